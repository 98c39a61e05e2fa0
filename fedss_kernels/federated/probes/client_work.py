"""What clients compute in their rounds, by a model of one: a simulation's memory is not a client's."""

from collections.abc import Sequence

import torch

from ..algorithms.parts import Part, Parts
from ..clients.player import Player
from ..ledger import Entry, Work
from .stage_costs import StageCosts, end_to_end, measure


class ClientWork:
    """Of a run's clients. A step is measured as it is first asked for, once for each kind.

    A kind is the sizes of the blocks that a client has, which of them it trains, and the images in a batch.
    Which blocks of one size a depth budget leaves out makes no difference.
    """

    def __init__(self, player: Player):
        self.player = player
        self._measured = dict[object, StageCosts]()

    def of(self, round: int, attempt: int, client: int) -> Work:
        """Of its largest batch, and of all: as many multiply-adds for each image that it trains on."""
        config, images = self.player.config, self.player.num_images(client)
        largest = min(config.batch_size, images)
        step = self._step(self.player.schedule.parts(round, attempt, client), largest)
        costs = step.costs
        alone = images % config.batch_size == 1  # in its batch: left out
        trained = len(self.player.client.schedule) * (images - alone)
        of_all = costs.multiply_adds * trained // largest
        return Work(step.held, costs.saved, costs.peak, costs.multiply_adds, of_all)

    def _step(self, parts: Parts, images: int) -> StageCosts:
        sizes = self.player.extractor.block_sizes
        there = [each for each in zip(sizes, parts.blocks, strict=True) if each[1] is not Part.ABSENT]
        kind = images, tuple(there)
        if kind not in self._measured:
            self._measured[kind] = self._measure(parts, images)
        return self._measured[kind]

    def _measure(self, parts: Parts, images: int) -> StageCosts:
        """On images in two views, which cost what any others would."""
        extractor, pixels = self.player.extractor, self.player.data.images[:images]
        views = extractor.as_input(torch.cat([pixels, pixels]))
        if self.player.method.by_round:
            return measure(extractor.module, views, [parts])[0]
        return end_to_end(extractor.module, views)


def in_a_round(entries: Sequence[Entry]) -> dict[str, float]:
    """The measures OF_A_STEP of a round, by name: of the client that needs most, and the sum of all."""
    works = [entry.work for entry in entries if entry.work is not None]
    if not works:
        return {}
    return {
        "client_memory": max(work.step_held + work.step_peak for work in works) / 1e6,
        "client_saved": max(work.step_saved for work in works) / 1e6,
        "client_multiply_adds": max(work.step_multiply_adds for work in works) / 1e9,
        "all_multiply_adds": sum(work.multiply_adds for work in works) / 1e9,
    }
