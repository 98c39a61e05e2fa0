"""Random changes to a client's training images that leave their classes as they are."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def random_affine(
    images: Tensor,  # (n, channels, H, W) floating
    max_shift: float,  # pixels
    max_distortion: float,
    rng: np.random.Generator,
) -> Tensor:  # (n, channels, H, W)
    """Each image seen through a map of its own: p -> p + A p + t, p relative to the centre.

    t is uniform in [-max_shift, max_shift]^2, the entries of the 2 x 2 matrix A are uniform in
    [-max_distortion, max_distortion]: shifts, small turns, stretches and shears. Values between pixels are
    interpolated linearly; outside it is 0.
    """
    n, _, H, W = images.shape
    maps = rng.uniform(-1.0, 1.0, (n, 2, 3))
    maps[:, :, :2] = np.eye(2) + max_distortion * maps[:, :, :2]
    maps[:, :, 2] *= max_shift / (np.array([W, H]) / 2)  # affine_grid counts in halves of the image
    grid = F.affine_grid(torch.from_numpy(maps).to(images.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
