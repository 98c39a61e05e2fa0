"""How good embeddings are: top-1, MAP@R and recall, in blocks: memory does not grow with T x T or T x C."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .row_table import RowTable

R = 10  # nearest others that a retrieval looks at
BLOCK = 2**22  # numbers in one block of similarities: 16 MiB of float32


@dataclass(frozen=True)
class Accuracies:
    """Shares in [0, 1]; None: not measured."""

    top1: float | None = None
    map_at_10: float | None = None
    recall_at_1: float | None = None
    recall_at_10: float | None = None


@dataclass(frozen=True)
class Retrieval:
    map_at_r: float
    recall_at_1: float
    recall_at_r: float


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


def retrieval(
    embeddings: Tensor,  # (T, D)
    labels: Tensor,  # (T,) int64
    r: int = R,
    block: int = BLOCK,
) -> Retrieval:
    """MAP@R and recall, where every row queries all the others by normalised Euclidean distance.

        MAP@R    = mean over queries of (1/R) sum_{i<=R} P(i)      (Eq. 9 of the FedSS paper)
        P(i)     = (right ones among the first i) / i if the i-th is right, else 0
        recall@k = share of queries with a right one among their first k

    A query with fewer than R others still divides by R. Raises ValueError unless there are two rows.
    """
    if len(embeddings) < 2:
        raise ValueError(f"retrieval: expected at least 2 embeddings, got {len(embeddings)}")
    unit = normalize(embeddings, dim=1)
    unit = unit - unit.mean(dim=0)  # as far apart as before; products of nearly equal ones would cancel
    squared = unit.square().sum(dim=1)
    total, found_at_1, found_at_r = 0.0, 0, 0
    for first, queries in _blocks(unit, max(1, block // len(unit))):
        nearness = 2 * (queries @ unit.T) - squared  # |query|^2 - distance^2
        own = torch.arange(len(queries))
        nearness[own, own + first] = -torch.inf  # a query does not find itself
        found = nearness.topk(min(r, len(unit) - 1), dim=1).indices
        right = (labels[found] == labels[first : first + len(queries), None]).double()
        precision = right.cumsum(dim=1) / torch.arange(1, found.shape[1] + 1)
        total += (precision * right).sum().item() / r
        found_at_1 += int(right[:, 0].sum())
        found_at_r += int(right.any(dim=1).sum())
    return Retrieval(total / len(unit), found_at_1 / len(unit), found_at_r / len(unit))


def _blocks(rows: Tensor | RowTable, size: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of consecutive blocks."""
    return ((first, rows[first : first + size]) for first in range(0, len(rows), size))
