"""The isotropic residual net: by its formula, its gradients, its grid, what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from fedss_kernels.federated.models import build_model
from fedss_kernels.federated.models.isotropic import isotropic_net


def images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def by_formula(net, x, groups, patch):
    """The stem, then x + f(f(x)) in each block, f a norm, ReLU and a convolution; means over quarters."""

    def f(x, gain, bias, weight):
        return F.conv2d(F.relu(F.group_norm(x, groups, gain, bias)), weight, padding=1)

    weight, gain, bias, *rest = net.parameters()
    x = F.conv2d(x, weight, stride=patch, padding=patch - 1)
    x = F.relu(F.group_norm(x, groups, gain, bias))
    convolutions = [*zip(*[iter(rest)] * 3, strict=True)]
    for first, second in zip(convolutions[::2], convolutions[1::2], strict=True):
        x = x + f(f(x, *first), *second)
    h, w = x.shape[2] // 2, x.shape[3] // 2
    quarters = [x[:, :, i : i + h, j : j + w].mean((2, 3)) for i in (0, h) for j in (0, w)]
    return torch.stack(quarters, 2).flatten(1)


@pytest.mark.parametrize(("side", "patch"), [(32, 4), (32, 8), (16, 2), (24, 3)])
def test_it_is_what_its_formula_says(side, patch):
    net = build_model(f"isotropic:depth=3,patch={patch}", 64, seed=0).double()
    x = images(2, 3, side, side)
    assert net.blocks.stem(x).shape == (2, 16, side // patch, side // patch)
    torch.testing.assert_close(net(x), by_formula(net, x, groups=2, patch=patch), rtol=1e-10, atol=1e-12)


def test_a_block_can_take_away():
    net = build_model("isotropic:depth=2", 64, seed=0)
    x = net.blocks.stem(torch.rand(4, 3, 32, 32))
    for block in list(net.blocks)[1:]:
        assert (block(x) < x).any() and (block(x) > x).any()


def test_its_gradients_are_right():
    net = build_model("isotropic:depth=2", 32, seed=0).double()
    names, parameters = zip(*net.named_parameters(), strict=True)
    x = images(2, 3, 16, 16).requires_grad_()

    def of(x, *parameters):
        return functional_call(net, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(of, (x, *parameters), fast_mode=True)


def test_any_block_may_be_left_out_and_features_taken_after_any():
    net, x = build_model("isotropic:depth=4", 32, seed=0), torch.rand(2, 3, 32, 32)
    stem, *blocks = net.blocks
    x = stem(x)
    for block in blocks:
        assert net.pool(x).shape == (2, 32) and block(x).shape == x.shape


def test_grey_images_are_taken_as_they_are_in_colour():
    net, x = build_model("isotropic:depth=1", 32, seed=0), torch.rand(2, 1, 28, 28)
    assert net.blocks.stem(x).shape == (2, 8, 7, 7)
    assert torch.equal(net(x), net(x.expand(-1, 3, -1, -1)))


def test_its_parameters_are_counted():
    """Of width 48: a stem of 7x7 and 12 blocks of two 3x3, each with a norm."""
    count = sum(p.numel() for p in isotropic_net(192).parameters())
    assert count == (3 * 49 * 48 + 96) + 12 * 2 * (9 * 48 * 48 + 96)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embedding_dim": 48}, "expected embedding_dim a multiple of 32, 4 times its width, got 48"),
        ({"embedding_dim": 0}, "expected embedding_dim of at least 1, got 0"),
        ({"depth": 0}, "expected depth of at least 1, got 0"),
        ({"patch": 0}, "expected patch of at least 1, got 0"),
    ],
)
def test_others_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"model: isotropic: {message}"):
        isotropic_net(**settings)
