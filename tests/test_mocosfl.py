"""MocoSFL as a run: cohorts, what moves, who is gone, stops and resumes."""

import csv
import dataclasses
import json
import math
from collections import Counter

import pytest
import torch
from tiny_federation import IMAGES_OF_EACH, tiny_config, tiny_data
from torch import nn

from fedss_kernels.federated import Config, ConfigError, Stopped, cli, run
from fedss_kernels.federated.any_round import TooFewClients
from fedss_kernels.federated.clients.player import Player
from fedss_kernels.federated.clients.pooled import pooled
from fedss_kernels.federated.clients.views import Views
from fedss_kernels.federated.files.run_folder import read_run
from fedss_kernels.federated.idle_settings import idle
from fedss_kernels.federated.ledger import Traffic
from fedss_kernels.federated.models.blocks import Chain
from fedss_kernels.federated.reports import report
from fedss_kernels.federated.reports.reported_run import Run
from fedss_kernels.federated.split_learning import from_config
from fedss_kernels.federated.split_learning.batches import Batches, next_images
from fedss_kernels.federated.split_learning.costs import Costs, Moved, in_the_paper
from fedss_kernels.federated.split_learning.drawn import Cohort
from fedss_kernels.federated.split_learning.joint import NobodyLeft
from fedss_kernels.federated.split_learning.rules import Rules
from fedss_kernels.federated.split_learning.split_round import SplitRound

P, L, STEPS, CLIENTS = 1 * 4 * 9 + 8, 4 * 6 * 6, 5, 5
SIZES = {k: n for k, n in enumerate((6, 6, 8, 2, 6))}  # images of each client of tiny_data


class Stem(nn.Sequential):
    """NaN for images that are one grey."""

    def forward(self, x):
        grey = x.flatten(1).std(1) < 1e-3
        return torch.where(grey[:, None, None, None], torch.nan, super().forward(x))


def net():
    torch.manual_seed(1)
    return Chain(
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        stem=Stem(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.GroupNorm(1, 4), nn.ReLU()),
        block1=nn.Sequential(nn.Conv2d(4, 4, 3, stride=2), nn.GroupNorm(1, 4), nn.ReLU()),
    )


def config(**options):
    usual = {"method": "mocosfl", "batch_size": 2, "queue_size": 12, "key_dim": 3, "round_steps": STEPS}
    return tiny_config(**usual | {"sync_period": 2} | options)


def train(data=None, resume=False, stop_after=None, **options):
    seen = []
    return run(
        config(**options),
        data=data or tiny_data(),
        model=net(),
        on_round=seen.append,
        resume=resume,
        stop=None if stop_after is None else lambda: seen[-1].round == stop_after,
    )


def algorithm(data=None, **options):
    settings = dataclasses.replace(config(**options), data="own", model="own")
    return SplitRound(settings, Player(settings, data or tiny_data(), net()))


def table(path):
    with path.open(newline="") as file:
        return [{k: v for k, v in line.items() if k != "seconds"} for line in csv.DictReader(file)]


def test_the_clients_of_the_tests_are_these():
    assert [len(held) for held in tiny_data().clients] == list(SIZES.values())
    assert len(IMAGES_OF_EACH) == CLIENTS


# ---- a run -------------------------------------------------------------------------------------------------


def test_a_run_measures_features_and_divergence_and_gives_the_net_away(tmp_path, monkeypatch):
    result = train(out=tmp_path, rounds=4)
    lines = table(tmp_path / "metrics.csv")
    assert [bool(line["knn"]) for line in lines] == [False, True, False, True]
    assert float(lines[1]["divergence"]) > 0 and lines[3]["probe"] and lines[3]["random_probe"]
    s = result.summary
    assert (
        s.headline.name == "probe" and 0 <= s.accuracy <= 1 and s.divergence == float(lines[3]["divergence"])
    )
    assert result.weight is result.table is result.homes is None
    trained = sum(p.numel() for p in result.extractor.parameters())
    assert trained == s.num_parameters == P + 4 * 4 * 9 + 4 + 8  # no head
    before = net()
    for name, value in result.extractor.state_dict().items():
        assert not torch.equal(value, before.state_dict()[name]), name
    # the loss of a new net is near that of guessing: twice, as of both views
    assert result.history[0].loss == pytest.approx(2 * math.log(13), rel=1)
    monkeypatch.setattr(report, "save_plots", lambda folder, runs: ["", ""])  # most of a report's time
    report.write_run_report(tmp_path, Run(*read_run(tmp_path)))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for words in ("MocoSFL", "linear probe", "latents of the images&#x27; views, up", "divergence"):
        assert words in page, words
    assert "positives" not in page and "<dt>block</dt>" in page


