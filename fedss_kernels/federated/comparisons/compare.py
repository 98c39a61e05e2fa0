"""Several methods and seeds, side by side: one run in its own process each, one table, one report."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..algorithms import METHODS
from ..config import Config, ConfigError
from ..data import FederatedData
from ..data.holdout import held_out
from ..disk import write_whole
from ..evaluation import check_measured
from ..files.round_metrics import RoundMetrics
from ..files.run_folder import faults, prepare
from ..ledger import KINDS
from ..loading import check_data, fitted, load_data, with_a_net
from ..measures import MEASURES, Measure, Measures, percent
from ..plan import FILE, HOLDOUT, Case, Plan, case_of
from ..reports.mean_sd import mean_sd
from ..reports.remarks import remarks
from ..reports.report import (
    MEGABYTE,
    Run,
    attempt,
    by_case,
    write_comparison_report,
)
from ..reports.tables import markdown, write_csv
from ..server.inspection import explained
from .jobs import Failure, OnHeard, OnRound, Tuned, folder_of, play_all, played

COMPARISON_FILES = (
    FILE,
    "table.csv",
    "table.md",
    "report.html",
    "accuracy_by_round.png",
    "accuracy_by_bytes.png",
    "accuracy_by_class_set.png",
    "rates.csv",
)


@dataclass(frozen=True)
class Line:
    """A case's line in the table, means over its seeds. Bytes are of a whole run, but where they say."""

    method: str
    num_negatives: int | None  # where there are several
    client_lr: float
    seeds: int
    measures: Measures  # no column
    measured: Mapping[str, tuple[float | None, float | None]]  # mean and sd, a column each
    class_set: float  # mean |S_k|
    class_set_share: float  # of C
    bytes_per_client_round: float
    bytes_by_kind: Mapping[str, float]  # a column each
    bytes_total: float
    saving: float  # of all bytes, against full_softmax in as many rounds
    class_saving: float  # of what grows with the number of classes alone
    seconds: float

    @property
    def bytes_for_classes(self) -> float:
        return sum(count for kind, count in self.bytes_by_kind.items() if KINDS[kind].by_class)

    def columns(self, measured: Sequence[str], kinds: Sequence[str]) -> dict[str, object]:
        """Of table.csv, where the table has these measures and kinds."""
        found = dict[str, object]()
        for field in dataclasses.fields(self):
            if field.name == "measured":
                for name in measured:
                    found[name], found[f"{name}_sd"] = self.measured.get(name, (None, None))
            elif field.name == "bytes_by_kind":
                found |= {f"bytes_{kind}": self.bytes_by_kind.get(kind, 0.0) for kind in kinds}
            elif field.name != "measures":
                found[field.name] = getattr(self, field.name)
        return found


@dataclass(frozen=True)
class Comparison:
    table: list[Line]
    runs: list[Run]
    failed: list[str]  # one line for each run that failed, each method that has no rate, a report not made
    out: Path
    notes: list[str] = dataclasses.field(default_factory=list)  # what else is to be said, a line each
    go_on: bool = False  # a run failed of what may be gone when it is resumed, as of a full disk


