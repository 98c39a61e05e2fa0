"""A matrix on the server of which a round touches few rows: its values, its optimiser's state, its steps.

A row is drawn whenever it is read, until it is stored when it is first stepped; in between nothing is
allocated, but for new rows that are lent side by side. What a row is now follows from what is stored and from
the number of steps done: reading changes nothing. So a round costs what the rows in it cost, however many
there are.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ... import _C
from .class_store import ClassStore
from .rows import Rows

DRAWN_AT_A_TIME = 2**13  # new rows: what draws them takes ten times their memory


class Stored(Protocol):
    """What an optimiser reads and writes of some rows: `Rows`, or a range of their columns."""

    weight: Tensor  # (C, D) float32
    state: Tensor  # (C, D) float32
    stepped: Tensor  # (C,) int64


class Optimizer(Protocol):
    """A rule by which rows that have a gradient are stepped, and what becomes of those that have none."""

    stateful: ClassVar[bool]  # whether it keeps numbers beside a row

    def read(self, rows: Stored, class_ids: Tensor, now: int) -> Tensor:
        """(S, D) rows as they are once `now` steps of the matrix are done."""
        ...

    def step(self, rows: Stored, class_ids: Tensor, gradient: Tensor, now: int) -> bool:
        """Makes step now + 1 of the matrix, for rows that are there; whether all it wrote is finite."""
        ...


@dataclass(frozen=True)
class SGD:
    """v <- beta v + g, w <- w - lr v; a row without a gradient coasts on its velocity: lazy_momentum.hpp."""

    stateful: ClassVar[bool] = True
    lr: float
    momentum: float  # beta, in [0, 1)

    def read(self, rows: Stored, class_ids: Tensor, now: int) -> Tensor:
        out = rows.weight.new_empty(len(class_ids), rows.weight.shape[1])
        _C.lazy_momentum_read(*self._table(rows, now), class_ids, out, threads=torch.get_num_threads())
        return out

    def step(self, rows: Stored, class_ids: Tensor, gradient: Tensor, now: int) -> bool:
        table, threads = self._table(rows, now), torch.get_num_threads()
        return _C.lazy_momentum_step(*table, class_ids, gradient, threads=threads)

    def _table(self, rows: Stored, now: int) -> tuple[Tensor, Tensor, Tensor, int, float, float]:
        return rows.weight, rows.state, rows.stepped, now, self.lr, self.momentum


@dataclass(frozen=True)
class Adagrad:
    """s <- s + g^2, w <- w - lr g / (sqrt(s) + eps), element by element; without a gradient a row rests."""

    stateful: ClassVar[bool] = True
    lr: float
    eps: float = 1e-8

    def read(self, rows: Stored, class_ids: Tensor, now: int) -> Tensor:
        return rows.weight[class_ids]

    def step(self, rows: Stored, class_ids: Tensor, gradient: Tensor, now: int) -> bool:
        squares = rows.state[class_ids].addcmul_(gradient, gradient)
        stepped = rows.weight[class_ids] - self.lr * gradient / squares.sqrt().add_(self.eps)
        rows.weight[class_ids], rows.state[class_ids] = stepped, squares
        rows.stepped[class_ids] = now + 1
        return _all_finite(stepped) and _all_finite(squares)


@dataclass(frozen=True)
class Replacement:
    """w <- g: a row is what it was last given."""

    stateful: ClassVar[bool] = False

    def read(self, rows: Stored, class_ids: Tensor, now: int) -> Tensor:
        return rows.weight[class_ids]

    def step(self, rows: Stored, class_ids: Tensor, gradient: Tensor, now: int) -> bool:
        rows.weight[class_ids] = gradient
        rows.stepped[class_ids] = now + 1
        return _all_finite(gradient)


class RowTable:
    """The matrix: `table.read(class_ids)`, `table.step(class_ids, gradient)`, `len(table)`, `table[2:5]`."""

    def __init__(
        self,
        num_rows: int,
        dim: int,
        optimizer: Optimizer,
        initial: Callable[[Tensor], Tensor],  # class_ids (S,) -> rows (S, D), a pure function of each id
        store: ClassStore | None = None,  # where rows are; None: in memory
    ):
        self.rows, self.store = store.rows if store else Rows.zeros(num_rows, dim), store
        self.optimizer, self.initial = optimizer, initial
        self.now = 0  # steps done
        self.finite = True  # whether all numbers are that were written here so far

    def __len__(self) -> int:
        return len(self.rows.weight)

    def __getitem__(self, part: slice) -> Tensor:
        return self.read(torch.arange(*part.indices(len(self))))

    def read(self, class_ids: Tensor) -> Tensor:
        """(S, D): copies of rows, as they are now. Raises IndexError for an id that is none."""
        _check_range(class_ids, len(self))
        if self.store:
            self.store.before_read(class_ids)
        found = self.optimizer.read(self.rows, class_ids, self.now)
        new = self.rows.stepped[class_ids] == 0
        if new.any():
            self._draw(class_ids[new], found, new.nonzero()[:, 0])
        return found

    def lend(self, class_ids: Tensor) -> Tensor:
        """`read`, but not to be changed nor used after a step.

        No copy where they lie side by side as they are now: as where every class is on every client.
        """
        if len(class_ids) and not self.store:
            first, last = int(class_ids[0]), int(class_ids[-1])
            if 0 <= first and last < len(self) and last - first == len(class_ids) - 1:
                side_by_side = (class_ids[1:] > class_ids[:-1]).all()
                if side_by_side and (self.rows.stepped[first : last + 1] == self.now).all():
                    if self.now == 0:  # all are new
                        self._draw(class_ids, self.rows.weight, class_ids)
                    return self.rows.weight[first : last + 1]
        return self.read(class_ids)

    def _draw(self, class_ids: Tensor, out: Tensor, places: Tensor) -> None:
        """New rows, into those places of `out`."""
        for ids, at in zip(class_ids.split(DRAWN_AT_A_TIME), places.split(DRAWN_AT_A_TIME), strict=True):
            out[at] = self.initial(ids)

    def step(self, class_ids: Tensor, gradient: Tensor) -> None:
        """A step along the gradient (U, D) of rows class_ids (U,), ascending; of other rows' it is 0.

        Raises IndexError for an id that is none, ValueError for one out of order, before anything changes.
        """
        self._before_change(class_ids, stepped=True)
        self.finite &= self.optimizer.step(self.rows, class_ids, gradient, self.now)
        self.now += 1

    def move(self, class_ids: Tensor, change: Tensor) -> None:
        """Adds `change` (U, D) to rows class_ids (U,), ascending, outside the optimiser: its state stays.

        Raises IndexError and ValueError as `step`.
        """
        new = self._before_change(class_ids, stepped=False)
        self.rows.stepped[new] = max(self.now, 1)  # with state 0 it stays where it is from any time on
        moved = self.rows.weight[class_ids] + change
        self.rows.weight[class_ids] = moved
        self.finite &= _all_finite(moved)

    def _before_change(self, class_ids: Tensor, *, stepped: bool) -> Tensor:
        """Checks ids, keeps what a roll-back needs, draws rows that are new; returns those."""
        _check_range(class_ids, len(self))
        if (class_ids[1:] <= class_ids[:-1]).any():
            raise ValueError("class_ids: expected them ascending, each once")
        if self.store:
            self.store.before_read(class_ids)
        new = class_ids[self.rows.stepped[class_ids] == 0]
        if self.store:
            self.store.allocate(new)
            self.store.keep(class_ids, stepped=stepped)
        self._draw(new, self.rows.weight, new)
        return new

    def stored(self) -> dict[str, Tensor]:
        """The rows that were stepped, U of them, for `restore`; of a store nothing, as it has them."""
        if self.store:
            self.store.sync()
            return {}
        class_ids = self.rows.stepped.nonzero()[:, 0]
        state = {"state": self.rows.state[class_ids]} if self.optimizer.stateful else {}
        return {
            "class_ids": class_ids,
            "weight": self.rows.weight[class_ids],
            **state,
            "stepped": self.rows.stepped[class_ids],
        }

    def restore(self, stored: dict[str, Tensor], now: int) -> None:
        """In a table of which no row was stepped, or in its store: the rows and the steps of another."""
        self.now = now
        if self.store:
            return self.store.roll_back(now)
        class_ids = stored["class_ids"]
        self.rows.weight[class_ids] = stored["weight"]
        if self.optimizer.stateful:
            self.rows.state[class_ids] = stored["state"]
        self.rows.stepped[class_ids] = stored["stepped"]


def _all_finite(numbers: Tensor) -> bool:
    """By their sum, in one pass; that of large numbers may be infinite although they are not."""
    return math.isfinite(numbers.sum().item()) or bool(numbers.isfinite().all())


def _check_range(class_ids: Tensor, num_rows: int) -> None:
    if len(class_ids) == 0:
        return
    least, most = (int(bound) for bound in class_ids.aminmax())
    if least < 0 or most >= num_rows:
        bad = least if least < 0 else most
        raise IndexError(f"class_ids: expected rows in [0, {num_rows}), got {bad}")
