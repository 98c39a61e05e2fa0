"""A client's accuracies by hand, and what fine-tuning moves and leaves alone."""

import copy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny_federation import CLASSES_HELD, DIM, NUM_CLASSES, tiny_config, tiny_data, tiny_model
from torch import nn
from torch.nn.functional import cross_entropy, linear, normalize

from fedss_kernels.federated.data.holdout import held_out
from fedss_kernels.federated.data.partition import Partition, divide_test
from fedss_kernels.federated.fine_tuning import FineTuner, Tuning, measures, personalise
from fedss_kernels.federated.metrics import top1

EPOCHS = (0, 1, 2)
FEW = Tuning(epochs=EPOCHS, rate=0.05)


def data_of_clients(task="classification"):
    data = tiny_data(task)
    labels = data.labels.numpy(), data.test_labels.numpy()
    tested = divide_test(labels[0], data.clients, labels[1], Partition("iid"), "classification", 0)
    return replace(data, test_clients=tested)


def model(columns: int = DIM) -> tuple[nn.Module, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.linspace(0.1, 3, NUM_CLASSES)[:, None]
    return tiny_model(), lengths * torch.randn(NUM_CLASSES, columns, generator=generator)


def embedded(net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return net(images.float() / 255)


def tuner(tuning: Tuning = FEW, config=None, columns: int = DIM) -> FineTuner:
    return FineTuner(config or tiny_config(), data_of_clients(), model(columns), tuning)


# ---- without training


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_initial_is_over_all_classes_and_restricted_over_ones_own(similarity):
    data, dot = data_of_clients(), similarity == "dot"
    net, rows = model(DIM + dot)
    found = personalise(tiny_config(similarity=similarity), data, (net, rows), FEW)
    assert [each.client for each in found] == [k for k, tested in enumerate(data.test_clients) if len(tested)]
    for each in found:
        held, tested = data.clients[each.client], data.test_clients[each.client]
        x, labels = embedded(net, data.test_images[tested]), data.test_labels[tested]
        scores = (
            linear(x, rows[:, :-1], rows[:, -1]) if dot else normalize(x, dim=1) @ normalize(rows, dim=1).T
        )
        own = data.labels[held].unique()
        assert own.tolist() == list(CLASSES_HELD[each.client])
        assert each.initial == (scores.argmax(1) == labels).double().mean().item()
        assert each.restricted == (own[scores[:, own].argmax(1)] == labels).double().mean().item()
        assert each.after[0] == each.initial
        train = embedded(net, data.images[held])
        if not dot:
            x, train = normalize(x, dim=1), normalize(train, dim=1)
        means = torch.stack([train[data.labels[held] == c].mean(0) for c in own])
        near = own[(x[:, None] - means).norm(dim=2).argmin(1)]
        assert each.nearest_mean == (near == labels).double().mean().item()
        assert (each.images, each.classes, each.tested) == (len(held), len(own), len(tested))
    assert len({each.initial for each in found} | {each.restricted for each in found}) > 2


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_of_training_images_that_are_not_finite_nothing_is_near(similarity):
    """Of client 0 all are blank, and the net divides by their spread."""
    data = data_of_clients()
    images = data.images.clone()
    images[data.clients[0]] = 7

    class Spread(nn.Module):
        def forward(self, x):
            x = x.flatten(1)
            return x / (x - x[:, :1]).norm(dim=1, keepdim=True)

    net = nn.Sequential(Spread(), nn.Linear(36, DIM))
    rows = model(DIM + (similarity == "dot"))[1]
    found = personalise(tiny_config(similarity=similarity), replace(data, images=images), (net, rows), FEW)
    assert found[0].client == 0 and found[0].nearest_mean == 0
    assert any(each.nearest_mean for each in found)


def test_initial_over_all_test_images_is_the_runs_top1():
    data = data_of_clients()
    net, rows = model()
    found = personalise(tiny_config(), data, (net, rows), replace(FEW, epochs=(0,)))
    tested = torch.cat(data.test_clients)
    right = sum(each.initial * each.tested for each in found)
    assert right / len(tested) == pytest.approx(
        top1(embedded(net, data.test_images[tested]), rows, data.test_labels[tested])
    )


def test_the_length_of_a_row_changes_nothing_with_cosines():
    data, (net, rows) = data_of_clients(), model()
    longer = rows * torch.logspace(-3, 3, NUM_CLASSES)[:, None]
    for part in ("head", "full"):
        a, b = (personalise(tiny_config(), data, (net, w), replace(FEW, part=part)) for w in (rows, longer))
        assert [each.after for each in a] == [each.after for each in b]


# ---- what moves


def states(part: str, similarity: str = "cosine", client: int = 1, **options):
    config = tiny_config(similarity=similarity)
    it = tuner(Tuning(part=part, epochs=EPOCHS, rate=0.05, **options), config, config.row_dim)
    phi, rows = it.phi.clone(), it.rows.clone()
    after = [(phi.clone(), found.clone()) for phi, found in it.epochs(client)]
    return it, phi, rows, after


def test_the_head_leaves_the_bits_of_the_net_and_the_body_those_of_the_rows():
    for part, of_phi, of_rows in (("head", False, True), ("body", True, False), ("full", True, True)):
        it, phi, rows, after = states(part)
        assert len(after) == 2
        assert torch.equal(after[-1][0], phi) != of_phi and torch.equal(after[-1][1], rows) != of_rows
        assert torch.equal(it.phi, phi) and torch.equal(it.rows, rows), "the model stays as it is"
    assert torch.equal(rows, normalize(model()[1], dim=1))


def test_of_own_rows_alone_the_others_keep_their_bits():
    own = list(CLASSES_HELD[1])
    others = [c for c in range(NUM_CLASSES) if c not in own]
    for rows_option, same in (("own", True), ("all", False)):
        _, _, rows, after = states("head", rows=rows_option)
        assert torch.equal(after[-1][1][others], rows[others]) == same
        assert not torch.equal(after[-1][1][own], rows[own])


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("over", ["all", "own"])
@pytest.mark.parametrize("part", ["head", "body", "full"])
def test_the_steps_are_those_of_torchs_sgd_on_torchs_cross_entropy(part, over, similarity):
    it, _, rows, after = states(part, similarity, rows=over)
    data, config, client = data_of_clients(), tiny_config(), 1
    net, rows, held = model()[0], rows.requires_grad_(), data.clients[client]
    moved = {"head": [rows], "body": [*net.parameters()], "full": [rows, *net.parameters()]}[part]
    sgd = torch.optim.SGD(moved, lr=0.05, momentum=0.9)
    rng = it.shuffle(client)
    own = data.labels[held].unique()
    for phi, found in after:
        order = held[torch.from_numpy(rng.permutation(len(held)))]
        for batch in order.split(config.batch_size):
            x = net(data.images[batch].float() / 255)
            if similarity == "cosine":
                logits = config.scale * normalize(x, dim=1) @ normalize(rows, dim=1).T
            else:
                logits = config.scale * linear(x, rows[:, :-1], rows[:, -1])
            target = data.labels[batch]
            if over == "own":
                logits, target = logits[:, own], torch.searchsorted(own, target)
            sgd.zero_grad()
            cross_entropy(logits, target).backward()
            sgd.step()
        torch.testing.assert_close(found, rows.detach(), rtol=1e-4, atol=1e-5)
        flat = torch.cat([p.detach().flatten() for p in net.parameters()])
        torch.testing.assert_close(phi, flat, rtol=1e-4, atol=1e-5)


def test_epochs_are_reshuffled_and_a_longer_look_changes_no_earlier_number():
    data = data_of_clients()
    short = personalise(tiny_config(), data, model(), replace(FEW, epochs=(1, 2)))
    long = personalise(tiny_config(), data, model(), replace(FEW, epochs=(2, 4, 1)))
    assert [each.after[2] for each in short] == [each.after[2] for each in long]
    assert list(long[0].after) == [1, 2, 4]
    rng = tuner().shuffle(3)
    assert not np.array_equal(rng.permutation(20), rng.permutation(20))


@pytest.mark.parametrize("part", ["head", "body", "full"])
def test_fine_tuning_one_client_does_not_touch_the_next(part):
    class Noisy(nn.Sequential):
        """Draws as it is trained."""

    torch.manual_seed(0)
    net = Noisy(nn.Flatten(), nn.Linear(36, 12), nn.Dropout(0.3), nn.Linear(12, DIM))
    it = FineTuner(tiny_config(max_shift=1), data_of_clients(), (net, model()[1]), replace(FEW, part=part))
    forwards = [[(phi.clone(), w.clone()) for phi, w in it.epochs(k)] for k in range(5)]
    torch.manual_seed(99)
    backwards = [[(phi.clone(), w.clone()) for phi, w in it.epochs(k)] for k in reversed(range(5))][::-1]
    for a, b in zip(forwards, backwards, strict=True):
        assert all(torch.equal(p, q) and torch.equal(v, w) for (p, v), (q, w) in zip(a, b, strict=True))
    assert not any(
        torch.equal(a[-1][0], b[-1][0]) and torch.equal(a[-1][1], b[-1][1]) for a, b in pairwise(forwards)
    )


def test_torchs_generator_and_the_callers_model_are_left_alone():
    net, rows = model()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    personalise(tiny_config(), data_of_clients(), (net, rows), replace(FEW, part="full"))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(rows, model()[1])


def test_images_are_moved_as_in_training_for_the_body_and_plain_for_the_head():
    for part, same in (("head", True), ("body", False), ("full", False)):
        plain, moved = (
            list(tuner(replace(FEW, part=part), tiny_config(max_shift=shift)).epochs(1))[-1]
            for shift in (0, 2)
        )
        assert all(map(torch.equal, plain, moved)) == same


def test_a_seed_decides_the_steps():
    one, same, other = (list(tuner(config=tiny_config(seed=seed)).epochs(4))[-1][1] for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


# ---- whose model


def test_a_client_that_keeps_its_own_head_or_net_is_tuned_from_it():
    data, (net, rows) = data_of_clients(), model()
    other_net, other_rows = tiny_model(), rows.flip(0)
    with torch.no_grad():
        other_net[1].weight.mul_(-1)
    other_phi = torch.cat([p.detach().flatten() for p in other_net.parameters()])

    def own(client: int):
        return {0: (None, other_rows), 1: (other_phi, None), 4: (other_phi, other_rows)}.get(
            client, (None, None)
        )

    found = personalise(tiny_config(), data, (net, rows), replace(FEW, part="full"), own=own)
    expected = {
        client: personalise(tiny_config(), data, start, replace(FEW, part="full"))
        for client, start in {
            0: (net, other_rows),
            1: (other_net, rows),
            4: (other_net, other_rows),
            3: (net, rows),
        }.items()
    }
    for client, everyone in expected.items():
        of = [next(each for each in some if each.client == client) for some in (found, everyone)]
        assert of[0] == of[1]


def test_a_net_may_be_a_state_as_in_a_runs_folder(monkeypatch):
    monkeypatch.setattr("fedss_kernels.federated.clients.player._build_model", lambda config: tiny_model())
    net, rows = model()
    with torch.no_grad():
        net[1].weight.mul_(-1)
    data = data_of_clients()
    assert personalise(tiny_config(), data, (net.state_dict(), rows), FEW) == personalise(
        tiny_config(), data, (net, rows), FEW
    )


def test_newcomers_of_a_trial_are_measured_instead():
    data, (net, rows) = tiny_data(), model()
    trial = held_out(data, 0.6, seed=2)
    found = personalise(tiny_config(), trial, (net, rows), FEW)
    tested = [(k, new) for k, new in enumerate(trial.newcomers) if len(new[1])]
    assert [each.client for each in found] == [k for k, _ in tested] and found
    for each, (_, (train, test)) in zip(found, tested, strict=True):
        x = normalize(embedded(net, trial.test_images[test]), dim=1)
        initial = (x @ normalize(rows, dim=1).T).argmax(1) == trial.test_labels[test]
        assert each.initial == initial.double().mean() and each.images == len(train)
    kept = personalise(tiny_config(), trial, (net, rows), FEW, own=lambda client: (None, rows.flip(0)))
    assert kept == found, "what clients keep is no newcomer's"


def test_how_many_have_fine_tuned_is_told_before_each():
    told = []
    personalise(
        tiny_config(), data_of_clients(), model(), FEW, clients=3, on_tuned=lambda *of: told.append(of)
    )
    assert told == [(0, 3), (1, 3), (2, 3)]


def test_some_clients_are_the_first():
    found = personalise(tiny_config(), data_of_clients(), model(), FEW, clients=2)
    assert found == personalise(tiny_config(), data_of_clients(), model(), FEW)[:2]


# ---- what cannot be


def nobodys():
    return replace(tiny_data(), test_clients=())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            nobodys,
            "nobody knows which test images of tiny are whose: expected some in test_clients, got none$",
        ),
        (
            lambda: replace(tiny_data(), test_clients=[[]] * 5),
            r"personalise: test_clients: expected test images of some of the 5 clients, got none",
        ),
        (
            lambda: replace(data_of_clients(), newcomers=[([0, 1], []), ([2], [])]),
            r"personalise: newcomers: expected test images of some of the 2 newcomers, got none",
        ),
        (lambda: data_of_clients("retrieval"), "personalise: expected a classification, got a retrieval"),
    ],
)
def test_data_without_clients_test_images_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        personalise(tiny_config(), data(), model(), FEW)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "tail"}, "part: expected one of head, body, full, got 'tail'"),
        ({"rows": "some"}, "rows: expected one of all, own, got 'some'"),
        ({"rate": 0.0}, "rate: expected a finite number greater than 0, got 0.0"),
        ({"rate": float("nan")}, "rate: expected a finite number greater than 0, got nan"),
        ({"epochs": ()}, r"epochs: expected at least one, each at least 0, got \(\)"),
        ({"epochs": (1, -1)}, r"epochs: expected at least one, each at least 0, got \(1, -1\)"),
    ],
)
def test_what_cannot_be_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        Tuning(**options)


