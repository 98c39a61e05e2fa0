"""Client-driven class sets: the classes a client asks the server for, and the correction of each."""

import math

import numpy as np
import torch
from torch import Tensor


def draw_negatives(
    num_classes: int, positives: Tensor, num_negatives: int, rng: np.random.Generator
) -> Tensor:
    """min(m, C - |P|) classes, uniform without replacement from [0, C) outside `positives`, ascending.

    >>> draw_negatives(5, torch.tensor([1, 3]), 10, np.random.default_rng(0))
    tensor([0, 2, 4])
    """
    held = set(positives.tolist())
    others = [j for j in range(num_classes) if j not in held]
    m = min(num_negatives, len(others))
    return torch.tensor(sorted(rng.choice(others, m, replace=False).tolist() if m else []), dtype=torch.int64)


def class_set(num_classes: int, positives: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(class_ids, is_negative, log_expected_count) of S = P u N, ascending.

    A positive is always in the set, so its expected count is 1 and the logarithm 0; a negative's is |N| / (C
    - |P|).
    """
    P, N = set(positives.tolist()), set(negatives.tolist())
    assert not P & N, "a negative is a class that the client does not hold"
    class_ids = sorted(P | N)
    log_count = math.log(len(N) / (num_classes - len(P))) if N else 0.0
    is_negative = [j in N for j in class_ids]
    return (
        torch.tensor(class_ids, dtype=torch.int64),
        torch.tensor(is_negative, dtype=torch.bool),
        torch.tensor([log_count if negative else 0.0 for negative in is_negative], dtype=torch.float64),
    )
