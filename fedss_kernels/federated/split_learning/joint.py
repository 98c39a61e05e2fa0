"""A step of clients and server together, as it is: what travels, who is left out, and who steps when."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .client_halves import ClientHalves
from .latents import Latents
from .server_half import ServerHalf


class NobodyLeft(RuntimeError):
    """All of a cohort sent numbers that are not finite."""


@dataclass
class Joint:
    """The two halves. Who sends numbers that are not finite is out of the cohort, and in `left_out`."""

    clients: ClientHalves
    server: ServerHalf
    trusting: bool = False  # whether nobody is left out
    left_out: list[int] = field(default_factory=list)

    def step(self, first: Tensor, second: Tensor, lr: float) -> float:  # two views, (K, b, ...) each
        """The loss before: a sum of the views', each a mean over the images."""
        travels = self.clients.travels
        sent = self.clients.forward(first, second)
        latents = Latents(travels(sent.online), travels(sent.momentum))
        stay = self._leave(latents.finite)
        latents = latents if stay.all() else latents.of(stay)
        loss, gradient = self.server.step(latents, self.clients.clients, lr)
        if not self.server.rules.frozen:
            self.clients.backward(travels(gradient), lr)
        return loss

    def synchronise(self, images: Mapping[int, int]) -> None:
        """The clients' halves are averaged by their number of images."""
        self._leave(self.clients.finite())
        self.clients.synchronise([images[client] for client in self.clients.clients])

    def _leave(self, stay: Tensor) -> Tensor:
        """Who is not among those who may stay is out. Raises NobodyLeft."""
        if self.trusting or stay.all():
            return torch.ones_like(stay)
        there = zip(self.clients.clients, stay.tolist(), strict=True)
        self.left_out += [client for client, stays in there if not stays]
        self.clients.leave(stay)
        if not self.clients.clients:
            raise NobodyLeft
        return stay
