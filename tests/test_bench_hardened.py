"""The benchmark of hardened halves, at a size that takes seconds."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from fedss_kernels.bench import hardened
from fedss_kernels.bench.hardened import CASES, PROBE, Line
from tiny_federation import tiny_data

from fedss_kernels.federated.figures.inversion import ATTACKERS, NO_LATENTS


@pytest.fixture(scope="module")
def data():
    """Ten classes of 16x16, whose label stands in the first pixel."""
    labels, tested = torch.arange(80) % 10, torch.arange(40) % 10
    draw = np.random.default_rng(0)

    def images(labels):
        made = torch.from_numpy(draw.integers(0, 256, (len(labels), 3, 16, 16), dtype=np.uint8))
        made[:, :, 0, 0] = labels[:, None].to(torch.uint8)
        return made

    return replace(
        tiny_data(),
        num_classes=10,
        class_names=tuple(map(str, range(10))),
        images=images(labels),
        labels=labels,
        clients=tuple(torch.arange(80).chunk(4)),
        client_names=tuple("abcd"),
        test_images=images(tested),
        test_labels=tested,
        test_clients=(),
    )


@pytest.fixture
def small(monkeypatch):
    for name, value in {"CLIENTS": 4, "KNOWN": 6, "EPOCHS": 1, "STEPS": 2, "PASSES": 1, "WIDTH": 4}.items():
        monkeypatch.setattr(hardened, name, value)
    monkeypatch.setattr(hardened, "ATTACK", {"share": 0.2, "count": 9})
    monkeypatch.setattr(hardened, "CASES", {name: replace(case, steps=1) for name, case in CASES.items()})


def test_the_source_and_the_clients_share_no_class(data, small):
    source, clients = hardened.parts(data)
    for part, odd in ((source, 0), (clients, 1)):
        assert set(part.labels.tolist()) == set(part.test_labels.tolist()) == set(range(odd, 10, 2))
        assert torch.equal(part.images[:, 0, 0, 0].long(), part.labels)
        assert torch.equal(part.test_images[:, 0, 0, 0].long(), part.test_labels)
        assert torch.cat(list(part.clients)).tolist() == list(range(40)) and len(part.clients) == 4


def test_cases_differ_in_the_bottleneck_and_the_penalty_alone():
    configs = {name: hardened.config_of(case, 3) for name, case in CASES.items()}
    assert configs["bottleneck alone"] == configs["trained against an attacker"]
    assert [c.rounds * c.round_steps for c in configs.values()] == [96, 600, 600]
    assert configs["no bottleneck"].bottleneck is None
    assert [case.strength for case in CASES.values()] == [0, 0, 2]


@pytest.mark.exhaustive
def test_every_half_is_attacked_and_those_with_a_bottleneck_probed(data, small, tmp_path, monkeypatch):
    monkeypatch.setattr(hardened, "load_data", lambda config: data)
    train = iter(range(2))
    monkeypatch.setattr(hardened, "run", lambda *a, run=hardened.run, **k: (next(train), run(*a, **k))[1])
    arguments = ["--data-dir", "nowhere", "--seeds", "0", "--out", str(tmp_path)]
    assert hardened.main(arguments) == 0
    with (tmp_path / "hardened.csv").open() as file:
        rows = [(row["half"], row["attacker"]) for row in csv.DictReader(file)]
    assert sorted(rows) == sorted(
        [("none", NO_LATENTS)] * 3
        + [(name, attacker) for name in CASES for attacker in ATTACKERS]
        + [(name, PROBE) for name, case in CASES.items() if case.bottleneck]
    )
    assert (tmp_path / "hardened.png").stat().st_size > 10_000
    before = (tmp_path / "hardened.md").read_text()
    assert hardened.main(arguments) == 0  # nothing is measured again: `train` is used up
    assert (tmp_path / "hardened.md").read_text() == before


def test_the_table_has_means_over_seeds():
    lines = [Line("a half", seed, "residual, for MSE", 0.01 + 0.02 * seed, 0.5, 14.0) for seed in (0, 1)]
    lines += [Line("a half", seed, PROBE, probe=0.4 + 0.2 * seed, knn=0.3) for seed in (0, 1)]
    row = hardened.table(lines).splitlines()[-1]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        *("a half", "residual, for MSE", "0.0200 ± 0.0141", "0.500 ± 0.000", "14.0 ± 0.0"),
        *("50.0 ± 14.1", "30.0 ± 0.0"),
    ]


def test_a_file_is_read_as_it_was_written(tmp_path):
    lines = [Line("a", 0, PROBE, probe=0.5, knn=0.25), Line("b", 1, "x", 0.1, 0.2, 0.3)]
    hardened.write(tmp_path, lines)
    assert hardened.read(tmp_path / "hardened.csv") == lines
    assert hardened.read(tmp_path / "no.csv") == []
