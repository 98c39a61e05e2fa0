"""The intersection attack: its arithmetic against simulation, and the kinds of negatives."""

import csv
import itertools
import math
from fractions import Fraction

import pytest
import torch
from tiny_federation import tiny_config, tiny_data, tiny_model

from fedss_kernels.federated import TooFewClients, cli
from fedss_kernels.federated.clients.player import Player
from fedss_kernels.federated.cohort import draw_cohort
from fedss_kernels.federated.config import Config, ConfigError
from fedss_kernels.federated.figures import privacy
from fedss_kernels.federated.loading import load_data


@pytest.mark.parametrize("sticky, fresh", [(0, 2), (2, 0), (1, 1), (0, 0), (3, 0)])
def test_the_posterior_is_bayes_rule_over_every_draw(sticky, fresh):
    """5 classes, 2 of them held: every choice of P, of the kept and of the new negatives, two requests."""
    classes, requests = range(5), 2
    held = seen_in_all = Fraction(0)
    for positives in itertools.combinations(classes, 2):
        others = [j for j in classes if j not in positives]
        for kept in itertools.combinations(others, sticky):
            rest = [j for j in others if j not in kept]
            draws = list(itertools.combinations(rest, fresh))
            choices = math.comb(len(others), sticky) * len(draws) ** requests
            for drawn in itertools.product(draws, repeat=requests):
                chance = Fraction(1, choices)
                if 0 in {*positives, *kept} or all(0 in new for new in drawn):
                    seen_in_all += chance
                    held += chance * (0 in positives)
    assert privacy.posterior(5, 2, sticky, fresh, requests) == pytest.approx(float(held / seen_in_all))


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    config = Config(glyph_classes=60, glyph_writers=40, num_negatives=20, cache_dir=cache)
    return config, load_data(config)


def test_sticky_negatives_are_the_same_in_every_round_and_mixed_ones_half(glyphs):
    config, data = glyphs
    for negatives, common in (("fresh", 0), ("sticky", 20), ("mixed", 10)):
        player = Player(Config(**{**vars(config), "negatives": negatives}), data)
        held = player.client.positives(3)
        requests = [player.request(round, 0, 3).class_ids for round in range(40)]
        assert {len(ids) for ids in requests} == {len(held) + 20}
        shared = torch.stack([torch.bincount(ids, minlength=60) for ids in requests]).all(0)
        assert shared.sum() == len(held) + common
        assert torch.equal(
            player.request(0, 0, 3).log_expected_count.exp().min(),
            torch.tensor(20 / (60 - len(held)), dtype=torch.float64).log().exp(),
        )


@pytest.mark.exhaustive
def test_the_attack_finds_what_the_formula_says(glyphs):
    config, data = glyphs
    lines = privacy.measure(config, data, clients=40, requests=(1, 2, 3, 20))
    assert [(line.negatives, line.requests) for line in lines] == [
        (way, count)
        for way in ("fresh", "sticky", "mixed", "shared", "pir", "all rows")
        for count in (1, 2, 3, 20)
    ]
    by = {(line.negatives, line.requests): line for line in lines}
    assert all(line.recall == 1 for line in lines)
    for line in lines:
        assert (line.posterior is None) == (line.negatives in ("shared", "pir"))
        assert line.posterior is None or line.precision == pytest.approx(line.posterior, abs=0.03)
    assert by["fresh", 1].precision == by["sticky", 20].precision == by["mixed", 1].precision
    assert by["fresh", 20].precision == 1 and by["sticky", 20].named == by["sticky", 1].named
    assert by["sticky", 20].precision < by["mixed", 20].precision < 1
    assert by["all rows", 20].named == 60 and by["all rows", 20].precision == by["shared", 1].precision
    for count in (1, 2, 3, 20):  # the unions have negatives in them too, of 16 clients nearly all classes
        assert by["shared", count].named <= by["pir", count].named <= 60
        assert by["pir", count].precision == pytest.approx(by["all rows", 1].precision, abs=0.01)
    assert by["all rows", 1].bytes == 2 * 60 * 64 * 4 and by["fresh", 1].bytes == by["sticky", 1].bytes


def test_of_shared_negatives_the_server_sees_the_classes_of_each_cohort_together(glyphs):
    config, data = glyphs
    config = Config(**{**vars(config), "negatives": "shared", "cohort": 3})
    player = Player(config, data)
    positives = [player.client.positives(k) for k in range(40)]
    for client in (0, 7):
        unions = [privacy.Seen(player)(round, client) for round in range(30)]
        for union in unions:
            assert torch.isin(positives[client], union).all()
        assert max(map(len, unions)) > max(map(len, positives))
        in_all = [set(union.tolist()) for union in unions]
        assert set(positives[client].tolist()) <= set.intersection(*in_all) < in_all[0]


