"""The benchmark of whole rounds, at a size that takes seconds: what it times does the same work."""

import csv

import pytest
import torch
from fedss_kernels.bench import rounds

from fedss_kernels.federated import Config
from fedss_kernels.federated.clients.player import Player
from fedss_kernels.federated.fedavg_round import Simulation
from fedss_kernels.federated.loading import load_data

SMALL = {"glyph_classes": 20, "glyph_writers": 12, "rounds": 2, "cohort": 3, "num_negatives": 4}


def test_the_training_alone_is_what_the_clients_do():
    """The last client's rows and the model's parameters, trained by one and by the other."""
    config = Config(**SMALL)
    simulation = Simulation(config, Player(config, load_data(config)))
    simulation.play(0)
    training = rounds.Training(simulation)
    training.prepare(1)
    (request, rows, _), phi = training.clients[0], simulation.server.extractor
    del training.clients[1:]
    before = rows.detach().clone()
    training.run()
    cohort = rounds.draw_cohort(0, 1, 0, 12, 3)
    update = simulation.player.update(1, 0, cohort[0], request, phi, before)
    torch.testing.assert_close(before - rows.detach(), update.rows, rtol=1e-4, atol=1e-7)
    trained = torch.cat([p.detach().flatten() for p in training.model.parameters()])
    torch.testing.assert_close(phi - trained, update.extractor, rtol=1e-4, atol=1e-6)


@pytest.mark.exhaustive
def test_every_line_is_measured_and_saved(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark, inside, times in no worker
    Config(**SMALL).save(tmp_path / "config.json")
    rounds.main(["--config", str(tmp_path / "config.json"), "--rounds", "2", "--out", str(tmp_path / "out")])
    with (tmp_path / "out" / "rounds.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["what"] for line in lines] == ["training alone", "in one process", "1 worker", "2 workers"]
    assert all(float(line["round"]) > 0 and float(line["ratio"]) > 0 for line in lines)
    assert (tmp_path / "out" / "rounds.md").read_text() + "\n" == capsys.readouterr().out
