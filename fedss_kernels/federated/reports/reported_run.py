"""What a report is made of: runs, and which of them go together."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..algorithms import METHODS
from ..config import Config
from ..files.round_metrics import RoundMetrics
from ..files.summary import Summary
from ..ledger import OUTCOMES
from ..measures import Measure
from ..plan import Case, case_of

MEGABYTE = 10**6


@dataclass(frozen=True)
class Run:
    """What a report is made of: one run's settings, course and figures."""

    config: Config
    history: list[RoundMetrics]
    summary: Summary

    @property
    def updates(self) -> int:
        """Clients drawn, or that would be: what a figure per client and round divides by."""
        drawn = sum(getattr(self.summary, outcome) for outcome in OUTCOMES)
        return max(drawn, 1) * (self.summary.cohort if METHODS[self.summary.method].pooled else 1)

    @property
    def saving(self) -> float:
        """Share of all the bytes of the method's baseline that this run did not move."""
        return 1 - self.summary.traffic.total / self.summary.full_traffic.total

    @property
    def class_saving(self) -> float:
        """The same for what depends on the number of classes: class rows and ids."""
        full = self.summary.full_traffic.classification
        return 1 - self.summary.traffic.classification / full if full else 0.0


def course(run: Run) -> Measure:
    """What a run's curves show: its headline, or where that is measured at the end alone, what is so before.

    That is the first of its measures, of the headline's kind, that is measured more than once.
    """

    return next(iter(_measured_before(run)), run.summary.headline)


def beside(run: Run) -> list[Measure]:
    """What else its curves can show: measures of the same kind that are told of it too."""
    told = run.summary.measures.told
    return [each for each in _measured_before(run) if each.name in told and each != course(run)]


def _measured_before(run: Run) -> list[Measure]:
    """Its measures of the headline's kind that are measured more than once."""

    def times(name: str) -> int:
        return sum(m.measured.get(name) is not None for m in run.history)

    return [measure for measure in run.summary.measures.alike if times(measure.name) > 1]


def by_case(runs: Sequence[Run]) -> dict[Case, list[Run]]:
    """Runs that differ in their seed alone; a number of negatives counts where there are several."""
    several = len({run.config.num_negatives for run in runs if METHODS[run.summary.method].samples}) > 1
    groups: dict[Case, list[Run]] = {}
    for run in runs:
        groups.setdefault(case_of(run.config, several), []).append(run)
    return groups


def method_names(runs: Sequence[Run]) -> list[str]:
    """The methods, each once."""
    return list(dict.fromkeys(run.summary.method for run in runs))


def several_seeds(runs: Sequence[Run]) -> bool:
    return len({run.summary.seed for run in runs}) > 1
