"""A method of which a block of the net is frozen: it comes, is used as it is, and does not go back."""

import csv
import dataclasses

import pytest
import torch
from tiny_federation import DIM, NUM_CLASSES, PIXELS, tiny_config, tiny_data
from torch import nn

from fedss_kernels.federated import Stopped, run
from fedss_kernels.federated.algorithms import METHODS
from fedss_kernels.federated.algorithms.parts import Part, Parts
from fedss_kernels.federated.clients.client import Client

HIDDEN = 5
FIRST, SECOND = PIXELS * HIDDEN + HIDDEN, HIDDEN * DIM + DIM


class TwoBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, HIDDEN), nn.ReLU())
        self.second = nn.Linear(HIDDEN, DIM)

    @property
    def blocks(self) -> list[nn.Module]:
        return [self.first, self.second]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(images))


def net() -> nn.Module:
    torch.manual_seed(2)
    return TwoBlocks()


def first_frozen(num_blocks: int) -> Parts:
    assert num_blocks == 2
    return Parts((Part.FROZEN, Part.TRAINED), Part.TRAINED)


@pytest.fixture(autouse=True)
def frozen(monkeypatch):
    method = dataclasses.replace(
        METHODS["full_softmax"], name="frozen", by_block=True, parts=lambda n: PARTS[n](n)
    )
    monkeypatch.setitem(METHODS, "frozen", method)


PARTS = {1: lambda n: Parts((Part.TRAINED,), Part.TRAINED), 2: first_frozen}


def train(**options):
    stop_after, seen, resume = options.pop("stop_after", None), [], options.pop("resume", False)
    return run(
        tiny_config(**({"method": "frozen", "rounds": 4} | options)),
        data=tiny_data(),
        model=net(),
        on_round=seen.append,
        resume=resume,
        stop=None if stop_after is None else lambda: seen[-1].round == stop_after,
    )


def test_it_keeps_its_bits_while_the_others_are_trained():
    before, after = net(), train().extractor
    for a, b in zip(before.first.parameters(), after.first.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(before.second.weight, after.second.weight)
    assert all(p.requires_grad for p in after.parameters())


def test_it_has_no_gradient_and_no_graph(monkeypatch):
    seen, step = [], Client._step

    def watch(self, images, target, objective, *others):
        module = self.extractor.module
        seen.append(module.first(images).requires_grad)
        return step(self, images, target, objective, *others)

    monkeypatch.setattr(Client, "_step", watch)
    train(rounds=1)
    assert seen and not any(seen)


def test_it_is_a_round_of_full_softmax_on_the_net_above_it():
    """Whose lower part is a constant: parameters that ask for no gradient are none of ours."""
    whole = net()
    for p in whole.first.parameters():
        p.requires_grad_(False)
    constant = run(tiny_config(method="full_softmax", rounds=4), data=tiny_data(), model=whole)
    found = train()
    assert torch.equal(found.weight, constant.weight)
    assert torch.equal(found.extractor.second.weight, constant.extractor.second.weight)


def test_it_comes_and_does_not_go_back(tmp_path):
    result = train(out=tmp_path)
    with (tmp_path / "ledger.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        assert int(line["down_frozen"]) == 4 * FIRST
        assert int(line["down_extractor"]) == int(line["up_extractor"]) == 4 * SECOND
        assert int(line["down_rows"]) == 4 * NUM_CLASSES * DIM
    assert result.summary.traffic.of("frozen") == 4 * FIRST * len(lines)


def test_it_goes_on_bit_for_bit(tmp_path):
    whole = train()
    with pytest.raises(Stopped):
        train(out=tmp_path, stop_after=2)
    resumed = train(out=tmp_path, resume=True)
    assert torch.equal(resumed.weight, whole.weight)
    for a, b in zip(resumed.extractor.parameters(), whole.extractor.parameters(), strict=True):
        assert torch.equal(a, b)
