"""Which methods and which numbers of their own are known: those of the package, and those registered."""

import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from ..config_error import ConfigError, UnknownMethod, did_you_mean
from . import METHODS, settings_of_all


def check_known(method: Any, source: Path) -> None:
    """Raises UnknownMethod where a file's method is none that is known."""
    if isinstance(method, str) and method not in METHODS:
        words = f"was made with the method {method!r}, which is not known here"
        near = did_you_mean(method, list(METHODS))
        raise UnknownMethod(
            "method", f"{source} {words}{near}: --plugin FILE imports the file that defines it"
        )


def own_numbers(method: str, given: Any) -> dict[str, float]:
    """The method's, those that are given over its defaults, and given ones of other methods.

    Raises ConfigError.
    """
    known = settings_of_all()
    if not isinstance(given, Mapping | None):
        example = dict([*known.items()][:1]) or "{name: number}"
        raise ConfigError("settings", f"expected numbers by name, as {example}, got {reprlib.repr(given)}")
    for name in given or ():
        if name not in known:
            others = f", but {', '.join(known)}" if known else ""
            near = did_you_mean(str(name), list(known))
            raise ConfigError("settings", f"no method has {name}{near or others}")
    own = METHODS[method].settings if method in METHODS else {}
    return {name: _number(name, value) for name, value in {**own, **(given or {})}.items()}


def _number(name: str, value: object) -> float:
    if isinstance(value, np.generic):
        value = value.item()
    if not is_number(value):
        raise ConfigError("settings", f"{name}: expected a finite number, got {value!r}")
    return float(value)


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def in_words(numbers: Mapping[str, float]) -> str:
    """ "mu=0.1, nu=2"; "none"."""
    return ", ".join(f"{name}={number:g}" for name, number in numbers.items()) or "none"
