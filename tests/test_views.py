"""Views: against torchvision's functions step by step, the draws by what they must be, and repeatable."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_federation import tiny_data
from torch.utils._python_dispatch import TorchDispatchMode

from fedss_kernels.federated import Config
from fedss_kernels.federated.clients.colours import in_grey, jitter, turn_hue
from fedss_kernels.federated.clients.player import views_of
from fedss_kernels.federated.clients.resampling import blurred, resampled
from fedss_kernels.federated.clients.views import DRAWS, RECIPES, Views, choose

KINDS = list(RECIPES)


@pytest.fixture(scope="module")
def theirs(torchvision):
    from torchvision.transforms import functional

    return functional


def some_images(count=6, channels=3, height=32, width=32):
    made = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=made)


def close(found, expected, atol=2e-6):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


# ---- the steps against torchvision's


@pytest.mark.parametrize("shape", [(32, 32), (28, 40)])
def test_a_box_is_resampled_as_theirs(shape, theirs):
    images = some_images(4, 3, *shape).float() / 255
    boxes = np.array([[0, 0, *shape], [3, 5, 20, 17], [7, 2, 1, 9], [shape[0] - 9, shape[1] - 11, 9, 11]])
    flipped = np.array([False, True, False, True])
    for size in (32, 13):
        expected = torch.stack(
            [
                theirs.resized_crop(image, *box, [size, size], antialias=False)
                for image, box in zip(images, boxes.tolist(), strict=True)
            ]
        )
        expected[flipped] = expected[flipped].flip(3)
        close(resampled(images, boxes, flipped, size), expected)


@pytest.mark.parametrize("size", [32, 7, 5, 1])
def test_blur_is_theirs(size, theirs):
    """They reflect at the edges, so the kernel of 13 pixels is cut where the image has fewer than 7."""
    images = some_images(3, 3, size, size).float() / 255
    sigmas = [0.1, 0.9, 2.0]
    taps = 2 * min(6, size - 1) + 1
    expected = [theirs.gaussian_blur(x, [taps, taps], [s]) for x, s in zip(images, sigmas, strict=True)]
    close(blurred(images, np.array(sigmas)), torch.stack(expected))


def test_grey_is_theirs(theirs):
    images = some_images().float() / 255
    expected = torch.stack([theirs.rgb_to_grayscale(image, num_output_channels=3) for image in images])
    expected[0] = images[0]
    in_grey(images, np.arange(1, 6))
    close(images, expected)


def test_hue_is_theirs(theirs):
    """Grey pixels and pure colours among them, where it has no angle or is at a corner."""
    images = some_images(5).float() / 255
    images[0, :, :4] = images[0, :1, :4]
    images[1] = torch.eye(3).repeat(1, 12)[:, :32, None].expand(3, 32, 32)
    turns = [0.1, -0.1, 0.03, -0.5, 0.5]
    expected = torch.stack([theirs.adjust_hue(x, turn) for x, turn in zip(images, turns, strict=True)])
    turn_hue(images, np.arange(5), np.array(turns))
    close(images, expected, atol=4e-6)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)])
def test_jitter_is_theirs_in_each_image_order(order, theirs):
    """Image 0 is not jittered: it stays to the bit."""
    steps = theirs.adjust_brightness, theirs.adjust_contrast, theirs.adjust_saturation, theirs.adjust_hue
    images = some_images(3).float() / 255
    factors = np.array([[1.0, 1.0, 1.0], [1.4, 0.7, 1.3], [0.6, 1.2, 0.8]])
    turns = np.array([0.0, 0.08, -0.05])
    orders = np.array([(3, 1, 0, 2), order, order[::-1]])
    expected = images.clone()
    for image in (1, 2):
        for step in orders[image]:
            amount = [*factors[image], turns[image]][step]
            expected[image] = steps[step](expected[image], amount)
    before = images[0].clone()
    jitter(images, factors, turns, orders)
    close(images, expected, atol=4e-6)
    assert torch.equal(images[0], before)


def test_one_channel_has_its_brightness_and_contrast_alone(theirs):
    images = some_images(2, channels=1).float() / 255
    expected = torch.stack(
        [theirs.adjust_contrast(theirs.adjust_brightness(image, 1.3), 0.7) for image in images]
    )
    found = images.clone()
    jitter(found, np.array([[1.3, 0.7, 0.6]] * 2), np.array([0.1, 0.1]), np.array([(2, 0, 1, 3)] * 2))
    close(found, expected)
    in_grey(found, np.arange(2))
    close(found, expected)


class Calls(TorchDispatchMode):
    """Of torch's operations, by name."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("channels", "steps"), [(1, 2), (3, 3)])
