"""`fedss flower new`: an app for a real federation."""

import argparse
from pathlib import Path

from ..flower.new_app import write_app
from .command import Command
from .options import Mistake, one_of


def _add_flower_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", type=one_of("new"), metavar="WHAT", help="new: write an app to start from")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where, a new or an empty one")


def _flower(arguments: argparse.Namespace) -> int:
    try:
        write_app(arguments.folder)
    except FileExistsError as error:
        raise Mistake(str(error)) from None
    print(f"an app for Flower, and how to run it: {arguments.folder / 'README.md'}")
    return 0


FLOWER = Command(
    "write an app for a real federation, over a network",
    (),
    _add_flower_arguments,
    _flower,
    extra="flower",
    plugins=False,
)