def test_a_retrieval_is_measured_as_one():
    result = train(tiny_data("retrieval"), rounds=1)
    assert result.summary.headline.name == "map_at_10" and 0 <= result.summary.accuracy <= 1
    assert result.summary.random_map_at_10 is not None and result.summary.divergence > 0


def test_a_round_is_its_steps_played_by_hand():
    """Each client's own images and views, an average every two steps and after the last."""
    run_of_it, by_hand = algorithm(velocities="kept"), algorithm(velocities="kept")
    data, joint = tiny_data(), by_hand.joint
    taken = Counter()
    for round in range(3):
        run_of_it.play(round)
        cohort = Cohort.draw(by_hand.config, CLIENTS, round, 0, STEPS)
        rows = {k: next_images(data.clients[k], taken[k], 2 * STEPS, 0, k) for k in cohort.clients}
        taken.update(dict.fromkeys(cohort.clients, 2 * STEPS))
        batches = Batches(data.images, rows, 2, Views("moco", 6), (0, round, 0))
        joint.clients.receive(cohort.clients)
        for step in range(STEPS):
            joint.step(*batches.views_of(step, cohort.clients), 0.2)
            if step in (1, 3, 4):
                joint.synchronise(SIZES)
        joint.clients.dismiss()
    by_hand.taken[:] = torch.tensor([taken[k] for k in range(CLIENTS)])
    there, here = run_of_it.stored(), by_hand.stored()
    assert there.keys() == here.keys()
    for name, value in there.items():
        assert torch.equal(value, here[name]), name


# ---- in one place ------------------------------------------------------------------------------------------


def test_central_moco_is_the_run_of_one_client_with_all_images_and_a_cohorts_batch():
    data, everybody = tiny_data(), pooled(tiny_data())
    central = algorithm(method="central_moco", cohort=3, dropout_rate=0.9, min_clients=3)
    alone = algorithm(everybody, cohort=1, batch_size=6)
    assert len(central.data.clients) == 1 and len(data.clients) == CLIENTS
    for round in range(3):
        played = central.play(round)
        assert played.loss == alone.play(round).loss and played.num_images == 6 * STEPS
        assert all(entry.traffic.total == 0 for entry in played.entries)
    for name, value in alone.stored().items():
        assert torch.equal(value, central.stored()[name]), name


def test_central_moco_takes_as_many_steps_as_a_client_does():
    steps = round(sum(SIZES.values()) / CLIENTS / 2)
    assert algorithm(method="central_moco", round_steps=0).steps == steps


def test_what_is_of_clients_has_no_effect_in_one_place_but_the_momentum():
    there = "\n".join(idle([config(method="central_moco", min_clients=2, server_momentum=0.5)]))
    assert "min_clients 2 has no effect" in there and "sync_period 2 has no effect" in there
    assert "server_momentum" not in there


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum_copies": "kept", "velocities": "kept", "dropout_rate": 0.4, "private_queues": True},
        {"freeze_clients": True, "symmetric": "full", "wire_dtype": "bfloat16"},
    ],
    ids=["averaged", "kept", "frozen"],
)
def test_a_run_that_was_stopped_and_one_that_crashed_go_on_bit_for_bit(options, tmp_path):
    whole = train(rounds=4, out=tmp_path / "whole", **options)
    with pytest.raises(Stopped):
        train(rounds=4, out=tmp_path / "stopped", stop_after=1, **options)
    resumed = train(rounds=4, out=tmp_path / "stopped", resume=True, **options)
    for name in ("metrics.csv", "ledger.csv"):
        assert table(tmp_path / "stopped" / name) == table(tmp_path / "whole" / name)
    for name, value in whole.extractor.state_dict().items():
        assert torch.equal(value, resumed.extractor.state_dict()[name])


def test_what_is_stored_does_not_grow_with_the_clients_unless_they_keep_something():
    usual, kept = (algorithm(momentum_copies=how, velocities=how) for how in ("averaged", "kept"))
    for each in (usual, kept):
        for round in range(2):
            each.play(round)
    assert not [name for name in usual.stored() if "kept" in name]
    seen = {k for round in range(2) for k in Cohort.draw(kept.config, CLIENTS, round, 0, STEPS).clients}
    assert kept.stored()["kept_copies_of"].tolist() == sorted(seen)
    assert kept.stored()["kept_velocities"].shape == (len(seen), P)


