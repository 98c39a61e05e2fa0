"""Layer-wise learning: a block after the other, what is frozen to the bit, and a budget of blocks."""

import csv
import dataclasses

import pytest
import torch
from layered_net import layered_net
from tiny_federation import PIXELS, tiny_config, tiny_data
from torch import nn

from fedss_kernels.federated import CheckpointError, ConfigError, Stopped, run
from fedss_kernels.federated.algorithms import METHODS
from fedss_kernels.federated.algorithms.parts import Part
from fedss_kernels.federated.clients.client import Client
from fedss_kernels.federated.clients.player import Player
from fedss_kernels.federated.fedavg_round import Simulation
from fedss_kernels.federated.idle_settings import idle
from fedss_kernels.federated.models.projection import projection_head, projection_size

WIDTH, LAYERS, ROUNDS = 12, 4, 8  # two rounds for each block
STEM, BLOCK, HEAD = PIXELS * WIDTH + WIDTH, WIDTH * WIDTH + WIDTH, projection_size(WIDTH)
SIZES = [STEM, *[BLOCK] * LAYERS, HEAD]


def net() -> nn.Module:
    return layered_net(LAYERS, WIDTH)


def config(**options):
    settings = {
        "method": "layerwise",
        "rounds": ROUNDS,
        "client_lr": 0.05,
        "embedding_dim": WIDTH,
        "eval_every": 4,
    }
    return tiny_config(**(settings | options))


def player_of(**options) -> Player:
    return Player(config(**options), tiny_data(), net())


def train(**options):
    stop_after, seen, resume = options.pop("stop_after", None), [], options.pop("resume", False)
    on_round = options.pop("on_round", seen.append)
    return run(
        config(**options),
        data=tiny_data(),
        model=net(),
        on_round=on_round,
        resume=resume,
        stop=None if stop_after is None else lambda: seen[-1].round == stop_after,
    )


def bits(result) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in result.extractor.state_dict().values()]


def blocks(phi: torch.Tensor) -> list[bytes]:
    return [part.numpy().tobytes() for part in phi.split(SIZES)]


def letters(parts) -> str:
    """Trained, frozen or absent, from the stem to the head."""
    return "".join(part.name[0] for part in parts.blocks)


# ---- who trains what -----------------------------------------------------------------------------------


def test_a_block_after_the_other_is_trained_and_the_stem_with_the_first():
    schedule = player_of().schedule
    found = [letters(schedule.whole(round)) for round in range(ROUNDS)]
    assert found == [each for each in ("TTAAAT", "FFTAAT", "FFFTAT", "FFFFTT") for _ in range(2)]
    assert all(schedule.parts(r, 0, k) == schedule.whole(r) for r in range(ROUNDS) for k in range(5))
    assert {schedule.whole(0).rows} == {Part.ABSENT}


def test_stages_may_have_several_blocks_and_rounds_that_do_not_divide():
    schedule = player_of(stages=3, rounds=7).schedule
    found = [letters(schedule.whole(round)) for round in range(7)]
    assert found == [*["TTAAAT"] * 3, *["FFTAAT"] * 2, *["FFFTTT"] * 2]


def test_without_freezing_the_net_grows():
    found = [letters(player_of(freeze="no").schedule.whole(round)) for round in range(0, ROUNDS, 2)]
    assert found == ["TTAAAT", "TTTAAT", "TTTTAT", "TTTTTT"]


def test_a_budget_leaves_out_frozen_blocks_but_the_first_and_as_the_seed_draws():
    schedule, again, other = (player_of(depth_budget=3, **s).schedule for s in ({}, {}, {"seed": 1}))
    clients = range(200)
    for round, kept in ((0, 0), (2, 0), (4, 1), (6, 1)):
        whole = schedule.whole(round)
        found = [schedule.parts(round, 0, k) for k in clients]
        assert all(sum(p.present[1:-1]) == min(3, sum(whole.present[1:-1])) for p in found)
        assert all(p.trained == whole.trained and p.present[:2] == [True, True] for p in found)
        between = [letters(p)[2:-2].count("F") for p in found] if round > 2 else [0]
        assert {*between} == {kept}
    last = [letters(schedule.parts(6, 0, k)) for k in clients]
    assert {*last} == {"FFFATT", "FFAFTT"} and 70 < last.count("FFFATT") < 130  # 100 +- 4 sd
    assert last == [letters(again.parts(6, 0, k)) for k in clients]
    assert last != [letters(other.parts(6, 0, k)) for k in clients]
    assert last != [letters(schedule.parts(6, 1, k)) for k in clients]
    assert last != [letters(schedule.parts(7, 0, k)) for k in clients]


