"""The client's half of a round: local SGD on its own images, from what came to what goes back."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..algorithms.given import Given, Loss
from ..algorithms.parts import Part, Parts, Pass
from ..data import FederatedData
from ..messages import Request, Update
from ..models.blocks import of_blocks
from ..randomness import Purpose, generator
from .augment import Augmentation
from .extractor import CPU, Extractor
from .objectives import ClassRows, Objective, OwnLoss
from .sgd import sgd_step


class Client:
    """Plays any client of a data set: one resident model and one set of buffers serve them all, in turn.

    What a batch is and what is minimised over it: `batches`, `objective`.
    """

    def __init__(
        self,
        extractor: Extractor,
        data: FederatedData,
        *,
        schedule: Sequence[Pass],
        batch_size: int,
        scale: float,
        seed: int,
        similarity: str = "cosine",
        momentum: float = 0.0,
        augmentation: Augmentation,
        loss: Loss | None = None,  # these two as of a Method
        penalty_gradient: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        self.extractor, self.data = extractor, data
        self.schedule, self.batch_size, self.seed = schedule, batch_size, seed
        self.scale, self.similarity, self.momentum = scale, similarity, momentum
        self.augmentation, self.draws = augmentation, augmentation.draws
        self.loss, self.penalty_gradient = loss, penalty_gradient
        self._received: tuple[Tensor, Tensor] | None = None  # phi and the rows, for the penalty

    def positives(self, client: int) -> Tensor:  # (P,) int64, ascending
        """The classes in the client's data."""
        return self.data.labels[self.data.clients[client]].unique()

    def update(
        self,
        client: int,
        round: int,
        attempt: int,
        request: Request,
        phi: Tensor,  # (P,)
        rows: Tensor,  # (S, D): W[request.class_ids]
        lr: float,
        parts: Parts,
    ) -> Update:
        """SGD over the client's images, in batches drawn for this round; its velocity starts from 0."""
        model, held = self.extractor, self.data.clients[client]
        model.flat.copy_(phi)
        model.present = parts.present
        if not model.module.training:
            model.module.train()
        key = self.seed, round, attempt, client
        _seed_torch(int(generator(*key, Purpose.MODEL).integers(2**63)), model.device)
        shuffle = changes = generator(*key, Purpose.BATCHES)
        if self.draws:
            changes = generator(*key, Purpose.AUGMENTATION)
        theirs = rows.to(model.device, copy=parts.rows.moves), request.to(model.device)
        objective = self.objective(*theirs, held)
        if self.penalty_gradient:
            self._received = model.flat.clone(), objective.rows.detach().clone()
        velocity = (torch.zeros_like(model.flat), torch.zeros_like(objective.rows)) if self.momentum else None
        total, seen = torch.zeros((), dtype=torch.float64, device=model.device), 0
        for moves, order in self.passes(held, round, shuffle):
            model.move([moves.blocks and part.moves for part in parts.blocks])
            objective.rows.requires_grad_(moves.rows and parts.rows.moves)
            for x, t in self.batches(order, request, changes):
                total += len(t) * self._step(x, t, objective, lr, velocity)
                seen += len(t)
        objective.rows.grad = None  # what comes now takes no more memory than a step
        trained, after = objective.rows.detach().to(CPU), model.flat.to(CPU)
        travels = parts.rows is Part.TRAINED
        return Update(
            client,
            request.class_ids if travels else request.class_ids[:0],
            torch.sub(rows, trained, out=trained) if travels else rows[:0],
            of_blocks(phi - after, model.block_sizes, parts.trained),
            len(held),
            total.item() / seen,
            _kept(parts, trained, after),
        )

    def objective(self, rows: Tensor, request: Request, held: Tensor) -> Objective:
        """For one round; rows: as they are trained, on the device that trains; held: the client's images."""
        if self.loss is None:
            return ClassRows(rows, request, self.scale, self.similarity)
        places = torch.searchsorted(request.class_ids, self.data.labels[held])
        counts = places.bincount(minlength=len(request.class_ids)).to(rows.device)
        request = replace(request, class_ids=request.class_ids.to(rows.device))
        return OwnLoss(rows, Given(request, counts, self.scale, self.similarity), self.loss)

    def batches(
        self, order: Tensor, request: Request, rng: np.random.Generator
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """(images as the net takes them, target) of each step of a pass over the images in `order`."""
        images = self.augmentation(self.data.images[order], rng, self.extractor.device)
        target = torch.searchsorted(request.class_ids, self.data.labels[order]).to(self.extractor.device)
        return zip(images.split(self.batch_size), target.split(self.batch_size), strict=True)

    def passes(self, held: Tensor, round: int, shuffle: np.random.Generator) -> Iterator[tuple[Pass, Tensor]]:
        """What moves, and the images that are trained on, in order."""
        for moves in self.schedule:
            yield moves, held[torch.from_numpy(shuffle.permutation(len(held)))]

    def _step(
        self,
        images: Tensor,
        target: Tensor,
        objective: Objective,
        lr: float,
        velocity: tuple[Tensor, Tensor] | None,  # of phi and of the rows; None: v = g
    ) -> Tensor:
        """v <- momentum * v + g, theta <- theta - lr * v, in place; g: the gradient of the batch's mean loss.

        Of what moves. Returns the loss before.
        """
        model, rows = self.extractor, objective.rows
        model.zero_gradient()
        rows.grad = None
        loss = objective.loss(model(images), target)
        loss.backward()
        if rows.requires_grad and rows.grad is None:  # a method's own loss may leave them as they are
            rows.grad = torch.zeros_like(rows)
        with torch.no_grad():
            if self._received:
                self._add_penalty(rows, *self._received)
            of_phi, of_rows = velocity or (None, None)
            model.step(lr, self.momentum, of_phi)
            if rows.requires_grad:
                assert rows.grad is not None
                sgd_step(rows, rows.grad, lr, self.momentum, of_rows)
        return loss.detach().double()  # no number: that would wait for a GPU

    def _add_penalty(self, rows: Tensor, phi: Tensor, received_rows: Tensor) -> None:
        """To the gradients of what moves, of the term beside the loss; phi and the rows as they came."""
        assert self.penalty_gradient is not None
        if any(self.extractor.moving):
            self.extractor.gradient.add_(self.penalty_gradient(self.extractor.flat, phi))
        if rows.requires_grad:
            assert rows.grad is not None
            rows.grad.add_(self.penalty_gradient(rows, received_rows))


def _seed_torch(seed: int, device: torch.device) -> None:
    """For a net that draws. Not torch.manual_seed, which formats a traceback for the sake of GPUs."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


def _kept(parts: Parts, rows: Tensor, phi: Tensor) -> Tensor | None:
    """What stays with the client for its next round, one vector."""
    if not parts.anything_at_home:
        return None
    return torch.cat([rows.flatten(), phi]) if parts.net_at_home else rows.flatten()
