"""What a step's clients send to the server."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Latents:
    """V is 1, or 2 where both views have both. K clients of b images; momentum[v] is of the other view."""

    online: Tensor  # (V, K, b, ...), from the clients' halves
    momentum: Tensor  # (V, K, b, ...), from their momentum copies

    def of(self, clients: slice | Tensor) -> "Latents":
        """Of some of the clients, by place."""
        return Latents(self.online[:, clients], self.momentum[:, clients])

    @property
    def finite(self) -> Tensor:  # (K,) bool
        """Of each client, whether all that it sends is."""
        return (self.online + self.momentum).isfinite().flatten(2).all(2).all(0)

    @property
    def norms(self) -> Tensor:  # (K,)
        """Of each client, of all that it sends."""
        parts = (part.transpose(0, 1).flatten(1).norm(dim=1) for part in (self.online, self.momentum))
        return torch.stack([*parts]).norm(dim=0)