# ---- frozen is frozen ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"depth_budget": 2, "projection": "new"},
        {"aggregation": "median"},
        {"server_optimizer": "adagrad", "server_lr": 0.01},
    ],
)
def test_a_frozen_block_never_moves_again_at_the_server_or_a_client(options, monkeypatch):
    """With the server's momentum of 0.9, on which it would coast."""
    seen, step = [], Client._step

    def watch(self, images, target, objective, *others):
        loss = step(self, images, target, objective, *others)
        seen.append(blocks(self.extractor.flat))
        return loss

    monkeypatch.setattr(Client, "_step", watch)
    player = player_of(**options, client_momentum=0.5)
    simulation = Simulation(player.config, player)
    for round in range(ROUNDS):
        before, trained = blocks(simulation.server.extractor), player.schedule.whole(round).trained
        seen.clear()
        simulation.play(round)
        after = blocks(simulation.server.extractor)
        for i, moves in enumerate(trained[:-1]):
            assert (before[i] != after[i]) == moves
            assert all((step[i] != before[i]) == moves for step in seen)
    assert before[-1] != after[-1]


def test_a_block_begins_without_the_velocity_of_another_stage():
    player = player_of()
    simulation = Simulation(player.config, player)
    state = simulation.server._net.state[0]
    for round in range(3):
        simulation.play(round)
    moving = [bool(part.any()) for part in state.split(SIZES)]
    assert moving == [False, False, True, False, False, True]


def test_fixed_blocks_save_nothing_for_backward():
    """What autograd keeps is as much in the last stage as in the second, but where nothing is frozen."""

    def saved(round: int, **options) -> int:
        player, shapes = player_of(**options), []
        request = player.request(round, 0, 1)
        phi = player.extractor.flat.clone()

        def pack(tensor):
            shapes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            player.update(round, 0, 1, request, phi, torch.empty(0))
        return len(shapes)

    assert saved(2) == saved(4) == saved(6) < saved(2, freeze="no") < saved(6, freeze="no")


@pytest.mark.parametrize("options", [{}, {"depth_budget": 2}])
def test_a_client_sends_back_what_is_trained_and_nothing_else(options):
    player = player_of(**options)
    for round in range(ROUNDS):
        update = player.update(
            round, 0, 1, player.request(round, 0, 1), player.extractor.flat.clone(), torch.empty(0)
        )
        assert len(update.extractor) == (STEM if round < 2 else 0) + BLOCK + HEAD
        assert bool(update.extractor[:BLOCK].any()) and bool(update.extractor[-HEAD:].any())


# ---- limits --------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_one_stage_of_all_blocks_is_simclr():
    assert bits(train(stages=1)) == bits(train(method="simclr"))


@pytest.mark.exhaustive
def test_a_budget_of_all_blocks_drops_none():
    assert bits(train(depth_budget=LAYERS)) == bits(train()) != bits(train(depth_budget=2))


