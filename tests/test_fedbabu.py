"""FedBABU: a head that is a function of the seed, is never trained and never travels; and its kin."""

import dataclasses
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from later import later
from tiny_federation import DIM, NUM_CLASSES, tiny_config, tiny_data, tiny_model

from fedss_kernels.federated import Config, ConfigError, Result, run
from fedss_kernels.federated.algorithms import METHODS
from fedss_kernels.federated.algorithms.parts import Part, Parts, all_travel
from fedss_kernels.federated.clients.client import Client
from fedss_kernels.federated.clients.objectives import ClassRows
from fedss_kernels.federated.clients.player import Player
from fedss_kernels.federated.fedavg_round import Simulation
from fedss_kernels.federated.randomness import Purpose, generator, initial_rows

FROZEN = ["fedbabu", "fedbabu_ss"]


def train(method: str, **options) -> Result:
    return run(tiny_config(method=method, **options), data=tiny_data(), model=tiny_model())


def bits(result: Result) -> list[torch.Tensor]:
    return [result.weight, *result.extractor.state_dict().values()]


def assert_same_bits(a: Result, b: Result) -> None:
    for x, y in zip(bits(a), bits(b), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("workers", [1, *later(2)])
@pytest.mark.parametrize("method", FROZEN)
@pytest.mark.exhaustive
def test_the_head_is_what_the_seed_gives_in_every_process(method, workers):
    result = train(method, rounds=5, workers=workers, seed=3)
    code = (
        "import torch; from fedss_kernels.federated.randomness import initial_rows;"
        f"print(initial_rows(3, torch.arange({NUM_CLASSES}), {DIM}, 0.5).view(torch.int32).tolist())"
    )
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert str(result.weight.view(torch.int32).tolist()) == elsewhere.stdout.strip()
    first = tiny_model().state_dict()
    assert not torch.equal(result.extractor.state_dict()["1.weight"], first["1.weight"])


def test_another_seed_has_another_head_and_every_method_the_same():
    heads = {seed: train("fedbabu", seed=seed).weight for seed in (0, 1)}
    assert not torch.equal(heads[0], heads[1])
    assert torch.equal(train("fedbabu_ss", seed=1).weight, heads[1])


@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16"])
def test_where_the_head_moves_and_travels_it_is_fedavg(wire_dtype, monkeypatch):
    moving = dataclasses.replace(METHODS["fedbabu"], parts=all_travel)
    fedavg = train("fedavg", wire_dtype=wire_dtype)
    monkeypatch.setitem(METHODS, "fedbabu", moving)
    assert_same_bits(train("fedbabu", wire_dtype=wire_dtype), fedavg)


@pytest.mark.parametrize("num_negatives", [NUM_CLASSES - 2, NUM_CLASSES + 100])  # the smallest |P| is 2
def test_with_every_negative_the_sampled_one_is_the_whole_one(num_negatives):
    assert_same_bits(train("fedbabu_ss", num_negatives=num_negatives), train("fedbabu"))


def test_a_round_is_one_of_full_softmax_whose_row_gradients_are_dropped(monkeypatch):
    frozen = train("fedbabu", rounds=1)
    monkeypatch.setattr(torch.Tensor, "add_", _not_to_rows(torch.Tensor.add_))
    dropped = train("full_softmax", rounds=1)
    assert_same_bits(frozen, dropped)


def _not_to_rows(add_):
    def add(self, other, **options):
        return self if self.shape == (NUM_CLASSES, DIM) else add_(self, other, **options)

    return add


def test_no_gradient_of_a_frozen_head_is_computed(monkeypatch):
    seen = []
    step = Client._step

    def watch(self, images, target, objective: ClassRows, *others):
        loss = step(self, images, target, objective, *others)
        seen.append((objective.rows.requires_grad, objective.rows.grad))
        return loss

    monkeypatch.setattr(Client, "_step", watch)
    train("fedbabu", rounds=1)
    assert seen and all(found == (False, None) for found in seen)


def test_no_row_is_sent_and_one_that_is_is_refused():
    config = tiny_config(method="fedbabu")
    simulation = Simulation(config, Player(config, tiny_data(), tiny_model()))
    player, server = simulation.player, simulation.server
    request = player.request(0, 0, 1)
    update = player.update(0, 0, 1, request, server.extractor, torch.empty(0))
    assert len(update.class_ids) == 0 and update.rows.shape == (0, DIM) and update.kept is None
    nothing = request.class_ids[:0]
    assert simulation.inspection.faults([update], [nothing]) == [""]
    sent = dataclasses.replace(update, class_ids=torch.tensor([0]), rows=torch.zeros(1, DIM))
    assert simulation.inspection.faults([sent], [nothing]) == ["shape"]


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_lengths_of_a_cosine_head_do_not_matter(scale):
    there, here = train("fedbabu", weight_init_scale=scale), train("fedbabu", weight_init_scale=0.5)
    for a, b in zip(there.history, here.history, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-4)


def test_a_linear_head_is_a_linear_layer_with_a_bias():
    """One client, one round, one step, against torch's own linear layer and cross-entropy."""
    config = tiny_config(
        method="fedavg", similarity="dot", scale=None, weight_init_scale=None, rounds=1, cohort=1
    )
    config = dataclasses.replace(config, batch_size=100, server_momentum=0.0)
    assert config.scale == 1.0 and config.weight_init_scale == pytest.approx((3 * DIM) ** -0.5)
    data, net = tiny_data(), tiny_model()
    result = run(config, data=data, model=net)
    rows = initial_rows(0, torch.arange(NUM_CLASSES), DIM + 1, config.weight_init_scale)
    head = torch.nn.Linear(DIM, NUM_CLASSES)
    with torch.no_grad():
        head.weight.copy_(rows[:, :-1])
        head.bias.copy_(rows[:, -1])
    k = int(generator(0, 0, 0, 0, Purpose.COHORT).choice(len(data.clients), 1, replace=False)[0])
    held = data.clients[k]
    loss = F.cross_entropy(head(net(data.images[held] / 255)), data.labels[held])
    loss.backward()
    assert result.history[0].loss == pytest.approx(loss.item(), rel=1e-5)
    trained = torch.cat([head.weight, head.bias[:, None]], 1) - 0.2 * torch.cat(
        [head.weight.grad, head.bias.grad[:, None]], 1
    )
    torch.testing.assert_close(result.weight, trained.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["fedavg", "fedbabu", "fedss", "fedbabu_ss"])
def test_a_linear_head_learns(method):
    config = tiny_config(
        method=method, similarity="dot", scale=None, rounds=60, cohort=5, client_lr=0.1, eval_every=60
    )
    result = run(config, data=tiny_data(), model=tiny_model())
    assert result.summary.top1 > 0.5  # by chance: 1/7
    assert result.weight.shape == (NUM_CLASSES, DIM + 1)


def test_what_does_not_go_together_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="class_store: expected none with fedbabu"):
        Config(method="fedbabu", class_store=tmp_path)
    with pytest.raises(ConfigError, match="similarity: expected cosine with fedaws"):
        Config(method="fedaws", similarity="dot")


def test_parts_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="blocks: expected none KNOWN"):
        Parts((Part.KNOWN,), Part.TRAINED)
    with pytest.raises(ValueError, match="rows: expected TRAINED, KNOWN, HOME or ABSENT, got FROZEN"):
        Parts((Part.TRAINED,), Part.FROZEN)
    with pytest.raises(ValueError, match="blocks: expected all of them HOME"):
        Parts((Part.HOME, Part.TRAINED), Part.HOME)
