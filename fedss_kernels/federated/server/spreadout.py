"""FedAwS' step of the server: class rows that are too near to each other are pushed apart.

    W <- W - lambda * eta * gradient of  sum over ordered pairs (c, c') of max(0, nu - d(w_c, w_c'))^2
    d = 1 - cosine; eta: the clients' learning rate; the gradient goes to both rows of a pair

Yu, Rawat, Menon and Kumar, "Federated Learning with Only Positive Labels", ICML 2020. With very many classes
the pairs are those of a sample of rows with their nearest classes; with every row and C - 1 neighbours it is
the sum over all pairs. O(rows sampled * C * D) of work, blocked: memory does not grow with C * C.

A row that is not finite is near to none: it moves no other, and none moves it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...scatter_add import scatter_add_
from .row_table import RowTable

BLOCK = 2**22  # cosines at a time
ZERO_NORM = 1e-12  # shorter rows have no direction


@dataclass(frozen=True)
class Spreadout:
    weight: float  # lambda
    margin: float  # nu, a distance in (0, 2]
    neighbours: int | None  # that count of each row sampled, the nearest; None: all
    rows: int | None  # sampled each time; None: all

    def step(self, table: RowTable, lr: float, rng: np.random.Generator) -> None:
        """Moves the rows, outside the optimiser: velocities stay what they were."""
        sampled = torch.arange(len(table))
        if self.rows is not None and self.rows < len(table):
            sampled = torch.from_numpy(np.sort(rng.choice(len(table), self.rows, replace=False)))
        class_ids, gradient = self.gradient(table, sampled)
        table.move(class_ids, -self.weight * lr * gradient)

    def gradient(self, table: RowTable, sampled: Tensor) -> tuple[Tensor, Tensor]:
        """(class_ids (U,) ascending, rows (U, D)) of the sum over the pairs of the rows `sampled` (R,)."""
        if self.neighbours is None or self.neighbours >= len(table) - 1:
            return self._of_all(table, sampled)
        return self._of_nearest(table, sampled, self.neighbours)

    def _of_all(self, table: RowTable, sampled: Tensor) -> tuple[Tensor, Tensor]:
        rows = table[:]
        units = _units(rows)
        pushed = torch.zeros_like(rows)
        for part in sampled.split(max(1, BLOCK // len(rows))):
            slopes = 2 * self._hinge(units[part] @ units.T)
            slopes[torch.arange(len(part)), part] = 0  # no class is a pair with itself
            pushed[part] += slopes @ units
            pushed += slopes.T @ units[part]
        return torch.arange(len(rows)), _through_norm(pushed, rows, units)

    def _of_nearest(self, table: RowTable, sampled: Tensor, count: int) -> tuple[Tensor, Tensor]:
        cosines, others = _nearest(table, sampled, count)
        slopes = 2 * self._hinge(cosines).flatten()
        first, second = sampled.repeat_interleave(count), others.flatten()
        class_ids, places = torch.cat([first, second]).unique(return_inverse=True)
        rows = table.read(class_ids)
        units, pushed = _units(rows), torch.zeros_like(rows)
        of_first, of_second = places.split(len(first))
        scatter_add_(pushed, of_first, units[of_second], slopes)
        scatter_add_(pushed, of_second, units[of_first], slopes)
        return class_ids, _through_norm(pushed, rows, units)

    def _hinge(self, cosines: Tensor) -> Tensor:
        return (self.margin - 1 + cosines).clamp(min=0)


def _nearest(table: RowTable, sampled: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(cosines (R, count), classes (R, count)) of each row's nearest others, a block of classes at a time."""
    units = _units(table.read(sampled))
    best, classes = units.new_empty(len(sampled), 0), sampled.new_empty(len(sampled), 0)
    for ids in torch.arange(len(table)).split(max(1, BLOCK // len(sampled))):
        rows = table.read(ids)
        cosines = units @ _units(rows).T
        cosines[:, ~rows.isfinite().all(dim=1)] = -torch.inf
        cosines[sampled[:, None] == ids] = -torch.inf
        best = torch.cat([best, cosines], 1)
        classes = torch.cat([classes, ids.expand(len(sampled), -1)], 1)
        best, places = best.topk(min(count, best.shape[1]), dim=1)
        classes = classes.gather(1, places)
    return best, classes


def _units(rows: Tensor) -> Tensor:
    """Rows of norm 1; one without a direction, of zeros or not finite, is zero."""
    norms = _norms(rows)
    return torch.where(_directed(norms), rows / norms, 0.0)


def _directed(norms: Tensor) -> Tensor:
    return (norms >= ZERO_NORM) & norms.isfinite()


def _through_norm(pushed: Tensor, rows: Tensor, units: Tensor) -> Tensor:
    """The gradient with respect to rows of that with respect to their directions."""
    norms = _norms(rows)
    across = pushed - (pushed * units).sum(1, keepdim=True) * units
    return torch.where(_directed(norms), across / norms, 0.0)


def _norms(rows: Tensor) -> Tensor:
    """(U, 1); in float64 where float32 cannot hold the square of one."""
    norms = rows.norm(dim=1, keepdim=True)
    if norms.isfinite().all():
        return norms
    wide = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
    return torch.where(norms.isfinite(), norms, wide.to(norms.dtype))
