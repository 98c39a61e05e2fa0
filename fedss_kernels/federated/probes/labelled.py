"""Which images features are measured on: those whose labels are known, and a few while training goes on."""

import torch
from torch import Tensor

from ..randomness import NO_CLIENT, Purpose, generator


def labelled(labels: Tensor, share: float, seed: int) -> Tensor:  # (N,) -> (n,) int64, ascending
    """Rows of this share of each class, one at least, drawn by the seed."""
    rng = generator(seed, 1, 0, NO_CLIENT, Purpose.PROBE)
    kept = list[Tensor]()
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        few = rng.permutation(len(rows))[: max(1, round(share * len(rows)))]
        kept.append(rows[few])
    return torch.cat(kept).sort().values


def some(number: int, most: int, seed: int, stream: int) -> Tensor:  # (n,) int64, ascending
    """So many rows of a number of them at most, drawn by the seed."""
    rng = generator(seed, 2, stream, NO_CLIENT, Purpose.PROBE)
    return torch.from_numpy(rng.permutation(number)[:most]).sort().values
