"""The average of a round's updates, added up one after the other: of each no more is kept than the sum."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import _C
from .. import secure_sums
from ..messages import Update


@dataclass(frozen=True)
class PseudoGradient:
    """g: zero on every class row that is not listed."""

    class_ids: Tensor  # (U,) int64, ascending, unique: the rows that some client held
    rows: Tensor  # (U, D)
    extractor: Tensor  # (P,)


class Holders:
    """Who sends an update of which class rows, and of how many images: all that weights are made of."""

    def __init__(self, held: Sequence[Tensor], counts: Sequence[int], denominator: str):
        """held: of each update its class_ids (S,), each once; counts: its n_k."""
        self.class_ids = torch.cat(list({id(ids): ids for ids in held}.values())).unique()  # (U,) ascending
        self.total = sum(counts)
        self.n: Tensor | None = None  # (U,) float64: the n of each row's average; None: the total
        if denominator == "holders":
            self.n = self.summed(held, counts)

    def summed(self, held: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        """(U,) float64: the sum of n_k over each row's holders. Counts are whole numbers, so it is exact."""
        n = torch.zeros(len(self.class_ids), dtype=torch.float64)
        for ids, count in zip(held, counts, strict=True):
            n[self.places(ids)] += count
        return n

    def places(self, class_ids: Tensor) -> Tensor:
        """(S,): where these rows are among all."""
        return torch.searchsorted(self.class_ids, class_ids)


class Mean:
    """g = sum_k (n_k / n) update_k, in the order of `add`, so the bits depend on nothing else."""

    def __init__(self, holders: Holders, clients: int | None = None):
        """clients: each update weighs 1 / clients, whatever its images; None: by these."""
        self.holders, self.clients = holders, clients
        self._sum: PseudoGradient | None = None

    def add(self, update: Update) -> None:
        """One of the updates that `holders` knows of."""
        holders, places = self.holders, self.holders.places(update.class_ids)
        if self._sum is None:
            rows = torch.zeros(len(holders.class_ids), update.rows.shape[1], dtype=torch.float32)
            self._sum = PseudoGradient(holders.class_ids, rows, torch.zeros_like(update.extractor))
        weight = 1 / self.clients if self.clients else update.num_examples / holders.total
        share = torch.tensor([weight], dtype=torch.float32)
        of_rows = share.expand(len(places))
        if holders.n is not None and not self.clients:
            of_rows = (update.num_examples / holders.n[places]).to(torch.float32)
        _scatter_add(self._sum.rows, places, update.rows, of_rows)
        _scatter_add(self._sum.extractor[None], _FIRST, update.extractor[None], share)

    def gradient(self) -> PseudoGradient:
        """Once all were added: one at least."""
        assert self._sum is not None
        return self._sum


class SumMean:
    """g of updates of the same class rows as a secure sum has it: a function of the sum of their integers."""

    def __init__(self, class_ids: Tensor, counts: Sequence[int], most: int):
        """most: images of a client that weighs 1."""
        self.class_ids, self.weight, self.most = class_ids, sum(counts) / most, most
        self.clients = 0
        self._rows = self._extractor = torch.zeros(1, dtype=torch.int64)

    def add(self, update: Update) -> None:
        """One that was quantised; their order is nothing to the sum."""
        weight = update.num_examples / self.most
        self._rows = self._rows + secure_sums.integers(update.rows, weight)
        self._extractor = self._extractor + secure_sums.integers(update.extractor, weight)
        self.clients += 1

    def gradient(self) -> PseudoGradient:
        """Once all were added: one at least."""
        assert self.clients
        rows, extractor = (
            secure_sums.mean(total, self.clients, self.weight) for total in (self._rows, self._extractor)
        )
        return PseudoGradient(self.class_ids, rows, extractor)


_FIRST = torch.zeros(1, dtype=torch.int64)


def _scatter_add(out: Tensor, places: Tensor, rows: Tensor, scale: Tensor) -> None:
    """scatter_add_ of tensors that are the server's own and known to fit, without what it asks of others'."""
    _C.scatter_add(out, places, rows, scale, threads=torch.get_num_threads())
