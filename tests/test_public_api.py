"""What users may rely on, by name and signature, is what tests/public_api.txt has: so a change is seen.

`python tests/test_public_api.py` writes the file anew, after a change that is meant.
"""

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

LISTING = Path(__file__).parent / "public_api.txt"
MOST = 120  # characters of a signature in one line
PLACES = ("fedss_kernels", "fedss_kernels.federated", "fedss_kernels.federated.flower")


def listing() -> str:
    """A line for each name: `module.name(signature)`, and for each public method of a class."""
    return "".join(f"{line}\n" for place in PLACES for line in _of(place))


def _of(place: str) -> Iterator[str]:
    module = importlib.import_module(place)
    for name in sorted(module.__all__):
        found = getattr(module, name)
        yield f"{place}.{name}{_signature(found)}"
        if inspect.isclass(found):
            for member, value in inspect.getmembers(found, _is_ours):
                if not member.startswith("_"):
                    yield f"{place}.{name}.{member}{'' if isinstance(value, property) else _signature(value)}"


def _is_ours(member: object) -> bool:
    """Not torch's, and no field's default."""
    of = member.fget if isinstance(member, property) else member
    return inspect.isroutine(of) and str(getattr(of, "__module__", "")).startswith("fedss_kernels")


def _signature(found: object) -> str:
    """Of an exception none: it is made here and caught there."""
    if inspect.isclass(found) and issubclass(found, BaseException):
        return ""
    assert callable(found)
    signature = inspect.signature(found)
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()
    ]
    text = str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
    if len(text) < MOST:
        return text
    return "".join(["(", *(f"\n    {parameter}" for parameter in parameters), "\n)"])


def test_names_and_signatures_are_those_that_were_promised():
    assert listing() == LISTING.read_text(encoding="utf-8")


if __name__ == "__main__":
    LISTING.write_text(listing(), encoding="utf-8")
