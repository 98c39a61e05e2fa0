"""Nearest neighbours: what the features of a net tell apart without training anything on them.

Wu, Xiong, Yu and Lin, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018,
section 3.4.
"""

import math

import torch
from torch import Tensor

from ..metrics import BLOCK, directions
from .rows import blocks, check_rows, finite, share

NEIGHBOURS = 50
TEMPERATURE = 0.1


def knn(
    bank: Tensor,  # (N, F)
    bank_labels: Tensor,  # (N,) int64
    queries: Tensor,  # (T, F)
    query_labels: Tensor,  # (T,) int64
    *,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    centred: bool = True,  # whether the bank's mean is taken off first
    block: int = BLOCK,  # numbers in one block of similarities
) -> float:
    """The share of queries that the nearest rows of the bank name rightly.

        found = argmax_c  sum over the k rows b most like q, of class c, of e^(cos(q, b) / T)

    Of equals it is the first class. All rows vote where there are fewer than k. A query that is not finite is
    a miss, and such a row of the bank no neighbour. Raises ValueError for shapes that do not go together,
    k < 1, or a temperature that is not greater than 0.
    """
    check_rows(bank, bank_labels, queries, query_labels)
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: expected a finite number greater than 0, got {temperature:g}")
    kept, there = finite(bank), finite(queries)
    bank, bank_labels = bank[kept], bank_labels[kept]
    if not len(bank):
        return 0.0
    queries = torch.where(there[:, None], queries, 0.0)
    if centred:
        mean = bank.mean(dim=0)
        bank, queries = bank - mean, queries - mean
    (bank, _), (queries, _) = directions(bank), directions(queries)
    classes, voters = bank_labels.unique(return_inverse=True)
    found = torch.empty_like(query_labels)
    for rows in blocks(len(queries), max(len(bank), len(classes)), block):
        near = torch.mm(queries[rows], bank.T).topk(min(k, len(bank)), dim=1)
        weights = ((near.values - near.values[:, :1]).double() / temperature).exp()  # of the nearest 1
        votes = weights.new_zeros(len(weights), len(classes))
        votes.scatter_add_(1, voters[near.indices], weights)
        found[rows] = classes[votes.argmax(dim=1)]
    return share(found, query_labels, there)
