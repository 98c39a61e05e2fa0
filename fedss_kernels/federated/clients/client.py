"""The client's half of a round: local SGD on its own images, from what came to what goes back."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ...sampled_softmax import sampled_softmax_loss
from ..algorithms import Request
from ..data import FederatedData
from ..randomness import Purpose, generator
from .augment import centre_crop, random_crop, random_shift

CPU = torch.device("cpu")
EMBEDDED_NUMBERS = 2**23  # in the images that are embedded at a time: 55 of 3x224x224, 512 of 3x64x64


@dataclass(frozen=True)
class Update:
    """What a client sends back: how far it moved, as old minus new, so that the server can step along it."""

    client: int
    class_ids: Tensor  # (S,) int64, ascending
    rows: Tensor  # (S, D): W[class_ids] as received minus as trained
    extractor: Tensor  # (P,): phi as received minus as trained
    num_examples: int  # n_k
    loss: float  # mean over its images as they were trained on


class Extractor:
    """A module whose trainable parameters are views of one vector `flat`, phi, their gradients of `gradient`.

    Loading phi, a step of SGD and the difference of two phi are then one operation each, whatever the module.
    Frozen parameters and buffers are constants: they stay with the module and never travel. All of it is on
    `device`; what comes and goes is in main memory, where the server is.
    """

    def __init__(self, module: nn.Module, crop_size: int = 0, device: torch.device = CPU):
        self.device = device
        module.to(device)
        trainable = [p for p in module.parameters() if p.requires_grad]
        _check_dtypes(module)
        self.module, self.crop_size = module, crop_size
        self.flat = torch.cat([p.detach().reshape(-1) for p in trainable])
        self.gradient = torch.zeros_like(self.flat)
        sizes = [p.numel() for p in trainable]
        for p, values, grad in zip(
            trainable, self.flat.split(sizes), self.gradient.split(sizes), strict=True
        ):
            p.data, p.grad = values.view(p.shape), grad.view(p.shape)
        self.constants = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def check_buffers(self) -> None:
        """Raises ValueError if training changed a buffer: no client could agree with another on its value."""
        for name, buffer in self.module.named_buffers():
            if not _same(buffer, self.constants[name]):
                raise ValueError(
                    f"model: expected buffers that training leaves alone, but it changed {name!r}"
                )

    def as_input(self, images: Tensor) -> Tensor:
        """uint8 images as the module's input where it isn't trained on them."""
        images = centre_crop(images, self.crop_size) if self.crop_size else images
        return as_input(images.to(self.device))

    @torch.no_grad()
    def embed(self, images: Tensor, batch_size: int = 512) -> Tensor:  # (T, channels, H, W) uint8 -> (T, D)
        self.module.eval()
        batch_size = max(1, min(batch_size, EMBEDDED_NUMBERS // images[0].numel()))
        embedded = [as_embeddings(self.module(self.as_input(batch))) for batch in images.split(batch_size)]
        return torch.cat([part.to(CPU, torch.float32) for part in embedded])


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
        max_shift: int = 0,
        crop_size: int = 0,  # of the images that it trains on, 0: they are whole
    ):
        self.extractor, self.data = extractor, data
        self.local_epochs, self.batch_size, self.scale, self.seed = local_epochs, batch_size, scale, seed
        self.max_shift, self.crop_size = max_shift, crop_size

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
        """Plain SGD over the client's images, in batches drawn for this round."""
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
        total, seen = torch.zeros((), dtype=torch.float64, device=model.device), 0
        for order in self.passes(held, round, shuffle):
            images = self.data.images[order]
            if self.crop_size:
                images = random_crop(images, self.crop_size, augmentation)
            images = as_input(images.to(model.device))
            if self.max_shift > 0:
                images = random_shift(images, self.max_shift, augmentation)
            target = torch.searchsorted(request.class_ids, self.data.labels[order]).to(model.device)
            for x, t in zip(images.split(self.batch_size), target.split(self.batch_size), strict=True):
                total += len(t) * self._step(x, t, trained, there, lr)
            seen += len(order)
        moved = rows - trained.detach().to(CPU)
        phi_moved = phi - model.flat.to(CPU)
        return Update(client, request.class_ids, moved, phi_moved, len(held), total.item() / seen)

    def passes(self, held: Tensor, round: int, shuffle: np.random.Generator) -> Iterator[Tensor]:
        """The images that are trained on, in order."""
        for _ in range(self.local_epochs):
            yield held[torch.from_numpy(shuffle.permutation(len(held)))]

    def _step(self, images: Tensor, target: Tensor, rows: Tensor, request: Request, lr: float) -> Tensor:
        """theta <- theta - lr * gradient of the batch's mean loss, in place; returns the loss before."""
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
            model.flat.add_(model.gradient, alpha=-lr)
            rows.add_(rows.grad, alpha=-lr)
        return loss.detach().double()  # no number: that would wait for a GPU


def _same(a: Tensor, b: Tensor) -> bool:
    """Torch has no NaN equal to itself."""
    return torch.equal(a, b) or (a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all()))


def as_input(images: Tensor) -> Tensor:
    """uint8 pixels as the model's input: float32 in [0, 1]."""
    return images.to(torch.float32).div_(255)


def as_embeddings(found: object) -> Tensor:
    """What a net returned. Raises ValueError for no tensor, which some return in training alone."""
    if not isinstance(found, Tensor):
        raise ValueError(f"model: expected embeddings, one tensor (B, D), got {_what(found)}")
    return found


def _what(found: object) -> str:
    """Of what a net returned: "a dict of 'logits' (Tensor)"."""
    kind = type(found).__name__
    if isinstance(found, Mapping):
        return f"a {kind} of {', '.join(f'{key!r} ({type(v).__name__})' for key, v in found.items())}"
    if isinstance(found, tuple | list):
        return f"a {kind} of {', '.join(type(value).__name__ for value in found) or 'nothing'}"
    return kind


def _check_dtypes(module: nn.Module) -> None:
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("model: expected a module with parameters to train, got one without")
    for name, p in trainable:
        if p.dtype != torch.float32:
            raise ValueError(f"model: expected float32 parameters, got {p.dtype} in {name!r}")
