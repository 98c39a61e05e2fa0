"""What a run with noise has given away of who took part: epsilon, for a delta.

Whether the data of one client were others changes the probability of any outcome by a factor of at most
e^epsilon, but for delta. A round is the Gaussian mechanism on K of N clients, drawn without replacement.
Where one client's data are replaced the sum moves by up to 2 S, so sigma S of noise is sigma / 2 of that. The
rounds are composed by Renyi differential privacy, by Google's library dp-accounting (Wang, Balle and
Kasiviswanathan, "Subsampled Renyi Differential Privacy and Analytical Moments Accountant", AISTATS 2019).
"""

from functools import cache
from importlib.util import find_spec

from .config import Config, ConfigError
from .measures import Measure, declare

EPSILON = declare(
    Measure(
        "epsilon",
        "ε",
        "what the rounds so far give away of who took part",
        "The probability of any outcome changes by a factor of at most e^ε, but for a small δ, where the "
        "data of one client are others.",
        of="of the rounds so far",
        share=False,
        more_is_better=False,
    )
)


def delta_of(config: Config, num_clients: int) -> float:
    """Its own, or one below 1 / N: of a client at random something may be known for sure with that chance."""
    return config.delta if config.delta is not None else num_clients**-1.1


def epsilon(config: Config, num_clients: int, rounds: int) -> float:
    """After so many rounds of a run with noise."""
    if rounds == 0:
        return 0.0
    delta = delta_of(config, num_clients)
    return _epsilon(config.noise_multiplier, num_clients, config.cohort, rounds, delta)


@cache
def _epsilon(multiplier: float, num_clients: int, cohort: int, rounds: int, delta: float) -> float:
    check()
    import dp_accounting as dp
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    round = dp.SampledWithoutReplacementDpEvent(num_clients, cohort, dp.GaussianDpEvent(multiplier / 2))
    accountant.compose(dp.SelfComposedDpEvent(round, rounds))
    return float(accountant.get_epsilon(delta))


def check() -> None:
    """Raises ConfigError where dp-accounting is not installed."""
    if find_spec("dp_accounting") is None:
        needs = "needs dp-accounting, which counts epsilon: pip install 'fedss-kernels[dp]'"
        raise ConfigError("noise_multiplier", needs)
