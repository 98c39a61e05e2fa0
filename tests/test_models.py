import pytest
import torch
from torch import nn

from fedss_kernels.federated import Config
from fedss_kernels.federated.models import (
    FEATURES,
    MODELS,
    TAKES,
    build_model,
    family_of,
    refuse_batch_norm,
)
from fedss_kernels.federated.models.small import SmallConvNet


def test_maps_images_to_embeddings():
    for batch in (1, 3):
        assert build_model("conv4", 10, seed=0)(torch.rand(batch, 1, 28, 28)).shape == (batch, 10)
    assert SmallConvNet(5, in_channels=3)(torch.rand(2, 3, 28, 28)).shape == (2, 5)
    assert build_model("conv4", 10, seed=0)(torch.rand(2, 1, 32, 32)).shape == (2, 10)
    for size in (28, 32):
        assert build_model("conv4_rgb", 10, seed=0)(torch.rand(2, 3, size, size)).shape == (2, 10)


@pytest.mark.parametrize("name", TAKES)
def test_a_net_for_some_sizes_takes_these_and_no_others(name):
    channels, least, most = TAKES[name]
    dim = FEATURES.get(name, 8)
    net = build_model(name, dim, seed=0)

    def takes(side: int) -> bool:
        try:
            return net(torch.rand(2, channels, side, side)).shape == (2, dim)
        except RuntimeError:
            return False

    sides = range(least - 2, most + 3)
    assert [side for side in sides if takes(side)] == list(range(least, most + 1))


@pytest.mark.parametrize("name", [*FEATURES, "isotropic:depth=1,patch=3", "conv4_rgb"])
def test_embeddings_are_by_default_of_the_numbers_that_a_net_makes(name):
    config = Config(data="cifar10", model=name)
    assert config.embedding_dim == FEATURES.get(family_of(name), 64)
    net = build_model(name, config.embedding_dim, seed=0)
    for side in (32,) if name in TAKES else (9, 32, 50):
        assert net(torch.rand(2, 3, side, side)).shape == (2, config.embedding_dim)
    assert Config(data="cifar10", model=name, embedding_dim=96).embedding_dim == 96


def test_embedding_does_not_depend_on_the_rest_of_the_batch():
    """What GroupNorm is for: a row's embedding is a function of that row."""
    model, images = build_model("conv4", 64, seed=0).double(), torch.rand(5, 1, 28, 28, dtype=torch.float64)
    torch.testing.assert_close(model(images)[3:4], model(images[3:4]))


def test_weights_are_a_function_of_the_seed():
    def weights(seed: int) -> torch.Tensor:
        return nn.utils.parameters_to_vector(build_model("conv4", 64, seed).parameters())

    first = weights(3)
    torch.rand(7)
    assert torch.equal(first, weights(3))
    assert not torch.equal(first, weights(4))


def test_torchs_own_stream_is_left_alone():
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    build_model("conv4", 64, seed=0)
    assert torch.equal(torch.rand(4), expected)


def test_every_parameter_gets_a_gradient():
    model = build_model("conv4", 64, seed=0)
    model(torch.rand(4, 1, 28, 28)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_unknown_model_names_the_choices():
    with pytest.raises(ValueError, match=r"expected one of conv4, .*, got 'resnet'"):
        build_model("resnet", 64, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embedding_dim": 0}, "embedding_dim: expected at least 1, got 0"),
        ({"channels": (8, 8, 8)}, "channels: expected four multiples of groups 4"),
        ({"channels": (8, 8, 8, 6)}, "channels: expected four multiples of groups 4"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SmallConvNet(**arguments)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.InstanceNorm2d(4, track_running_stats=True)]
)
def test_running_statistics_are_refused_by_name(norm):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(norm))
    with pytest.raises(ValueError, match=rf"1\.0 \({type(norm).__name__}\).*use GroupNorm"):
        refuse_batch_norm(model)


def test_a_model_that_is_itself_a_batch_norm(monkeypatch):
    monkeypatch.setitem(MODELS, "norm", lambda embedding_dim: nn.BatchNorm1d(embedding_dim))
    with pytest.raises(ValueError, match="the model itself"):
        build_model("norm", 4, seed=0)


def test_norms_without_running_statistics_pass():
    norms = [
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.InstanceNorm2d(4),
        nn.BatchNorm2d(4, track_running_stats=False),
    ]
    refuse_batch_norm(nn.Sequential(*norms))


def test_conv4_32_is_fedbabus_4conv():
    """Its body has 3 * 64 * 9 + 3 * 64 * 64 * 9 weights, 4 * 64 biases and 4 * 2 * 64 numbers of norms."""
    model = build_model("conv4_32", 256, seed=0)
    assert sum(p.numel() for p in model.parameters()) == 1728 + 110_592 + 256 + 512 == 113_088
    for side in (32, 47):
        assert model(torch.rand(2, 3, side, side)).shape == (2, 256)
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) == 4 and not list(model.buffers())


def test_conv4_32_has_no_layer_for_another_embedding():
    with pytest.raises(ValueError, match="model: conv4_32: expected embedding_dim 256, .* got 64"):
        build_model("conv4_32", 64, seed=0)


def test_settings_follow_a_name():
    whole, small = (build_model(name, 64, seed=0) for name in ("vit", "vit:patch=8,depth=2"))
    assert len(whole.blocks) == 13 and len(small.blocks) == 3
    assert small.blocks.stem(torch.rand(1, 3, 32, 32)).shape == (1, 16, 64)
    assert len(build_model("isotropic:depth=4", 32, seed=0).blocks) == 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "vit:width=96",
            "vit: expected settings of depth, heads, patch, side, each once, .*, got 'width=96'",
        ),
        ("vit:depth=2,depth=3", "vit: expected settings .*, got 'depth=3'"),
        ("vit:", "vit: expected settings .*, got ''"),
        *[
            (
                f"isotropic:depth={value}",
                rf"isotropic: expected settings of depth, patch, .*, got 'depth={value}'",
            )
            for value in ("", "-1", "1.5", "six", "99999", "\u0663")
        ],
        ("conv4:depth=2", "conv4: expected no settings, got 'depth=2'"),
        ("resnet:depth=2", "expected one of conv4, .*, got 'resnet:depth=2'"),
    ],
)
def test_other_settings_are_refused_by_name(name, message):
    with pytest.raises(ValueError, match=f"model: {message}"):
        build_model(name, 64, seed=0)


@pytest.mark.parametrize(
    ("name", "dim"), [("vit:depth=1", 32), ("isotropic:depth=1", 32), ("conv4_ws", 128), ("resnet18_32", 512)]
)
def test_those_for_learning_without_labels_are_of_the_seed_row_by_row_and_learn_in_all_parts(name, dim):
    first, again, other = (build_model(name, dim, seed) for seed in (3, 3, 4))
    flat = [nn.utils.parameters_to_vector(net.parameters()) for net in (first, again, other)]
    assert torch.equal(flat[0], flat[1]) and not torch.equal(flat[0], flat[2])
    images = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(first(images)[1:2], first(images[1:2]), rtol=1e-4, atol=1e-5)
    first(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in first.parameters())
