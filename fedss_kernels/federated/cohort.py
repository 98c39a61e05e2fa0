"""Who takes part in a round: the clients drawn for it, and which of them never answer."""

from functools import lru_cache

from .config import Config
from .randomness import NO_CLIENT, Purpose, generator


def draw_cohort(seed: int, round: int, attempt: int, num_clients: int, cohort: int) -> list[int]:
    """`cohort` different clients of [0, num_clients), uniformly, ascending."""
    rng = generator(seed, round, attempt, NO_CLIENT, Purpose.COHORT)
    return sorted(rng.choice(num_clients, cohort, replace=False).tolist())


def absence(config: Config, round: int, attempt: int, client: int) -> str | None:
    """Why the server never has this client's answer: "dropped", "late", or None.

    A client's time is log-normal around 1, the median client's, by `latency_spread`; it is late past
    `deadline`.
    """
    key = config.seed, round, attempt, client
    if config.dropout_rate and generator(*key, Purpose.DROPOUT).random() < config.dropout_rate:
        return "dropped"
    if config.deadline is not None:
        latency = generator(*key, Purpose.LATENCY).lognormal(0.0, config.latency_spread)
        if latency > config.deadline:
            return "late"
    return None


@lru_cache(maxsize=1)
def num_absent(config: Config, num_clients: int, round: int, attempt: int) -> int:
    """How many clients of the cohort never answer."""
    cohort = draw_cohort(config.seed, round, attempt, num_clients, config.cohort)
    return sum(absence(config, round, attempt, k) is not None for k in cohort)
