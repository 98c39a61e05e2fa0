"""Random shifts and crops: by hand, within bounds, each image its own, repeatable."""

import numpy as np
import pytest
import torch

from fedss_kernels.federated.clients.augment import centre_crop, random_crop, random_flip, random_shift

IMAGES = torch.arange(1, 1 + 2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)


class Fixed:
    """In place of a random generator: the given offsets into the frame, (down, right) for each image."""

    def __init__(self, down, right):
        self.offsets = np.array([down, right])

    def integers(self, low, high, size):
        assert (low, high, size) == (0, 5, self.offsets.shape)
        return self.offsets


def test_by_hand():
    """In a frame of 2, offset (3, 4) shows what is 1 row down and 2 columns right; (2, 2) changes nothing."""
    moved = random_shift(IMAGES, 2, Fixed([3, 2], [4, 2]))
    expected = torch.zeros_like(IMAGES[0])
    expected[:, :-1, :-2] = IMAGES[0, :, 1:, 2:]
    assert torch.equal(moved[0], expected) and torch.equal(moved[1], IMAGES[1])
    assert moved.is_contiguous()


def test_no_shift_changes_nothing():
    assert torch.equal(random_shift(IMAGES, 0, np.random.default_rng(0)), IMAGES)


def test_every_shift_occurs_equally_often():
    """One bright pixel at the centre of 5 x 5: 25 places, each 1/25 of 10,000 draws, within 5 sd of 19.6."""
    images = torch.zeros(10_000, 1, 5, 5)
    images[:, :, 2, 2] = 1
    seen = random_shift(images, 2, np.random.default_rng(0)).sum(0)
    assert seen.sum() == 10_000 and ((seen - 400).abs() < 5 * 19.6).all()


def test_a_seed_repeats_them():
    first, again = (random_shift(IMAGES, 2, np.random.default_rng(3)) for _ in range(2))
    assert torch.equal(first, again)


class Coins:
    """In place of a random generator: which images are flipped."""

    def __init__(self, *flipped):
        self.flipped = np.array(flipped)

    def integers(self, low, high, size):
        assert (low, high, size) == (0, 2, len(self.flipped))
        return self.flipped


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_a_flip_by_hand(dtype):
    """The columns of the one image from right to left; its rows and channels, and the other image, stay."""
    images = IMAGES.to(dtype)
    flipped = random_flip(images, Coins(0, 1))
    assert torch.equal(flipped[0], images[0]) and flipped.dtype == dtype and flipped.is_contiguous()
    assert torch.equal(flipped[1], images[1][..., [5, 4, 3, 2, 1, 0]])
    assert torch.equal(images, IMAGES.to(dtype))  # what came is as it was


def test_half_of_the_images_are_flipped_and_a_seed_repeats_which():
    """Of 10,000 within 5 sd of 50."""
    images = torch.arange(2.0).expand(10_000, 1, 1, 2)
    first, again = (random_flip(images, np.random.default_rng(0)) for _ in range(2))
    assert abs(first[:, 0, 0, 0].sum() - 5000) < 250 and torch.equal(first, again)


def test_a_crop_is_a_square_of_the_image_each_place_equally_often():
    """Of 5 x 7 there are 3 * 5 squares of 3 pixels: each 1/15 of 15,000 draws, within 5 sd of 30.6."""
    image = torch.arange(35, dtype=torch.uint8).reshape(1, 1, 5, 7)
    found = random_crop(image.expand(15_000, 1, 5, 7), 3, np.random.default_rng(0))
    assert found.shape == (15_000, 1, 3, 3) and found.dtype == torch.uint8
    corners, counts = found[:, 0, 0, 0].unique(return_counts=True)
    assert corners.tolist() == [7 * top + left for top in range(3) for left in range(5)]
    assert ((counts - 1000).abs() < 5 * 30.6).all()
    offsets = (torch.arange(3)[:, None] * 7 + torch.arange(3)).to(torch.uint8)
    assert torch.equal(found[:, 0], found[:, 0, :1, :1] + offsets)


def test_crops_of_a_seed_repeat_and_of_the_whole_change_nothing():
    first, again = (random_crop(IMAGES, 2, np.random.default_rng(3)) for _ in range(2))
    assert torch.equal(first, again)
    square = IMAGES[..., :4]
    assert torch.equal(random_crop(square, 4, np.random.default_rng(0)), square)


def test_the_centre_by_hand():
    """Of 4 x 6: rows 1 and 2, columns 2 and 3; of 3 x 3 the square of 2 is the one at the top left."""
    assert torch.equal(centre_crop(IMAGES, 2), IMAGES[:, :, 1:3, 2:4])
    assert torch.equal(centre_crop(IMAGES[..., :3, :3], 2), IMAGES[..., :2, :2])
