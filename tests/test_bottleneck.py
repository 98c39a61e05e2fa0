"""A bottleneck at the cut: what crosses it, what stays as it was, and what cannot be."""

import pytest
import torch
from tiny_federation import tiny_config, tiny_data
from torch import nn

from fedss_kernels.federated import ConfigError, run
from fedss_kernels.federated.clients.player import Player
from fedss_kernels.federated.models import build_model
from fedss_kernels.federated.models.blocks import Chain, blocks_of
from fedss_kernels.federated.models.bottleneck import Bottleneck, narrowed
from fedss_kernels.federated.split_learning.half import cut
from fedss_kernels.federated.split_learning.split_round import SplitRound


def images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("after", [1, 2])
def test_of_resnet18_1024_numbers_cross_the_papers(after):
    net = build_model("resnet18_32", 512, seed=0)
    before = sum(p.numel() for p in net.parameters())
    narrow = narrowed(net, after, Bottleneck.read("C4S2"), images(1, 3, 32, 32), seed=0)
    first, rest = cut(narrow, after)
    latents = first(images(2, 3, 32, 32))
    assert latents.shape == (2, 4, 16, 16) and latents.min() == 0  # behind a ReLU
    assert rest[0][0](latents).shape == (2, 64, 32, 32)
    torch.testing.assert_close(rest(latents), narrow(images(2, 3, 32, 32)))
    added = 64 * 4 * 9 + 4 + 4 * 64 * 9 + 64
    assert sum(p.numel() for p in narrow.parameters()) == before + added


@pytest.mark.parametrize(
    ("side", "stride", "crossing"), [(8, 2, 4), (7, 2, 4), (9, 3, 3), (8, 3, 3), (6, 1, 6)]
)
def test_the_way_back_is_to_the_same_height_and_width(side, stride, crossing):
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = Chain(pool, stem=nn.Conv2d(1, 3, 1), block1=nn.Identity())
    narrow = narrowed(net, 1, Bottleneck(2, stride), images(1, 1, side, side + 1), seed=0)
    first, rest = narrow.blocks
    latents = first(images(2, 1, side, side + 1))
    assert latents.shape[1:3] == (2, crossing)
    assert rest(latents).shape == (2, 3, side, side + 1)


def test_the_blocks_have_their_names_and_the_seed_gives_the_layers():
    def made(seed):
        net = build_model("conv4_ws", 128, seed=0)
        return net, narrowed(net, 2, Bottleneck(4, 2), images(1, 3, 32, 32), seed=seed)

    (net, narrow), (_, again), (_, other) = made(3), made(3), made(4)
    assert [name for name, _ in blocks_of(narrow)] == [name for name, _ in blocks_of(net)]
    assert {*net.parameters()} < {*narrow.parameters()}
    weights = [n.blocks[1][1].weight for n in (narrow, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    bound = (6 / ((32 + 4) * 9)) ** 0.5
    assert 0.9 * bound < weights[0].abs().max() <= bound and not narrow.blocks[1][1].bias.any()


@pytest.mark.parametrize("text", ["", "4", "C4", "c4s2", "C0S2", "C4S0", "C4S2 ", "C4S22"])
def test_what_is_none_is_refused(text):
    with pytest.raises(
        ValueError, match="bottleneck: expected C, 1 to 9999 channels, S and a stride of 1 to 9, as C4S2"
    ):
        Bottleneck.read(text)


@pytest.mark.parametrize(
    ("net", "after", "words"),
    [
        (
            build_model("vit", 192, seed=0),
            1,
            r"expected \(B, channels, height, width\) at the cut, got \(1, ",
        ),
        (build_model("conv4_ws", 128, seed=0), 4, "got 4 blocks and a cut after 4"),
        (build_model("conv4_rgb", 64, seed=0), 1, "got a SmallConvNet and a cut after 1"),
    ],
)
def test_nets_that_have_no_such_place_are_refused(net, after, words):
    with pytest.raises(ValueError, match=words):
        narrowed(net, after, Bottleneck(4, 2), images(1, 3, 32, 32), seed=0)


def net():
    torch.manual_seed(1)
    return Chain(
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        stem=nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(1, 4), nn.ReLU()),
        block1=nn.Sequential(nn.Conv2d(4, 4, 3, stride=2), nn.GroupNorm(1, 4), nn.ReLU()),
    )


def config(**options):
    usual = {
        "method": "mocosfl",
        "bottleneck": "C2S3",
        "rounds": 2,
        "queue_size": 12,
        "key_dim": 3,
        "round_steps": 2,
    }
    return tiny_config(**usual | options)


def test_a_run_with_one_sends_as_much_less(tmp_path):
    settings = config(data="own", model="own")
    made = SplitRound(settings, Player(settings, tiny_data(), net()))
    assert made.costs.latent == 2 * 2 * 2 and made.costs.half == 4 * 9 + 12 + 4 * 2 * 9 + 2
    result = run(config(out=tmp_path / "run"), data=tiny_data(), model=net())
    assert result.extractor.blocks[0][1].weight.shape == (2, 4, 3, 3)
    state = torch.load(tmp_path / "run" / "model.pt", weights_only=True)["extractor"]
    Player(settings, tiny_data(), net()).extractor.module.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bottleneck": "4x2"}, "bottleneck: expected C, .*, as C4S2, got '4x2'"),
        ({"cut": 2}, "bottleneck: expected a net of blocks .* got 2 blocks and a cut after 2"),
    ],
)
def test_a_bottleneck_that_does_not_fit_is_the_users_mistake(options, words):
    with pytest.raises(ConfigError, match=words):
        run(config(**options), data=tiny_data(), model=net())


def test_a_named_net_is_tried_before_images_are_read():
    from fedss_kernels.federated.clients.player import check_model

    with pytest.raises(ConfigError, match="bottleneck: expected .* got a SmallConvNet"):
        check_model(config(model="conv4", embedding_dim=64), (1, 28, 28))
