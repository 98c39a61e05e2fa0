"""`fedss methods`: what there is to train with."""

import argparse
import textwrap

from ..algorithms import METHODS as _METHODS
from .command import Command
from .options import flag

WIDTH = 100


def _add_methods_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def _methods(arguments: argparse.Namespace) -> int:
    for method in _METHODS.values():
        print(f"{method.name} ({method.label}): {method.paper}")
        print(textwrap.fill(method.summary, WIDTH, initial_indent="  ", subsequent_indent="  "))
        if method.options:
            print(f"  options of its own: {', '.join(map(flag, method.options))}")
    return 0


METHODS = Command(
    "list the methods, each with its paper and its options", (), _add_methods_arguments, _methods
)
