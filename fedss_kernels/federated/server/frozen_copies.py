"""Frozen blocks that clients have from earlier rounds, where they keep what they were sent."""

from collections import defaultdict

from ..algorithms.parts import Part
from ..algorithms.schedule import Schedule
from ..cohort import draw_cohort
from ..config import Config


class FrozenCopies:
    """Worked out from the cohorts, and so the same in a run that is resumed; nobody stores it.

    A block that is frozen stays as it is, so a copy serves to the end. Of a round that was tried again the
    clients of the first attempt are counted alone: others are sent what they may have had.
    """

    def __init__(self, config: Config, schedule: Schedule, num_clients: int):
        self.config, self.schedule, self.num_clients = config, schedule, num_clients
        self._rounds, self._held = 0, defaultdict[int, set[int]](set)

    def held(self, client: int, round: int) -> set[int]:
        """Places of the blocks that it was sent frozen before this round; none where nothing is kept.

        Rounds are asked for in order: those that are done are gone through once.
        """
        if self.config.frozen != "kept":
            return set()
        for done in range(self._rounds, round):
            for k in draw_cohort(self.config.seed, done, 0, self.num_clients, self.config.cohort):
                parts = enumerate(self.schedule.parts(done, 0, k).blocks)
                self._held[k] |= {place for place, part in parts if part is Part.FROZEN}
        self._rounds = max(self._rounds, round)
        return self._held[client]
