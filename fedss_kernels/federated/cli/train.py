"""`fedss run`, and `compare` and `compositions`, which run several."""

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..clashes import storeless
from ..config import (
    Config,
    ConfigError,
)
from ..disk import reason
from ..fedavg_round import TooFewClients
from ..files import checkpoint, record, run_folder
from ..files.checkpoint import CheckpointError
from ..files.round_metrics import RoundMetrics
from ..files.run_folder import RUN_FILES, check_folder, faults, read_config
from ..interrupts import Interrupted, noticed
from ..ledger import OUTCOMES
from ..lock import InUse
from ..plan import FILE, LISTS, Plan, read_preset
from ..run_loop import Result, Stopped, run
from ..server.class_store import check_free
from ..server.inspection import explained
from ..to_paste import to_paste
from ..workers import WorkerLost, help_out, launched
from .command import Command
from .options import (
    Mistake,
    Parser,
    add_config_file,
    add_options,
    as_typed,
    config_of,
    flag,
    lists_of,
    mistakes,
    not_read,
    read_numbers,
    read_rates,
    reader,
    reader_of_list,
    reader_of_methods,
    refuse,
    refuse_lost,
    shared_of,
    wrong_beside,
)
from .output import print_profile, print_table, read_data, say_what_is_logged, show_tuned

if TYPE_CHECKING:
    from ..comparisons.compare import Comparison


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="go on with the run that was stopped there, from its last checkpoint, or to more --rounds with "
        "one that is finished; its options are there too",
    )
    parser.add_argument("--profile", action="store_true", help="say where the time went")
    add_config_file(parser)
    add_options(parser)


_FINISHING = "fedss run: finishing this round"


def _go_on(command: str, out: Path) -> str:
    return f"go on with: {to_paste(command, '--resume', out)}"


def _saved(out: Path) -> str:
    """What is safe of a run that ended early, and how to go on."""
    if (out / "summary.json").exists():
        report = to_paste("report", out)
        return f"the run is finished, and its results are in {out}; its report: {report}"
    if not checkpoint.exists(out):
        return "no round is saved yet: start again with --overwrite"
    return f"saved up to round {checkpoint.last_round(out)}; {_go_on('run', out)}"


def _asked(arguments: argparse.Namespace) -> tuple[Config, Path]:
    """The run that is asked for, and its folder. Raises Mistake for what cannot be."""
    resume = arguments.resume is not None
    if resume:
        if "out" in arguments:
            raise Mistake("--out: a run is resumed in its own folder, that of --resume")
        arguments.out = arguments.resume
        _from_everywhere(arguments)
    try:
        config = config_of(arguments, _options_of(arguments.resume) if resume else {})
    except ConfigError:
        refuse(wrong_beside(arguments))
        raise
    if resume:
        refuse_lost(arguments, config, store=config.class_store)
    refuse(not_read(arguments, [config.method]))
    out = config.out or Path("runs") / f"{config.data}-{config.method}-seed{config.seed}"
    return dataclasses.replace(config, out=out), out


def _from_everywhere(arguments: argparse.Namespace) -> None:
    """Places that a run goes on from now, so that whoever measures it later finds them from any folder."""
    for name in checkpoint.PLACES:
        if place := vars(arguments).get(name):
            setattr(arguments, name, place.absolute())


