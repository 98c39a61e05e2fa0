"""How good the embeddings are: top-1 and MAP@R, in blocks: memory does not grow with T x T or T x C."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .row_table import RowTable

BLOCK = 2**22  # numbers in one block of similarities: 16 MiB of float32


def top1(
    embeddings: Tensor,  # (T, D)
    weight: Tensor | RowTable,  # (C, D)
    labels: Tensor,  # (T,) int64 in [0, C)
    block: int = BLOCK,
) -> float:
    """The share of rows whose largest cosine with a class row is their own class's; of equals the first."""
    embeddings = normalize(embeddings, dim=1)
    best = embeddings.new_full((len(embeddings),), -torch.inf)
    predicted = torch.zeros_like(labels)
    for first, classes in _blocks(weight, max(1, block // max(1, len(embeddings)))):
        cosine, place = (embeddings @ normalize(classes, dim=1).T).max(dim=1)
        better = cosine > best
        best = torch.where(better, cosine, best)
        predicted = torch.where(better, place + first, predicted)
    return (predicted == labels).double().mean().item()


def map_at_r(
    embeddings: Tensor,  # (T, D)
    labels: Tensor,  # (T,) int64
    r: int = 10,
    block: int = BLOCK,
) -> float:
    """MAP@R, Eq. 9 of the FedSS paper: every row queries all the others by normalised Euclidean distance.

        mean over queries of (1/R) sum_{i<=R} P(i)
        P(i) = (right ones among the first i) / i if the i-th is right, else 0

    A query with fewer than R others still divides by R. Raises ValueError unless there are two rows.
    """
    if len(embeddings) < 2:
        raise ValueError(f"map_at_r: expected at least 2 embeddings, got {len(embeddings)}")
    unit = normalize(embeddings, dim=1)
    squared = unit.square().sum(dim=1)  # 1, or 0 for a zero embedding
    total = 0.0
    for first, queries in _blocks(unit, max(1, block // len(unit))):
        nearness = 2 * (queries @ unit.T) - squared  # |query|^2 - distance^2
        own = torch.arange(len(queries))
        nearness[own, own + first] = -torch.inf  # a query does not find itself
        found = nearness.topk(min(r, len(unit) - 1), dim=1).indices
        right = (labels[found] == labels[first : first + len(queries), None]).double()
        precision = right.cumsum(dim=1) / torch.arange(1, found.shape[1] + 1)
        total += (precision * right).sum().item() / r
    return total / len(unit)


def _blocks(rows: Tensor | RowTable, size: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of consecutive blocks."""
    return ((first, rows[first : first + size]) for first in range(0, len(rows), size))
