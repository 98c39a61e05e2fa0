"""What comes back in a round: looked at and added up as it comes, so that no update waits for another.

The sum is formed as if every answer will count, as nearly always all do. Whether one counts is known at the
end alone, as its norm is held against the median of all; and a sum in float32 has its bits from who is in it,
and in what order, so nothing can be taken out of it again. Where an answer turns out not to count the sum is
thrown away. What a client sends is a function of the round and the client: those whose answers count are
played once more, and added up as they would have been without the others. Such a round takes twice as long;
every other holds one sum, whatever the number of clients.

A statistic other than the mean needs all the updates at once. They are kept for it, and so they are where
clients are poisoned on purpose, as hardly a round would be played once.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from ..messages import Update, clipped
from .inspection import Finding, Inspection
from .mean import PseudoGradient
from .server import Server


class Tally:
    """`take` each answer, in the clients' order; then `faults`, `counted` and `gradient`."""

    def __init__(
        self,
        server: Server,
        asked: Mapping[int, Tensor],  # of each client that will answer the class rows it asked for, (S,)
        counts: Mapping[int, int],  # and how many images it has
        inspection: Inspection | None,  # None: all that comes counts
        clip_norm: float | None,
        keeps: bool,  # all updates to the end
    ):
        self.server, self.asked, self.counts = server, asked, counts
        self.inspection, self.clip_norm = inspection, clip_norm
        self._findings: dict[int, Finding] = {}
        self._answers: dict[int, Update] = {}  # without their numbers, but where they are kept
        self._keeps = keeps
        self._mean = None if keeps or not asked else server.mean(list(asked.values()), list(counts.values()))
        self._sum: PseudoGradient | None = None  # of answers of which there is no more

    def take(self, client: int, update: Update) -> None:
        found = self.inspection.look(update, self.asked[client]) if self.inspection else Finding("")
        self._findings[client] = found
        if found.fault:
            self._mean = None
            return
        if self.clip_norm is not None:
            update = clipped(update, self.clip_norm)
        if self._keeps:
            self._answers[client] = update
            return
        if update.num_examples != self.counts[client]:
            self._mean = None
        if self._mean:
            self._mean.add(update)
        self._answers[client] = _without_numbers(update)

    def take_sum(self, answers: Mapping[int, Update], gradient: PseudoGradient) -> None:
        """In the place of each: those that count, without their numbers, and g of them."""
        self._findings = dict.fromkeys(answers, Finding(""))
        self._answers, self._sum = {k: _without_numbers(u) for k, u in answers.items()}, gradient

    def faults(self) -> dict[int, str]:
        """Of each client that answered what is wrong with its answer, or ""."""
        findings = list(self._findings.values())
        verdicts = [found.fault for found in findings]
        if self.inspection:
            verdicts = self.inspection.verdicts(findings, self._net_norm)
        return dict(zip(self._findings, verdicts, strict=True))

    @cached_property
    def _net_norm(self) -> float:
        """Of the net that the answers change."""
        return self.server.extractor.norm().item()

    def counted(self) -> dict[int, Update]:
        """The answers that count; their numbers are added up, and may be gone."""
        return {client: self._answers[client] for client, fault in self.faults().items() if not fault}

    def gradient(self) -> PseudoGradient | None:
        """Of those that count, one at least; None: they are to be played once more, for `again`."""
        if self._sum is not None:
            return self._sum
        counted = self.counted()
        if self._keeps:
            return self.server.aggregate(list(counted.values()))
        if self._mean is None or len(counted) < len(self.asked):
            return None
        return self._mean.gradient()

    def again(self) -> "Tally":
        """For the same answers, without those that do not count."""
        counted = self.counted()
        asked = {client: self.asked[client] for client in counted}
        counts = {client: update.num_examples for client, update in counted.items()}
        return Tally(self.server, asked, counts, None, self.clip_norm, keeps=False)


_NO_IDS, _NOTHING = torch.empty(0, dtype=torch.int64), torch.empty(0)


def _without_numbers(update: Update) -> Update:
    """Not views of them, which would keep them."""
    return replace(update, class_ids=_NO_IDS, rows=_NOTHING, extractor=_NOTHING)
