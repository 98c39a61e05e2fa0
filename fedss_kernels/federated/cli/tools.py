"""`fedss bench` and `doctor`: of the kernels, the installation and the machine."""

import argparse
import json
import sys
from pathlib import Path

import torch

from ... import doctor
from ..files.run_folder import make_folder
from ..surroundings import surroundings
from .command import Command
from .options import mistakes, one_of, read_names, read_shapes, reader


def _add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "subject",
        nargs="?",
        type=one_of("loss", "aggregator", "libraries", "all"),
        default="all",
        metavar="SUBJECT",
        help="loss, aggregator, libraries or all (default: all)",
    )
    parser.add_argument("--quick", action="store_true", help="a few shapes, in under a minute")
    parser.add_argument(
        "--shapes",
        type=read_shapes,
        metavar="SHAPES",
        help="these shapes instead, with commas between: BxSxDxC of losses, MxDxC of the aggregator",
    )
    parser.add_argument(
        "--contenders",
        type=read_names,
        metavar="NAMES",
        help="these alone, with commas between: ours, eager, ... as in the CSV (default: all)",
    )
    parser.add_argument(
        "--seconds",
        type=reader(float, "a number of at least 0.001 and at most 3600", low=0.001, high=3600),
        metavar="NUMBER",
        help="for timing each contender at each shape (default: 0.15, or 0.1 with --quick)",
    )
    parser.add_argument(
        "--threads",
        type=reader(int, "an integer of at least 1 and at most 1024", low=1, high=1024),
        metavar="INT",
        help="threads of torch and of the kernels (default: torch's choice)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/bench"),
        metavar="PATH",
        help="folder for the tables (CSV, Markdown) and plots, replacing earlier ones (default: runs/bench)",
    )


def _bench(arguments: argparse.Namespace) -> int:
    from ...bench.report import Plan
    from ...bench.results import Mismatch
    from ...bench.run import bench, select

    def progress(line: str) -> None:
        print(f"fedss bench: {line}", file=sys.stderr)

    seconds = arguments.seconds or (0.1 if arguments.quick else 0.15)
    plan = Plan(arguments.quick, arguments.shapes, arguments.contenders, seconds, progress)
    with mistakes():
        reports = select(arguments.subject, plan)
        make_folder(arguments.out)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        bench(reports, plan, arguments.out)
    except Mismatch as wrong:
        print(f"fedss bench: wrong result, nothing is timed: {wrong}", file=sys.stderr)
        return 1
    print(f"the tables and plots: {arguments.out}")
    return 0


def _add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")


def _doctor(arguments: argparse.Namespace) -> int:
    findings = doctor.examine() | {"simulator": surroundings()}
    print(json.dumps(findings, indent=2) if arguments.json else doctor.listing(findings))
    return 0


BENCH = Command(
    "time the loss and the aggregator beside what one would use instead",
    ("matplotlib", "rich", "pytest", "pytest_benchmark"),
    _add_bench_arguments,
    _bench,
    extra="bench",
    plugins=False,
)


DOCTOR = Command(
    "say what is installed here and what will run", (), _add_doctor_arguments, _doctor, plugins=False
)
