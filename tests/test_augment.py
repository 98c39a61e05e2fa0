"""Random affine maps: the identity, whole-pixel shifts and quarter turns by hand, and repeatability."""

import numpy as np
import torch

from fedss_kernels.federated.augment import random_affine


class Fixed:
    """In place of a random generator: the same numbers for every image."""

    def __init__(self, numbers):
        self.numbers = np.array(numbers, dtype=np.float64)

    def uniform(self, low, high, size):
        return np.broadcast_to(self.numbers, size).copy()


IMAGES = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)


def test_no_change_allowed_changes_nothing():
    result = random_affine(IMAGES, 0.0, 0.0, np.random.default_rng(0))
    torch.testing.assert_close(result, IMAGES)


def test_shift_is_counted_in_pixels():
    """Each pixel reads the one 2 to its right and 1 below (t = (2, 1)); what lies outside is 0."""
    result = random_affine(IMAGES, 2.0, 0.0, Fixed([[0, 0, 1.0], [0, 0, 0.5]]))
    expected = torch.zeros_like(IMAGES)
    expected[..., :-1, :-2] = IMAGES[..., 1:, 2:]
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


def test_distortion_is_a_matrix_about_the_centre():
    """x -> -y, y -> x turns a square image by a quarter: A = [[-1, -1], [1, -1]], at max_distortion 1."""
    square = IMAGES[..., :4]
    result = random_affine(square, 0.0, 1.0, Fixed([[-1, -1, 0], [1, -1, 0]]))
    torch.testing.assert_close(result, square.rot90(dims=(2, 3), k=1), atol=1e-4, rtol=0)


def test_each_image_has_a_map_of_its_own_and_a_seed_repeats_them():
    images = torch.rand(1, 1, 28, 28).expand(5, -1, -1, -1)
    first, again = (random_affine(images, 2.0, 0.15, np.random.default_rng(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert all(not torch.allclose(first[i], first[j]) for i in range(5) for j in range(i))
