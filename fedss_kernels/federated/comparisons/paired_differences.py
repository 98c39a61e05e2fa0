"""Methods apart, client by client: the differences of what their models are worth to each."""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..fine_tuning import Personal, Tuning
from ..reports.mean_sd import mean_sd

INTERVAL = statistics.NormalDist().inv_cdf(0.975)  # standard errors on either side of a mean


@dataclass(frozen=True)
class Measured:
    """One run's clients, fine-tuned in one way."""

    run: str  # its folder
    method: str  # as tables have it
    seed: int
    tuning: Tuning
    people: Sequence[Personal]
    name: str = ""  # the method's, by which it is drawn

    def values(self, name: str) -> list[float]:
        """One of Personal.accuracies, by client."""
        return [each.accuracies[name] for each in self.people]


@dataclass(frozen=True)
class Difference:
    first: str
    second: str
    seeds: int  # that both have
    clients: int
    of: dict[str, tuple[float, float | None]]  # (mean of first - second, its standard error), by accuracy


def by_method(found: Sequence[Measured]) -> dict[str, list[Measured]]:
    """The seeds of each method, and rate where there are several, by the name of the two."""
    several = len({each.tuning.rate for each in found}) > 1
    groups: dict[str, list[Measured]] = {}
    for each in found:
        name = f"{each.method}, rate {each.tuning.rate:g}" if several else each.method
        groups.setdefault(name, []).append(each)
    return groups


def differences(found: Sequence[Measured]) -> list[Difference]:
    """Of every two methods, at one rate, that have a seed in common."""
    return [_difference(first, second, pairs) for first, second, pairs in _paired(found) if pairs]


def unpaired(found: Sequence[Measured]) -> list[tuple[str, str]]:
    """Every two methods, at one rate, that have no seed in common, so no difference."""
    return [(first, second) for first, second, pairs in _paired(found) if not pairs]


def _paired(found: Sequence[Measured]) -> Iterator[tuple[str, str, list[tuple[Measured, Measured]]]]:
    """Every two methods, at one rate, and their runs of one seed."""
    for (first, some), (second, others) in itertools.combinations(by_method(found).items(), 2):
        if some[0].tuning.rate == others[0].tuning.rate:
            by_seed = {each.seed: each for each in others}
            yield first, second, [(each, by_seed[each.seed]) for each in some if each.seed in by_seed]


def _difference(first: str, second: str, pairs: Sequence[tuple[Measured, Measured]]) -> Difference:
    runs = [run for pair in pairs for run in pair]
    by_client = {id(run): {each.client: each.accuracies for each in run.people} for run in runs}
    common = sorted(set.intersection(*(set(clients) for clients in by_client.values())))
    of = {}
    for name in runs[0].people[0].accuracies:
        each = [
            statistics.fmean(
                by_client[id(a)][client][name] - by_client[id(b)][client][name] for a, b in pairs
            )
            for client in common
        ]
        mean, sd = mean_sd(each)
        of[name] = mean, None if sd is None else sd / len(each) ** 0.5
    return Difference(first, second, len(pairs), len(common), of)