def test_of_private_requests_the_server_sees_what_a_cohort_asks_for_together(glyphs):
    config, data = glyphs
    player = Player(Config(**{**vars(config), "requests": "pir", "cohort": 3}), data)
    for client in (0, 7):
        for round in range(4):
            cohort = draw_cohort(config.seed, round, 0, 40, 3)
            cohort = cohort if client in cohort else [client, *cohort[1:]]
            asked = {j for k in cohort for j in player.request(round, 0, k).class_ids.tolist()}
            assert privacy.Seen(player)(round, client).tolist() == sorted(asked)


def test_what_a_client_moves_for_private_requests(glyphs):
    """A bit vector and a row of each of two servers for each row; all rows and its keys and shares up."""
    config, data = glyphs
    player = Player(Config(**{**vars(config), "requests": "pir", "cohort": 3}), data)
    rows = len(player.request(0, 0, 5).class_ids)
    shares = 2 * (2 * 215 + 612) + 2 * 215 + 2 * 612 + 3 * 52
    assert privacy._bytes(player, 0, 5) == 2 * rows * (8 + 64 * 4) + 60 * 64 * 4 + shares


def test_the_limits_of_the_methods_hold_for_sticky_negatives_too():
    """With every class there is nothing to keep; without one neither."""
    from fedss_kernels.federated import run

    def weight(method: str, num_negatives: int) -> torch.Tensor:
        config = tiny_config(method=method, num_negatives=num_negatives, negatives="mixed")
        return run(config, data=tiny_data(), model=tiny_model()).weight

    assert torch.equal(weight("fedss", 9), weight("full_softmax", 3))
    assert torch.equal(weight("fedss", 0), weight("pos_only", 3))


def trained(out, monkeypatch):
    """(exit code, lines of privacy.csv) of the command, which trains too."""
    monkeypatch.setenv("FEDSS_CACHE", str(out.parent / "cache"))
    small = ["--glyph-classes=12", "--glyph-writers=4", "--cohort=2", "--embedding-dim=8"]
    code = cli.main(["privacy", *small, "--rounds=2", "--clients=3", "--train", f"--out={out}"])
    with (out / "privacy.csv").open(newline="") as file:
        return code, list(csv.DictReader(file))


def test_the_command_writes_table_and_plot_and_trains_if_asked(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    code, lines = trained(out, monkeypatch)
    assert code == 0
    assert len(lines) == 6 * len(privacy.REQUESTS) and all(float(line["top1"]) >= 0 for line in lines)
    assert (out / "privacy.md").read_text() in capsys.readouterr().out
    assert (out / "privacy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", [TooFewClients, ValueError])
def test_a_training_that_fails_leaves_the_others_and_what_is_seen_in_requests(
    kind, tmp_path, capsys, monkeypatch
):
    real = cli.measure.run

    def run(config, **options):
        if config.negatives == "sticky" and config.method == "fedss":
            raise kind("round 1: nobody")
        return real(config, **options)

    monkeypatch.setattr(cli.measure, "run", run)
    code, lines = trained(tmp_path / "out", monkeypatch)
    assert code == 1
    error = capsys.readouterr().err
    assert error == "fedss privacy: training with sticky negatives failed: round 1: nobody\n"
    assert {line["negatives"] for line in lines if line["top1"]} == {
        "fresh",
        "mixed",
        "shared",
        "pir",
        "all rows",
    }
    assert len(lines) == 6 * len(privacy.REQUESTS)


@pytest.mark.exhaustive
def test_what_is_trained_when_a_signal_comes_is_written(tmp_path, capsys, monkeypatch):
    real = cli.measure.run

    def run(config, **options):
        if config.negatives == "sticky":
            raise KeyboardInterrupt
        return real(config, **options)

    monkeypatch.setattr(cli.measure, "run", run)
    code, lines = trained(tmp_path / "out", monkeypatch)
    assert code == 130
    assert "fedss privacy: stopped: what is not there was not measured\n" in capsys.readouterr().err
    assert {line["negatives"] for line in lines if line["top1"]} == {"fresh"}
    assert len(lines) == 6 * len(privacy.REQUESTS)


@pytest.mark.parametrize(
    "method, options, named, precision",
    [
        ("pos_only", {}, "held", 1.0),
        ("full_softmax", {}, "all", "prior"),
        ("neg_only", {"num_negatives": 60, "equal_pushes": True}, "all", "prior"),
    ],
)
def test_the_posterior_is_of_what_the_method_asks_for(method, options, named, precision, glyphs):
    config, data = glyphs
    config = Config(**{**vars(config), "method": method, **options})
    held = len(Player(config, data).client.positives(0))
    for line in privacy.measure(config, data, clients=1, requests=(1, 3)):
        if line.negatives in privacy.UNLIKE:
            continue
        assert line.named == {"held": held, "all": 60}[named]
        expected = held / 60 if precision == "prior" else precision
        assert line.precision == line.posterior == pytest.approx(expected)


@pytest.mark.parametrize("method", ["centralized", "fedbabu", "fedbabu_ss"])
def test_a_method_whose_clients_ask_for_nothing_has_no_requests(method, glyphs):
    config, data = glyphs
    with pytest.raises(ConfigError, match="method: expected one whose clients ask for rows"):
        privacy.measure(Config(**{**vars(config), "method": method}), data, clients=1)
