"""Nets to be cut: weight standardisation by its formula, ResNet-18 as torchvision's, sizes as the paper's."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from fedss_kernels.federated.models import build_model
from fedss_kernels.federated.models.layers import Standardised
from fedss_kernels.federated.models.resnet32 import BasicBlock, StandardisedConv2d


def images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def standardised(weight):
    """Filter by filter, unbiased."""
    return torch.stack([(w - w.mean()) / (w.std() + 1e-5) for w in weight])


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 2)])
def test_a_convolution_by_its_formula(kernel, stride):
    layer, x = StandardisedConv2d(4, 6, kernel, stride).double(), images(2, 4, 7, 8)
    expected = nn.functional.conv2d(x, standardised(layer.weight), None, stride, kernel // 2)
    torch.testing.assert_close(layer(x), expected)
    assert layer.bias is None
    assert torch.autograd.gradcheck(
        lambda x, w: functional_call(layer, {"weight": w}, (x,)), (x.requires_grad_(), layer.weight)
    )


def test_a_filter_of_equal_weights_is_none_and_has_a_gradient():
    layer, x = StandardisedConv2d(4, 6, 3), torch.rand(2, 4, 7, 8)
    with torch.no_grad():
        layer.weight[:3] = 0.5
    y = layer(x)
    y.square().sum().backward()
    assert not y[:, :3].any() and y[:, 3:].any() and layer.weight.grad.isfinite().all()


def test_a_filters_size_says_nothing():
    """Behind a norm: the same features from filters ten times as large."""
    net, x = build_model("conv4_ws", 128, seed=0), torch.rand(2, 3, 32, 32)
    expected = net(x)
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() == 4:
                p.mul_(10)
    torch.testing.assert_close(net(x), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("name", "dim"), [("conv4_ws", 128), ("resnet18_32", 512)])
def test_pixels_are_standardised_by_cifar10s(name, dim, torchvision):
    """As torchvision's Normalize; and before anything else of the net."""
    from torchvision.transforms import Normalize

    normalise = Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    net = build_model(name, dim, seed=0)
    x, (first, *_) = images(2, 3, 32, 32).float(), net.blocks[0]
    assert isinstance(first, Standardised) and not [*first.parameters(), *first.buffers()]
    torch.testing.assert_close(first(x), normalise(x))
    torch.testing.assert_close(first(x[:, :1]), normalise(x[:, :1].expand(-1, 3, -1, -1)))
    assert first(x.double()).dtype == torch.float64


def test_resnet18_is_torchvisions_with_another_stem_and_standardised_filters(torchvision):
    from torchvision.models import resnet18

    net = build_model("resnet18_32", 512, seed=0).double()
    theirs = resnet18(norm_layer=lambda channels: nn.GroupNorm(channels // 4, channels))
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    theirs.fc = nn.Identity()
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p, own in zip(theirs.double().parameters(), net.parameters(), strict=True):
            own.add_(0.1 * torch.randn(own.shape, generator=drawn))
            p.copy_(standardised(own) if own.dim() == 4 else own)
    x = images(2, 3, 32, 32)
    torch.testing.assert_close(net(x), theirs(Standardised()(x)), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "dim", "sizes", "latents"),
    [
        (
            "resnet18_32",
            512,
            {1: 1_856, 2: 75_840, 9: 11_168_832},
            [*[(64, 32, 32)] * 3, *[(128, 16, 16)] * 2, *[(256, 8, 8)] * 2, *[(512, 4, 4)] * 2],
        ),
        (
            "conv4_ws",
            128,
            {1: 464, 3: 464 + 4_672 + 18_560, 4: 97_680},
            [(16, 16, 16), (32, 16, 16), (64, 8, 8), (128, 4, 4)],
        ),
    ],
)
def test_cut_after_any_block_they_are_of_the_papers_sizes(name, dim, sizes, latents):
    net, x = build_model(name, dim, seed=0), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        for after, (block, latent) in enumerate(zip(net.blocks, latents, strict=True), 1):
            x = block(x)
            assert x.shape == (1, *latent)
            if after in sizes:
                assert sum(p.numel() for p in net.blocks[:after].parameters()) == sizes[after]
        torch.testing.assert_close(net.pool(x), x.mean((2, 3)))


def test_a_cut_after_three_convolutions_leaves_the_client_139_thousandths_of_the_work():
    """The paper's 13.9% of the multiply-adds; three convolutions of 64 channels at 32x32."""
    net, x = build_model("resnet18_32", 512, seed=0), torch.rand(1, 3, 32, 32)
    work = []
    for part in (net.blocks[:2], net):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            part(x)
        work.append(counter.get_total_flops() / 2)
    assert work[0] == (3 + 2 * 64) * 64 * 9 * 32 * 32
    assert round(work[0] / work[1], 3) == 0.139


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_are_right_in_both_ways_of_a_block(stride):
    block = BasicBlock(8, 8 * stride, stride).double()
    names, parameters = zip(*block.named_parameters(), strict=True)

    def of(x, *parameters):
        return functional_call(block, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(of, (images(2, 8, 6, 6).requires_grad_(), *parameters), fast_mode=True)


@pytest.mark.parametrize(("name", "features"), [("resnet18_32", 512), ("conv4_ws", 128)])
def test_another_embedding_is_refused(name, features):
    with pytest.raises(ValueError, match=f"model: {name}: expected embedding_dim {features}, .* got 64"):
        build_model(name, 64, seed=0)
