"""Matplotlib as it comes: neither MPLBACKEND nor a matplotlibrc decides whether and how there is a plot."""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from types import ModuleType


@contextlib.contextmanager
def plotting() -> Iterator[None]:
    """Figures are made and saved in here, with matplotlib's own settings; the user's are put back after."""
    matplotlib = import_matplotlib()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def as_it_is(name: str) -> str:
    """What users call something, for a text of a figure, where "$" would begin a formula.

    Of labels that begin with "_" legends have none, so a space of no width stands before it.
    """
    name = name.replace("$", r"\$")
    return f"\u200b{name}" if name.startswith("_") else name


def import_matplotlib() -> ModuleType:
    """The module, also where MPLBACKEND names a backend that is not here, with which it can't be imported.

    A notebook's kernel sets it, and what is started from the notebook inherits it. Figures are saved without
    a backend; a good one is set all the same, for plots of the caller's own.
    """
    if "matplotlib" in sys.modules or "MPLBACKEND" not in os.environ:
        return importlib.import_module("matplotlib")
    backend = os.environ.pop("MPLBACKEND")
    try:
        matplotlib = importlib.import_module("matplotlib")
    finally:
        os.environ["MPLBACKEND"] = backend
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = backend
    return matplotlib
