"""Who is in a round of split learning, and for how long."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..cohort import draw_cohort
from ..config import Config
from ..randomness import Purpose, generator


@dataclass(frozen=True)
class Cohort:
    """Clients that were drawn, ascending, with the steps that each takes part in."""

    attempt: int
    steps: Mapping[int, int]  # client -> so many, from the first on; as many as there are: it stays

    @property
    def clients(self) -> list[int]:
        return list(self.steps)

    def staying(self, steps: int) -> list[int]:
        """Who is there after so many."""
        return [client for client, there in self.steps.items() if there >= steps]

    @classmethod
    def draw(cls, config: Config, num_clients: int, round: int, attempt: int, steps: int) -> "Cohort":
        """A share `dropout_rate` of them is gone after some steps, uniform from none to all but one."""
        drawn = draw_cohort(config.seed, round, attempt, num_clients, config.cohort)
        return cls(attempt, {k: _there(config, round, attempt, k, steps) for k in drawn})


def _there(config: Config, round: int, attempt: int, client: int, steps: int) -> int:
    if not config.dropout_rate:
        return steps
    rng = generator(config.seed, round, attempt, client, Purpose.DROPOUT)
    return int(rng.integers(steps)) if rng.random() < config.dropout_rate else steps
