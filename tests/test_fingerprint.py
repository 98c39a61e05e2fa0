"""What a resumed run would not be the same run with: in the data, in the net, trained or not."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from tiny_federation import tiny_config, tiny_data
from torch import nn

from fedss_kernels.federated import CheckpointError, Stopped, run
from fedss_kernels.federated.files.fingerprint import Fingerprint


class Net(nn.Module):
    """With a frozen layer, a buffer that is saved and one that is not, and a number that is neither."""

    def __init__(self, *, activation: nn.Module | None = None, temperature=1.0, frozen=1.0, mean=0.0):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.Linear(36, 8), nn.Linear(8, 4)
        self.first.requires_grad_(False).weight.mul_(frozen)
        self.activation, self.temperature = activation or nn.ReLU(), temperature
        self.register_buffer("mean", torch.full((1,), mean))
        self.register_buffer("mask", torch.ones(8), persistent=False)

    def forward(self, images):
        hidden = self.activation(self.first(images.flatten(1) - self.mean)) * self.mask
        return self.last(hidden) / self.temperature


class Doubled(Net):
    def forward(self, images):
        return 2 * super().forward(images)


Doubled.__name__ = "Net"  # as where its source was edited


def fingerprint(net: nn.Module, data=None) -> Fingerprint:
    return Fingerprint.of(data or tiny_data(), net, lambda images: net(images / 255).detach())


def masked() -> Net:
    net = Net()
    net.mask[0] = 0
    return net


def thawed() -> Net:
    net = Net()
    net.first.bias.requires_grad_(True)
    return net


@pytest.mark.parametrize(
    "other, differs",
    [
        (lambda: Net(frozen=1.001), ["the net's frozen parameters"]),
        (lambda: Net(mean=0.5), ["the net's buffers"]),
        (masked, ["the net's buffers"]),
        (lambda: Net(activation=nn.GELU()), ["the net's modules"]),
        (lambda: Net(activation=nn.Dropout(0.5)), ["the net's modules"]),
        (lambda: Net(temperature=2), ["the net's modules"]),
        (Doubled, ["what the net computes"]),
        (thawed, ["the net's trained parameters", "the net's frozen parameters"]),
        (lambda: Net().double().float(), []),
        (lambda: Net().eval(), []),
    ],
)
def test_another_net_is_told_by_what_of_it_is_another(other, differs):
    assert fingerprint(Net()).differences(fingerprint(other())) == differs
    assert fingerprint(other()).differences(fingerprint(Net())) == differs


@pytest.mark.parametrize(
    "a, b",
    [
        (torch.ones(2), torch.tensor([1, 1.001])),  # no buffer
        (np.ones(2), np.array([1, 1.001])),
        (np.float32(1), np.float32(1.001)),
        ([1, (2, None)], [1, (2, 3)]),
        ({"width": 1}, {"width": 2}),
        (nn.functional.relu, nn.functional.gelu),
        ("mean", "max"),
        (torch.float32, torch.float64),
    ],
)
def test_attributes_count_whatever_they_do(a, b):
    nets = Net(), Net(), Net()
    for net, value in zip(nets, (a, b, copy.deepcopy(a)), strict=True):
        net.note = value
    assert fingerprint(nets[0]).differences(fingerprint(nets[1])) == ["the net's modules"]
    assert fingerprint(nets[0]).differences(fingerprint(nets[2])) == []


def test_dtypes_shapes_and_names_count_and_what_two_names_share():
    for name, change in (
        (
            "buffers",
            lambda net, n: net.register_buffer("b", torch.zeros(2, 3, dtype=(torch.int32, torch.float32)[n])),
        ),
        ("buffers", lambda net, n: net.register_buffer("b", torch.zeros((2, 3) if n else (3, 2)))),
        ("buffers", lambda net, n: net.register_buffer(("b", "c")[n], torch.zeros((), dtype=torch.bfloat16))),
    ):
        a, b = (nn.Sequential(nn.Flatten(), nn.Linear(36, 4)) for _ in range(2))
        b.load_state_dict(a.state_dict())
        assert fingerprint(a).differences(fingerprint(b)) == []
        change(a, 0), change(b, 1)
        assert fingerprint(a).differences(fingerprint(b)) == [f"the net's {name}"]
    tied, free = (nn.Sequential(nn.Flatten(), nn.Linear(36, 36), nn.Linear(36, 36)) for _ in range(2))
    free.load_state_dict(tied.state_dict())
    tied[2].weight = tied[1].weight
    free[2].weight = nn.Parameter(free[1].weight.detach().clone())
    assert fingerprint(tied).differences(fingerprint(free)) == ["the net's trained parameters"]


def test_rounding_is_no_difference_and_a_net_that_draws_is_itself():
    first = fingerprint(Net())
    rounded = dataclasses.replace(first, embeddings=[x * (1 + 1e-4) for x in first.embeddings])
    assert first.differences(rounded) == []
    fewer = dataclasses.replace(first, embeddings=first.embeddings[1:])
    assert first.differences(fewer) == ["what the net computes"]

    class Draws(Net):
        def forward(self, images):
            return super().forward(images) + torch.rand(1)

    torch.manual_seed(0)
    drawn = fingerprint(Draws())
    torch.rand(5)
    assert drawn.differences(fingerprint(Draws())) == []
    nan = dataclasses.replace(first, embeddings=[float("nan")])
    assert nan.differences(nan) == []


@pytest.mark.parametrize(
    "name, differs",
    [
        ("images", "the training images"),
        ("labels", "the training labels"),
        ("clients", "which client holds which image"),
        ("test_images", "the test images"),
        ("test_labels", "the test labels"),
    ],
)
def test_one_pixel_label_or_row_of_the_data_counts(name, differs):
    data = tiny_data()
    value = getattr(data, name)
    if name == "clients":
        value = (value[0][:-1], *value[1:])
    else:
        value = value.clone()
        value[5] = value[0] if "labels" in name else value[5] ^ 1
    changed = dataclasses.replace(data, **{name: value})
    assert fingerprint(Net(), data).differences(fingerprint(Net(), changed)) == [differs]


def test_who_is_tested_on_which_image_counts_and_an_earlier_versions_lacks_it():
    data = tiny_data()
    first, second, *others = data.test_clients
    swapped = dataclasses.replace(data, test_clients=(second, first, *others))
    held_out = dataclasses.replace(data, newcomers=((data.clients[0], first),))
    found = fingerprint(Net(), data)
    for changed in (swapped, held_out):
        differs = found.differences(fingerprint(Net(), changed))
        assert differs == ["who is tested on which image"]
    parts = {name: part for name, part in found.parts.items() if name != differs[0]}
    assert dataclasses.replace(found, parts=parts).differences(found) == []


def test_someone_who_is_tested_on_nothing_counts_whatever_the_strides_are():
    """As of NumPy where every class has one image, which is fine-tuned on."""
    data, nothing = tiny_data(), torch.from_numpy(np.arange(4)[np.zeros(4, dtype=bool)])
    strided = torch.empty(0, dtype=torch.int64).as_strided((0,), (0,))
    first, second = (
        dataclasses.replace(data, newcomers=((data.clients[0], none),)) for none in (nothing, strided)
    )
    assert fingerprint(Net(), first).differences(fingerprint(Net(), second)) == []


def test_one_image_counts_alike_whatever_the_strides_are():
    data = tiny_data()
    rows = torch.arange(7)[3::4]
    assert rows.stride() == (4,)
    one, same = (
        dataclasses.replace(data, clients=(held, *data.clients[1:])) for held in (rows, rows.clone())
    )
    assert fingerprint(Net(), one).differences(fingerprint(Net(), same)) == []


def test_of_many_images_a_sample_is_read(monkeypatch):
    monkeypatch.setattr("fedss_kernels.federated.files.fingerprint.ALL_BYTES", 0)
    monkeypatch.setattr("fedss_kernels.federated.files.fingerprint.SAMPLE", 4)
    data = tiny_data()
    found = []
    for row in range(len(data.images)):
        images = data.images.clone()
        images[row] ^= 1
        found += fingerprint(Net(), data).differences(
            fingerprint(Net(), dataclasses.replace(data, images=images))
        )
    assert found and set(found) == {"the training images"} and len(found) < len(data.images)


def test_numbers_of_a_method_that_another_version_noted_are_told_as_that():
    def differences(*numbers):
        first, second = (dataclasses.replace(fingerprint(Net()), method=of) for of in numbers)
        return first.differences(second)

    assert differences([1.0, 2.0], [1.0, 2.0]) == differences([], [1.0]) == []
    assert differences([1.0, 2.0], [1.0, 3.0]) == ["what the method computes"]
    words = "what the method computes, or the version, which noted more or less of it"
    assert differences([1.0, 2.0], [1.0]) == [words]


def test_a_run_with_another_frozen_layer_or_buffer_is_not_resumed(tmp_path):
    def train(net, **options):
        return run(tiny_config(rounds=4, out=tmp_path), data=tiny_data(), model=net, **options)

    with pytest.raises(Stopped):
        train(Net(), stop=lambda: True)
    for net, differs in ((Net(frozen=0.5), "frozen parameters"), (Net(mean=0.5), "buffers")):
        with pytest.raises(
            CheckpointError, match=f"net or another method: not as it was: the net's {differs}$"
        ):
            train(net, resume=True)
    assert train(Net(), resume=True).summary.rounds == 4
