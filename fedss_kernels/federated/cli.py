"""The command line: `fedss run`, `compare`, `bench`, `doctor`.

A user's mistake is one line on stderr and exit code 2. The options of a run are generated from Config.
Nothing here imports matplotlib or rich before a command that needs them runs, so the command line can say
what is missing.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch

from .. import doctor
from .checkpoint import CheckpointError
from .class_store import check_free
from .config import (
    OWN,
    PRESETS,
    STICKY,
    Config,
    ConfigError,
    did_you_mean,
    expectation,
    option_type,
    read_options,
)
from .interrupts import noticed
from .ledger import OUTCOMES
from .lock import InUse
from .models import MODELS
from .plan import LISTS, Plan, read_preset
from .rounds import Stopped, TooFewClients, check_data, load_data, run
from .run_folder import RUN_FILES, RoundMetrics, check_folder, make_folder, read_model
from .workers import WorkerLost, help_out, launched


class Mistake(Exception):
    """What the user should put right, in one line."""


@dataclass(frozen=True)
class Command:
    help: str
    needs: tuple[str, ...]  # modules beyond what the package itself requires
    add_arguments: Callable[[argparse.ArgumentParser], None]
    main: Callable[[argparse.Namespace], int]
    extra: str = "sim"  # that brings what it needs


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 (a run failed), 2 (a user's mistake), 130 (Ctrl-C)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = "fedss"
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


# ---- the commands ------------------------------------------------------------------------------------------


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="go on with the run that was stopped there, from its last checkpoint; its options are there too",
    )
    parser.add_argument("--profile", action="store_true", help="say where the time went")
    _add_config_file(parser)
    _add_options(parser)


_FINISHING = "fedss run: finishing this round; Ctrl-C again stops at once"


def _run(arguments: argparse.Namespace) -> int:
    from .progress import RunProgress
    from .report import Run, percent, write_run_report

    resume = arguments.resume is not None
    with _mistakes():
        if resume:
            if "out" in arguments:
                raise Mistake("--out: a run is resumed in its own folder, that of --resume")
            arguments.config = arguments.config or arguments.resume / "config.json"
            arguments.out = arguments.resume
        config = _config(arguments)
        out = config.out or Path("runs") / f"{config.data}-{config.method}-seed{config.seed}"
        config = dataclasses.replace(config, out=out)
        data = load_data(config)
        check_data(config, data)
        rank, processes = launched()
        if rank > 0:
            help_out(config, data, rank, processes)
            return 0
        if not resume:
            check_folder(out, RUN_FILES, overwrite=config.overwrite)
            if config.class_store:
                check_free(config.class_store, run=out, overwrite=config.overwrite)
    played: list[RoundMetrics] = []
    logging.getLogger("fedss_kernels").addHandler(logging.NullHandler())  # what is left out is counted below
    try:
        with RunProgress([config.method], config.rounds) as progress, noticed(_FINISHING) as stop:

            def show(metrics: RoundMetrics) -> None:
                played.append(metrics)
                progress.advance(0, metrics)

            result = run(
                config,
                data=data,
                on_round=show,
                resume=resume,
                stop=stop,
            )
    except ConfigError as error:
        raise Mistake(f"{_flag(error.option)}: {error.message}") from None
    except (CheckpointError, FileExistsError, InUse) as error:
        raise Mistake(str(error)) from None
    except (TooFewClients, WorkerLost) as error:
        print(f"fedss run: {error}; what was done is in {out}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        done = f"stopped after round {stopped.rounds} of {config.rounds}"
        print(f"fedss run: {done}; go on with: fedss run --resume {out}", file=sys.stderr)
        return 130
    write_run_report(out, Run(result.config, result.history, result.summary))
    s = result.summary
    outcomes = {outcome: getattr(s, outcome) for outcome in OUTCOMES}
    if outcomes["accepted"] < sum(outcomes.values()):
        counts = ", ".join(f"{n:,} {outcome}" for outcome, n in outcomes.items())
        print(f"of {sum(outcomes.values()):,} clients drawn {counts}: {out / 'ledger.csv'}")
    if arguments.profile:
        _print_profile(result.seconds, len(played))
    accuracy = f"MAP@10 {percent(s.map_at_10)}, recall@1 {percent(s.recall_at_1)}"
    if s.task == "classification":
        accuracy = f"top-1 {percent(s.top1)}, {accuracy}"
    print(f"{accuracy}, {s.traffic.total / 1e6:,.1f} MB moved: {out / 'report.html'}")
    return 0


def _add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--methods",
        type=_names,
        metavar="NAMES",
        help="the methods, with commas between (default: fedss,full_softmax,pos_only,neg_only)",
    )
    _add_comparison_arguments(parser)


def _add_compositions_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(methods=["fedss", "neg_only"], equal_pushes=True)
    _add_comparison_arguments(parser, without=("equal_pushes",))


def _add_comparison_arguments(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="methods, numbers and options from a preset of this name, or from a file like one",
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="go on with the comparison that was stopped there; its options are there too",
    )
    _add_config_file(parser)
    parser.add_argument(
        "--seeds",
        type=_numbers,
        metavar="INTS",
        help="the seeds, with commas between; every method is run with each (default: 0,1,2)",
    )
    parser.add_argument(
        "--counts",
        type=_numbers,
        metavar="INTS",
        help="numbers of negatives, with commas between; methods that ask for some are run with each "
        "(default: --num-negatives)",
    )
    parser.add_argument(
        "--rates",
        type=_rates,
        metavar="NUMBERS",
        help="values of --client-lr, with commas between: the best for each method and number of "
        "negatives is found first, on a tenth of the training clients (default: --client-lr for all)",
    )
    parser.add_argument(
        "--jobs",
        type=_reader(int, "an integer of at least 1", low=1),
        default=os.cpu_count() or 1,
        metavar="INT",
        help="runs at a time, each in a process of its own (default: the number of cores)",
    )
    _add_options(parser, without=("method", "seed", *without))


def _refuse_others(arguments: argparse.Namespace) -> None:
    """A comparison is resumed as it was; only the number of jobs may be another."""
    given = vars(arguments)
    options = [field.name for field in dataclasses.fields(Config) if field.name in given]
    options += [name for name in ("preset", "config", *LISTS) if given.get(name) is not None]
    if options:
        raise Mistake(f"{_flag(options[0])}: a comparison is resumed with the options it began with")


_COMPARED: dict[str, Any] = {
    "methods": ["fedss", "full_softmax", "pos_only", "neg_only"],
    "seeds": [0, 1, 2],
    "counts": [],
    "rates": [],
}


def _compare(arguments: argparse.Namespace) -> int:
    from .compare import COMPARISON_FILES, cells, compare, header, job_name, trial_name
    from .progress import RunProgress

    resume = arguments.resume is not None
    with _mistakes():
        if resume:
            _refuse_others(arguments)
            there = Plan.read(arguments.resume)
            plan = dataclasses.replace(there, config=dataclasses.replace(there.config, out=arguments.resume))
        else:
            preset = read_preset(arguments.preset) if arguments.preset else {}
            given = {name: getattr(arguments, name) for name in LISTS}
            lists = _COMPARED | preset | {name: value for name, value in given.items() if value is not None}
            plan = Plan(_config(arguments, preset.get("config", {})), *(lists[name] for name in LISTS))
        out = plan.config.out or Path("runs") / f"{arguments.command}-{plan.config.data}"
        check_data(plan.config, load_data(plan.config))
        if not resume:
            check_folder(out, COMPARISON_FILES, overwrite=plan.config.overwrite)
    names = [trial_name(plan, trial) for trial in plan.trials(out)]
    names += [job_name(plan, run) for run in plan.runs(out, {})]
    with RunProgress(names, plan.config.rounds) as progress:

        def show(first: int) -> Callable[[int, RoundMetrics | None], None]:
            return lambda job, m: progress.advance(first + job, m) if m else progress.start(first + job)

        comparison = compare(
            plan,
            out,
            jobs=arguments.jobs,
            on_trial=show(0),
            on_round=show(len(plan.trials(out))),
            resume=resume,
        )
    for line in comparison.failed:
        print(f"fedss {arguments.command}: {line}", file=sys.stderr)
    if comparison.table:
        _print_table(header(comparison.table), [cells(line) for line in comparison.table])
        print(f"the table, plots and report: {out / 'report.html'}")
    return 1 if comparison.failed else 0


def _add_noise_arguments(parser: argparse.ArgumentParser) -> None:
    count = _reader(int, "an integer of at least 1", low=1)
    parser.add_argument(
        "--counts",
        type=_counts,
        metavar="INTS",
        help="numbers of negatives, with commas between (default: seven, doubling, up to all the classes)",
    )
    parser.add_argument(
        "--batches", type=count, default=16, metavar="INT", help="batches, of a client each (default: 16)"
    )
    parser.add_argument(
        "--draws", type=count, default=4, metavar="INT", help="draws of negatives for each (default: 4)"
    )
    parser.add_argument(
        "--run",
        type=Path,
        metavar="FOLDER",
        help="measure the model of this finished run, on its data (default: a new one)",
    )
    _add_config_file(parser)
    _add_options(parser)


def _noise(arguments: argparse.Namespace) -> int:
    from . import noise

    with _mistakes():
        if arguments.run:
            arguments.config = arguments.config or arguments.run / "config.json"
        config = _config(arguments)
        out = arguments.out if "out" in arguments else Path("runs") / f"noise-{config.data}"
        data = load_data(config)
        model = None
        if arguments.run:
            model = read_model(arguments.run)
        counts = arguments.counts or noise.default_counts(data.num_classes)
        make_folder(out)
    torch.set_num_threads(config.threads)
    lines = noise.measure(
        config,
        data,
        counts,
        batches=arguments.batches,
        draws=arguments.draws,
        model=model,
        on_line=lambda line: print(f"fedss noise: {line.num_negatives} negatives", file=sys.stderr),
    )
    print(noise.write(out, lines, data.num_classes), end="")
    print(f"the table, the plot and the report: {out / 'report.html'}")
    return 0


def _add_confusion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs")
    number = _reader(int, "an integer of at least 0", low=0)
    parser.add_argument("--client", type=number, default=0, metavar="INT", help="default: 0")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/confusion"), metavar="PATH", help="default: runs/confusion"
    )


def _confusion(arguments: argparse.Namespace) -> int:
    from . import confusion

    found = []
    with _mistakes():
        for folder in arguments.runs:
            config, model = Config.from_dict(read_options(folder / "config.json")), read_model(folder)
            found.append(confusion.measure(config, load_data(config), model, arguments.client))
        make_folder(arguments.out)
    print(confusion.write(arguments.out, found, arguments.client), end="")
    print(f"the table, the plot and the report: {arguments.out / 'report.html'}")
    return 0


def _add_privacy_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clients",
        type=_reader(int, "an integer of at least 1", low=1),
        default=100,
        metavar="INT",
        help="clients whose requests are looked at (default: 100)",
    )
    parser.add_argument(
        "--train", action="store_true", help="train with each kind of negatives too, for what it costs"
    )
    _add_config_file(parser)
    _add_options(parser, without=("negatives",))


def _privacy(arguments: argparse.Namespace) -> int:
    from . import privacy
    from .progress import RunProgress

    with _mistakes():
        config = _config(arguments)
        out = config.out or Path("runs") / f"privacy-{config.data}"
        config = dataclasses.replace(config, out=None)
        data = load_data(config)
        check_data(config, data)
        make_folder(out)
    accuracy = {}
    if arguments.train:
        with RunProgress(list(STICKY), config.rounds) as progress:
            for job, negatives in enumerate(STICKY):
                progress.start(job)
                result = run(
                    dataclasses.replace(config, negatives=negatives),
                    data=data,
                    on_round=functools.partial(progress.advance, job),
                )
                accuracy[negatives] = result.summary.top1, result.summary.map_at_10
    lines = privacy.measure(config, data, clients=arguments.clients, accuracy=accuracy)
    print(privacy.write(out, lines), end="")
    print(f"the table, the plot and the report: {out / 'report.html'}")
    return 0


def _add_parameters_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=_one_of(*MODELS),
        default="mobilenet_v3_large",
        metavar="NAME",
        help=f"one of {', '.join(MODELS)} (default: mobilenet_v3_large, the paper's)",
    )
    parser.add_argument(
        "--dims", type=_counts, default=[64, 1280], metavar="INTS", help="embedding sizes (default: 64,1280)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/parameters"), metavar="PATH", help="default: runs/parameters"
    )


def _parameters(arguments: argparse.Namespace) -> int:
    from . import parameters

    with _mistakes():
        lines = parameters.measure(arguments.model, arguments.dims)
        make_folder(arguments.out)
    print(parameters.write(arguments.out, arguments.model, lines), end="")
    print(f"the table, the plot and the report: {arguments.out / 'report.html'}")
    return 0


def _add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "subject",
        nargs="?",
        type=_one_of("loss", "aggregator", "all"),
        default="all",
        metavar="SUBJECT",
        help="loss, aggregator or all (default: all)",
    )
    parser.add_argument("--quick", action="store_true", help="a few shapes, in under a minute")
    parser.add_argument(
        "--shapes",
        type=_shapes,
        metavar="SHAPES",
        help="these shapes instead, with commas between: BxSxDxC of the loss, MxDxC of the aggregator",
    )
    parser.add_argument(
        "--contenders",
        type=_names,
        metavar="NAMES",
        help="these alone, with commas between: ours, eager, ... as in the CSV (default: all)",
    )
    parser.add_argument(
        "--seconds",
        type=_reader(float, "a number of at least 0.001 and at most 3600", low=0.001, high=3600),
        metavar="NUMBER",
        help="for timing each contender at each shape (default: 0.15, or 0.1 with --quick)",
    )
    parser.add_argument(
        "--threads",
        type=_reader(int, "an integer of at least 1 and at most 1024", low=1, high=1024),
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
    from ..bench.report import Plan
    from ..bench.results import Mismatch
    from ..bench.run import bench, select

    def progress(line: str) -> None:
        print(f"fedss bench: {line}", file=sys.stderr)

    seconds = arguments.seconds or (0.1 if arguments.quick else 0.15)
    plan = Plan(arguments.quick, arguments.shapes, arguments.contenders, seconds, progress)
    with _mistakes():
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
    findings = doctor.examine()
    print(json.dumps(findings, indent=2) if arguments.json else doctor.listing(findings))
    return 0


COMMANDS: dict[str, Command] = {
    "run": Command("train with one method", ("matplotlib", "rich", "safetensors"), _add_run_arguments, _run),
    "compare": Command(
        "run several methods and seeds, and compare them",
        ("matplotlib", "rich", "safetensors"),
        _add_compare_arguments,
        _compare,
    ),
    "compositions": Command(
        "compare FedSS with NegOnly on as many pushing classes",
        ("matplotlib", "rich", "safetensors"),
        _add_compositions_arguments,
        _compare,
    ),
    "noise": Command(
        "measure how far FedSS' gradient is from FullSoftmax'", ("matplotlib",), _add_noise_arguments, _noise
    ),
    "confusion": Command(
        "show what runs take a client's images for, among its own classes",
        ("matplotlib",),
        _add_confusion_arguments,
        _confusion,
    ),
    "privacy": Command(
        "measure what a server learns from a client's requests",
        ("matplotlib", "rich"),
        _add_privacy_arguments,
        _privacy,
    ),
    "parameters": Command(
        "say what share of a model its class matrix is, and what FedSS saves",
        ("matplotlib",),
        _add_parameters_arguments,
        _parameters,
        extra="sim,vision",
    ),
    "bench": Command(
        "time the loss and the aggregator beside what one would use instead",
        ("matplotlib", "rich", "pytest", "pytest_benchmark"),
        _add_bench_arguments,
        _bench,
        extra="bench",
    ),
    "doctor": Command("say what is installed here and what will run", (), _add_doctor_arguments, _doctor),
}


# ---- options, generated from Config ------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Mistake(message.removeprefix("argument "))


def _parse(name: str, command: Command, argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog=name, description=command.help, allow_abbrev=False)
    command.add_arguments(parser)
    arguments, unknown = parser.parse_known_args(argv)
    arguments.command = name.removeprefix("fedss ")
    if unknown:
        given = unknown[0].split("=")[0]
        if not given.startswith("-"):
            raise Mistake(f"unexpected argument {given!r}")
        raise Mistake(f"no such option {given}{did_you_mean(given, list(parser._option_string_actions))}")
    return arguments


def _add_config_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="take the options from this file, a run's config.json; those on the command line win",
    )


def _add_options(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """An option for each field of Config. What isn't given is left to Config: one place for the defaults."""
    for field in dataclasses.fields(Config):
        if field.name in without:
            continue
        kind, _ = option_type(field.name)
        settings: dict[str, Any] = {
            "dest": field.name,
            "default": argparse.SUPPRESS,
            "help": f"{_help(field)} (default: {_default(field)})".replace("%", "%%"),
        }
        if kind is bool:
            settings["action"] = "store_true"
        else:
            settings |= {"type": _reader(kind, expectation(field)), "metavar": _METAVARS[kind]}
        parser.add_argument(_flag(field.name), **settings)