# ---- images and views --------------------------------------------------------------------------------------


def test_a_client_goes_through_all_its_images_before_any_comes_again():
    held = torch.tensor([30, 10, 20, 40])
    order = torch.cat([next_images(held, at, 3, 7, 2) for at in range(0, 12, 3)])
    assert torch.equal(order, next_images(held, 0, 12, 7, 2))
    passes = [sorted(part.tolist()) for part in order.split(4)]
    assert passes == [[10, 20, 30, 40]] * 3 and len({tuple(part.tolist()) for part in order.split(4)}) > 1
    assert not torch.equal(next_images(torch.arange(9), 0, 9, 7, 2), next_images(torch.arange(9), 0, 9, 7, 3))


def test_a_clients_views_do_not_depend_on_who_else_is_there():
    data, views = tiny_data(), Views("moco", 6)
    rows = {k: next_images(data.clients[k], 0, 6, 0, k) for k in range(3)}
    all_of_them, some = (Batches(data.images, rows, 2, views, (0, 1, 0)) for _ in range(2))
    for step in range(3):
        there = [0, 1, 2] if step == 0 else [0, 2]
        a, b = all_of_them.views_of(step, [0, 1, 2]), some.views_of(step, there)
        for one, other in zip(a, b, strict=True):
            assert torch.equal(one[[there.index(k) for k in there] if len(there) == 3 else [0, 2]], other)
        assert a[0].shape == (3, 2, 1, 6, 6) and not torch.equal(a[0], a[1])


def test_a_view_is_of_the_clients_own_image():
    """Of images of one grey, which views leave as they are, up to their brightness."""
    images = torch.arange(6, dtype=torch.uint8).mul(40)[:, None, None, None].expand(6, 1, 6, 6).contiguous()

    class AsTheyAre(Views):
        def made(self, images, draws):
            return images.float()

    batches = Batches(
        images, {4: torch.tensor([1, 2, 5]), 7: torch.tensor([0, 3, 4])}, 1, AsTheyAre("moco", 6), (0, 0, 0)
    )
    for step, (one, other) in enumerate([(1, 0), (2, 3), (5, 4)]):
        first, second = batches.views_of(step, [4, 7])
        assert torch.equal(first, second) and first[:, 0, 0, 0, 0].tolist() == [40 * one, 40 * other]


# ---- what moves --------------------------------------------------------------------------------------------


def flows(**options):
    """Of one round of all clients."""
    entries = algorithm(cohort=CLIENTS, **options).play(0).entries
    return sum((entry.traffic for entry in entries), Traffic())


@pytest.mark.parametrize(
    ("options", "latents", "gradients", "copies", "velocities"),
    [
        ({}, 2, 1, 1, 1),
        ({"client_momentum": 0.0}, 2, 1, 1, 0),
        ({"symmetric": "none", "velocities": "kept"}, 2, 1, 1, 0),
        ({"symmetric": "full"}, 4, 2, 1, 1),
        ({"momentum_copies": "kept"}, 2, 1, 0, 1),
        ({"momentum_copies": "reset", "velocities": "zeroed"}, 2, 1, 0, 0),
    ],
)
def test_what_moves_in_closed_form(options, latents, gradients, copies, velocities):
    moved, number = flows(**options), 4
    images, averages = CLIENTS * STEPS * 2, 3  # after two, four and the last of five steps
    assert moved["up_latents"] == latents * images * L * number
    assert moved["down_gradients"] == gradients * images * L * number
    weights = CLIENTS * averages * P * number
    for kind, there in (("extractor", 1), ("copies", copies), ("velocities", velocities)):
        assert moved[f"down_{kind}"] == moved[f"up_{kind}"] == there * weights, kind


