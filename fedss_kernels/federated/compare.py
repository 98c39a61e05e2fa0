"""Several methods and seeds, side by side: one run in its own process each, one table, one report."""

import csv
import dataclasses
import json
import multiprocessing
import signal
import statistics
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from .algorithms import METHODS
from .checkpoint import CheckpointError, differences
from .config import Config, ConfigError, did_you_mean
from .report import MEGABYTE, Run, percent, write_comparison_report, write_run_report
from .rounds import check_data, load_data, run
from .run_folder import RoundMetrics, prepare, read_run

COMPARISON_FILES = (
    "comparison.json",
    "table.csv",
    "table.md",
    "report.html",
    "accuracy_by_round.png",
    "accuracy_by_bytes.png",
)

OnRound = Callable[[int, RoundMetrics | None], None]  # (job, its metrics; None as it starts)


@dataclass(frozen=True)
class Line:
    """A method's line in the table, means over its seeds. Bytes are of a whole run, but where they say."""

    method: str
    seeds: int
    top1: float | None
    top1_sd: float | None
    map_at_10: float | None
    map_at_10_sd: float | None
    class_set: float  # mean |S_k|
    class_set_share: float  # of C
    bytes_per_client_round: float
    bytes_extractor: float
    bytes_rows: float
    bytes_ids: float
    bytes_total: float
    saving: float  # of all bytes, against full_softmax in as many rounds
    class_saving: float  # of class rows and ids alone
    seconds: float


@dataclass(frozen=True)
class Comparison:
    table: list[Line]
    runs: list[Run]
    failed: list[str]  # one line for each run that failed
    out: Path


