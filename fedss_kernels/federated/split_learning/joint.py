"""A step of clients and server together, as it is: what travels, who is left out, and who steps when."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .client_halves import ClientHalves
from .latents import Latents
from .server_half import ServerHalf


class NobodyLeft(RuntimeError):
    """All of a cohort sent numbers that are not finite."""


# Why a client is out, by what the ledger calls it.
REASONS = {
    "not finite": "its numbers are not finite",
    "norm": "its numbers are of a norm over --max-norm-ratio",
}


@dataclass
class Joint:
    """The two halves. Who sends what cannot be right is out of the cohort, and `left_out` says why.

    That is what is not finite, and, as of updates (server/inspection.py), what has a norm more than
    `max_norm_ratio` times the cohort's median: of a step's latents, and of how its half has changed when it
    is averaged, where that is by more than the half's own norm.
    """

    clients: ClientHalves
    server: ServerHalf
    trusting: bool = False  # whether nobody is left out
    max_norm_ratio: float = math.inf
    left_out: dict[int, str] = field(default_factory=dict)  # client -> one of REASONS

    def step(self, first: Tensor, second: Tensor, lr: float) -> float:  # two views, (K, b, ...) each
        """The loss before: a sum of the views', each a mean over the images."""
        travels = self.clients.travels
        sent = self.clients.forward(first, second)
        latents = Latents(travels(sent.online), travels(sent.momentum))
        stay = self._leave(latents.finite, latents.norms)
        latents = latents if stay.all() else latents.of(stay)
        loss, gradient = self.server.step(latents, self.clients.clients, lr)
        if not self.server.rules.frozen:
            self.clients.backward(travels(gradient), lr)
        return loss

    def synchronise(self, images: Mapping[int, int]) -> None:
        """The clients' halves are averaged by their number of images."""
        clients = self.clients
        # between two averages some clients hardly move, and one that still learns many times as far
        self._leave(clients.finite(), clients.changes(), harmless=clients.weights.norm().item())
        clients.synchronise([images[client] for client in clients.clients])

    def _leave(self, finite: Tensor, norms: Tensor, harmless: float = 0.0) -> Tensor:
        """Who stays, (K,) bool; the others are out. Raises NobodyLeft."""
        if self.trusting:
            return torch.ones_like(finite)
        usual = norms[finite].median().item() if finite.any() else 0.0  # of two in the middle the lower
        bound = max(self.max_norm_ratio * usual, harmless) if usual > 0 else math.inf
        stay = finite & ~(norms > bound)
        if stay.all():
            return stay
        for client, sound, stays in zip(self.clients.clients, finite.tolist(), stay.tolist(), strict=True):
            if not stays:
                self.left_out[client] = "norm" if sound else "not finite"
        self.clients.leave(stay)
        if not self.clients.clients:
            raise NobodyLeft
        return stay