def test_bytes_are_those_of_the_numbers_that_cross(monkeypatch):
    """Counted where they are rounded, of two bytes each."""
    crossed = Counter()

    def counting(numbers, dtype):
        crossed["steps" if numbers.dim() > 2 else "averages"] += numbers.numel()
        return numbers.to(torch.bfloat16).float()

    monkeypatch.setattr(from_config, "over_the_wire", counting)
    moved = flows(wire_dtype="bfloat16")
    assert moved["up_latents"] + moved["down_gradients"] == 2 * crossed["steps"]
    # up from each client; down what is the same for all passes here once: at the start and at each average
    up = sum(moved[f"up_{kind}"] for kind in ("extractor", "copies", "velocities"))
    down_once = 2 * 3 * P * (1 + 3)
    assert 2 * crossed["averages"] == up + down_once


def test_a_frozen_half_comes_once_and_nothing_goes_back(tmp_path):
    whole = net()
    result = train(rounds=3, freeze_clients=True, out=tmp_path)
    for name, value in result.extractor.blocks[0].state_dict().items():
        assert torch.equal(value, whole.blocks[0].state_dict()[name])
    assert not torch.equal(result.extractor.blocks[1][0].weight, whole.blocks[1][0].weight)
    moved, lines = result.summary.traffic, table(tmp_path / "ledger.csv")
    clients = {line["client"] for line in lines}
    assert moved["down_extractor"] == 4 * P * len(clients) and len(lines) == 9 > len(clients)
    assert moved["up_latents"] == 2 * 2 * STEPS * 9 * L * 4
    assert moved.total == moved["down_extractor"] + moved["up_latents"]
    assert result.summary.divergence == 0


def test_the_papers_numbers_by_the_papers_counting():
    """Table 1: megabytes of one of 1,000 clients, of 50 images, in 200 epochs; of FL-SSL one of 5."""
    step = {"epochs": 200, "images": 50, "latent": 64 * 32 * 32}
    found = [
        in_the_paper(synchronisations=0, parameters=0, epochs=200, images=50, latent=4 * 16 * 16, latents=1),
        in_the_paper(synchronisations=0, parameters=0, **step),
        in_the_paper(synchronisations=200, parameters=1_856),
        in_the_paper(synchronisations=200, parameters=75_840),
        in_the_paper(synchronisations=100, parameters=21_677_121),
    ]
    assert [round(value, 4) for value in found[:2]] == [39.0625, 5000]
    assert [round(value, 3) for value in found[2:]] == [1.416, 57.861, 8269.165]
    # and by the ledger: three latents an image, or two; weights both ways
    honest = Costs(Rules(momentum_copies="kept", velocities="kept"), 1_856, 65_536, 1)
    moved = honest.traffic(Moved(200 * 50, 200 * 50, 200, 200))
    assert moved.total / 2**20 == pytest.approx(7500 + 2 * 1.416, abs=1e-3)
    frozen = Costs(Rules(frozen=True), 1_856, 1_024, 1).traffic(Moved(200 * 50, 200 * 50, 1, 0))
    assert frozen["up_latents"] / 2**20 == 78.125 and frozen["down_gradients"] == 0


# ---- who is gone -------------------------------------------------------------------------------------------


def test_a_client_that_vanishes_costs_what_it_had_moved_and_no_more(tmp_path):
    result = train(rounds=6, cohort=4, dropout_rate=0.5, min_clients=2, out=tmp_path)
    lines = table(tmp_path / "ledger.csv")
    tried = [line for line in lines if any(int(line[flow]) for flow in ("down_extractor", "up_latents"))]
    partial = 0
    for line in tried:
        round, client, attempt = (int(line[name]) for name in ("round", "client", "attempt"))
        there = Cohort.draw(result.config, CLIENTS, round - 1, attempt, STEPS).steps[client]
        averages = there // 2 + (there == STEPS)
        partial += 0 < there < STEPS
        assert line["outcome"] == ("accepted" if there == STEPS else "dropped")
        assert int(line["up_latents"]) == 2 * int(line["down_gradients"]) == 2 * there * 2 * L * 4
        assert int(line["up_extractor"]) == averages * P * 4
        assert int(line["down_extractor"]) == (1 + min(averages, 2)) * P * 4
    assert partial > 2
    for metrics in result.history:
        mine = [line for line in lines if int(line["round"]) == metrics.round]
        assert metrics.accepted >= 2 and metrics.attempts == int(mine[-1]["attempt"]) + 1
    passed = [line for line in lines if line not in tried]
    assert {line["outcome"] for line in passed} <= {"dropped", "discarded"}
    assert any(line["outcome"] == "discarded" for line in passed)


