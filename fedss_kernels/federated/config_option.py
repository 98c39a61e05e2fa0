"""One option of a configuration: its default, its bounds, its help, and what its value may be."""

import dataclasses
import math
import reprlib
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .config_error import FROM_OUTSIDE, ConfigError, did_you_mean

LARGEST = 3e38  # that float32 holds, about


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,  # the least value allowed
    above: float | None = None,  # the value must be greater than this
    below: float | None = None,  # the value must be less than this
    choices: Callable[[], Sequence[str]] | None = None,
    chosen: Callable[[str], str] = str,  # what of a value is one of them
    saved: bool = True,
    hashed: bool = True,
) -> Any:
    """A field of Config: its default, its help, and what it may be."""
    bounds = {"low": low, "above": above, "below": below, "choices": choices, "chosen": chosen}
    metadata = {"help": help, "saved": saved, **bounds}
    return dataclasses.field(default=default, hash=None if hashed else False, metadata=metadata)


def option_type(field: dataclasses.Field) -> tuple[type, bool]:
    """(type, whether None is allowed) of an option, from its annotation, which is no text."""
    hint: Any = field.type
    if not isinstance(hint, types.UnionType):
        return hint, False
    return typing.get_args(hint)[0], True


def checked(field: dataclasses.Field, value: Any) -> Any:
    """`value` as the field's type. Raises ConfigError for one of another type, or out of range."""
    kind, optional = option_type(field)
    if value is None and optional:
        return None
    if isinstance(value, np.generic):
        value = value.item()
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    if kind is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if type(value) is not kind:
        kind_of_it = "" if value is None else f" of type {type(value).__name__}"
        got = f"{reprlib.repr(value)}{kind_of_it}"
        raise ConfigError(field.name, f"expected {expectation(field)}, got {got}")
    finite = not isinstance(value, float) or abs(value) < LARGEST
    if not finite or not _in_bounds(field, value):
        held = "; float32 holds 3e38" if isinstance(value, float) and LARGEST <= abs(value) < math.inf else ""
        nearest = _nearest(field, value)
        raise ConfigError(field.name, f"expected {expectation(field)}, got {value!r}{nearest}{held}")
    return value


def _in_bounds(field: dataclasses.Field, value: Any) -> bool:
    low, above, below, choices = (field.metadata[name] for name in ("low", "above", "below", "choices"))
    return (
        (low is None or value >= low)
        and (above is None or value > above)
        and (below is None or value < below)
        and (choices is None or field.metadata["chosen"](value) in choices())
    )


def expectation(field: dataclasses.Field) -> str:
    """What a field may be, in words: "an integer of at least 1"."""
    kind, _ = option_type(field)
    low, above, below, choices = (field.metadata[name] for name in ("low", "above", "below", "choices"))
    if choices is not None:
        return f"one of {', '.join(choices())}"
    words = {int: "an integer", float: "a finite number", bool: "true or false", Path: "a path"}.get(
        kind, "text"
    )
    bounds = [("of at least", low), ("greater than", above), ("less than", below)]
    limits = " and ".join(f"{text} {bound}" for text, bound in bounds if bound is not None)
    return f"{words} {limits}".rstrip()


def _nearest(field: dataclasses.Field, value: Any) -> str:
    choices = field.metadata["choices"]
    near = did_you_mean(value, choices()) if choices is not None and isinstance(value, str) else ""
    return near + FROM_OUTSIDE * (field.name == "method")
