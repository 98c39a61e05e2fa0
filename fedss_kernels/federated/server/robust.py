"""Averages that a few wrong values do not move: of each coordinate by itself, over the clients, unweighted.

Yin, Chen, Kannan and Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
ICML 2018.

What is not finite is no value: the others have the statistic that they have without it, as otherwise a NaN
would pass for the largest of them.
"""

import functools
import math
from collections.abc import Callable
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor

Statistic = Callable[[Tensor], Tensor]  # (..., K, N) of K clients -> (..., N)
P = ParamSpec("P")


def _of_finite(
    statistic: Callable[Concatenate[Tensor, P], Tensor],
) -> Callable[Concatenate[Tensor, P], Tensor]:
    """The statistic of each coordinate's finite values; NaN where it has none."""

    @functools.wraps(statistic)
    def of_finite(values: Tensor, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        finite = values.isfinite()
        if finite.all():
            return statistic(values, *args, **kwargs)
        ordered = values.where(finite, torch.nan).sort(-2).values.transpose(-2, -1)  # NaN last
        counts = finite.sum(-2)
        out = values.new_full(counts.shape, torch.nan)
        for count in counts.unique().tolist():
            if count:
                here = counts == count
                out[here] = statistic(ordered[here][:, :count].T, *args, **kwargs)
        return out

    return of_finite


@_of_finite
def median(values: Tensor) -> Tensor:  # (..., K, N) -> (..., N)
    """Of an even number the mean of the two in the middle."""
    K = values.shape[-2]
    ordered = values.sort(-2).values
    return (ordered[..., (K - 1) // 2, :] + ordered[..., K // 2, :]) / 2


@_of_finite
def trimmed_mean(values: Tensor, trim: float) -> Tensor:  # (..., K, N) -> (..., N)
    """The mean without the floor(trim * K) smallest and as many of the largest; trim in [0, 0.5)."""
    K = values.shape[-2]
    cut = math.floor(trim * K + 1e-9)  # 0.29 * 100 is a little less than 29
    return values.sort(-2).values[..., cut : K - cut, :].mean(-2)


def by_row(statistic: Statistic, rows: Tensor, places: Tensor, num_places: int) -> Tensor:
    """(U, N) the statistic of the rows (M, N) of each place; places (M,) in [0, U), each at least once."""
    holders = torch.bincount(places, minlength=num_places)
    grouped, first = places.argsort(stable=True), holders.cumsum(0) - holders
    out = rows.new_empty(num_places, rows.shape[1])
    for count in holders.unique().tolist():
        alike = (holders == count).nonzero()[:, 0]
        out[alike] = statistic(rows[grouped[first[alike][:, None] + torch.arange(count)]])
    return out