def test_those_who_stay_learn_from_what_the_others_left_behind():
    """The server keeps the steps that a client made with it; its half is in no later average."""
    a = algorithm(dropout_rate=0.5, cohort=CLIENTS)
    round = next(
        r for r in range(20) if 0 < len(Cohort.draw(a.config, CLIENTS, r, 0, STEPS).staying(STEPS)) < CLIENTS
    )
    cohort = Cohort.draw(a.config, CLIENTS, round, 0, STEPS)
    played = a.play(round)
    assert played.num_images == 2 * sum(cohort.steps.values())
    assert a.taken.tolist() == [2 * cohort.steps[k] for k in range(CLIENTS)]


def test_a_round_that_nobody_stays_for_is_given_up_and_changes_nothing():
    a = algorithm(dropout_rate=0.999, min_clients=3)
    before = {name: value.clone() for name, value in a.stored().items()}
    with pytest.raises(TooFewClients, match="of 100 cohorts of 3 none had 3 clients who stayed to the end"):
        a.play(0)
    assert all(torch.equal(before[name], value) for name, value in a.stored().items())


def grey(clients):
    """Data in which these clients' images are one grey, of which the net makes NaN."""
    data = tiny_data()
    images = data.images.clone()
    for k in clients:
        images[data.clients[k]] = 128
    return dataclasses.replace(data, images=images)


def test_a_client_that_sends_nan_is_left_out_and_the_run_goes_on(tmp_path, caplog):
    result = train(grey([2]), rounds=2, cohort=CLIENTS, out=tmp_path)
    lines = table(tmp_path / "ledger.csv")
    out = [line for line in lines if line["outcome"] == "rejected"]
    assert [(line["client"], line["fault"]) for line in out] == [("2", "not finite")] * 2
    assert out[0]["up_latents"] == str(2 * 2 * L * 4) and out[0]["down_gradients"] == "0"
    assert result.history[-1].not_finite_since is None
    assert "round 1: client 2 was left out: its numbers are not finite" in caplog.text
    with pytest.raises(TooFewClients, match="round 1: all clients sent numbers that are not finite"):
        train(grey(range(CLIENTS)), rounds=2)


def test_where_all_are_trusted_nan_spreads_and_it_is_said_since_when():
    result = train(grey([2]), rounds=2, cohort=CLIENTS, trust_updates=True)
    assert [metrics.not_finite_since for metrics in result.history] == [1, 1]
    assert result.summary.probe is None and result.history[-1].rejected == 0


def test_a_round_in_which_all_diverge_changes_nothing():
    a = algorithm(grey(range(CLIENTS)))
    before = {name: value.clone() for name, value in a.stored().items()}
    with pytest.raises(TooFewClients) as error:
        a.play(0)
    assert all(torch.equal(before[name], value) for name, value in a.stored().items())
    assert [entry.outcome for entry in error.value.entries] == ["rejected"] * 3


def test_a_round_that_fails_half_way_changes_nothing(monkeypatch):
    a = algorithm(momentum_copies="kept")
    a.play(0)
    before = {name: value.clone() for name, value in a.stored().items()}
    steps, step = [], a.joint.step

    def failing(*views):
        steps.append(len(steps))
        if len(steps) == 4:
            raise NobodyLeft
        return step(*views)

    monkeypatch.setattr(a.joint, "step", failing)
    with pytest.raises(TooFewClients, match="is --client-lr too high"):
        a.play(1)
    after = a.stored()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_where_keys_become_alike_it_is_said_once(caplog):
    a = algorithm(queue_size=4)
    with torch.no_grad():
        a.joint.server.weights.zero_()
        a.joint.server.copy.zero_()
    for round in range(2):
        a.play(round)
    assert caplog.text.count("would be 3.22 if all keys were alike") == 1


# ---- settings ----------------------------------------------------------------------------------------------


def test_defaults_are_the_methods_where_it_has_its_own():
    mine, other = Config(method="mocosfl", data="cifar10"), Config(data="cifar10")
    assert (mine.client_lr, mine.client_momentum, mine.batch_size, mine.rounds) == (0.06, 0.9, 1, 200)
    assert (mine.warmup_rounds, mine.lr_decay, mine.num_clients) == (0, "cosine", other.num_clients)
    assert (other.client_momentum, other.rounds) == (0.0, 500)
    assert Config(method="mocosfl", client_lr=0.5).client_lr == 0.5
    assert idle([mine]) == [] or all("checkpoint_every" in line for line in idle([mine]))
    a = algorithm(round_steps=0)
    assert a.steps == 3  # of 2 images each of 28 / 5