def test_a_new_head_is_the_seeds_and_has_no_velocity():
    player = player_of(projection="new")
    simulation = Simulation(player.config, player)
    for round in range(ROUNDS):
        simulation.play(round)
        head, state = simulation.server.extractor[-HEAD:], simulation.server._net.state[0, -HEAD:]
        new = torch.cat(
            [p.detach().flatten() for p in projection_head(WIDTH, 0, (round + 1) // 2).parameters()]
        )
        begins = round in (1, 3, 5)
        assert torch.equal(head, new) == begins and bool(state.any()) != begins


# ---- it runs, stops, goes on ---------------------------------------------------------------------------


@pytest.mark.parametrize("stop_after", [3, 4])
def test_it_goes_on_in_the_middle_and_at_the_edge_of_a_stage(stop_after, tmp_path):
    options = {"depth_budget": 2, "projection": "new", "dropout_rate": 0.2, "client_momentum": 0.5}
    whole = train(**options, out=tmp_path / "whole", frozen="kept")
    with pytest.raises(Stopped):
        train(**options, out=tmp_path / "run", frozen="kept", stop_after=stop_after)
    assert bits(train(**options, out=tmp_path / "run", frozen="kept", resume=True)) == bits(whole)
    found = [(tmp_path / name / "ledger.csv").read_text() for name in ("whole", "run")]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "stop_after, way", [(2, "go on with 8, or start"), (None, "of 8 is finished: start")]
)
def test_of_another_number_of_rounds_the_stages_would_be_others(stop_after, way, tmp_path):
    if stop_after:
        with pytest.raises(Stopped):
            train(out=tmp_path, stop_after=stop_after)
    else:
        train(out=tmp_path)
    words = "rounds: 8 there, 12 here: which blocks layerwise trains in a round may be by the number of all "
    words += "rounds"
    with pytest.raises(CheckpointError, match=f"{words}; .*{way} a run of 12 anew"):
        train(out=tmp_path, resume=True, rounds=12)


def test_a_crash_at_the_edge_of_a_stage_loses_nothing(tmp_path):
    def crash(metrics):
        if metrics.round == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(out=tmp_path, checkpoint_every=2, on_round=crash)
    assert bits(train(out=tmp_path, checkpoint_every=2, resume=True)) == bits(train())


def test_what_is_measured_is_of_the_blocks_that_are_there(monkeypatch):
    depths = []

    def watch(net, data, depth, seed, prepared):
        depths.append(depth)
        return {"knn": 0.5}

    monkeypatch.setattr("fedss_kernels.federated.evaluation.while_training", watch)
    result = train(depth_budget=2, eval_every=1)
    assert depths == [1, 1, 2, 2, 3, 3, 4, 4]
    assert result.summary.probe is not None and result.summary.random_probe is not None


@pytest.mark.parametrize(
    "options, steps",
    [
        ({"method": "simclr"}, 2 * PIXELS * WIDTH + 3 * LAYERS * WIDTH**2),
        ({"depth_budget": 2}, 2 * PIXELS * WIDTH + 3 * WIDTH**2),
        ({"freeze": "no"}, 2 * PIXELS * WIDTH + 3 * LAYERS * WIDTH**2),
        ({"stages": 2}, 2 * PIXELS * WIDTH + 6 * WIDTH**2),
    ],
    ids=str,
)
def test_a_step_is_counted_in_the_stage_that_takes_most(options, steps):
    """Of 3 images in two views. Of what comes from before a block no gradient is asked for."""
    found = train(**options).summary
    assert found.client_multiply_adds == pytest.approx(6 * steps / 1e9, rel=1e-9)
    held = STEM + LAYERS * BLOCK if options.get("method") or options.get("freeze") else STEM + 2 * BLOCK
    assert found.client_memory > 4 * held / 1e6
    assert {"client_memory", "client_multiply_adds"} < {*found.measures.shown}


def test_rubbish_is_left_out_and_others_go_on():
    result = train(poison_rate=0.4, cohort=4, dropout_rate=0.2, min_clients=2, depth_budget=2)
    assert sum(m.rejected for m in result.history) > 0 and sum(m.dropped for m in result.history) > 0
    assert all(part.isfinite().all() for part in result.extractor.state_dict().values())


# ---- what moves ----------------------------------------------------------------------------------------


def ledger(folder) -> list[dict[str, str]]:
    with (folder / "ledger.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("budget", [None, 2])
def test_the_ledger_counts_blocks_by_what_becomes_of_them(budget, tmp_path):
    options = {} if budget is None else {"depth_budget": budget}
    result = train(**options, out=tmp_path, dropout_rate=0.2)
    for line in ledger(tmp_path):
        stage, up = (int(line["round"]) - 1) // 2, line["outcome"] == "accepted"
        frozen = 0 if stage == 0 else STEM + BLOCK * min(stage, (budget or LAYERS) - 1)
        trained = BLOCK + (STEM if stage == 0 else 0)
        assert int(line["down_frozen"]) == 4 * frozen
        assert [int(line[f"{way}_extractor"]) for way in ("down", "up")] == [4 * trained, 4 * trained * up]
        assert [int(line[f"{way}_projection"]) for way in ("down", "up")] == [4 * HEAD, 4 * HEAD * up]
    full, whole = result.summary.full_traffic, train(method="simclr", dropout_rate=0.2).summary.traffic
    assert full == whole and result.summary.traffic.total < full.total


def test_a_frozen_block_that_is_kept_is_sent_once(tmp_path):
    train(out=tmp_path, frozen="kept", dropout_rate=0.2, cohort=2, seed=3)
    had: dict[str, int] = {}
    lines = [line for line in ledger(tmp_path) if line["attempt"] == "0"]
    for line in lines:
        stage = (int(line["round"]) - 1) // 2
        frozen, client = (STEM + BLOCK * stage if stage else 0), line["client"]
        assert int(line["down_frozen"]) == 4 * (frozen - had.get(client, 0))
        had[client] = frozen
    assert any(line["down_frozen"] == "0" for line in lines if int(line["round"]) > 2)


# ---- what cannot be ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"depth_budget": 1}, "depth_budget: expected an integer of at least 2, got 1"),
        ({"depth_budget": 2, "stages": 2}, "depth_budget: expected at least 3, the first block and those"),
        ({"depth_budget": 3, "freeze": "no"}, "depth_budget: expected none with freeze no"),
        ({"stages": 5}, "stages: expected at most 4, the net's blocks, got 5"),
        ({"rounds": 3}, "stages: expected at most 3, the rounds, got 4"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        player_of(**options)


class Shrinking(nn.Module):
    """Its second block is of another width; `features` says whether its pool makes up for it."""

    def __init__(self, features: int) -> None:
        super().__init__()
        linear = [nn.Linear(PIXELS, 24), nn.Linear(24, 24), nn.Linear(24, WIDTH)]
        self.blocks = nn.Sequential(nn.Sequential(nn.Flatten(), linear[0]), *linear[1:])
        self.pool = nn.AdaptiveAvgPool1d(features) if features else nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.pool(self.blocks(images))


class Doubled(nn.Module):
    def __init__(self, inner: nn.Module, *, pool: bool) -> None:
        super().__init__()
        self.blocks, self.pool = inner.blocks, nn.Identity() if pool else None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 2 * self.blocks(images)


@pytest.mark.parametrize(
    "model, options, words",
    [
        (
            lambda: layered_net(1, WIDTH),
            {},
            "model: expected a stem and at least 2 blocks to train in turn, got 2",
        ),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, WIDTH)),
            {},
            "model: expected a stem and .* got 1",
        ),
        (
            lambda: Doubled(net(), pool=False),
            {},
            r"model: expected an attribute pool, .* got NoneType; layerwise has other parts .* \(by_round\)",
        ),
        (lambda: Doubled(net(), pool=True), {}, "model: expected a net that is its blocks and then its pool"),
        (lambda: Shrinking(0), {}, "model: expected as many features after each block, got 24, 12"),
        (
            lambda: Shrinking(WIDTH),
            {"depth_budget": 2},
            "depth_budget: expected none with a net whose blocks",
        ),
    ],
)
def test_nets_that_cannot_be_trained_so_are_refused(model, options, words):
    with pytest.raises(ConfigError, match=words):
        Player(config(rounds=2, stages=2, **options), tiny_data(), model())


