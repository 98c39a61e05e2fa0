"""How good embeddings are: top-1, MAP@R and recall, in blocks: memory does not grow with T x T or T x C.

A row with a number that is not finite, as of a net that divides by the spread of a blank image, has no
direction. It is a miss, counted and said; all the others have what they would have without it.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .server.row_table import RowTable

SIMILARITIES = ("cosine", "dot")
R = 10  # nearest others that a retrieval looks at
BLOCK = 2**22  # numbers in one block of similarities: 16 MiB of float32
NOTHING = -1  # what a row without a direction is taken for
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retrieval:
    map_at_r: float
    recall_at_1: float
    recall_at_r: float
    not_finite: int = 0  # rows that were misses as they have a number that is not finite

    @property
    def measured(self) -> dict[str, float]:
        """By the measures' names, where r is R."""
        return {
            f"map_at_{R}": self.map_at_r,
            "recall_at_1": self.recall_at_1,
            f"recall_at_{R}": self.recall_at_r,
        }


def top1(
    embeddings: Tensor,  # (T, D)
    weight: Tensor | RowTable,  # (C, D), or (C, D + 1) of similarity="dot"
    labels: Tensor,  # (T,) int64 in [0, C)
    block: int = BLOCK,
    *,
    similarity: str = "cosine",
) -> float:
    """The share of rows whose most similar class row is their own class's; of equals the first."""
    return (nearest(embeddings, weight, block, similarity=similarity) == labels).double().mean().item()


def nearest(
    embeddings: Tensor,  # (T, D)
    weight: Tensor | RowTable,  # (C, D), or (C, D + 1) of similarity="dot"
    block: int = BLOCK,
    *,
    similarity: str = "cosine",
) -> Tensor:  # (T,) int64
    """The class whose row is the most similar to each embedding; of equals the first.

        cosine   x . w / (|x| |w|)
        dot      x . w + b, where b is the last number of the class's row

    NOTHING for an embedding that is not finite. For a class whose row is not, no embedding is taken.
    Raises ValueError for another similarity.
    """
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity: expected one of {', '.join(SIMILARITIES)}, got {similarity!r}")
    comparable, scores = (directions, _cosines) if similarity == "cosine" else (_finite, _dots)
    embeddings, finite = comparable(embeddings)
    best = embeddings.new_full((len(embeddings),), -torch.inf, dtype=torch.float64)
    predicted = torch.full((len(embeddings),), NOTHING)
    bad_classes = 0
    for first, classes in _blocks(weight, max(1, block // max(1, len(embeddings)))):
        rows, there = comparable(classes)
        found = scores(embeddings, rows)
        if not there.all():
            found[:, ~there] = -torch.inf
            bad_classes += int((~there).sum())
        score, place = found.max(dim=1)
        better = score > best
        best = torch.where(better, score.double(), best)
        predicted = torch.where(better, place + first, predicted)
    _say("embeddings", int((~finite).sum()), len(finite), "misses")
    _say("class rows", bad_classes, len(weight), "nothing is taken for these classes")
    return torch.where(finite, predicted, NOTHING)


def _cosines(units: Tensor, rows: Tensor) -> Tensor:  # (T, D), (N, D) -> (T, N)
    return units @ rows.T


def _dots(embeddings: Tensor, rows: Tensor) -> Tensor:  # (T, D), (N, D + 1) -> (T, N)
    """In float64 where float32 cannot hold one of them."""
    found = torch.addmm(rows[:, -1], embeddings, rows[:, :-1].T)
    return found if found.isfinite().all() else _dots(embeddings.double(), rows.double())


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

    A query with fewer than R others still divides by R. A row that is not finite is a query without a right
    one, and is found by none. Raises ValueError unless there are two rows.
    """
    queried = len(embeddings)
    if queried < 2:
        raise ValueError(f"retrieval: expected at least 2 embeddings, got {queried}")
    unit, finite = directions(embeddings)
    missed = int((~finite).sum())
    if missed:
        _say("embeddings", missed, queried, "misses")
        unit, labels = unit[finite], labels[finite]
    if len(unit) < 2:
        return Retrieval(0.0, 0.0, 0.0, missed)
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
    return Retrieval(total / queried, found_at_1 / queried, found_at_r / queried, missed)


def directions(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(rows (N, D) at length 1, zeros for those that are not finite; whether each is (N,)).

    Where float32 cannot hold the square of a length, the row is made shorter first.
    """
    if rows.norm(dim=1).isfinite().all():
        return normalize(rows, dim=1), torch.ones(len(rows), dtype=torch.bool)
    largest = rows.abs().amax(dim=1, keepdim=True)
    finite = largest.isfinite()
    too_long = finite & ~rows.norm(dim=1, keepdim=True).isfinite()
    rows = torch.where(finite, torch.where(too_long, rows / largest, rows), 0.0)
    return normalize(rows, dim=1), finite[:, 0]


def _finite(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(rows (N, D), zeros for those that are not finite; whether each is (N,))."""
    finite = rows.isfinite().all(dim=1)
    return torch.where(finite[:, None], rows, 0.0), finite


def _say(what: str, count: int, of: int, so: str) -> None:
    if count:
        log.warning("%s of %s %s are not finite: %s", f"{count:,}", f"{of:,}", what, so)


def _blocks(rows: Tensor | RowTable, size: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of consecutive blocks."""
    return ((first, rows[first : first + size]) for first in range(0, len(rows), size))
