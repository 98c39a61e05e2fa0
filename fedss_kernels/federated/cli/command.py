"""What a command of `fedss` is."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from .options import Parser


@dataclass(frozen=True)
class Command:
    help: str
    needs: tuple[str, ...]  # modules beyond what the package itself requires
    add_arguments: Callable[[Parser], None]
    main: Callable[[argparse.Namespace], int]
    extra: str = "sim"  # that brings what it needs
    plugins: bool = True  # whether it reads a configuration or a run, which may be of a method of one's own