def test_halves_are_made_as_the_settings_say():
    a = algorithm(
        **{
            "temperature": 0.3,
            "ema": 0.7,
            "server_momentum": 0.2,
            "client_momentum": 0.4,
            "weight_decay": 0.1,
        },
        **{"symmetric": "none", "client_gradient": "own", "momentum_copies": "reset", "velocities": "zeroed"},
        **{"in_turn": True, "private_queues": True, "queue_size": 13, "trust_updates": True},
    )
    joint = a.joint
    assert joint.clients.rules == joint.server.rules == Rules(
        0.3, 0.7, 0.2, 0.4, 0.1, "none", "own", "reset", "zeroed", in_turn=True
    )  # fmt: skip
    assert [len(queue.keys) for queue in joint.server.queues] == [2] * CLIENTS and joint.trusting
    lengths = torch.stack([queue.keys.norm(dim=1) for queue in joint.server.queues])
    torch.testing.assert_close(lengths, torch.ones(CLIENTS, 2))
    shared = algorithm().joint
    assert [len(queue.keys) for queue in shared.server.queues] == [12] and not shared.trusting
    assert algorithm(freeze_clients=True).joint.server.rules.frozen


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cut": 2}, "cut: expected 0 to 1, as the net has 2 blocks and the server needs one, got 2"),
        (
            {"workers": 2},
            "workers: expected 1 with mocosfl, whose clients and server step together",
        ),
        ({"personalise_epochs": 1}, "personalise_epochs: expected 0 with mocosfl, which has no class rows"),
        ({"private_queues": True, "queue_size": 4}, "queue_size: expected at least 5 with private_queues"),
        ({"symmetric": "both"}, "symmetric: expected one of server, full, none, got 'both'"),
        ({"temperature": 0.0}, "temperature: expected a finite number greater than 0"),
        ({"class_store": "somewhere"}, "class_store: expected none with mocosfl"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options, words):
    with pytest.raises(ConfigError, match=words):
        train(**options)


def test_a_net_that_is_not_its_blocks_in_a_row_is_refused():
    class Other(Chain):
        def forward(self, images):
            return super().forward(images) + 1

    whole = Other(net().pool, **dict(net().blocks.named_children()))
    with pytest.raises(ConfigError, match="model: expected a net that is its blocks one after another"):
        run(config(), data=tiny_data(), model=whole)
    with pytest.raises(
        ConfigError, match="cut: expected 0 to 0, as the net has 1 block and the server needs one, got 1"
    ):
        run(config(), data=tiny_data(), model=nn.Sequential(nn.Flatten(), nn.Linear(36, 4)))


def test_clients_that_stay_as_they_are_may_come_in_turn():
    assert all(math.isfinite(m.loss) for m in train(rounds=1, freeze_clients=True, in_turn=True).history)


def test_options_of_others_are_refused_and_those_without_effect_are_named(capsys):
    assert cli.main(["run", "--data", "glyphs", "--method", "fedss", "--queue-size", "5"]) == 2
    assert "--queue-size is for mocosfl, central_moco and fl_moco, not for fedss" in capsys.readouterr().err
    lines = idle([config(aggregation="median", max_shift=1, scale=5.0, deadline=2.0)])
    assert any("aggregation median has no effect: clients and server step together" in line for line in lines)
    assert any("max_shift 1 has no effect: the method takes views" in line for line in lines)
    frozen = idle([config(freeze_clients=True)])
    assert any("sync_period 2 has no effect: clients' blocks stay as they are" in line for line in frozen)
    in_turn = idle([config(in_turn=True, client_gradient="own")])
    assert any("client_gradient own has no effect" in line for line in in_turn)


def test_it_runs_from_the_command_line(tmp_path, capsys):
    small = "--glyph-writers 6 --glyph-classes 4 --rounds 1 --cohort 3 --round-steps 2 --queue-size 20"
    arguments = f"run --data glyphs --method mocosfl {small} --key-dim 4 --out".split()
    assert cli.main([*arguments, str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 <= summary["probe"] <= 1 and summary["traffic"]["up_latents"] > 0
    assert cli.main(["methods"]) == 0
    words = capsys.readouterr().out
    assert "mocosfl (MocoSFL): Li et al." in words and "--sync-period: steps between two averages" in words
