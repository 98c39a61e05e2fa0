"""By what a resumed run knows that a method has its parts where it had them: a checksum, as numbers.

Unlike a method's other functions (method_numbers.py) a schedule can be asked about the run itself.
"""

import hashlib

from ..algorithms.parts import Parts
from ..algorithms.schedule import Schedule
from ..cohort import draw_cohort
from ..config import Config

_ATTEMPTS = 2  # at a round that are looked at
_CLIENTS = 8  # of a cohort that are asked about, others in each round: to ask about all of many takes minutes


def schedule_numbers(schedule: Schedule, config: Config, num_clients: int, *, by_round: bool) -> list[float]:
    """Of every round, and of clients in its cohorts; of the first where no round differs from it.

    Raises ConfigError for what cannot be.
    """
    digest = hashlib.sha256()

    def note(parts: Parts) -> None:
        digest.update(repr([part.name for part in (*parts.blocks, parts.rows)]).encode())

    for round in range(config.rounds) if by_round else (0,):
        digest.update(repr(schedule.stage(round)).encode())
        note(schedule.whole(round))
        for attempt in range(_ATTEMPTS) if by_round else ():
            cohort = draw_cohort(config.seed, round, attempt, num_clients, config.cohort)
            for place in range(round, round + min(_CLIENTS, len(cohort))):
                note(schedule.parts(round, attempt, cohort[place % len(cohort)]))
    return [float(byte) for byte in digest.digest()]
