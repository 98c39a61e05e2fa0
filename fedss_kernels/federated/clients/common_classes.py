"""The class set that a cohort has in common: the classes of all its clients, and the same others for each.

A client that asks for rows of its own shows the server which classes it holds, however it hides them among
others: they are there again in the next round. Where the cohort has one class set the server needs the union
of the clients' classes alone, and that a secure sum over all the classes gives it: each client adds a number
of chance at those that it holds, or 1 where rows that few hold are not to move, and holders are counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...class_sets import draw_negatives
from ..cohort import absence, draw_cohort
from ..config import Config
from ..randomness import NO_CLIENT, Purpose, generator


@dataclass(frozen=True)
class CommonClasses:
    """The classes U of a cohort's clients and others N, uniform from all that are not in U.

    As a class set: those of U have the expected count 1, those of N |N| / (C - |U|), for every client. For
    given U, whatever it depends on,

        E_N [ sum_{j in U} e^o_j + (C - |U|) / |N| sum_{j in N} e^o_j ] = sum_j e^o_j,

    the denominator over all C classes: so it is right on average, as that of a class set of one's own is.
    """

    held: Tensor  # U, ascending
    holders: Tensor  # of each of U how many clients have it
    negatives: Tensor  # N
    absent: int  # clients of the cohort that never answer

    def few(self, holders: int) -> Tensor:
        """Those of U that fewer clients have."""
        return self.held[self.holders < holders]


class CommonClassSets:
    """Of each round, as every process finds it by itself."""

    def __init__(self, config: Config, num_classes: int, num_clients: int, held: Callable[[int], Tensor]):
        """held: client -> its classes (P,)."""
        self.config, self.num_classes, self.num_clients = config, num_classes, num_clients
        self.held = held
        self._last: tuple[tuple[int, int], CommonClasses] | None = None

    def of(self, round: int, attempt: int) -> CommonClasses:
        if self._last is None or self._last[0] != (round, attempt):
            config = self.config
            cohort = draw_cohort(config.seed, round, attempt, self.num_clients, config.cohort)
            self._last = (round, attempt), self.among(cohort, round, attempt)
        return self._last[1]

    def among(self, cohort: Sequence[int], round: int, attempt: int) -> CommonClasses:
        held, holders = torch.cat([self.held(k) for k in cohort]).unique(return_counts=True)
        absent = sum(absence(self.config, round, attempt, k) is not None for k in cohort)
        return CommonClasses(held, holders, self.others(held, round, attempt), absent)

    def others(self, held: Tensor, round: int, attempt: int) -> Tensor:
        """N, drawn for this U."""
        rng = generator(self.config.seed, round, attempt, NO_CLIENT, Purpose.COMMON_NEGATIVES)
        return draw_negatives(self.num_classes, held, self.config.num_negatives, rng)

    def told(self, round: int, attempt: int, common: CommonClasses) -> None:
        """Where the classes of clients are not known here: what the round's are, from a secure sum."""
        self._last = (round, attempt), common
