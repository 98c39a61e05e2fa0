"""The clients' rate in a round."""

import math

from .config import Config


def learning_rate(config: Config, round: int) -> float:
    """The clients' rate in a round, from 0: a linear rise to client_lr over warmup_rounds, then the decay.

    A linear or cosine decay would reach 0 in the round after the last. A decay by steps counts all rounds R,
    those of the warm-up too: after that, 1/10 from round floor(R / 2) on, 1/100 from floor(3 R / 4), neither
    in the first round, 0.
    """
    warmup = config.warmup_rounds
    if round < warmup:
        return config.client_lr * (round + 1) / warmup
    done = (round - warmup) / max(1, config.rounds - warmup)
    steps = sum(round >= max(1, quarters * config.rounds // 4) for quarters in (2, 3))
    decay = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "step": (1.0, 0.1, 0.01)[steps],
    }
    return config.client_lr * decay[config.lr_decay]
