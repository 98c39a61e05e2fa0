"""The server's half of a round: the model (phi, W), the average of the clients' updates, the step along it.

    g = sum_k (n_k / n) (theta_t - theta_k);   v <- beta v + g;   theta <- theta - alpha v

`select`, `aggregate` and `step` touch O(M D) numbers for M rows uploaded in the round, whatever C is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...scatter_add import scatter_add_
from ..messages import Update
from .class_store import ClassStore
from .robust import Statistic, by_row
from .row_table import Optimizer, RowTable


@dataclass(frozen=True)
class PseudoGradient:
    """g: zero on every class row that is not listed."""

    class_ids: Tensor  # (U,) int64, ascending, unique: the rows that some client held
    rows: Tensor  # (U, D)
    extractor: Tensor  # (P,)


class Server:
    def __init__(
        self,
        extractor: Tensor,  # (P,): the initial phi
        num_classes: int,
        embedding_dim: int,
        *,
        initial_rows: Callable[[Tensor], Tensor],  # class_ids (S,) -> rows (S, D) of the initial W
        optimizer: Optimizer,  # of W and phi alike
        denominator: str = "cohort",
        statistic: Statistic | None = None,  # of each number over the clients, unweighted; None: their mean
        store: ClassStore | None = None,  # where W is; None: in memory
    ):
        self.denominator, self.statistic = denominator, statistic
        self.weight = RowTable(num_classes, embedding_dim, optimizer, initial_rows, store)
        first = extractor.clone()[None]
        self._extractor = RowTable(
            1, len(extractor), optimizer, lambda ids: first[ids]
        )  # a row in every step
        self.extractor = self._extractor[:][0]  # phi (P,) as it is now

    @property
    def finite(self) -> bool:
        """Whether all numbers of the model and its optimiser are, as far as this process wrote them."""
        return self.weight.finite and self._extractor.finite

    def stored(self) -> dict[str, Tensor]:
        """All that the next round depends on but the number of rounds done, for `restore`."""
        tables = {"weight": self.weight, "extractor": self._extractor}
        return {f"{of}.{name}": t for of, table in tables.items() for name, t in table.stored().items()}

    def restore(self, stored: Mapping[str, Tensor], rounds: int) -> None:
        """In a new server: the state of another after so many rounds."""
        for of, table in (("weight", self.weight), ("extractor", self._extractor)):
            parts = {
                name.removeprefix(f"{of}."): t for name, t in stored.items() if name.startswith(f"{of}.")
            }
            table.restore(parts, rounds)
        self.extractor = self._extractor[:][0]

    def select(self, class_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(phi (P,), W[class_ids] (S, D)): what a client downloads. Not to be changed in place."""
        return self.extractor, self.weight.read(class_ids)

    def aggregate(self, updates: Sequence[Update]) -> PseudoGradient:
        """g of the updates, added up in their order, so the bits depend on nothing else.

        An update weighs n_k / n, n = sum n_k over the updates; for class rows and `denominator="holders"`, n
        is the sum over the updates that hold the row. A robust statistic of a row is taken over its holders,
        unweighted, and times their sum of n_k / n.
        """
        class_ids = torch.cat([update.class_ids for update in updates]).unique()
        places = [torch.searchsorted(class_ids, update.class_ids) for update in updates]
        if self.statistic is not None:
            return self._robust(updates, class_ids, places, self.statistic)
        n = self._row_counts(updates, places, len(class_ids))
        total = sum(update.num_examples for update in updates)
        rows = torch.zeros(len(class_ids), updates[0].rows.shape[1], dtype=torch.float32)
        extractor = torch.zeros_like(self.extractor)
        for update, place in zip(updates, places, strict=True):
            scatter_add_(rows, place, update.rows, (update.num_examples / n[place]).to(rows.dtype))
            share = torch.tensor([update.num_examples / total], dtype=extractor.dtype)
            scatter_add_(extractor[None], torch.zeros(1, dtype=torch.int64), update.extractor[None], share)
        return PseudoGradient(class_ids, rows, extractor)

    def _robust(
        self,
        updates: Sequence[Update],
        class_ids: Tensor,
        places: Sequence[Tensor],
        statistic: Statistic,
    ) -> PseudoGradient:
        held = torch.zeros(len(class_ids), dtype=torch.float64)  # sum of n_k over a row's holders
        for update, place in zip(updates, places, strict=True):
            held[place] += update.num_examples
        weight = (held / self._row_counts(updates, places, len(class_ids))).to(torch.float32)
        rows = torch.cat([update.rows for update in updates])
        middle = by_row(statistic, rows, torch.cat(list(places)), len(class_ids))
        extractor = statistic(torch.stack([update.extractor for update in updates]))
        return PseudoGradient(class_ids, middle * weight[:, None], extractor)

    def _row_counts(self, updates: Sequence[Update], places: Sequence[Tensor], num_rows: int) -> Tensor:
        """(U,) float64: the n of each row's average. Counts are whole numbers, so their sum is exact."""
        if self.denominator == "cohort":
            total = float(sum(update.num_examples for update in updates))
            return torch.full((num_rows,), total, dtype=torch.float64)
        n = torch.zeros(num_rows, dtype=torch.float64)
        for update, place in zip(updates, places, strict=True):
            n[place] += update.num_examples
        return n

    def step(self, gradient: PseudoGradient) -> None:
        """v <- beta v + g, theta <- theta - alpha v. A row that nobody held coasts on its velocity."""
        self.weight.step(gradient.class_ids, gradient.rows)
        self._extractor.step(torch.zeros(1, dtype=torch.int64), gradient.extractor[None])
        self.extractor = self._extractor[:][0]
