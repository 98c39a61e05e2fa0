"""Several methods and seeds, side by side: one run in its own process each, one table, one report."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..algorithms import METHODS
from ..config import Config, ConfigError
from ..data import FederatedData, Found
from ..data.holdout import held_out
from ..evaluation import check_measured
from ..files.round_metrics import RoundMetrics
from ..files.run_folder import faults
from ..loading import check_data, fitted, load_data, with_a_net
from ..plan import FILE, Plan, case_of
from ..reports.remarks import remarks
from ..reports.report import attempt, write_comparison_report
from ..reports.reported_run import Run
from ..server.inspection import explained
from .hold import beginning, going_on
from .jobs import OnHeard, OnRound, Tuned, folder_of, play_all, played
from .rates import BY_CLIENTS, best_rates, choices, fitting, of_failures, of_lost, say_fitted
from .standing import check_standing
from .table import Line, cells, header, tabulate, write_tables

COMPARISON_FILES = (
    FILE,
    "table.csv",
    "table.md",
    "report.html",
    "accuracy_by_round.png",
    "accuracy_by_bytes.png",
    "step_by_round.png",
    "accuracy_by_class_set.png",
    "rates.csv",
)
# Of the data: the share of the clients who are held out, and whether they are there alone.
Part = tuple[float, bool]


@dataclass(frozen=True)
class Comparison:
    table: list[Line]
    runs: list[Run]
    failed: list[str]  # one line for each run that failed, each method that has no rate, a report not made
    out: Path
    notes: list[str] = dataclasses.field(default_factory=list)  # what else is to be said, a line each
    go_on: bool = False  # a run failed of what may be gone when it is resumed, as of a full disk
    reported: bool = False  # the report was made


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
    seed, on images of a tenth of the training clients, who then do not train. Where there are not as many
    others as are in a round, all of them are.

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
    for settings that cannot be, FileExistsError for a folder in use, InUse where a comparison is going on in
    it, CheckpointError where there is no such comparison to go on with.
    """
    plan, found = _checked(plan, jobs)
    asked = plan.trials(out / "rates")
    trials = [fitting(trial, found[_part(trial)].clients) for trial in asked]
    with going_on(out, plan) if resume else beginning(out, plan, COMPARISON_FILES):
        if resume:
            check_standing([*trials, *plan.runs(out, {})])
        say_fitted(asked, trials)
        tuned = on_tuned or _ignore
        chosen = best_rates(plan, trials, out, jobs, _heard(on_trial or _ignore, tuned), resume, stop)
        rates = {choice.case: choice.best for choice in chosen if choice.best is not None}
        failed = [line for choice in chosen for line in of_failures(choice, trials)]
        notes = [line for choice in chosen for line in choice.notes]
        planned, hear = plan.runs(out, rates), _heard(on_round or _ignore, tuned, len(trials))
        kept = [i for i, c in enumerate(planned) if not plan.rates or case_of(c, plan.several) in rates]
        configs = [fitted(planned[i], found[_part(planned[i])]) for i in kept]
        if not configs:
            return Comparison([], [], failed, out, notes)
        done, failures = play_all(configs, jobs, lambda job, what: hear(kept[job], what), resume, stop)
        failed += [f"{job_name(plan, configs[job])} failed: {of.words}" for job, of in failures.items()]
        runs = _in_order(plan, done.values())
        notes += [line for run in runs for line in _notes(plan, run)]
        table, unmade = tabulate(runs), list[str]()
        if runs:
            write_tables(out, table)
            unmade = attempt(out, _write_report, out, runs, [*notes, *failed])
        go_on = not all(failure.lasting for failure in failures.values())
        return Comparison(table, runs, [*failed, *unmade], out, notes, go_on, bool(runs) and not unmade)


def _in_order(plan: Plan, runs: Iterable[Run]) -> list[Run]:
    """Cases in the plan's order, whichever run of them is the first that did not fail."""
    cases = plan.cases
    return sorted(runs, key=lambda run: cases.index(case_of(run.config, plan.several)))


def _checked(plan: Plan, jobs: int) -> tuple[Plan, dict[Part, Found]]:
    """With a net, and what its runs' data hold. Once, before anything starts: mistakes surface, caches fill.

    Raises ConfigError where a case does not fit the data, or cannot be measured on them.
    """
    if jobs < 1:
        raise ConfigError("jobs", f"expected an integer of at least 1, got {jobs}")
    plan = dataclasses.replace(plan, config=with_a_net(plan.config))  # the same when it is resumed elsewhere
    whole = load_data(dataclasses.replace(plan.to_read_by, holdout=0.0))
    if plan.rates and len(whole.clients) < 2:
        raise ConfigError("rates", "expected at least 2 clients, one of them held out for the trials, got 1")
    parts = dict[Part, FederatedData]()

    def of(config: Config) -> FederatedData:
        share, alone = part = _part(config)
        if part not in parts:
            parts[part] = held_out(whole, share, config.data_seed, alone=alone) if share else whole
        return parts[part]

    for config in plan.runs(Path(), {})[: len(plan.cases)]:
        _check(config, of(config))
    for config in plan.trials(Path())[:: len(plan.rates) or 1]:
        _check(fitting(config, len(of(config).clients)), of(config))
    return plan, {part: data.found for part, data in parts.items()}


def _part(config: Config) -> Part:
    return config.holdout, METHODS[config.method].alone


def _check(config: Config, data: FederatedData) -> None:
    check_data(fitted(config, data.found), data)
    check_measured(config, data)


def report_again(out: Path) -> list[str]:
    """The tables and the report of the comparison in `out`, of its runs that are done.

    Returns what is to be said: remarks as `compare`'s, and a line on each run or trial that is not done.
    Raises CheckpointError where there is no comparison, ValueError where no run of it is done.
    """
    plan = Plan.read(out)
    trials, configs = plan.trials(out / "rates"), plan.runs(out, {})
    chosen = choices(plan, trials, *played(trials, unknown=BY_CLIENTS))
    found, failures = played(configs, unknown=["client_lr"] if plan.rates else [])
    left_out = [line for choice in chosen for line in of_lost(plan, choice, trials)]
    rateless = [choice.case for choice in chosen if choice.failed]
    left_out += [
        f"{job_name(plan, configs[job])} is left out: {of.words}"
        for job, of in failures.items()
        if case_of(configs[job], plan.several) not in rateless
    ]
    runs = _in_order(plan, found.values())
    if not runs:
        raise ValueError(f"no run of the comparison in {out} is done: {'; '.join(left_out)}")
    notes = [line for choice in chosen for line in choice.notes]
    notes += [line for run in runs for line in _notes(plan, run)]
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


def job_name(plan: Plan, config: Config) -> str:
    return f"{case_of(config, plan.several).label}, seed {config.seed}"
