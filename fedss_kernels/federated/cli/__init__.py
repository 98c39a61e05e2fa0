"""The command line: `fedss run`, `compare`, `bench`, `doctor` and the others in COMMANDS.

A user's mistake is one line on stderr and exit code 2. The options of a run are generated from Config.
Nothing here imports matplotlib or rich before a command that needs them runs, so the command line can say
what is missing.
"""

import argparse
import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import data, models
from ..config import did_you_mean
from ..disk import reason
from ..given_back import give_back
from ..interrupts import Interrupted, at_once
from ..plugins import FILES, load_plugins
from ..workers import launched
from .command import Command
from .costs import COSTS
from .flower import FLOWER
from .inversion import HARDEN, INVERT
from .measure import CONFUSION, NOISE, PARAMETERS, PRIVACY
from .methods import METHODS
from .options import Mistake, Parser, mistakes, refuse, wrong_beside
from .output import say_what_is_logged
from .personalise import PERSONALISE
from .probe import PROBE
from .report import REPORT
from .streams import forgiving
from .tools import BENCH, DOCTOR
from .train import COMPARE, COMPOSITIONS, RUN


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    0; 1, a run failed, has no result, or is missing in a comparison (a rate that does not train while another
    does is none), or something could not be written; 2, a user's mistake; 130, 143, 129, stopped by Ctrl-C,
    SIGTERM, SIGHUP.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    give_back()
    with forgiving() as streams, at_once():
        code = _main(argv)
        for stream in streams:
            stream.flush()
        if lost := next((stream.lost for stream in streams if stream.lost), ""):
            print(f"{_name(argv)}: its output could not be written: {lost}", file=sys.stderr)
            code = code or 1
    return code


def _main(argv: list[str]) -> int:
    name = "fedss"
    logging.getLogger("fedss_kernels").addHandler(logging.NullHandler())  # it is said otherwise, and counted
    try:
        if argv[:1] in (["-h"], ["--help"]):
            print(_overview())
            return 0
        if argv[:1] == ["--version"]:
            print(f"fedss-kernels {_version()}")
            return 0
        command = _command(argv)
        name = _name(argv)
        arguments = _parse(name, command, argv[1:])
        _require(name, command)
        if launched()[0] == 0:  # of many processes one speaks
            say_what_is_logged(arguments.command, data, models)
        return command.main(arguments)
    except Mistake as mistake:
        print(mistake if str(mistake).startswith("fedss") else f"{name}: {mistake}", file=sys.stderr)
        return 2
    except OSError as error:  # the system's, in the middle: a full disk, a folder that is gone
        print(f"{name}: {reason(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        print(f"{name}: stopped", file=sys.stderr)
        return stopped.exit_code if isinstance(stopped, Interrupted) else Interrupted().exit_code


COMMANDS: dict[str, Command] = {
    "run": RUN,
    "compare": COMPARE,
    "compositions": COMPOSITIONS,
    "noise": NOISE,
    "confusion": CONFUSION,
    "personalise": PERSONALISE,
    "probe": PROBE,
    "privacy": PRIVACY,
    "parameters": PARAMETERS,
    "costs": COSTS,
    "invert": INVERT,
    "harden": HARDEN,
    "report": REPORT,
    "flower": FLOWER,
    "methods": METHODS,
    "bench": BENCH,
    "doctor": DOCTOR,
}


def _name(argv: Sequence[str]) -> str:
    return " ".join(["fedss", *argv[:1]])


def _parse(name: str, command: Command, argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=name, description=command.help, allow_abbrev=False)
    if command.plugins:
        _import_plugins(argv)
        _add_plugin(parser)
    command.add_arguments(parser)
    places = [
        f"{action.metavar or action.dest}{' ...' * (action.nargs == '+')}"
        for action in parser._actions
        if not action.option_strings
    ]
    parser.usage = " ".join([name, *places, "[OPTIONS]"])  # these are dozens
    arguments, unknown = parser.parse_known_args(argv)
    arguments.command = name.removeprefix("fedss ")
    if wrong := [*parser.wrong, *_unknown(unknown, list(parser._option_string_actions))]:
        refuse([*wrong, *wrong_beside(arguments, parser.unread)])
    return arguments


def _add_plugin(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plugin",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="import this file, which registers a method of one's own; may be given several times. "
        f"{FILES} in the environment does the same (default: none)",
    )


def _import_plugins(argv: Sequence[str]) -> None:
    """Before the other options are looked at, as what they may be depends on the methods that there are."""
    first = Parser(add_help=False, allow_abbrev=False)
    _add_plugin(first)
    with mistakes():
        load_plugins(first.parse_known_args(argv)[0].plugin)


def _unknown(arguments: Sequence[str], options: Sequence[str]) -> Iterator[str]:
    """A line for each option that there is not, whose value goes with it, and each argument too many."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        given = argument.split("=")[0]
        if given.startswith("-"):
            yield f"no such option {given}{did_you_mean(given, options)}"
        elif "=" in before or not before.startswith("-"):
            yield f"unexpected argument {given!r}"


def _command(argv: Sequence[str]) -> Command:
    names = ", ".join(COMMANDS)
    if not argv:
        raise Mistake(f"expected a command: {names}; fedss --help explains them")
    if argv[0] not in COMMANDS:
        raise Mistake(
            f"no such command {argv[0]!r}{did_you_mean(argv[0], list(COMMANDS))}: expected one of {names}"
        )
    return COMMANDS[argv[0]]


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fedss COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "fedss COMMAND --help explains a command's options.",
        ]
    )


def _require(name: str, command: Command) -> None:
    missing = [module for module in command.needs if importlib.util.find_spec(module) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        words = ", ".join(missing[:-1]) + " and " * (len(missing) > 1) + missing[-1]
        raise Mistake(
            f'{name} needs {words}, which {verb} not installed: pip install "fedss-kernels[{command.extra}]"'
        )


def _version() -> str:
    try:
        return version("fedss-kernels")
    except PackageNotFoundError:
        return "(not installed)"