def _run(arguments: argparse.Namespace) -> int:
    from ..reports.progress import RunProgress

    resume = arguments.resume is not None
    with mistakes():
        config, out = _asked(arguments)
        rank, processes = launched()
        if rank > 0:
            help_out(*read_data(config, []), rank, processes)
            return 0

        def ready() -> None:
            if not resume:
                check_folder(out, RUN_FILES, overwrite=config.overwrite)
                if config.class_store:
                    check_free(config.class_store, run=out, overwrite=config.overwrite)

        config, data = read_data(config, [] if resume else [config], ready, arguments.given)
    played: list[RoundMetrics] = []
    say_what_is_logged("run", checkpoint, record, run_folder)
    try:
        with RunProgress([config.method], config.rounds) as progress, noticed(_FINISHING) as stop:

            def show(metrics: RoundMetrics) -> None:
                played.append(metrics)
                progress.advance(0, metrics)

            result = run(
                config,
                data=data,
                on_round=show,
                on_tuned=functools.partial(show_tuned, progress, 0),
                resume=resume,
                stop=stop,
            )
    except (ConfigError, CheckpointError, FileExistsError, InUse) as error:
        raise Mistake(as_typed(error)) from None
    except TooFewClients as error:
        print(f"fedss run: {error}; what was done is in {out}", file=sys.stderr)
        return 1
    except WorkerLost as error:
        print(f"fedss run: {error}; {_saved(out)}", file=sys.stderr)
        return 1
    except OSError as error:  # of the disk, in the middle of the run
        print(f"fedss run: {reason(error)}; {_saved(out)}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        done = f"stopped after round {stopped.rounds} of {config.rounds}"
        print(f"fedss run: {done}; {_go_on('run', out)}", file=sys.stderr)
        return stop.exit_code
    except Interrupted as interrupted:
        return _stopped(interrupted, _saved(out))
    if arguments.profile:
        print_profile(result.seconds, len(played))
    try:
        return _finished(result, out)
    except KeyboardInterrupt as interrupted:  # Ctrl-C's own: no round is going on that it could wait for
        return _stopped(interrupted, _saved(out))


def _stopped(interrupted: KeyboardInterrupt, saved: str) -> int:
    print(f"fedss run: stopped; {saved}", file=sys.stderr)
    return interrupted.exit_code if isinstance(interrupted, Interrupted) else Interrupted().exit_code


def _finished(result: Result, out: Path) -> int:
    """Makes the report, and says what came of the run; returns the exit code."""
    from ..reports.remarks import remarks
    from ..reports.report import attempt, write_run_report
    from ..reports.reported_run import Run

    failed = attempt(out, write_run_report, out, Run(result.config, result.history, result.summary))
    s = result.summary
    outcomes = {outcome: getattr(s, outcome) for outcome in OUTCOMES}
    if outcomes["accepted"] < sum(outcomes.values()):
        why = {"rejected": f" ({explained(faults(out))})"} if outcomes["rejected"] else {}
        counts = ", ".join(f"{n:,} {outcome}{why.get(outcome, '')}" for outcome, n in outcomes.items())
        print(f"of {sum(outcomes.values()):,} clients drawn {counts}: {out / 'ledger.csv'}")
    print(f"{s.told}, {s.traffic.total / 1e6:,.1f} MB moved: {out if failed else out / 'report.html'}")
    for line in (*failed, *remarks(s)):
        print(f"fedss run: {line}", file=sys.stderr)
    return 1 if failed or s.not_finite_since is not None else 0


def _options_of(folder: Path) -> dict[str, Any]:
    """Of the run in a folder. Raises Mistake where there is none."""
    if not (folder / "config.json").exists() and not checkpoint.exists(folder):
        raise Mistake(f"--resume: no run in {folder}")
    return read_config(folder)[0].to_dict()


def _add_compare_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--methods",
        type=reader_of_methods(parser),
        metavar="NAMES",
        help="the methods, with commas between; a preset's own by their names there, or as their folders are "
        "called: layer-wise-budget-6 (default: fedss,full_softmax,pos_only,neg_only)",
    )
    parser.set_defaults(own={})
    _add_comparison_arguments(parser)


def _add_compositions_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(own={"methods": ["fedss", "neg_only"], "equal_pushes": True})
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
    add_config_file(parser)
    parser.add_argument(
        "--seeds",
        type=reader_of_list("seeds", read_numbers),
        metavar="INTS",
        help="the seeds, with commas between; every method is run with each (default: 0,1,2)",
    )
    parser.add_argument(
        "--counts",
        type=reader_of_list("counts", read_numbers),
        metavar="INTS",
        help="numbers of negatives, with commas between; methods that ask for some are run with each "
        "(default: --num-negatives)",
    )
    parser.add_argument(
        "--rates",
        type=reader_of_list("rates", read_rates),
        metavar="NUMBERS",
        help="values of --client-lr, with commas between: the best for each method and number of "
        "negatives is found first, by what a run is judged by (top-1, MAP@10 of a retrieval, with "
        "--personalise-epochs the personalised top-1), on a tenth of the training clients, who do not train "
        "then; fedper and fedrep need --personalise-epochs for it (default: --client-lr for all)",
    )
    parser.add_argument(
        "--jobs",
        type=reader(int, "an integer of at least 1", low=1),
        default=os.cpu_count() or 1,
        metavar="INT",
        help="runs at a time, each in a process of its own (default: the number of cores)",
    )
    add_options(parser, without=("method", "seed", *without))


def _refuse_others(arguments: argparse.Namespace) -> None:
    """A comparison is resumed as it was; only the number of jobs may be another, and where its data are."""
    given = vars(arguments)
    others = given.keys() - {*checkpoint.PLACES}
    options = [field.name for field in dataclasses.fields(Config) if field.name in others]
    options += [name for name in ("preset", "config", *LISTS) if given.get(name) is not None]
    refuse(f"{flag(option)}: a comparison is resumed with the options it began with" for option in options)


