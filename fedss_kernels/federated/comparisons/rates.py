"""Which client rate each case of a comparison takes: the best of those tried beforehand."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..config import Config
from ..plan import Case, Plan, case_of
from ..reports.reported_run import Run
from ..reports.tables import write_csv
from .jobs import Failure, OnHeard, folder_of, play_all


def best_rates(
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
            a_run = next(runs[job] for job in mine if trials[job].client_lr == best[case])
            notes += _of_the_choice(case, tried, best[case], a_run)
            notes += [f"{trial_name(plan, trials[j])} is the worst: {of.words}" for j, of in lost.items()]
    return best, notes, failed


def _of_the_choice(case: Case, tried: Mapping[float, float], best: float, run: Run) -> list[str]:
    """A line where the best rate, that of `run`, is one of equals, or another might be better."""
    equal = [f"{rate:g}" for rate in sorted(tried) if tried[rate] == tried[best]]
    if len(equal) > 1:
        headline, accuracy = run.summary.headline, run.summary.accuracy
        found = "nothing" if accuracy is None else f"{headline.column} {headline.figure(accuracy)}"
        words = (
            f"rates {' and '.join(equal)} came out equal, {found} on {run.summary.num_test_images:,} images"
        )
        return [f"{case.label}: {words} of clients who do not train: the smallest is taken"]
    if len(tried) > 2 and best in (min(tried), max(tried)):
        which = "smallest" if best == min(tried) else "largest"
        return [f"{case.label}: the best rate, {best:g}, is the {which} that was tried"]
    return []


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
