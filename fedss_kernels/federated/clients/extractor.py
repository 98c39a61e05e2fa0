"""A net whose trainable parameters are one vector, phi: what a client trains and the server averages."""

from collections.abc import Callable, Mapping, Sequence
from itertools import compress

import torch
from torch import Tensor, nn

from ..models.blocks import ranges
from .augment import as_input, centre_crop
from .sgd import sgd_step

CPU = torch.device("cpu")
EMBEDDED_NUMBERS = 2**23  # in the images that are embedded at a time: 55 of 3x224x224, 512 of 3x64x64


class Extractor:
    """A module whose trainable parameters are views of one vector `flat`, phi, their gradients of `gradient`.

    Loading phi, a step of SGD and the difference of two phi are then one operation each, whatever the module.
    A block of the net is a range of phi, and so are neighbours: `move` says which of them are trained, and
    `present` which of them there are. Where training puts a head on the net it is the last block.
    Frozen parameters and buffers are constants: they stay with the module and never travel. All of it is on
    `device`; what comes and goes is in main memory, where the server is.
    """

    def __init__(
        self,
        module: nn.Module,
        crop_size: int = 0,
        device: torch.device = CPU,
        blocks: Sequence[nn.Module] = (),  # of the module, as of blocks_of; none: it is one block
        head: nn.Module | None = None,  # of embeddings, in training alone
    ):
        check_parameters(module)
        self.device = device
        whole = [module] if head is None else [module, head]
        trainable = [p for part in whole for p in part.to(device).parameters() if p.requires_grad]
        self.blocks, self.head = list(blocks) or [module], head
        self.module, self.crop_size = module, crop_size
        self.flat = torch.cat([p.detach().reshape(-1) for p in trainable])
        self.gradient = torch.zeros_like(self.flat)
        sizes = [p.numel() for p in trainable]
        for p, values, grad in zip(
            trainable, self.flat.split(sizes), self.gradient.split(sizes), strict=True
        ):
            p.data, p.grad = values.view(p.shape), grad.view(p.shape)
        self.constants = {name: buffer.clone() for name, buffer in module.named_buffers()}
        self._parameters = [
            [p for p in block.parameters() if p.requires_grad] for block in (*self.blocks, *whole[1:])
        ]
        self.block_sizes = [sum(p.numel() for p in block) for block in self._parameters]  # sum to P
        self.moving = (True,) * len(self.block_sizes)
        self.present: Sequence[bool] | None = None  # of each block whether it is run in training; None: all
        self._moves_in([slice(0, len(self.flat))])

    def move(self, moving: Sequence[bool]) -> None:
        """Of each block whether it is trained from now on. What is not has no gradient and no graph."""
        moving = tuple(moving)
        if moving == self.moving:
            return
        for parameters, moves in zip(self._parameters, moving, strict=True):
            for p in parameters:
                p.requires_grad_(moves)
        self.moving = moving
        self._moves_in(ranges(self.block_sizes, moving))

    def _moves_in(self, parts: Sequence[slice]) -> None:
        self._parts = [(part, self.flat[part], self.gradient[part]) for part in parts]  # views, made once

    def zero_gradient(self) -> None:
        for _, _, gradient in self._parts:
            gradient.zero_()

    def step(self, lr: float, momentum: float = 0.0, velocity: Tensor | None = None) -> None:
        """Of SGD, with a velocity (P,) for all of phi; only what moves is stepped."""
        for part, numbers, gradient in self._parts:
            sgd_step(numbers, gradient, lr, momentum, None if velocity is None else velocity[part])

    def check_buffers(self) -> None:
        """Raises ValueError if training changed a buffer: no client could agree with another on its value."""
        for name, buffer in self.module.named_buffers():
            if not _same(buffer, self.constants[name]):
                raise ValueError(
                    f"model: expected buffers that training leaves alone, but it changed {name!r}"
                )

    def __call__(self, images: Tensor) -> Tensor:  # (B, channels, H, W) float32 -> (B, D)
        """In training: embeddings, or what the head makes of them."""
        found = self._embedded(images, self.present)
        return found if self.head is None else self.head(found)

    def _embedded(self, images: Tensor, present: Sequence[bool] | None) -> Tensor:
        """By the module; without some of its blocks by the others, one after the other, and its `pool`."""
        if present is None or all(present):
            return as_embeddings(self.module(images))
        for block in compress(self.blocks, present):
            images = block(images)
        assert isinstance(self.module.pool, nn.Module)  # of a net whose blocks may be absent
        return as_embeddings(self.module.pool(images))

    def as_input(self, images: Tensor) -> Tensor:
        """uint8 images as the module's input where it isn't trained on them."""
        images = centre_crop(images, self.crop_size) if self.crop_size else images
        return as_input(images.to(self.device))

    @torch.no_grad()
    def embed(
        self, images: Tensor, batch_size: int = 512, present: Sequence[bool] | None = None
    ) -> Tensor:  # (T, channels, H, W) uint8 -> (T, D)
        """By the blocks that are present; None: all."""
        self.module.eval()
        return in_batches(lambda batch: self._embedded(self.as_input(batch), present), images, batch_size)


def in_batches(
    make: Callable[[Tensor], Tensor],
    images: Tensor,
    batch_size: int,
    rows: Tensor | None = None,  # (n,) of the images; None: all
) -> Tensor:
    """What is made of images, of so many at a time or fewer where they are large: float32, in main memory.

    No more than these are read at a time, so images may be mapped from a file.
    """
    batch_size = max(1, min(batch_size, EMBEDDED_NUMBERS // images[0].numel()))
    batches = images.split(batch_size) if rows is None else (images[part] for part in rows.split(batch_size))
    made = [make(batch) for batch in batches]
    return torch.cat([part.to(CPU, torch.float32) for part in made])


def _same(a: Tensor, b: Tensor) -> bool:
    """Torch has no NaN equal to itself."""
    return torch.equal(a, b) or (a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all()))


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


def check_parameters(module: nn.Module) -> None:
    """Raises ValueError for parameters that cannot be trained and sent."""
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("model: expected a module with parameters to train, got one without")
    for name, p in trainable:
        if not p.is_leaf:
            raise ValueError(
                f"model: expected parameters that are leaves, got {name!r}, made by an operation"
            )
        if p.dtype != torch.float32:
            raise ValueError(f"model: expected float32 parameters, got {p.dtype} in {name!r}")
        if p.is_meta:
            raise ValueError(f"model: expected parameters with values, got {name!r} on the meta device")
