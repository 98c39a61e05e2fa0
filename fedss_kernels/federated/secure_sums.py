"""Sums of which the server learns nothing but the sum: what they do to numbers, and what they move.

Each client adds to its integers a mask of its own and one for each other client; modulo 2^32 those cancel in
the sum, and shares of keys, which clients hold for each other, take out what clients leave behind who never
answer (SecAgg: Bonawitz et al., CCS 2017; SecAgg+: Bell et al., CCS 2020). `flower` does so. In one process
there is nobody to hide numbers from, so none is masked: what is left are the integers, which this makes of
numbers, and the bytes, as Flower's SecAgg+ has them. With w = n_k / max n and u a change of client k,

    q = (w u + 8) 2^22 / 16, rounded up or down by chance, so that its mean is exact, each of them 4 bytes
    sum_k w u = 16 / 2^22 sum_k q - 8 K

The error of one client in w u is below 16 / 2^22 = 3.8e-6, of mean 0. A u outside [-8, 8] does not fit.
"""

import numpy as np
import torch
from torch import Tensor

from .ledger import ID_BYTES, Kind, Traffic, declare

RANGE, LEVELS, MODULUS = 8.0, 2**22, 2**32
MOST_CLIENTS = MODULUS // LEVELS - 1  # whose sum is below the modulus
INTEGER_BYTES = 4
# Of a public key (P-384), of a share of a mask's seed and of a private key, and of the two of them encrypted.
KEY_BYTES, SEED_SHARE_BYTES, KEY_SHARE_BYTES, SHARES_BYTES = 215, 52, 324, 612

declare(Kind("union", "the sum that finds the cohort's classes", ("down", "up"), by_class=True))
declare(Kind("shares", "keys and shares of the secure sums", ("down", "up"), by_class=False))
SUM_FLOWS = ("down_shares", "up_shares")  # of any sum, beside what is added
FLOWS = ("down_union", "up_union", *SUM_FLOWS)


def fits(numbers: Tensor) -> bool:
    """Whether they are in [-8, 8]; NaN is not."""
    return bool((numbers.abs() <= RANGE).all())


def quantised(numbers: Tensor, weight: float, rng: np.random.Generator) -> Tensor:
    """float32: what the sum has of numbers in [-8, 8] that weigh `weight`, in (0, 1]."""
    levels = (numbers.to(torch.float64) * weight + RANGE) * (LEVELS / (2 * RANGE))
    chance = torch.from_numpy(rng.random(levels.shape))
    whole = (levels + chance).floor_()
    return (whole * (2 * RANGE / LEVELS) - RANGE).div_(weight).to(torch.float32)


def integers(rounded: Tensor, weight: float) -> Tensor:
    """int64: the q of what was `quantised`, exactly: float32 puts w u less than 2^-21 off, 1/8 of a level."""
    levels = (rounded.to(torch.float64) * weight + RANGE) * (LEVELS / (2 * RANGE))
    return levels.round_().to(torch.int64)


def mean(total: Tensor, clients: int, weight: float) -> Tensor:
    """float32: sum_k w_k u_k / sum_k w_k, of sum_k q_k over so many clients who weigh so much together."""
    return (total.to(torch.float64) * (2 * RANGE / LEVELS) - RANGE * clients).div_(weight).to(torch.float32)


def traffic(num_classes: int, num_ids: int, clients: int, absent: int, *, answers: bool) -> Traffic:
    """Of one of `clients` that find their class set, num_ids, by a secure sum and add changes by another.

    The first is over num_classes integers. Those of the second are the changes, counted there. `absent`
    clients never answer in the second; one who does not `answer` is one of them.

    >>> traffic(540, 60, 16, 0, answers=True).bytes
    {'down_union': 480, 'up_union': 2160, 'down_shares': 31260, 'up_shares': 20884}
    """
    union = Traffic({"down_union": ID_BYTES * num_ids, "up_union": INTEGER_BYTES * num_classes})
    return union + of_one_sum(clients, 0, answers=True) + of_one_sum(clients, absent, answers=answers)


def of_one_sum(clients: int, absent: int, *, answers: bool) -> Traffic:
    """Keys and shares of one of `clients`, of whom `absent` never answer: one who does not is one of them."""
    others = clients - 1
    unmasking = (clients - absent) * SEED_SHARE_BYTES + absent * KEY_SHARE_BYTES
    sent = 2 * KEY_BYTES + others * SHARES_BYTES + unmasking * answers
    return Traffic({"down_shares": others * (2 * KEY_BYTES + SHARES_BYTES), "up_shares": sent})
