"""Whole numbers cut in proportion."""

import numpy as np


def apportion(
    totals: np.ndarray,  # (G,) int64, of each group
    group: np.ndarray,  # (N,) int64 in [0, G)
    weights: np.ndarray,  # (N,) int64, at least 0
    rng: np.random.Generator,
) -> np.ndarray:  # (N,) int64
    """Each group's total cut among its members in proportion to their weights, by largest remainder.

    Every part is within one of its exact share, and none is more than its weight where the total is no more
    than the weights. Equal remainders are told apart by a draw. A group without weight gives nothing.
    """
    sums = np.zeros(len(totals), dtype=np.int64)
    np.add.at(sums, group, weights)
    share = totals[group] * weights
    parts = share // sums[group].clip(1)
    left = np.where(sums > 0, totals, 0)
    np.subtract.at(left, group, parts)
    order = np.lexsort((rng.random(len(group)), -(share % sums[group].clip(1)), group))
    sizes = np.bincount(group, minlength=len(totals))
    place = np.arange(len(group)) - (np.cumsum(sizes) - sizes)[group[order]]  # among its group's
    parts[order] += place < left[group[order]]
    return parts