_METAVARS = {int: "INT", float: "NUMBER", str: "NAME", Path: "PATH"}


def _flag(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def _help(field: dataclasses.Field) -> str:
    choices = field.metadata["choices"]
    if choices is None or all(choice in field.metadata["help"] for choice in choices()):
        return field.metadata["help"]
    return f"{field.metadata['help']}: {', '.join(choice for choice in choices() if choice != OWN)}"


def _default(field: dataclasses.Field) -> str:
    if field.name in PRESETS[OWN]:
        return _by_data_set(
            {name: str(preset[field.name]) for name, preset in PRESETS.items() if name != OWN}
        )
    if isinstance(field.default, bool):
        return "yes" if field.default else "no"
    return "none" if field.default is None else str(field.default)


def _by_data_set(values: dict[str, str]) -> str:
    """ "1 for a; 2 for b, c; else 0": the value that most have comes last."""
    having: dict[str, list[str]] = {}
    for name, value in values.items():
        having.setdefault(value, []).append(name)
    most = max(having, key=lambda value: len(having[value]))
    others = [f"{value} for {', '.join(names)}" for value, names in having.items() if value != most]
    return "; ".join([*others, f"else {most}"]) if others else most


def _reader(
    kind: type, expected: str, low: float | None = None, high: float | None = None
) -> Callable[[str], Any]:
    """Text -> kind, for argparse. Bounds are Config's to check, but for the options that aren't Config's."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return read


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    return [
        _reader(int, "integers of at least 0 with commas between", low=0)(number)
        for number in text.split(",")
    ]


def _counts(text: str) -> list[int]:
    read = _reader(int, "integers of at least 1 with commas between", low=1)
    return [read(number) for number in text.split(",")]


def _rates(text: str) -> list[float]:
    read = _reader(float, "numbers greater than 0 with commas between", low=1e-300)
    return [read(number) for number in text.split(",")]


def _shapes(text: str) -> list[tuple[int, ...]]:
    read = _reader(int, "sizes of at least 1 with x between, as in 32x100x64x11318", low=1)
    shapes = [tuple(read(size) for size in shape.split("x")) for shape in _names(text)]
    if not shapes:
        raise argparse.ArgumentTypeError(f"expected at least one shape, got {text!r}")
    return shapes


def _one_of(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(choices)}, got {text!r}")
        return text

    return read


def _config(arguments: argparse.Namespace, preset: Mapping[str, Any] | None = None) -> Config:
    """Config's defaults, a preset, the --config file, the command line: the later win."""
    options = dict(preset or {}) | (read_options(arguments.config) if arguments.config else {})
    names = [field.name for field in dataclasses.fields(Config)]
    config = Config.from_dict(
        options | {name: value for name, value in vars(arguments).items() if name in names}
    )
    for name in ("data", "model"):
        if getattr(config, name) == OWN:
            raise ConfigError(name, f"{OWN!r} {name} is handed over in Python, as run(config, {name}=...)")
    return config


# ---- what the user sees ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _mistakes() -> Iterator[None]:
    """Wraps what reads and checks the user's choices, and nothing else: there, an error is a mistake."""
    try:
        yield
    except ConfigError as error:
        raise Mistake(f"{_flag(error.option)}: {error.message}") from None
    except (ValueError, OSError) as error:
        raise Mistake(" ".join(str(error).split())) from None


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


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for i, title in enumerate(header):
        table.add_column(title, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    # Off a terminal rich would squeeze the table into 80 columns; a file or a log takes it as wide as it is.
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


def _print_profile(seconds: Mapping[str, float], rounds: int) -> None:
    total = sum(seconds.values())
    rows = [
        [stage, f"{spent:.2f}", f"{100 * spent / total:.1f}%", f"{1000 * spent / rounds:.2f}"]
        for stage, spent in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    _print_table(["stage", "seconds", "share", "ms a round"], rows)


def _version() -> str:
    try:
        return version("fedss-kernels")
    except PackageNotFoundError:
        return "(not installed)"