def test_each_pass_over_the_pixels_changes_them(channels, steps):
    """One channel has two steps, as saturation is nothing to it, and is not looked through for its grey."""
    images, numbers = some_images(6, channels).float() / 255, np.full((6, 3), 1.1)
    with Calls() as jittering:
        jitter(images, numbers, np.zeros(6), np.array([(2, 0, 1), (0, 1, 2), (1, 2, 0)] * 2))
    assert jittering.count["lerp"] == jittering.count["clamp_"] == steps
    with Calls() as greying:
        in_grey(images, np.arange(6))
    assert bool(greying.count) == (channels == 3)


# ---- the whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_view_is_what_theirs_make_of_its_choice(kind, channels, theirs):
    """One after the other, each image by itself; the flip last in MoCo's order."""
    images = some_images(24, channels, 30, 34)
    views = Views(kind, 32)
    draws = views.draw(24, np.random.default_rng(4))
    choice = choose(draws, RECIPES[kind], (30, 34))
    assert 0 < (choice.turns != 0).sum() < 24 or kind == "simclr"
    steps = [theirs.adjust_brightness, theirs.adjust_contrast]
    steps += [theirs.adjust_saturation, theirs.adjust_hue] if channels == 3 else []
    expected = []
    for i, image in enumerate(images):
        view = theirs.resized_crop(image / 255, *choice.boxes[i].tolist(), [32, 32], antialias=False)
        amounts = [*choice.factors[i], choice.turns[i]]
        for step in [s for s in choice.orders[i] if s < len(steps)]:
            view = steps[step](view, amounts[step])
        if i in choice.grey and channels == 3:
            view = theirs.rgb_to_grayscale(view, num_output_channels=3)
        if i in choice.blurred:
            view = theirs.gaussian_blur(view, [13, 13], [choice.sigmas[i]])
        expected.append(view.flip(2) if choice.flipped[i] else view)
    close(views.made(images, draws), torch.stack(expected), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_is_what_the_recipe_says(kind):
    """Over 20,000 views: shares within 5 sd, and what is uniform by its mean and ends."""
    n, recipe = 20_000, RECIPES[kind]
    choice = choose(Views(kind, 32).draw(n, np.random.default_rng(0)), recipe, (32, 32))

    def share(found, expected):
        assert abs(np.mean(found) - expected) <= 5 * math.sqrt(expected * (1 - expected) / n)

    top, left, height, width = choice.boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (height > 0).all() and (width > 0).all()
    assert (top + height <= 32).all() and (left + width <= 32).all()
    assert set(top[height == 20]) == set(left[width == 20]) == set(range(13))  # every place
    area = height * width / 1024
    assert area.min() < recipe.smallest + 0.02 and area.min() > recipe.smallest * 0.85 and area.max() == 1
    assert 0.65 < (width / height).min() < 0.75 and 1.33 < (width / height).max() < 1.55
    jittered = (choice.factors != 1).any(1)
    share(jittered, 0.8)
    for factors in choice.factors[jittered].T:
        assert 0.6 <= factors.min() < 0.601 and 1.399 < factors.max() < 1.4
        assert abs(factors.mean() - 1) < 5 * 0.8 / math.sqrt(12 * len(factors))
    steps = 3 if kind == "simclr" else 4
    assert choice.orders.shape == (n, steps)
    for order in itertools.permutations(range(steps)):
        share((choice.orders == order).all(1), 1 / math.factorial(steps))
    share(choice.flipped, 0.5)
    share(np.isin(np.arange(n), choice.grey), 0.2)
    if kind == "simclr":
        assert not len(choice.blurred) and not choice.turns.any()
        return
    share(np.isin(np.arange(n), choice.blurred), 0.5)
    assert 0.1 <= choice.sigmas.min() < 0.101 and 1.999 < choice.sigmas.max() < 2
    assert (choice.turns[~jittered] == 0).all() and 0.0999 < np.abs(choice.turns).max() <= 0.1


def test_a_box_that_never_fits_is_the_middle_of_the_image():
    """As with torchvision's RandomResizedCrop: of a long image as much as the aspects allow."""
    draws = np.full((1, DRAWS), 0.999)  # the largest area, the widest
    for shape, box in (
        ((32, 32), (0, 0, 32, 32)),
        ((20, 80), (0, 26, 20, 27)),  # 27 = round(20 * 4 / 3)
        ((80, 20), (26, 0, 27, 20)),  # 27 = round(20 / (3 / 4))
    ):
        assert tuple(choose(draws, RECIPES["moco"], shape).boxes[0]) == box


@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_of_the_seed_alone_not_of_threads_or_the_rest_of_the_batch(kind, set_threads):
    images, views = some_images(60), Views(kind, 32)
    found = views(images, np.random.default_rng(7))
    assert found.shape == (60, 3, 32, 32) and found.dtype == torch.float32
    assert found.min() >= -1e-6 and found.max() <= 1 + 1e-6
    set_threads(2)
    assert torch.equal(views(images, np.random.default_rng(7)), found)
    set_threads(1)
    assert torch.equal(views(images[:25], np.random.default_rng(7)), found[:25])
    others = images.clone()
    others[1:] = 255 - others[1:]
    assert torch.equal(views(others, np.random.default_rng(7))[0], found[0])
    assert not torch.equal(views(images, np.random.default_rng(8)), found)
    rng = np.random.default_rng(7)
    parts = [views.draw(20, rng), views.draw(40, rng)]
    assert torch.equal(views.made(images, np.concatenate(parts)), found)


def test_one_large_image_is_the_same_by_two_threads(set_threads):
    """Large enough for torch to share out its rows, and a mean over it; jittered, and blurred."""
    image, views, draws = some_images(1, 3, 240, 250), Views("moco", 224), np.full((1, DRAWS), 0.3)
    found = views.made(image, draws)
    set_threads(2)
    assert torch.equal(views.made(image, draws), found)


def test_each_image_has_draws_of_its_own_and_nothing_is_changed():
    image = some_images(1)
    images, before = image.expand(50, 3, 32, 32), image.clone()
    found = Views("moco", 32)(images, np.random.default_rng(0))
    assert len(found.flatten(1).unique(dim=0)) == 50 and torch.equal(image, before)


def test_of_no_image_there_is_none():
    assert Views("moco", 20)(some_images(0), np.random.default_rng(0)).shape == (0, 3, 20, 20)


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (torch.zeros(2, 3, 8, 8), r"torch.float32 \(2, 3, 8, 8\)"),
        (torch.zeros(2, 2, 8, 8, dtype=torch.uint8), r"torch.uint8 \(2, 2, 8, 8\)"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"torch.uint8 \(3, 8, 8\)"),
    ],
)
def test_other_images_are_refused(images, got):
    with pytest.raises(ValueError, match=rf"images: expected uint8 \(B, 1 or 3, H, W\), got {got}"):
        Views("simclr", 8)(images, np.random.default_rng(0))


