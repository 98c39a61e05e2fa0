"""What clients keep with themselves from round to round: class rows, and the net where that stays too.

In a simulation somebody has to keep it for them, and that is the place where the server is. None of it is
traffic, and no server of a real federation has it.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..messages import Update
from .class_store import ClassStore
from .row_table import Replacement, RowTable
from .stored import named, part


class Homes:
    """`read` one client's, `keep` what a round made of some."""

    def __init__(
        self,
        num_clients: int,
        rows: Tensor,  # (C, D): those that every client begins with
        net: Tensor | None,  # (P,): the net that it begins with; None: nets travel
        store: ClassStore | None,  # where all of it is; None: in memory
    ):
        self.shape = rows.shape
        first = rows.flatten() if net is None else torch.cat([rows.flatten(), net])
        self.table = RowTable(
            num_clients, len(first), Replacement(), lambda clients: first.expand(len(clients), -1), store
        )

    def read(self, client: int) -> Tensor:
        """One vector: the rows, one after the other, and then the net."""
        return self.table.read(torch.tensor([client]))[0]

    def model(self, client: int) -> tuple[Tensor | None, Tensor]:
        """(phi (P,), or None where nets travel; its rows (C, D))"""
        rows, phi = self._parts(self.read(client)[None])
        return (phi[0] if phi.shape[1] else None), rows[0]

    def _parts(self, numbers: Tensor) -> tuple[Tensor, Tensor]:  # (n, H) -> (n, C, D), (n, P)
        rows, phi = numbers.tensor_split([self.shape.numel()], dim=1)
        return rows.view(-1, *self.shape), phi

    def keep(self, updates: Sequence[Update]) -> None:
        """What clients whose answers count have made of their own; others' is as it was before the round."""
        kept = [update.kept for update in updates if update.kept is not None]
        self.table.step(torch.tensor([update.client for update in updates]), torch.stack(kept))

    def trained(self) -> dict[str, Tensor]:
        """Of those who took part: "clients" (n,), "heads" (n, C, D), and "bodies" (n, P) where nets stay."""
        clients = self.table.rows.stepped.nonzero()[:, 0]
        rows, phi = self._parts(self.table.read(clients))
        return {"clients": clients, "heads": rows} | ({"bodies": phi} if phi.shape[1] else {})

    def stored(self) -> dict[str, Tensor]:
        """For `restore`, by names that say whose it is."""
        return named("homes", self.table.stored())

    def restore(self, stored: Mapping[str, Tensor], rounds: int) -> None:
        self.table.restore(part("homes", stored), rounds)
