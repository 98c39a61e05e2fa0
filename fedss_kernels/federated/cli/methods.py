"""`fedss methods`: what there is to train with."""

import argparse
import dataclasses
import textwrap

from ..algorithms import METHODS as _METHODS
from ..algorithms import Method
from ..algorithms.own_numbers import in_words
from ..config import Config
from ..reports.parts_in_words import place
from .command import Command
from .options import default_of, flag, help_of

WIDTH = 100


def _add_methods_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def _methods(arguments: argparse.Namespace) -> int:
    for method in _METHODS.values():
        print(f"{method.name} ({method.label}): {method.paper or 'of no paper'}")
        print(_indented(method.summary))
        found = place(method)
        print(_indented(f"net: {found.net}; class rows: {found.rows}; what moves: {found.moves}"))
        _print_own(method)
        print()
    print("fedss run --help explains the options of all.")
    return 0


def _print_own(method: Method) -> None:
    """The options that not every method reads, each with its default."""
    if method.options:
        print("  of its own:")
    for field in dataclasses.fields(Config):
        if field.name == "settings" and method.settings:
            print(_indented(f"{flag(field.name)}: {in_words(method.settings)}", 4, 6))
        elif field.name in method.options:
            words = help_of(field).removeprefix(f"of {method.name}: ").removeprefix(f"{method.name} ")
            print(_indented(f"{flag(field.name)}: {words} (default: {default_of(field)})", 4, 6))


def _indented(words: str, first: int = 2, others: int = 2) -> str:
    return textwrap.fill(words, WIDTH, initial_indent=" " * first, subsequent_indent=" " * others)


METHODS = Command(
    "list the methods, each with its paper, what moves, and its options",
    (),
    _add_methods_arguments,
    _methods,
)