def compare(
    config: Config,  # everything but method, seed and out
    methods: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    *,
    jobs: int = 1,
    on_round: OnRound | None = None,
    resume: bool = False,
) -> Comparison:
    """Runs every method with every seed, `jobs` at a time, each in its own process and folder in `out`.

    With `resume` the comparison in `out` that was stopped goes on: its finished runs stand, the others go on
    from their last checkpoints.

    Writes the table (CSV and Markdown), the plots and report.html to `out`. A run that fails leaves a line in
    `failed` and the others stand. Processes are spawned, so a script that calls this needs `if __name__ ==
    "__main__":`. Raises ConfigError for names or settings that cannot be, FileExistsError for a folder in
    use, CheckpointError where there is no such comparison to go on with.
    """
    if jobs < 1:
        raise ConfigError("jobs", f"expected an integer of at least 1, got {jobs}")
    if config.workers > 1:
        raise ConfigError("workers", f"expected 1 in a comparison, which has jobs, got {config.workers}")
    configs = plan(config, methods, seeds, out)
    # Once, before anything starts: mistakes surface here, and caches fill.
    check_data(config, load_data(config))
    if resume:
        _check_same(config, methods, seeds, out)
    else:
        prepare(out, COMPARISON_FILES, overwrite=config.overwrite)
        settings = {"methods": list(methods), "seeds": list(seeds), "jobs": jobs, "config": config.to_dict()}
        (out / "comparison.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    errors = _run_all(configs, jobs, on_round or (lambda job, metrics: None), resume)
    failed = [f"{job_name(configs[job])} failed: {error}" for job, error in sorted(errors.items())]
    finished = [c for job, c in enumerate(configs) if job not in errors]
    runs = [Run(*read_run(_folder(c))) for c in finished]
    table = tabulate(runs)
    if runs:
        write_tables(out, table)
        write_comparison_report(out, runs, HEADER, [cells(line) for line in table], failed)
    return Comparison(table, runs, failed, out)


def plan(config: Config, methods: Sequence[str], seeds: Sequence[int], out: Path) -> list[Config]:
    """One configuration for each run, methods of one seed next to each other."""
    for name in methods:
        if name not in METHODS:
            raise ConfigError(
                "methods",
                f"expected some of {', '.join(METHODS)}, got {name!r}{did_you_mean(name, [*METHODS])}",
            )
    for name, values in (("methods", methods), ("seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise ConfigError(
                name, f"expected at least one, each once, got {', '.join(map(str, values)) or 'none'}"
            )
    return [
        replace(
            config,
            method=method,
            seed=seed,
            out=out / f"{method}-seed{seed}",
            class_store=config.class_store and config.class_store / f"{method}-seed{seed}",
        )
        for seed in seeds
        for method in methods
    ]


@dataclass(frozen=True)
class Plan:
    """What comparison.json says."""

    config: Config
    methods: list[str]
    seeds: list[int]


def read_plan(out: Path) -> Plan:
    """Of the comparison in `out`. Raises CheckpointError where there is none."""
    try:
        found = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
        return Plan(Config.from_dict(found["config"]), found["methods"], found["seeds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"no comparison to go on with in {out}: {error}") from None


def _check_same(config: Config, methods: Sequence[str], seeds: Sequence[int], out: Path) -> None:
    there = read_plan(out)
    different = differences(there.config.to_dict(), config.to_dict())
    different += [
        f"{name}: {before} there, {list(now)} here"
        for name, before, now in (("methods", there.methods, methods), ("seeds", there.seeds, seeds))
        if before != list(now)
    ]
    if different:
        raise CheckpointError(f"the comparison in {out} is another: {'; '.join(different)}")


def job_name(config: Config) -> str:
    return f"{METHODS[config.method].label}, seed {config.seed}"


def _folder(config: Config) -> Path:
    assert config.out is not None
    return config.out


# ---- processes ---------------------------------------------------------------------------------------------


def _run_all(configs: Sequence[Config], jobs: int, on_round: OnRound, resume: bool) -> dict[int, str]:
    """Plays every configuration; returns the error of each job that failed."""
    context = multiprocessing.get_context("spawn")
    waiting, errors = list(range(len(configs))), dict[int, str]()
    running: dict[Connection, tuple[int, Any]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                job = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(sender, configs[job], resume), daemon=True)
                with _deaf_to_ctrl_c():
                    process.start()
                sender.close()  # so that the receiver sees the end when the child's copy is gone
                running[receiver] = (job, process)
                on_round(job, None)
            for ready in wait(list(running)):
                _receive(cast(Connection, ready), running, errors, on_round)
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()
    return errors


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """A process started in here ignores Ctrl-C from its first moment: to stop it is its parent's business."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set a handler
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _receive(
    receiver: Connection,
    running: dict[Connection, tuple[int, Any]],
    errors: dict[int, str],
    on_round: OnRound,
) -> None:
    job, process = running[receiver]
    try:
        message = receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode and job not in errors:
            errors[job] = f"its process ended with exit code {process.exitcode} (killed? out of memory?)"
        del running[receiver]
        return
    if isinstance(message, RoundMetrics):
        on_round(job, message)
    else:
        errors[job] = message


def _child(sender: Connection, config: Config, resume: bool) -> None:
    """One run, if it is not done; sends its metrics, or a line about what went wrong."""
    try:
        begun = resume and any(_folder(config).glob("checkpoint-0*"))
        if not (resume and (_folder(config) / "summary.json").exists()):
            # a run that was stopped before its first checkpoint starts again
            run(replace(config, overwrite=config.overwrite or resume), on_round=sender.send, resume=begun)
        write_run_report(_folder(config), Run(*read_run(_folder(config))))
    except BrokenPipeError:
        pass  # the parent is gone: nobody waits for this run
    except Exception as error:
        folder = _folder(config)
        if folder.is_dir():
            (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        sender.send(f"{type(error).__name__}: {error}")


# ---- the table ---------------------------------------------------------------------------------------------

HEADER = (
    "method",
    "top-1 (%)",
    "MAP@10 (%)",
    "|S_k| (of C)",
    "MB moved",
    "saved",
    "MB for classes",
    "saved of these",
    "seconds",
)


def tabulate(runs: Sequence[Run]) -> list[Line]:
    """One line for each method, in the order of their first run."""
    names = dict.fromkeys(run.summary.method for run in runs)
    return [_line(name, [run for run in runs if run.summary.method == name]) for name in names]


def _line(method: str, runs: Sequence[Run]) -> Line:
    summaries = [run.summary for run in runs]
    top1, top1_sd = _mean_sd([s.top1 for s in summaries])
    map_at_10, map_at_10_sd = _mean_sd([s.map_at_10 for s in summaries])
    mean = statistics.fmean
    return Line(
        method=method,
        seeds=len(runs),
        top1=top1,
        top1_sd=top1_sd,
        map_at_10=map_at_10,
        map_at_10_sd=map_at_10_sd,
        class_set=mean(s.mean_class_set for s in summaries),
        class_set_share=mean(s.mean_class_set / s.num_classes for s in summaries),
        bytes_per_client_round=mean(run.summary.traffic.total / run.updates for run in runs),
        bytes_extractor=mean(s.traffic.extractor for s in summaries),
        bytes_rows=mean(s.traffic.rows for s in summaries),
        bytes_ids=mean(s.traffic.up_ids for s in summaries),
        bytes_total=mean(s.traffic.total for s in summaries),
        saving=mean(run.saving for run in runs),
        class_saving=mean(run.class_saving for run in runs),
        seconds=mean(s.seconds for s in summaries),
    )


def _mean_sd(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None for what was not measured, and for the sd of one value."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return None, None
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None


def cells(line: Line) -> list[str]:
    """A line as text, under HEADER."""
    return [
        METHODS[line.method].label,
        _with_sd(line.top1, line.top1_sd),
        _with_sd(line.map_at_10, line.map_at_10_sd),
        f"{line.class_set:.1f} ({percent(line.class_set_share)})",
        f"{line.bytes_total / MEGABYTE:,.1f}",
        percent(line.saving),
        f"{(line.bytes_rows + line.bytes_ids) / MEGABYTE:,.1f}",
        percent(line.class_saving),
        f"{line.seconds:.0f}",
    ]


def _with_sd(mean: float | None, sd: float | None) -> str:
    if mean is None:
        return "–"
    return f"{100 * mean:.1f}" if sd is None else f"{100 * mean:.1f} ± {100 * sd:.1f}"


def write_tables(out: Path, table: Sequence[Line]) -> None:
    """table.csv, with shares in [0, 1] and bytes as they are, and table.md, with the text of `cells`."""
    with (out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in dataclasses.fields(Line)])
        writer.writerows(dataclasses.astuple(line) for line in table)
    rows = [HEADER, ["---"] + ["---:"] * (len(HEADER) - 1), *(cells(line) for line in table)]
    text = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)
    (out / "table.md").write_text(text, encoding="utf-8")
