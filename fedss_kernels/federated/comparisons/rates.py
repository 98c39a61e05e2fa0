"""Which client rate each case of a comparison takes: the best of those tried beforehand."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..config import Config
from ..plan import Case, Plan, case_of
from ..reports.reported_run import Run
from ..reports.tables import write_csv
from .jobs import Failure, OnHeard, folder_of, play_all

FEW = 100  # images, of which one is more than a percent: as much as rates may differ by
BY_CLIENTS = ("cohort", "min_clients", "min_holders")  # options that no more clients can be than there are
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """Of a case's rate."""

    case: Case
    best: float | None  # None: it trains at none, or a trial is missing
    notes: list[str] = field(default_factory=list)  # what is to be said of it, a line each
    failed: str = ""  # why it trains at none
    # trials without a result, by job, where one is missing: with it another rate might be the best
    lost: dict[int, Failure] = field(default_factory=dict)


def fitting(trial: Config, clients: int) -> Config:
    """A trial as so many clients can play it, those whom its holdout leaves."""
    if trial.cohort is None or trial.cohort <= clients:
        return trial
    return replace(trial, **{name: min(getattr(trial, name), clients) for name in BY_CLIENTS})


def say_fitted(planned: Sequence[Config], trials: Sequence[Config]) -> None:
    """A line where trials have other cohorts than planned, as there are not so many clients."""
    for line in dict.fromkeys(map(_of_cohort, planned, trials)):
        if line:
            log.warning(line)


def _of_cohort(planned: Config, trial: Config) -> str:
    names = [name for name in BY_CLIENTS if getattr(planned, name) != getattr(trial, name)]
    words = ", ".join(f"{name} is {getattr(trial, name)}, not {getattr(planned, name)}" for name in names)
    have = f"trials of a rate have {trial.cohort} clients, as a tenth is held out"
    return f"{have}: {words}" if names else ""


def best_rates(
    plan: Plan,
    trials: Sequence[Config],
    out: Path,
    jobs: int,
    on_trial: OnHeard,
    resume: bool,
    stop: Callable[[], bool],
) -> list[Choice]:
    """Plays the trials, and chooses by them; writes rates.csv."""
    if not plan.rates:
        return []
    runs, failures = play_all(trials, jobs, on_trial, resume, stop)
    _write_rates(out, plan, trials, runs, failures)
    return choices(plan, trials, runs, failures)


def choices(
    plan: Plan, trials: Sequence[Config], runs: Mapping[int, Run], failures: Mapping[int, Failure]
) -> list[Choice]:
    """Of each case's rate, where there are some, by its trials that are done and what others failed of."""
    found = list[Choice]()
    for case in plan.cases if plan.rates else ():
        jobs = [job for job, config in enumerate(trials) if case_of(config, plan.several) == case]
        of_case = {trials[job].client_lr: runs[job] for job in jobs if job in runs}
        lost = {job: failures[job] for job in jobs if job in failures}
        if not all(failure.lasting for failure in lost.values()):
            found.append(Choice(case, None, lost=lost))
        elif not of_case:
            rates = ", ".join(f"{rate:g}" for rate in plan.rates)
            words = " / ".join(dict.fromkeys(failure.words for failure in lost.values()))
            failed = f"{case.label} failed, as it trains at none of the rates {rates}: {words}"
            found.append(Choice(case, None, failed=failed))
        else:
            best = max(sorted(of_case), key=lambda rate: _merit(of_case[rate]))  # of equals the smallest
            notes = [f"{case.label}: {line}" for line in _of_the_choice(of_case, best)]
            notes += [f"{trial_name(plan, trials[job])} is the worst: {of.words}" for job, of in lost.items()]
            found.append(Choice(case, best, notes))
    return found


def of_failures(choice: Choice, trials: Sequence[Config]) -> list[str]:
    """Why a comparison goes on without the case, a line for each reason."""
    if choice.failed:
        return [choice.failed]
    return [
        f"a trial of {folder_of(trials[job]).name} failed: {of.words}; {choice.case.label} is not compared "
        "without it: go on with --resume"
        for job, of in choice.lost.items()
        if not of.lasting
    ]


def of_lost(plan: Plan, choice: Choice, trials: Sequence[Config]) -> list[str]:
    """The same of a comparison that is not done, or not as it was: a line for each trial without a result."""
    if choice.failed:
        return [choice.failed]
    return [f"{trial_name(plan, trials[job])} has no result: {of.words}" for job, of in choice.lost.items()]


def _of_the_choice(runs: Mapping[float, Run], best: float) -> list[str]:
    """Lines where the best of the rates is one of equals, or another might be better."""
    merits, summary = {rate: _merit(run) for rate, run in runs.items()}, runs[best].summary
    equal = [f"{rate:g}" for rate in sorted(merits) if merits[rate] == merits[best]]
    count = summary.num_headline_images
    images = "images" if count is None else "1 image" if count == 1 else f"{count:,} images"
    if len(equal) > 1:
        headline, accuracy = summary.headline, summary.accuracy
        found = "nothing" if accuracy is None else f"{headline.column} {headline.figure(accuracy)}"
        words = f"rates {' and '.join(equal)} came out equal, {found} on {images}"
        return [f"{words} of clients who do not train: the smallest is taken"]
    lines = list[str]()
    if len(merits) > 2 and best in (min(merits), max(merits)):
        which = "smallest" if best == min(merits) else "largest"
        lines.append(f"the best rate, {best:g}, is the {which} that was tried")
    if len(merits) > 1 and count and count < FEW:
        words = f"the best rate, {best:g}, was found on {images} of clients who do not train"
        lines.append(f"{words}, of which one is {100 / count:.1f}%")
    return lines


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


def trial_name(plan: Plan, config: Config) -> str:
    return f"{case_of(config, plan.several).label}, rate {config.client_lr:g}"