def test_draws_for_other_images_are_refused():
    views = Views("simclr", 8)
    draws = views.draw(3, np.random.default_rng(0))
    with pytest.raises(ValueError, match=rf"draws: expected shape \(2, {DRAWS}\), got \(3, {DRAWS}\)"):
        views.made(some_images(2), draws)


def test_other_kinds_and_sizes_are_refused():
    with pytest.raises(ValueError, match="views: expected one of simclr, moco, got 'byol'"):
        Views("byol", 32)
    with pytest.raises(ValueError, match="views: expected a size of at least 1, got 0"):
        Views("moco", 0)
    for smallest in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=rf"views: expected a smallest_box in \(0, 1\], got {smallest}"):
            Views("moco", 8, smallest)


@pytest.mark.parametrize("kind", KINDS)
def test_a_smallest_box_of_ones_own_changes_boxes_alone(kind):
    views, usual = Views(kind, 32, 0.5), Views(kind, 32)
    draws = views.draw(2000, np.random.default_rng(0))
    found, before = (choose(draws, v.recipe, (32, 32)) for v in (views, usual))
    area = found.boxes[:, 2:].prod(1) / 1024
    assert 0.45 < area.min() < 0.52 and area.max() == 1
    for name in ("factors", "turns", "orders", "grey", "blurred", "sigmas", "flipped"):
        np.testing.assert_array_equal(getattr(found, name), getattr(before, name))


@pytest.mark.parametrize(("method", "kind"), [("simclr", "simclr"), ("fl_moco", "moco"), ("mocosfl", "moco")])
def test_a_run_has_the_views_of_its_method_and_options(method, kind):
    config = Config(data="cifar10", model="isotropic", method=method, embedding_dim=32, rounds=1)
    assert views_of(config, tiny_data()) == Views(kind, 6)
    assert views_of(replace(config, smallest_box=0.3, crop_size=5), tiny_data()) == Views(kind, 5, 0.3)
