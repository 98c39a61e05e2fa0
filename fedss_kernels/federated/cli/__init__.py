"""The command line: `fedss run`, `compare`, `bench`, `doctor` and the others in COMMANDS.

A user's mistake is one line on stderr and exit code 2. The options of a run are generated from Config.
Nothing here imports matplotlib or rich before a command that needs them runs, so the command line can say
what is missing.
"""

import argparse
import importlib.util
import io
import logging
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from ..config import did_you_mean
from .command import Command
from .measure import CONFUSION, NOISE, PARAMETERS, PRIVACY
from .options import Mistake, Parser
from .tools import BENCH, DOCTOR
from .train import COMPARE, COMPOSITIONS, RUN


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    0; 1, a run failed, has no result, or is missing in a comparison (a rate that does not train while another
    does is none); 2, a user's mistake; 130, Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = "fedss"
    logging.getLogger("fedss_kernels").addHandler(logging.NullHandler())  # it is said otherwise, and counted
    for stream in (sys.stdout, sys.stderr):  # what an encoding lacks becomes ?, not a traceback
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        if argv[:1] in (["-h"], ["--help"]):
            print(_overview())
            return 0
        if argv[:1] == ["--version"]:
            print(f"fedss-kernels {_version()}")
            return 0
        command = _command(argv)
        name = f"fedss {argv[0]}"
        arguments = _parse(name, command, argv[1:])
        _require(name, command)
        return command.main(arguments)
    except Mistake as mistake:
        print(mistake if str(mistake).startswith("fedss") else f"{name}: {mistake}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return 130


COMMANDS: dict[str, Command] = {
    "run": RUN,
    "compare": COMPARE,
    "compositions": COMPOSITIONS,
    "noise": NOISE,
    "confusion": CONFUSION,
    "privacy": PRIVACY,
    "parameters": PARAMETERS,
    "bench": BENCH,
    "doctor": DOCTOR,
}


def _parse(name: str, command: Command, argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=name, description=command.help, allow_abbrev=False)
    command.add_arguments(parser)
    arguments, unknown = parser.parse_known_args(argv)
    arguments.command = name.removeprefix("fedss ")
    if unknown:
        given = unknown[0].split("=")[0]
        if not given.startswith("-"):
            raise Mistake(f"unexpected argument {given!r}")
        raise Mistake(f"no such option {given}{did_you_mean(given, list(parser._option_string_actions))}")
    return arguments


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
