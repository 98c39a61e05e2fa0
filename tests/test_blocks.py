"""A net is a list of blocks: one after another they are the net, their parameters its own, in its order."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from fedss_kernels.federated.models import MODELS, build_model
from fedss_kernels.federated.models.blocks import Chain, blocks_of

# the blocks between the stem and the embedding, or the end
MIDDLE = {
    "conv4": 3,
    "conv4_rgb": 3,
    "conv4_32": 3,
    "conv4_ws": 3,
    "isotropic": 12,
    "vit": 12,
    "mobilenet_v3_small": 12,
    "mobilenet_v3_large": 16,
    "resnet18": 4,
    "resnet18_32": 8,
}
DIMS = {"conv4_ws": 128, "isotropic": 64, "vit": 64, "resnet18_32": 512}  # else 256


def built(name: str, seed: int = 0) -> nn.Module:
    return build_model(name, DIMS.get(name, 256), seed)


def images(name: str) -> torch.Tensor:
    return torch.rand(2, 1 if name == "conv4" else 3, 32, 32, generator=torch.Generator().manual_seed(0))


def in_a_chain(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for _, block in blocks_of(net):
        x = block(x)
    return net.pool(x) if isinstance(net, Chain) else x


@pytest.mark.parametrize("name", MODELS)
def test_one_after_another_they_are_the_net_to_the_bit(name, torchvision):
    net, x = built(name), images(name)
    assert [block for block, _ in blocks_of(net)] == [
        "stem",
        *(f"block{i}" for i in range(1, MIDDLE[name] + 1)),
        *([] if isinstance(net, Chain) else ["embedding"]),
    ]
    whole = net(x)
    whole.square().sum().backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    chained = in_a_chain(net, x)
    chained.square().sum().backward()
    assert torch.equal(chained, whole) and chained.shape == (2, DIMS.get(name, 256))
    assert all(map(torch.equal, gradients, (p.grad for p in net.parameters())))


@pytest.mark.parametrize("name", MODELS)
def test_each_is_a_range_of_the_parameters(name, torchvision):
    net = built(name)
    held = [parameter for _, block in blocks_of(net) for parameter in block.parameters()]
    assert [id(p) for p in held] == [id(p) for p in net.parameters()]


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_has_its_own_and_a_pickle_and_a_file_too(name, torchvision):
    net, x = built(name), images(name)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    found = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)]
    expected = net(x)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    for other in found:
        assert torch.equal(in_a_chain(other, x), expected)


NAMES_BEFORE = {
    "conv4": ["features.0.weight", "features.1.weight", "embedding.bias"],
    "mobilenet_v3_large": ["1.features.0.0.weight", "1.features.16.1.bias", "1.classifier.weight"],
    "resnet18": ["1.conv1.weight", "1.layer4.1.bn2.bias", "1.fc.bias"],
}


@pytest.mark.parametrize("name", NAMES_BEFORE)
def test_blocks_add_no_name_to_a_state_dict(name, torchvision):
    """So that the files of earlier runs, and torchvision's, are read as ever."""
    state = built(name).state_dict()
    assert set(NAMES_BEFORE[name]) <= set(state)
    assert len(state) == len(list(built(name).parameters())) and not any("block1" in key for key in state)


# ---- nets of one's own


class Own(nn.Module):
    def __init__(self, blocks: object, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.blocks = blocks


FIRST, SECOND = nn.Linear(2, 3), nn.Linear(3, 2)


def test_one_without_is_one_block():
    assert blocks_of(FIRST) == [("net", FIRST)]


@pytest.mark.parametrize("kind", [nn.ModuleList, lambda blocks: nn.Sequential(*blocks)])
def test_any_module_with_blocks_has_them(kind):
    assert blocks_of(Own(kind([FIRST, SECOND]))) == [("0", FIRST), ("1", SECOND)]
    assert blocks_of(Own([FIRST, SECOND], a=FIRST, b=SECOND)) == [("0", FIRST), ("1", SECOND)]


def test_a_block_without_parameters_may_come_twice():
    relu = nn.ReLU()
    assert blocks_of(Own(nn.ModuleList([FIRST, relu, SECOND, relu])))[3] == ("3", relu)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Own(nn.ModuleList([FIRST]), b=SECOND), "that hold every parameter, got without 'b.weight'"),
        (Own(nn.ModuleList([]), b=SECOND), "that hold every parameter, got without 'b.weight'"),
        (
            Own(nn.ModuleList([FIRST, SECOND, FIRST])),
            "that share no parameter, got several with 'blocks.0.weight'",
        ),
        (
            Own([SECOND, FIRST], a=FIRST, b=SECOND),
            "in the order of the model's parameters, got another place for 'a.weight'",
        ),
        (
            Own([FIRST, SECOND], a=FIRST),
            r"with parameters of the model alone, got one of shape \(2, 3\) that is not among them",
        ),
        (Own(12, a=FIRST), "to be an nn.Sequential or nn.ModuleList, got int"),
        (Own([FIRST, 3], a=FIRST), "to be an nn.Sequential or nn.ModuleList, got list"),
    ],
)
def test_others_are_refused_in_words(net, message):
    with pytest.raises(ValueError, match=f"model: expected .*{message}"):
        blocks_of(net)
