"""The clients' half: one for each of a cohort, and their average in between."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..clients.sgd import sgd_step
from .half import Half
from .latents import Latents
from .rules import Rules

Way = Callable[[Tensor], Tensor]  # what becomes of numbers as they travel


def unchanged(numbers: Tensor) -> Tensor:
    return numbers


@dataclass
class _Graph:
    """Of a forward pass, until its backward."""

    weights: Tensor  # (K, P), of all who took part in it
    online: Tensor  # (V, k, b, ...), of those who are still there
    rows: Tensor  # (k,): theirs in `weights`


class ClientHalves:
    """C, its momentum copy and its velocity: (K, P) of each, for a cohort, and between rounds (P,) for all.

    Where the copies or the velocities are "kept", every client that ever took part has its own for good.
    """

    def __init__(self, half: Half, rules: Rules, travels: Way = unchanged):
        self.half, self.rules, self.travels = half, rules, travels
        self.weights = half.initial.clone()  # what a cohort is sent
        self.copy, self.velocity = self.weights.clone(), torch.zeros_like(self.weights)
        self.kept_copies, self.kept_velocities = dict[int, Tensor](), dict[int, Tensor]()
        self.divergence = 0.0  # at the last synchronisation
        self.clients: list[int] = []
        self._graph: _Graph | None = None

    def receive(self, clients: Sequence[int]) -> None:
        """These are the cohort: each has what all are sent, and what it has kept."""
        self.clients, K = list(clients), len(clients)
        if self.rules.frozen:
            return
        self.each_weights = self.travels(self.weights).repeat(K, 1)
        self.each_copy = self._rows(self.kept_copies, self.travels(self.copy))
        self.each_velocity = self._rows(self.kept_velocities, self.travels(self.velocity))

    def _rows(self, kept: Mapping[int, Tensor], usual: Tensor) -> Tensor:
        return torch.stack([kept.get(client, usual) for client in self.clients])

    def leave(self, stay: Tensor) -> None:  # (K,) bool
        """Those who do not stay are out of the cohort, and what they learned since it last met is lost."""
        self._keep(~stay)
        rows = stay.nonzero()[:, 0]
        self.clients = [self.clients[row] for row in rows.tolist()]
        if self.rules.frozen:
            return
        self.each_weights, self.each_copy = self.each_weights[rows], self.each_copy[rows]
        self.each_velocity = self.each_velocity[rows]
        if self._graph:
            graph = self._graph
            self._graph = _Graph(graph.weights, graph.online[:, rows], graph.rows[rows])

    def dismiss(self) -> None:
        """The round is over."""
        self._keep(torch.ones(len(self.clients), dtype=torch.bool))
        self.clients = []

    def _keep(self, who: Tensor) -> None:
        if self.rules.frozen:
            return
        for row in who.nonzero()[:, 0].tolist():
            if self.rules.momentum_copies == "kept":
                self.kept_copies[self.clients[row]] = self.each_copy[row].clone()
            if self.rules.velocities == "kept":
                self.kept_velocities[self.clients[row]] = self.each_velocity[row].clone()

    def forward(self, first: Tensor, second: Tensor) -> Latents:  # the two views, (K, b, ...)
        """What they send. A momentum copy steps before it is used, towards a C that has not stepped yet."""
        views, others = [first], [second]
        if self.rules.symmetric == "full":
            views, others = [first, second], [second, first]
        if self.rules.frozen:
            with torch.no_grad():
                return Latents(self._alike(views), self._alike(others))
        weights = self.each_weights.detach().requires_grad_()
        online = self._each(weights, views)
        self._graph = _Graph(weights, online, torch.arange(len(weights)))
        self.each_copy.mul_(self.rules.ema).add_(self.each_weights, alpha=1 - self.rules.ema)
        with torch.no_grad():
            return Latents(online.detach(), self._each(self.each_copy, others))

    def _each(self, flats: Tensor, views: Sequence[Tensor]) -> Tensor:  # V of (K, b, ...) -> (V, K, b, ...)
        K, b = views[0].shape[:2]
        latents = self.half.each(flats, torch.cat(list(views), dim=1))
        return latents.view(K, len(views), b, *latents.shape[2:]).transpose(0, 1)

    def _alike(self, views: Sequence[Tensor]) -> Tensor:
        """Where all clients have the same half."""
        latents = self.half(self.weights, torch.stack(list(views)).flatten(0, 2))
        return latents.view(len(views), *views[0].shape[:2], *latents.shape[1:])

    def backward(self, gradient: Tensor, lr: float) -> None:  # (V, K, b, ...)
        """Each steps along its rows of the loss' gradient in the latents.

        That is a mean over all rows. "own" is of the mean over the client's: times as many as there are
        clients, as all have b rows; where the server steps in turn it was that already.
        """
        graph, rules = self._graph, self.rules
        assert graph is not None
        self._graph = None
        if not self.half.sizes:  # the cut is before the first parameter
            return
        if rules.client_gradient == "own" and not rules.in_turn:
            gradient = gradient * len(self.clients)
        (found,) = torch.autograd.grad(graph.online, graph.weights, gradient)
        found = found if len(found) == len(graph.rows) else found[graph.rows]
        step = lr, rules.client_momentum, self.each_velocity, rules.weight_decay
        sgd_step(self.each_weights, found, *step)

    def synchronise(self, images: Sequence[int]) -> None:
        """C <- sum_k (n_k / n) C_k, of the cohort's clients, with n_k images each; and all C_k <- C."""
        n = torch.tensor(images, dtype=torch.float64)
        share, rules = (n / n.sum()).to(self.weights.dtype), self.rules
        self.weights = share @ self.travels(self.each_weights)
        self.divergence = self._divergence()
        self._send(self.weights, self.each_weights)
        if rules.momentum_copies != "kept":
            averaged = rules.momentum_copies == "averaged"
            self.copy = share @ self.travels(self.each_copy) if averaged else self.weights.clone()
            self._send(self.copy, self.each_copy)
        if rules.velocities != "kept":
            averaged = rules.velocities == "averaged"
            nothing = torch.zeros_like(self.weights)
            self.velocity = share @ self.travels(self.each_velocity) if averaged else nothing
            self._send(self.velocity, self.each_velocity)

    def _send(self, numbers: Tensor, to: Tensor) -> None:  # (P,), (K, P)
        to.copy_(self.travels(numbers).expand_as(to))

    def _divergence(self) -> float:
        """sum_l |C_k,l - C_l|, the mean over the clients k, l the half's parameters: the paper's Eq. 4."""
        apart = (self.each_weights - self.weights).split(self.half.sizes, dim=1) if self.half.sizes else ()
        return sum((layer.norm(dim=1).mean().item() for layer in apart), 0.0)

    def finite(self) -> Tensor:  # (K,) bool
        """Of each client, whether all its numbers are."""
        if self.rules.frozen:
            return torch.ones(len(self.clients), dtype=torch.bool)
        return (self.each_weights + self.each_copy + self.each_velocity).isfinite().all(dim=1)

    def changes(self) -> Tensor:  # (K,)
        """Of each client, the norm of what is averaged, less what it was sent."""
        if self.rules.frozen:
            return torch.zeros(len(self.clients))
        parts = [self.each_weights - self.weights]
        if self.rules.momentum_copies == "averaged":
            parts.append(self.each_copy - self.copy)
        if self.rules.velocities == "averaged":
            parts.append(self.each_velocity - self.velocity)
        return torch.cat(parts, dim=1).norm(dim=1)

    def stored(self) -> dict[str, Tensor]:
        """All that the next cohort depends on, for `restore`."""
        found = {"clients": self.weights, "clients_copy": self.copy, "clients_velocity": self.velocity}
        for name, kept in self._kept():
            if kept:
                found[f"{name}_of"] = torch.tensor(sorted(kept))
                found[name] = torch.stack([kept[client] for client in sorted(kept)])
        return found

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        self.weights, self.copy = stored["clients"].clone(), stored["clients_copy"].clone()
        self.velocity = stored["clients_velocity"].clone()
        for name, kept in self._kept():
            kept.clear()
            if name in stored:
                kept.update(zip(stored[f"{name}_of"].tolist(), stored[name].clone(), strict=True))

    def _kept(self) -> list[tuple[str, dict[int, Tensor]]]:
        return [("kept_copies", self.kept_copies), ("kept_velocities", self.kept_velocities)]
