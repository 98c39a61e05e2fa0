"""The server's half of a round: the model (phi, W), the average of the clients' updates, the step along it.

    g = sum_k (n_k / n) (theta_t - theta_k);   v <- beta v + g;   theta <- theta - alpha v

`select`, `aggregate` and `step` touch O(M D) numbers for M rows uploaded in the round, whatever C is.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..messages import Update
from .class_store import ClassStore
from .mean import Holders, Mean, PseudoGradient, SumMean
from .net import Net
from .robust import Statistic, by_row
from .row_table import Optimizer, RowTable
from .stored import named, part


class Server:
    def __init__(
        self,
        extractor: Tensor,  # (P,): the initial phi
        num_classes: int,
        embedding_dim: int,
        *,
        initial_rows: Callable[[Tensor], Tensor],  # class_ids (S,) -> rows (S, D) of the initial W
        optimizer: Optimizer,  # of W and phi alike
        blocks: Sequence[int] | None = None,  # sizes of the blocks of phi, in order; None: it is one
        denominator: str = "cohort",
        statistic: Statistic | None = None,  # of each number over the clients, unweighted; None: their mean
        clients: int | None = None,  # each counts as one of so many; None: by its images
        most: int | None = None,  # images that weigh 1 in a secure sum of updates; None: there is none
        store: ClassStore | None = None,  # where W is; None: in memory
    ):
        self.denominator, self.statistic, self.clients, self.most = denominator, statistic, clients, most
        self.weight = RowTable(num_classes, embedding_dim, optimizer, initial_rows, store)
        self._net = Net(extractor, optimizer, [len(extractor)] if blocks is None else blocks)

    @property
    def extractor(self) -> Tensor:
        """phi (P,) as it is now. Not to be changed in place."""
        return self._net.phi

    @property
    def finite(self) -> bool:
        """Whether all numbers of the model and its optimiser are, as far as this process wrote them."""
        return self.weight.finite and self._net.finite

    def stored(self) -> dict[str, Tensor]:
        """All that the next round depends on but the number of rounds done, for `restore`."""
        return named("weight", self.weight.stored()) | named("extractor", self._net.stored())

    def restore(self, stored: Mapping[str, Tensor], rounds: int) -> None:
        """In a new server: the state of another after so many rounds."""
        self.weight.restore(part("weight", stored), rounds)
        self._net.restore(part("extractor", stored))

    def select(self, class_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(phi (P,), W[class_ids] (S, D)): what a client downloads.

        Not to be changed in place, nor used once the server has made a step.
        """
        return self.extractor, self.weight.lend(class_ids)

    def mean(self, held: Sequence[Tensor], counts: Sequence[int]) -> Mean | SumMean:
        """For updates of these class rows, (S,) each, and of so many images: their average, to be added up.

        An update weighs n_k / n, n = sum n_k over the updates; for class rows and `denominator="holders"`, n
        is the sum over the updates that hold the row. Where `clients` are alike: 1 / clients.
        """
        if self.most:
            return SumMean(held[0], counts, self.most)
        return Mean(Holders(held, counts, self.denominator), self.clients)

    def aggregate(self, updates: Sequence[Update]) -> PseudoGradient:
        """g of the updates: their mean, in their order, or their robust statistic.

        A robust statistic of a row is taken over its holders, unweighted, and times their sum of n_k / n.
        """
        held, counts = [u.class_ids for u in updates], [u.num_examples for u in updates]
        if self.statistic is not None:
            return self._robust(updates, held, counts, self.statistic)
        mean = self.mean(held, counts)
        for update in updates:
            mean.add(update)
        return mean.gradient()

    def _robust(
        self, updates: Sequence[Update], held: Sequence[Tensor], counts: Sequence[int], statistic: Statistic
    ) -> PseudoGradient:
        holders = Holders(held, counts, self.denominator)
        n = holders.total if holders.n is None else holders.n
        weight = (holders.summed(held, counts) / n).to(torch.float32)
        rows = torch.cat([update.rows for update in updates])
        places = torch.cat([holders.places(ids) for ids in held])
        middle = by_row(statistic, rows, places, len(holders.class_ids))
        extractor = statistic(torch.stack([update.extractor for update in updates]))
        return PseudoGradient(holders.class_ids, middle * weight[:, None], extractor)

    def step(self, gradient: PseudoGradient, trained: Sequence[bool] | None = None) -> None:
        """v <- beta v + g, theta <- theta - alpha v. A row that nobody held coasts on its velocity.

        trained: of each block of phi whether it was trained in the round, None: all were. The others rest,
        and gradient.extractor has the numbers of those that were, one block after the other.
        """
        self.weight.step(gradient.class_ids, gradient.rows)
        self._net.step(gradient.extractor, trained)

    def begin(self, block: int, numbers: Tensor) -> None:
        """A block of phi begins anew, with these numbers and no velocity."""
        self._net.begin(block, numbers)
