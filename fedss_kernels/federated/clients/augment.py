"""Random changes to a client's training images that leave their classes as they are."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def as_input(images: Tensor) -> Tensor:
    """uint8 pixels as the model's input: float32 in [0, 1]."""
    return images.to(torch.float32).div_(255)


@dataclass(frozen=True)
class Augmentation:
    """What a client's training images go through, the first thing first."""

    crop_size: int = 0  # a square of so many pixels of each, anywhere in it; 0: it is whole
    max_shift: int = 0  # moved by so many pixels at most
    flip: bool = False  # every other one from left to right

    @property
    def draws(self) -> bool:
        return bool(self.crop_size or self.max_shift or self.flip)

    def __call__(
        self,
        images: Tensor,  # (n, channels, H, W) uint8
        rng: np.random.Generator,  # of any state where nothing is drawn
        device: torch.device | str = "cpu",
    ) -> Tensor:  # float32 in [0, 1], on the device
        if self.crop_size:
            images = random_crop(images, self.crop_size, rng)
        images = as_input(images.to(device))
        if self.max_shift > 0:
            images = random_shift(images, self.max_shift, rng)
        return random_flip(images, rng) if self.flip else images


def random_shift(
    images: Tensor,  # (n, channels, H, W)
    max_shift: int,  # pixels
    rng: np.random.Generator,
) -> Tensor:  # (n, channels, H, W)
    """Each image moved by whole pixels of its own, uniform in [-max_shift, max_shift] along both axes.

    What moves in from outside is 0. The same as a random crop of the image in a frame of `max_shift` zeros.
    """
    n, _, H, W = images.shape
    down, right = torch.from_numpy(rng.integers(0, 2 * max_shift + 1, (2, n)))
    framed = F.pad(images, (max_shift,) * 4)
    rows = down[:, None] + torch.arange(H)  # (n, H)
    columns = right[:, None] + torch.arange(W)  # (n, W)
    moved = framed[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()  # indexing puts the channels last


def random_flip(
    images: Tensor,  # (n, channels, H, W), uint8 or floats
    rng: np.random.Generator,
) -> Tensor:  # (n, channels, H, W)
    """Each image from left to right with probability 1/2, else as it is."""
    flipped = torch.from_numpy(rng.integers(0, 2, len(images))).bool().to(images.device)
    return torch.where(flipped[:, None, None, None], images.flip(3), images)


def random_crop(
    images: Tensor,  # (n, channels, H, W)
    size: int,  # pixels, at most H and W
    rng: np.random.Generator,
) -> Tensor:  # (n, channels, size, size)
    """A square of each image, at a place of its own, uniform over all there are."""
    n, _, H, W = images.shape
    tops, lefts = rng.integers(0, H - size + 1, n).tolist(), rng.integers(0, W - size + 1, n).tolist()
    squares = zip(images, tops, lefts, strict=True)
    return torch.stack([image[:, top : top + size, left : left + size] for image, top, left in squares])


def centre_crop(
    images: Tensor, size: int
) -> Tensor:  # (n, channels, H, W) -> (n, channels, size, size), a view
    """The square in the middle of each image, half a pixel up and left where it has no middle."""
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]