def _planned(arguments: argparse.Namespace) -> Plan:
    """The comparison that is asked for. Raises Mistake for what cannot be."""
    from ..comparisons.jobs import folder_of

    if arguments.resume is None:
        preset = read_preset(arguments.preset) if arguments.preset else {}
        vars(arguments).update(arguments.own)
        lists = lists_of(arguments, preset)
        config, own = shared_of(arguments, preset, lists["methods"])
        plan = Plan(config, **{name: lists[name] for name in LISTS}, own=own)
        refuse(not_read(arguments, [case.method for case in plan.cases]))
        return plan
    _refuse_others(arguments)
    _from_everywhere(arguments)
    there, out = Plan.read(arguments.resume), arguments.resume
    places = {name: value for name, value in vars(arguments).items() if name in checkpoint.PLACES}
    plan = dataclasses.replace(there, config=dataclasses.replace(there.config, out=out, **places))
    begun = [*plan.trials(out / "rates"), *plan.runs(out, {})]
    any_saved = any(checkpoint.exists(folder_of(run)) for run in begun)
    refuse_lost(arguments, plan.config, store=plan.config.class_store if any_saved else None)
    return plan


def _compare(arguments: argparse.Namespace) -> int:
    from ..comparisons import jobs, rates, standing
    from ..comparisons.compare import COMPARISON_FILES, compare, job_name
    from ..comparisons.jobs import JobsStopped
    from ..comparisons.rates import trial_name
    from ..reports.progress import RunProgress

    resume = arguments.resume is not None
    with mistakes():
        plan = _planned(arguments)
        out = plan.config.out or Path("runs") / f"{arguments.command}-{plan.config.data}"
        names = [trial_name(plan, trial) for trial in plan.trials(out)]
        runs = plan.runs(out, {})
        names += [job_name(plan, run) for run in runs]
        rounds = [each.rounds for each in (*plan.trials(out), *runs)]

        def ready() -> None:
            if not resume:
                check_folder(out, COMPARISON_FILES, overwrite=plan.config.overwrite)
            for option, instead in (("client_lr", "rates"), ("num_negatives", "counts")):
                if option in arguments and getattr(plan, instead):
                    print(f"{flag(option)} has no effect: {flag(instead)} are taken instead")
            if plan.storeless:
                print(f"class_store is not for {storeless(plan.storeless)}")

        given = () if resume else arguments.given
        read_data(dataclasses.replace(plan.to_read_by, out=out), [] if resume else runs, ready, given)
    command = f"fedss {arguments.command}"
    go_on = _go_on(arguments.command, out)
    say_what_is_logged(arguments.command, jobs, rates, standing)
    finishing = f"{command}: finishing the rounds of the runs"
    try:
        with RunProgress(names, rounds) as progress, noticed(finishing) as stop:

            def show(first: int) -> Callable[[int, RoundMetrics | None], None]:
                return lambda job, m: progress.advance(first + job, m) if m else progress.start(first + job)

            comparison = compare(
                plan,
                out,
                jobs=arguments.jobs,
                on_trial=show(0),
                on_round=show(len(plan.trials(out))),
                on_tuned=functools.partial(show_tuned, progress),
                resume=resume,
                stop=stop,
            )
    except (ConfigError, CheckpointError, FileExistsError, InUse) as error:  # found before anything begins
        raise Mistake(as_typed(error)) from None
    except (JobsStopped, Interrupted) as stopped:
        print(f"{command}: stopped; {go_on}", file=sys.stderr)
        return stopped.exit_code if isinstance(stopped, Interrupted) else stop.exit_code
    except OSError as error:
        saved = f"the runs' checkpoints are saved; {go_on}"
        way = saved if (out / FILE).exists() else "no run has begun: start again"
        print(f"{command}: {reason(error)}; {way}", file=sys.stderr)
        return 1
    return _compared(comparison, command, go_on)


def _compared(comparison: "Comparison", command: str, go_on: str) -> int:
    """Says what came of a comparison; returns the exit code."""
    from ..comparisons.table import LEAST, cells, header

    for line in (*comparison.notes, *comparison.failed):
        print(f"{command}: {line}", file=sys.stderr)
    if comparison.go_on:
        print(f"{command}: once the reason is gone {go_on}", file=sys.stderr)
    if comparison.table:
        print_table(header(comparison.table), cells(comparison.table), LEAST)
        out = comparison.out
        made = f"the table, plots and report: {out / 'report.html'}"
        print(made if comparison.reported else f"the table: {out / 'table.md'}")
    return 1 if comparison.failed else 0


RUN = Command("train with one method", ("matplotlib", "rich", "safetensors"), _add_run_arguments, _run)


COMPARE = Command(
    "run several methods and seeds, and compare them",
    ("matplotlib", "rich", "safetensors"),
    _add_compare_arguments,
    _compare,
)


COMPOSITIONS = Command(
    "compare FedSS with NegOnly on as many pushing classes",
    ("matplotlib", "rich", "safetensors"),
    _add_compositions_arguments,
    _compare,
)
