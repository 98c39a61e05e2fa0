"""A net that is trained in stages: its newest blocks, while those before rest and others are to come."""

from dataclasses import dataclass, replace

from ..config_error import ConfigError
from ..randomness import Purpose, generator
from .parts import Part, Parts
from .schedule import Settings


@dataclass(frozen=True)
class Stages:
    """Of a stem, `layers` blocks and a projection head; the stem goes with the first block.

    Stage s of n has blocks floor(L s / n) to floor(L (s + 1) / n) of L, and so it has of the rounds. The
    depth budget is of blocks that a client holds: the first, those that are trained, and of the frozen ones
    between as many as are left, drawn before anything is sent.
    """

    settings: Settings
    layers: int
    count: int

    def __post_init__(self) -> None:
        """Raises ConfigError for stages or a budget that do not fit."""
        settings, trained = self.settings, -(-self.layers // self.count)  # in a stage, at most
        for most, what in ((self.layers, "the net's blocks"), (settings.rounds, "the rounds")):
            if self.count > most:
                raise ConfigError("stages", f"expected at most {most}, {what}, got {self.count}")
        if settings.depth_budget is None:
            return
        if settings.freeze == "no":
            expected = "expected none with freeze no, as frozen blocks alone are left out"
            raise ConfigError("depth_budget", f"{expected}, got {settings.depth_budget}")
        least = trained + (self.count > 1)
        if settings.depth_budget < least:
            expected = f"expected at least {least}, the first block and those that are trained at a time"
            raise ConfigError("depth_budget", f"{expected}, got {settings.depth_budget}")

    def stage(self, round: int) -> int:
        return min(self.count - 1, round * self.count // self.settings.rounds)

    def whole(self, round: int) -> Parts:
        first, last = (self.layers * (self.stage(round) + i) // self.count for i in (0, 1))
        before = Part.FROZEN if self.settings.freeze == "yes" else Part.TRAINED
        stem = before if first else Part.TRAINED
        layers = [before] * first + [Part.TRAINED] * (last - first) + [Part.ABSENT] * (self.layers - last)
        return Parts((stem, *layers, Part.TRAINED), Part.ABSENT)

    def parts(self, round: int, attempt: int, client: int) -> Parts:
        whole = self.whole(round)
        over = sum(whole.present[1:-1]) - (self.settings.depth_budget or self.layers)
        if over <= 0:
            return whole
        between = [i for i, part in enumerate(whole.blocks) if i > 1 and part is Part.FROZEN]
        rng = generator(self.settings.seed, round, attempt, client, Purpose.DEPTH)
        dropped = rng.choice(between, over, replace=False).tolist()
        return replace(whole, blocks=[Part.ABSENT if i in dropped else p for i, p in enumerate(whole.blocks)])


def by_stage(settings: Settings, num_blocks: int) -> Stages:
    """Those that are asked for, or one for each block."""
    layers = num_blocks - 2
    return Stages(settings, layers, settings.stages or layers)
