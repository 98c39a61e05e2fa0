"""The client's half of a round: local SGD on its own images, from what came to what goes back."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ...sampled_softmax import sampled_softmax_loss
from ..data import FederatedData
from ..messages import Request, Update
from ..randomness import Purpose, generator
from .augment import random_crop, random_flip, random_shift
from .extractor import CPU, Extractor, as_embeddings, as_input


class Client:
    """Plays any client of a data set: one resident model and one set of buffers serve them all, in turn."""

    def __init__(
        self,
        extractor: Extractor,
        data: FederatedData,
        *,
        local_epochs: int,
        batch_size: int,
        scale: float,
        seed: int,
        momentum: float = 0.0,
        max_shift: int = 0,
        flip: bool = False,
        crop_size: int = 0,  # of the images that it trains on, 0: they are whole
    ):
        self.extractor, self.data = extractor, data
        self.local_epochs, self.batch_size, self.scale, self.seed = local_epochs, batch_size, scale, seed
        self.momentum = momentum
        self.max_shift, self.flip, self.crop_size = max_shift, flip, crop_size

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
    ) -> Update:
        """SGD over the client's images, in batches drawn for this round; its velocity starts from 0."""
        model, held = self.extractor, self.data.clients[client]
        model.flat.copy_(phi)
        if not model.module.training:
            model.module.train()
        # Not torch.manual_seed, which formats a traceback each time for the sake of GPUs.
        noise = generator(self.seed, round, attempt, client, Purpose.MODEL).integers(2**63)
        torch.default_generator.manual_seed(int(noise))
        if model.device.type == "cuda":
            torch.cuda.default_generators[model.device.index].manual_seed(int(noise))
        shuffle = generator(self.seed, round, attempt, client, Purpose.BATCHES)
        augmentation = generator(self.seed, round, attempt, client, Purpose.AUGMENTATION)
        trained = rows.to(model.device, copy=True).requires_grad_()
        there = request.to(model.device)
        velocity = [torch.zeros_like(model.flat), torch.zeros_like(trained)] if self.momentum else []
        total, seen = torch.zeros((), dtype=torch.float64, device=model.device), 0
        for order in self.passes(held, round, shuffle):
            images = self.data.images[order]
            if self.crop_size:
                images = random_crop(images, self.crop_size, augmentation)
            images = as_input(images.to(model.device))
            if self.max_shift > 0:
                images = random_shift(images, self.max_shift, augmentation)
            if self.flip:
                images = random_flip(images, augmentation)
            target = torch.searchsorted(request.class_ids, self.data.labels[order]).to(model.device)
            for x, t in zip(images.split(self.batch_size), target.split(self.batch_size), strict=True):
                total += len(t) * self._step(x, t, trained, there, lr, velocity)
            seen += len(order)
        moved = rows - trained.detach().to(CPU)
        phi_moved = phi - model.flat.to(CPU)
        return Update(client, request.class_ids, moved, phi_moved, len(held), total.item() / seen)

    def passes(self, held: Tensor, round: int, shuffle: np.random.Generator) -> Iterator[Tensor]:
        """The images that are trained on, in order."""
        for _ in range(self.local_epochs):
            yield held[torch.from_numpy(shuffle.permutation(len(held)))]

    def _step(
        self,
        images: Tensor,
        target: Tensor,
        rows: Tensor,
        request: Request,
        lr: float,
        velocity: list[Tensor],  # of phi and of the rows; empty without momentum, where v = g
    ) -> Tensor:
        """v <- momentum * v + g, theta <- theta - lr * v, in place; g: the gradient of the batch's mean loss.

        Returns the loss before.
        """
        model = self.extractor
        model.gradient.zero_()
        rows.grad = None
        loss = sampled_softmax_loss(
            as_embeddings(model.module(images)),
            rows,
            target,
            request.denominator,
            request.log_expected_count,
            scale=self.scale,
        )
        loss.backward()
        assert rows.grad is not None
        with torch.no_grad():
            for v, g in zip(velocity, (model.gradient, rows.grad), strict=False):
                g.copy_(v.mul_(self.momentum).add_(g))
            model.flat.add_(model.gradient, alpha=-lr)
            rows.add_(rows.grad, alpha=-lr)
        return loss.detach().double()  # no number: that would wait for a GPU