def test_a_model_that_does_not_fit_or_is_not_finite_is_refused():
    net, rows = model()
    for weight, message in (
        (rows[:3], r"model: expected class rows \(7, 4\), got \(3, 4\)"),
        (rows.index_fill(0, torch.tensor([2]), torch.nan), "model: it has numbers that are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            personalise(tiny_config(), data_of_clients(), (net, weight), FEW)


def test_fine_tuning_that_runs_away_is_wrong_everywhere_and_said():
    start = tiny_config(similarity="dot"), data_of_clients(), model(DIM + 1)
    for rate, runs_away in ((1e38, True), (0.01, False)):
        found = personalise(*start, Tuning(rate=rate, epochs=(0, 3)))
        lost = [each for each in found if each.not_finite]
        assert bool(lost) == runs_away and all(each.after[3] == 0 for each in lost)
        assert any(each.initial for each in lost) == runs_away


def test_a_runs_measures_are_means_over_clients():
    found = personalise(tiny_config(), data_of_clients(), model(), FEW)
    of = measures(found)
    assert list(of) == ["initial", "restricted", "nearest_mean", "personalised"]
    assert of["personalised"] == pytest.approx(np.mean([each.after[2] for each in found]))
    assert of["restricted"] == pytest.approx(np.mean([each.restricted for each in found]))
