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
from ..files.run_folder import faults, prepare
from ..loading import check_data, fitted, load_data, with_a_net
from ..plan import FILE, HOLDOUT, Plan, case_of
from ..reports.remarks import remarks
from ..reports.report import attempt, write_comparison_report
from ..reports.reported_run import Run
from ..server.inspection import explained
from .jobs import OnHeard, OnRound, Tuned, folder_of, play_all, played
from .rates import best_rates, trial_name
from .standing import check_standing, say_left_over
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
    plan, data = _checked(plan, jobs)
    if resume:
        plan.check_same(out)
        check_standing([*(plan.trials(out / "rates") if plan.rates else ()), *plan.runs(out, {})])
    else:
        say_left_over(out, plan)
        prepare(out, COMPARISON_FILES, overwrite=plan.config.overwrite)
        plan.save(out)
    tuned, runs_from = on_tuned or _ignore, len(plan.trials(out))
    rates, notes, failed = best_rates(plan, out, jobs, _heard(on_trial or _ignore, tuned), resume, stop)
    planned, hear = plan.runs(out, rates), _heard(on_round or _ignore, tuned, runs_from)
    kept = [i for i, c in enumerate(planned) if not plan.rates or case_of(c, plan.several) in rates]
    configs = [fitted(planned[i], data) for i in kept]
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


def _checked(plan: Plan, jobs: int) -> tuple[Plan, Found]:
    """With a net, and what the data hold. Once, before anything starts: mistakes surface, and caches fill."""
    if jobs < 1:
        raise ConfigError("jobs", f"expected an integer of at least 1, got {jobs}")
    plan = dataclasses.replace(plan, config=with_a_net(plan.config))  # the same when it is resumed elsewhere
    data = load_data(plan.config)
    _check(plan, data)
    return plan, data.found


def _check(plan: Plan, data: FederatedData) -> None:
    """Raises ConfigError where a case does not fit the data, or cannot be measured on them."""
    check_data(fitted(plan.config, data.found), data)
    tried: dict[bool, FederatedData] = {}
    for case in plan.cases:
        config, alone = plan.config_of(case), METHODS[case.method].alone
        if case.method in plan.own or case.called:
            check_data(fitted(config, data.found), data)
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
    found, failures = played(configs, unknown=["client_lr"] if plan.rates else [])
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


def job_name(plan: Plan, config: Config) -> str:
    return f"{case_of(config, plan.several).label}, seed {config.seed}"