def compare(
    plan: Plan,
    out: Path,
    *,
    jobs: int = 1,
    on_trial: OnRound | None = None,
    on_round: OnRound | None = None,
    on_tuned: Callable[[int, int, int], None] | None = None,
    resume: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Comparison:
    """Runs every case with every seed, `jobs` at a time, each in its own process and folder in `out`.

    With `plan.rates` each case has the best of them by its headline, found beforehand by runs with the first
    seed, on images of a tenth of the training clients, who then do not train.

    `on_trial(job, metrics)` and `on_round` are called after every round of a trial or run, and with None as
    it starts; `on_tuned(job, done, total)` while its clients fine-tune, runs counted after all trials.

    With `resume` the comparison in `out` that was stopped goes on: its finished runs stand, the others go on
    from their last checkpoints. Once `stop()`, asked now and then, is true the runs finish their rounds, save
    them, and JobsStopped is raised.

    Writes the table (CSV and Markdown), the plots and report.html to `out`. A run that fails leaves a line in
    `failed` and the others stand; one whose model is not finite at its end has failed. A rate that does not
    train is the worst of its case, with a line in `notes`; a case of which none does has failed. Where a
    trial failed for another reason, killed or on a full disk, its case is not played, as with it another rate
    might be the best: the comparison can be resumed.
    Processes are spawned, so a script that calls this needs `if __name__ == "__main__":`. Raises ConfigError
    for settings that cannot be, FileExistsError for a folder in use, CheckpointError where there is no such
    comparison to go on with.
    """
    plan = _checked(plan, jobs)
    if resume:
        plan.check_same(out)
    else:
        prepare(out, COMPARISON_FILES, overwrite=plan.config.overwrite)
        plan.save(out)
    tuned, runs_from = on_tuned or _ignore, len(plan.trials(out))
    rates, notes, failed = _best_rates(plan, out, jobs, _heard(on_trial or _ignore, tuned), resume, stop)
    planned, hear = plan.runs(out, rates), _heard(on_round or _ignore, tuned, runs_from)
    kept = [i for i, c in enumerate(planned) if not plan.rates or case_of(c, plan.several) in rates]
    configs = [planned[i] for i in kept]
    if not configs:
        return Comparison([], [], failed, out, notes)
    found, failures = play_all(configs, jobs, lambda job, what: hear(kept[job], what), resume, stop)
    failed += [f"{job_name(plan, configs[job])} failed: {of.words}" for job, of in failures.items()]
    runs = _in_order(plan, found.values())
    notes += [line for run in runs for line in _notes(plan, run)]
    table = tabulate(runs)
    if runs:
        write_tables(out, table)
        failed += attempt(out, _write_report, out, runs, [*notes, *failed])
    go_on = not all(failure.lasting for failure in failures.values())
    return Comparison(table, runs, failed, out, notes, go_on)


def _in_order(plan: Plan, runs: Iterable[Run]) -> list[Run]:
    """Cases in the plan's order, whichever run of them is the first that did not fail."""
    cases = plan.cases
    return sorted(runs, key=lambda run: cases.index(case_of(run.config, plan.several)))


def _checked(plan: Plan, jobs: int) -> Plan:
    """With a net. Once, before anything starts: mistakes surface here, and caches fill."""
    if jobs < 1:
        raise ConfigError("jobs", f"expected an integer of at least 1, got {jobs}")
    plan = dataclasses.replace(plan, config=with_a_net(plan.config))  # the same when it is resumed elsewhere
    _check(plan, load_data(plan.config))
    return plan


def _check(plan: Plan, data: FederatedData) -> None:
    """Raises ConfigError where a case does not fit the data, or cannot be measured on them."""
    check_data(fitted(plan.config, data.found), data)
    tried: dict[bool, FederatedData] = {}
    for method in plan.methods:
        config, alone = dataclasses.replace(plan.config, method=method), METHODS[method].alone
        check_measured(config, data)
        if plan.rates:
            if alone not in tried:
                tried[alone] = held_out(data, HOLDOUT, config.data_seed, alone=alone)
            check_measured(config, tried[alone])


def report_again(out: Path) -> list[str]:
    """The tables and the report of the comparison in `out`, of its runs that are done; a line on each other.

    Raises CheckpointError where there is no comparison, ValueError where no run of it is done.
    """
    plan = Plan.read(out)
    trials, configs = plan.trials(out / "rates"), plan.runs(out, {})
    _, lost = played(trials)
    found, failures = played(configs)
    left_out = [f"{trial_name(plan, trials[job])} has no result: {of.words}" for job, of in lost.items()]
    left_out += [f"{job_name(plan, configs[job])} is left out: {of.words}" for job, of in failures.items()]
    runs = _in_order(plan, found.values())
    if not runs:
        raise ValueError(f"no run of the comparison in {out} is done: {'; '.join(left_out)}")
    notes = [line for run in runs for line in _notes(plan, run)]
    write_tables(out, tabulate(runs))
    _write_report(out, runs, [*notes, *left_out])
    return [*notes, *left_out]


def _write_report(out: Path, runs: Sequence[Run], failed: Sequence[str]) -> None:
    table = tabulate(runs)
    write_comparison_report(out, runs, header(table), cells(table), failed)


def _ignore(job: int, *of_it: object) -> None:
    pass


def _heard(on_round: OnRound, on_tuned: Callable[[int, int, int], None], first: int = 0) -> OnHeard:
    """Who is told what a job says; `first` is how many jobs on_tuned counts before those of on_round."""

    def hear(job: int, what: RoundMetrics | Tuned | None) -> None:
        if isinstance(what, Tuned):
            on_tuned(first + job, what.done, what.total)
        else:
            on_round(job, what)

    return hear


def _notes(plan: Plan, run: Run) -> list[str]:
    """What is to be said of it; of answers that were left out only where no rubbish was asked for."""
    found, rejected = remarks(run.summary), run.summary.rejected
    if rejected and not run.config.poison_rate:
        why = explained(faults(folder_of(run.config)))
        found.append(f"{rejected:,} of {run.updates:,} clients' answers were left out: {why}")
    return [f"{job_name(plan, run.config)}: {line}" for line in found]


def _best_rates(
    plan: Plan, out: Path, jobs: int, on_trial: OnHeard, resume: bool, stop: Callable[[], bool]
) -> tuple[dict[Case, float], list[str], list[str]]:
    """(the best rate of each case that has one, notes, a line for each failure); writes rates.csv."""
    if not plan.rates:
        return {}, [], []
    trials = plan.trials(out / "rates")
    runs, failures = play_all(trials, jobs, on_trial, resume, stop)
    _write_rates(out, plan, trials, runs, failures)
    best, notes, failed = dict[Case, float](), list[str](), list[str]()
    for case in plan.cases:
        mine = [job for job, config in enumerate(trials) if case_of(config, plan.several) == case]
        lost = {job: failures[job] for job in mine if job in failures}
        missing = [job for job, failure in lost.items() if not failure.lasting]
        tried = {trials[job].client_lr: _merit(runs[job]) for job in mine if job in runs}
        if missing:  # a rate chosen without it might be another once it is there
            failed += [
                f"a trial of {folder_of(trials[job]).name} failed: {lost[job].words}; {case.label} is not "
                "compared without it: go on with --resume"
                for job in missing
            ]
        elif not tried:
            rates = ", ".join(f"{rate:g}" for rate in plan.rates)
            words = " / ".join(dict.fromkeys(failure.words for failure in lost.values()))
            failed.append(f"{case.label} failed, as it trains at none of the rates {rates}: {words}")
        else:
            best[case] = max(sorted(tried), key=lambda rate: tried[rate])  # of equals the smallest
            notes += [f"{trial_name(plan, trials[j])} is the worst: {of.words}" for j, of in lost.items()]
    return best, notes, failed


def _merit(run: Run) -> float:
    """The headline's value, or where less is better less of it."""
    accuracy, sign = run.summary.accuracy, 1 if run.summary.headline.more_is_better else -1
    return -math.inf if accuracy is None else sign * accuracy


def _write_rates(
    out: Path,
    plan: Plan,
    trials: Sequence[Config],
    runs: Mapping[int, Run],
    failures: Mapping[int, Failure],
) -> None:
    """rates.csv: of each trial its headline's value, or why it has none."""
    lines: list[list[object]] = [["case", "client_lr", "accuracy", "failed"]]
    for job, config in enumerate(trials):
        result = ["", failures[job].words] if job in failures else [runs[job].summary.accuracy, ""]
        lines.append([case_of(config, plan.several).name, config.client_lr, *result])
    write_csv(out / "rates.csv", lines)


def job_name(plan: Plan, config: Config) -> str:
    return f"{case_of(config, plan.several).label}, seed {config.seed}"


def trial_name(plan: Plan, config: Config) -> str:
    return f"{case_of(config, plan.several).label}, rate {config.client_lr:g}"


# ---- the table ---------------------------------------------------------------------------------------------


LEAST = ("seconds", "saved of these", "MB for classes", "rate", "|S_k| (of C)")  # what can be done without


def header(table: Sequence[Line]) -> list[str]:
    """Of the columns of `cells`."""
    counted = ["MB moved", "saved", "MB for classes", "saved of these", "seconds"]
    measured = [MEASURES[name].column for name in _shown(table)]
    return ["method", "rate", *measured, "|S_k| (of C)", *counted]


def _shown(table: Sequence[Line]) -> list[str]:
    """The measures in the table: those of the methods, each once."""
    return list(dict.fromkeys(name for line in table for name in line.measures.shown))


def tabulate(runs: Sequence[Run]) -> list[Line]:
    """One line for each case, in the order of their first run."""
    groups = by_case(runs)
    return [_line(case, group) for case, group in groups.items()]


def _line(case: Case, runs: Sequence[Run]) -> Line:
    summaries = [run.summary for run in runs]
    measures, mean = summaries[0].measures, statistics.fmean
    return Line(
        method=case.method,
        num_negatives=case.num_negatives,
        client_lr=runs[0].config.client_lr,
        seeds=len(runs),
        measures=measures,
        measured={
            name: _mean_sd([s.measured.get(name) for s in summaries])
            for name in measures.names
            if MEASURES[name].compared
        },
        class_set=mean(s.mean_class_set for s in summaries),
        class_set_share=mean(s.mean_class_set / s.num_classes for s in summaries),
        bytes_per_client_round=mean(run.summary.traffic.total / run.updates for run in runs),
        bytes_by_kind={
            kind.name: mean(s.traffic.of(kind.name) for s in summaries) for kind in summaries[0].traffic.kinds
        },
        bytes_total=mean(s.traffic.total for s in summaries),
        saving=mean(run.saving for run in runs),
        class_saving=mean(run.class_saving for run in runs),
        seconds=mean(s.seconds for s in summaries),
    )


def _mean_sd(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """None for what was not measured, and for the sd of one value."""
    numbers = [value for value in values if value is not None]
    return mean_sd(numbers) if numbers else (None, None)


def cells(table: Sequence[Line]) -> list[list[str]]:
    """The lines as text, under `header`."""
    shown = _shown(table)
    return [_cells(line, shown) for line in table]


def _cells(line: Line, shown: Sequence[str]) -> list[str]:
    return [
        Case(line.method, line.num_negatives).label,
        f"{line.client_lr:g}",
        *(_with_sd(MEASURES[name], *line.measured.get(name, (None, None))) for name in shown),
        f"{line.class_set:.1f} ({percent(line.class_set_share)})",
        f"{line.bytes_total / MEGABYTE:,.1f}",
        percent(line.saving),
        f"{line.bytes_for_classes / MEGABYTE:,.1f}",
        percent(line.class_saving),
        f"{line.seconds:.0f}",
    ]


def _with_sd(measure: Measure, mean: float | None, sd: float | None) -> str:
    if mean is None:
        return "–"
    return measure.figure(mean) if sd is None else f"{measure.figure(mean)} ± {measure.figure(sd)}"


def write_tables(out: Path, table: Sequence[Line]) -> None:
    """table.csv, with shares in [0, 1] and bytes as they are, and table.md, with the text of `cells`."""
    measured = dict.fromkeys(name for line in table for name in line.measured)
    kinds = [kind for kind in KINDS if any(kind in line.bytes_by_kind for line in table)]
    lines = [line.columns([*measured], kinds) for line in table]
    write_csv(out / "table.csv", [[*lines[0]], *([*line.values()] for line in lines)])
    write_whole(out / "table.md", markdown(header(table), cells(table)))
