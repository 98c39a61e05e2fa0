"""Every random choice of a run, as a pure function of (seed, round, attempt, client, purpose).

No generator is carried from one draw to the next, so results depend neither on the order in which clients are
played nor on how often a run was stopped and resumed.
"""

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a draw is for. The numbers are part of every seeded result: add new ones, never renumber."""

    COHORT = 0
    NEGATIVES = 1
    BATCHES = 2  # the order in which a client goes through its images
    MODEL = 3  # whatever the model itself draws in training, such as dropout
    AUGMENTATION = 4  # how a client's images are shifted
    DROPOUT = 5  # whether a client never answers
    LATENCY = 6  # how long a client takes
    POISON = 7  # whether a client sends rubbish, and what
    SPREADOUT = 8  # the rows whose neighbours the server looks at
    STICKY_NEGATIVES = 10  # those that a client asks for in every round
    NOISE = 9  # the batches that gradient noise is measured on
    PERSONALISE = 11  # how a client goes through its images as it fine-tunes the model, and changes them
    PROJECTION = 12  # a projection head as it begins
    COMMON_NEGATIVES = 14  # those that all clients of a cohort have
    SECURE_SUM = 15  # how what a client adds to a sum is rounded
    DEPTH = 13  # the frozen blocks that a client does without
    BOTTLENECK = 40  # the layers at a narrow cut
    HARDEN = 41  # what a server knows that prepares a half, and whom it trains against
    INVERSION = 42  # what an attacker knows, and is
    QUEUE = 30  # the keys that a queue begins with
    HEAD = 31  # the layers after a net that its keys come from
    PROBE = 20  # which images features are measured on, and how a net is fine-tuned on them


NO_CLIENT = 0  # for draws that belong to the round and not to a client


def generator(seed: int, round: int, attempt: int, client: int, purpose: Purpose) -> np.random.Generator:
    """A fresh counter-based generator (Philox) for one choice; equal arguments give equal streams.

    All arguments are non-negative integers of any size.
    """
    key = np.random.SeedSequence(seed, spawn_key=(int(purpose), round, attempt, client))
    return np.random.Generator(np.random.Philox(key))


def initial_rows(
    seed: int,  # in [0, 2**64)
    class_ids: Tensor,  # (S,) int64
    dim: int,
    scale: float,
) -> Tensor:  # (S, D) float32
    """Rows of the initial class matrix: `scale` times standard normals, row j a pure function of (seed, j).

    Entry (j, c) comes from a hash of (seed, j, c // 2) alone, by Box-Muller: with the hash's two halves as
    u in (0, 1] and v in [0, 1), entries 2p and 2p + 1 are sqrt(-2 log u) times cos(2 pi v) and sin(2 pi v).
    So any rows can be drawn at any time, in any order, and O(S D) of work is all it takes.
    """
    row_key = splitmix64(splitmix64(np.array([seed], dtype=np.uint64)) ^ class_ids.numpy().astype(np.uint64))
    pair = np.arange((dim + 1) // 2, dtype=np.uint64)
    bits = splitmix64(row_key[:, None] + pair * _GOLDEN)  # (S, pairs), wrapping modulo 2**64
    radius = np.sqrt(-2.0 * np.log(((bits >> np.uint64(32)).astype(np.float64) + 1.0) * 2.0**-32))
    angle = (bits & np.uint64(2**32 - 1)).astype(np.float64) * (2.0 * np.pi * 2.0**-32)
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(
        len(class_ids), 2 * len(pair)
    )
    return torch.from_numpy((scale * normal[:, :dim]).astype(np.float32))


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Steele, Lea and Flood's 64-bit mixer (OOPSLA 2014), element by element: a bijection of uint64."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
