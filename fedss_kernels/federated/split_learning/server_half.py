"""The server's half: it contrasts what clients send, steps, and says how they should."""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clients.contrast import contrast
from ..clients.sgd import sgd_step
from .half import Half
from .key_queue import KeyQueue
from .latents import Latents
from .rules import Rules


class ServerHalf:
    """S with its head, its momentum copy, its velocity, and the queue: one for all clients, or one for each.

    All on one device, the first queue's; what comes and goes is where the clients are.
    """

    def __init__(self, half: Half, queues: Sequence[KeyQueue], rules: Rules):
        self.half, self.queues, self.rules = half, list(queues), rules
        self.device = self.queues[0].keys.device
        half.module.to(self.device)
        self.weights = half.initial.to(self.device, copy=True)
        self.copy, self.velocity = self.weights.clone(), torch.zeros_like(self.weights)

    def step(self, latents: Latents, clients: Sequence[int], lr: float) -> tuple[float, Tensor]:
        """(the loss before, its gradient in latents.online (V, K, b, ...)); the loss is a sum over the pairs.

        All clients' latents are one batch, or with `in_turn` batches of a client each, one after the other.
        """
        if not self.rules.in_turn:
            return self._step(latents, clients, lr)
        places = [slice(i, i + 1) for i in range(len(clients))]
        stepped = [self._step(latents.of(at), clients[at], lr) for at in places]
        return sum(loss for loss, _ in stepped) / len(stepped), torch.cat([g for _, g in stepped], dim=1)

    def _step(self, latents: Latents, clients: Sequence[int], lr: float) -> tuple[float, Tensor]:
        rules, shape = self.rules, latents.online.shape[:3]
        h, momentum = latents.online.detach().to(self.device), latents.momentum.to(self.device)
        h.requires_grad_(not rules.frozen)
        self.copy.mul_(rules.ema).add_(self.weights, alpha=1 - rules.ema)
        queried, keyed = h, momentum
        if rules.symmetric == "server":  # the same latents the other way round
            queried, keyed = torch.cat([h, momentum]), torch.cat([momentum, h.detach()])
        weights = self.weights.detach().requires_grad_()
        with torch.no_grad():
            keys = F.normalize(self.half(self.copy, keyed.flatten(0, 2)), dim=1)
        queries = self.half(weights, queried.flatten(0, 2))
        rows = (len(queried), *shape[1:], -1)
        keys = keys.view(rows)
        loss = self._loss(queries.view(rows), keys, clients)
        wanted = (weights,) if rules.frozen else (weights, h)
        gradient, *of_latents = torch.autograd.grad(loss, wanted)
        sgd_step(self.weights, gradient, lr, rules.momentum, self.velocity, rules.weight_decay)
        for queue, at in self._queues(clients):  # the first view's keys first
            queue.enqueue(keys[:, at].flip(0).flatten(0, 2))
        sent = of_latents[0] if of_latents else h.new_zeros(()).expand_as(h)  # none is sent
        return loss.item(), sent.to(latents.online.device)

    def _loss(self, queries: Tensor, keys: Tensor, clients: Sequence[int]) -> Tensor:  # (V, K, b, d)
        """sum over V of the mean over K and b, as b is the same for all."""
        T, V = self.rules.temperature, len(queries)
        each = [
            contrast(queries[:, at].flatten(0, 2), keys[:, at].flatten(0, 2), queue.keys, T)
            for queue, at in self._queues(clients)
        ]
        return V * torch.stack(each).mean()

    def _queues(self, clients: Sequence[int]) -> Iterator[tuple[KeyQueue, slice]]:
        """Each queue with the places of the clients whose it is."""
        if len(self.queues) == 1:
            yield self.queues[0], slice(None)
            return
        for place, client in enumerate(clients):
            yield self.queues[client], slice(place, place + 1)

    def stored(self) -> dict[str, Tensor]:
        """All that its next step depends on, for `restore`."""
        return {
            "server": self.weights,
            "server_copy": self.copy,
            "server_velocity": self.velocity,
            "queue": torch.stack([queue.keys for queue in self.queues]),
            "queue_next": torch.tensor([queue.next for queue in self.queues]),
        }

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        for mine, name in ((self.weights, "server"), (self.copy, "server_copy")):
            mine.copy_(stored[name])
        self.velocity.copy_(stored["server_velocity"])
        for queue, keys, next in zip(
            self.queues, stored["queue"], stored["queue_next"].tolist(), strict=True
        ):
            queue.keys.copy_(keys)
            queue.next = next
