"""Boxes of images at another size, and blur: both sum along the rows, then along the columns.

So each is two products with a matrix of weights for each image, over a whole batch.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

REACH = 6  # pixels from the middle of a blur's kernel to its ends: three times a sigma of 2


def resampled(
    images: Tensor,  # (B, channels, H, W) floats
    boxes: np.ndarray,  # (B, 4): top, left, height, width, whole pixels inside the image
    flipped: np.ndarray,  # (B,) bool: from left to right
    size: int,
) -> Tensor:  # (B, channels, size, size)
    """A box of each image, bilinearly and without antialiasing: the mean of the nearest two, by distance."""
    H, W = images.shape[2:]
    top, left, height, width = boxes.T
    rows, columns = _places(top, height, size), _places(left, width, size)
    columns[flipped] = columns[flipped, ::-1]
    by_row = _tents(rows, H, images)[:, None] @ images
    return (by_row.flatten(1, 2) @ _tents(columns, W, images).mT).unflatten(1, (-1, size))


def blurred(
    images: Tensor,  # (B, channels, size, size) floats
    sigmas: np.ndarray,  # (B,), pixels
) -> Tensor:
    """Gaussian blur over 2 REACH + 1 pixels, the image reflected at its edges; over fewer in a small one."""
    size = images.shape[-1]
    reach = min(REACH, size - 1)
    taps = np.arange(-reach, reach + 1)
    kernels = np.exp(-0.5 * (taps / sigmas[:, None]) ** 2)
    kernels /= kernels.sum(1, keepdims=True)
    seen = np.abs(np.arange(size)[:, None] + taps)  # (size, taps): pixel -1 is pixel 1
    seen = size - 1 - np.abs(size - 1 - seen)
    seeing = F.one_hot(torch.from_numpy(seen), size).to(images)  # (size, taps, size)
    weights = torch.einsum("bt,ytx->byx", torch.from_numpy(kernels).to(images), seeing)
    weights = weights[:, None]
    return weights @ images @ weights.mT


def _places(begins: np.ndarray, lengths: np.ndarray, size: int) -> np.ndarray:  # (B, size) float64
    """Where in the image the pixels of a view are: the middles of `size` equal parts of the box."""
    middles = (np.arange(size) + 0.5) * (lengths / size)[:, None] - 0.5
    return begins[:, None] + middles.clip(0, lengths[:, None] - 1)


def _tents(places: np.ndarray, whole: int, like: Tensor) -> Tensor:  # (B, size, whole)
    """Weights of the pixels 0 .. whole - 1 at each place: 1 less the distance, at least 0."""
    pixels = torch.arange(whole, device=like.device, dtype=like.dtype)
    return (torch.from_numpy(places).to(like)[:, :, None] - pixels).abs_().neg_().add_(1).clamp_(min=0)