def test_a_net_that_changes_shape_can_do_without_a_budget():
    assert Player(config(rounds=2, stages=2), tiny_data(), Shrinking(WIDTH))


def test_batch_norm_with_running_statistics_is_refused():
    model = net()
    model.layers[1].append_norm = nn.BatchNorm1d(WIDTH)
    with pytest.raises(ValueError, match="keeps running statistics"):
        Player(config(), tiny_data(), model)


def test_settings_that_have_no_effect_are_worth_a_word():
    usual = {"num_negatives": 38, "scale": 8.0, "weight_init_scale": 0.01, "eval_every": 4}
    assert idle([config(**usual)]) == []
    for options, words in (
        ({"stages": 1, "projection": "new"}, "projection new has no effect: there is one stage"),
        ({"freeze": "no", "frozen": "kept"}, "frozen kept has no effect: no block is frozen"),
        ({"method": "simclr", "stages": 2}, "stages 2 has no effect: it is for layerwise"),
    ):
        assert idle([config(**usual, **options)]) == [words]


def test_it_is_simclr_but_for_when_what_is_trained():
    """So what clients minimise, and what has no rows, is said in one place."""
    layerwise, simclr = METHODS["layerwise"], METHODS["simclr"]
    differ = {
        f.name for f in dataclasses.fields(layerwise) if getattr(layerwise, f.name) != getattr(simclr, f.name)
    }
    assert differ == {"name", "label", "summary", "paper", "by_block", "by_round", "options"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("options", [{}, {"depth_budget": 2, "frozen": "kept"}])
def test_two_workers_play_the_same_bits(options):
    options |= {"dropout_rate": 0.3, "wire_dtype": "bfloat16", "cohort": 4, "eval_every": 1}
    alone, together = train(**options), train(workers=2, **options)
    assert bits(together) == bits(alone)
    assert [m.measured for m in together.history] == [m.measured for m in alone.history]
    assert [m.traffic for m in together.history] == [m.traffic for m in alone.history]
