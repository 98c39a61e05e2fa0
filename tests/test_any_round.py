"""An algorithm beside the simulation, with measures and traffic of its own: from its rounds to a table."""

import csv
import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from tiny_federation import tiny_config, tiny_data, tiny_model

from fedss_kernels.federated import Stopped, measures, run, run_loop
from fedss_kernels.federated.algorithms import METHODS
from fedss_kernels.federated.any_round import Played, Trained
from fedss_kernels.federated.comparisons import jobs
from fedss_kernels.federated.comparisons.compare import compare
from fedss_kernels.federated.comparisons.table import cells, header
from fedss_kernels.federated.files.facts import Facts
from fedss_kernels.federated.files.run_folder import read_run
from fedss_kernels.federated.ledger import KINDS, Entry, Kind, Traffic
from fedss_kernels.federated.measures import MEASURES, Measure, Measures
from fedss_kernels.federated.plan import Plan
from fedss_kernels.federated.reports.plots import LIGHT, accuracy_by_round
from fedss_kernels.federated.reports.progress import RunProgress
from fedss_kernels.federated.reports.report import write_run_report
from fedss_kernels.federated.reports.reported_run import Run
from fedss_kernels.federated.stopwatch import Stopwatch

ERROR = Measure(
    "attack_mse", "attack MSE", "how far an attacker's images are", of="on an attack", share=False,
    more_is_better=False,
)  # fmt: skip
NEIGHBOURS = Measure("knn", "kNN", "images whose nearest neighbours name them", "Voted by <five>.")
COUNT = Measure("saved_bytes", "saved bytes", "of a step", share=False, compared=False)
OWN = Measures(("knn", "saved_bytes", "attack_mse"), "attack_mse", ("attack_mse", "knn"), ("attack_mse",))
FLOWS = ("up_latents", "down_latents", "up_extractor")
COHORT = 2


class Split:
    """Adds 1 to a number in every round: the attack's error goes down with it, the least at a rate of 0.3."""

    def __init__(self, config, player, workers, store):
        self.config, self.player, self.watch = config, player, Stopwatch()
        self.not_finite_since, self.steps, self.team = None, torch.zeros(1), nullcontext()
        assert (workers, store) == (1, None)

    @staticmethod
    def facts(config, player):
        return Facts.of(player.data, 7, OWN, FLOWS)

    def play(self, round):
        self.steps += 1
        traffic = Traffic({"up_latents": 1000, "down_latents": 100 * round})
        entries = [Entry(round + 1, 0, k, 0, "accepted", "", traffic) for k in range(COHORT)]
        return Played(entries, 1 / self.steps.item(), 6)

    def evaluate(self, *, last):
        found = {"attack_mse": abs(self.config.client_lr - 0.3) + 1 / self.steps.item()}
        return found | {"knn": 0.75, "saved_bytes": 12_345} if last else found

    def stored(self):
        return {"steps": self.steps}

    def restore(self, tensors, rounds):
        self.steps = tensors["steps"]
        assert self.steps.item() == rounds

    def checkpoint(self, folder, rounds):
        folder.save_checkpoint(rounds, self.stored())

    def trained(self):
        return Trained(self.player.extractor.module.eval())


@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    for measure in (ERROR, NEIGHBOURS, COUNT):
        monkeypatch.setitem(MEASURES, measure.name, measure)
    latents = Kind("latents", "latents", ("down", "up"), by_class=False)
    monkeypatch.setitem(KINDS, "latents", latents)
    method = replace(METHODS["pos_only"], name="split", label="Split", summary="In two parts.")
    monkeypatch.setitem(METHODS, "split", method)
    monkeypatch.setitem(run_loop.OTHERS, "split", Split)


def train(**options):
    config = tiny_config(**{"method": "split", "rounds": 4, "client_lr": 0.5} | options)
    return run(config, data=tiny_data(), model=tiny_model())


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_its_columns_are_its_own(tmp_path):
    result = train(out=tmp_path)
    lines = table(tmp_path / "metrics.csv")
    assert (
        list(lines[0])
        == (
            "round loss client_lr knn saved_bytes attack_mse not_finite_since attempts accepted dropped late "
            "rejected discarded mean_class_set bytes_up_latents bytes_down_latents bytes_up_extractor "
            "bytes_so_far seconds"
        ).split()
    )
    # Of 2 clients, 1000 bytes up and 100 for each earlier round down; evaluated in rounds 2 and 4.
    assert [line["bytes_down_latents"] for line in lines] == ["0", "200", "400", "600"]
    assert [line["bytes_so_far"] for line in lines] == ["2000", "4200", "6600", "9200"]
    assert [line["attack_mse"] for line in lines] == ["", "0.7", "", "0.45"]
    assert [line["knn"] for line in lines] == ["", "", "", "0.75"]
    ledger = table(tmp_path / "ledger.csv")
    assert list(ledger[0])[6:] == list(FLOWS) and len(ledger) == 4 * COHORT
    assert [line["up_extractor"] for line in ledger] == ["0"] * 8
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["attack_mse"], summary["saved_bytes"]) == (0.45, 12_345)
    assert summary["traffic"] == {"up_latents": 8000, "down_latents": 1200, "up_extractor": 0}
    assert not {"top1", "map_at_10", "measures", "measured"} & summary.keys()
    assert read_run(tmp_path) == (result.config, result.history, result.summary)
    s = result.summary
    assert (s.accuracy, s.attack_mse, s.told) == (0.45, 0.45, "attack MSE 0.4500") and s.top1 is None
    assert result.table is result.weight is None and "attack MSE 0.4500, in" in repr(result)


def test_it_is_stopped_and_resumed(tmp_path):
    config = tiny_config(method="split", rounds=4, client_lr=0.5, out=tmp_path)
    with pytest.raises(Stopped):
        run(config, data=tiny_data(), model=tiny_model(), stop=lambda: True)
    resumed = run(config, data=tiny_data(), model=tiny_model(), resume=True)
    assert read_run(tmp_path) == (resumed.config, resumed.history, resumed.summary)
    for one, other in zip(resumed.history, train().history, strict=True):
        assert replace(one, seconds=0) == replace(other, seconds=0)


def test_its_report_and_its_bar_say_its_headline(tmp_path, capsys):
    result = train(out=tmp_path)
    write_run_report(tmp_path, made := Run(*read_run(tmp_path)))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for words in (
        "<strong>0.4500</strong>attack MSE: how far an attacker&#x27;s images are",
        "Attack MSE on an attack as training goes on.",
        "The same attack MSE by what had been moved",
        "<td>latents, down and up</td><td>1.1</td>",  # 9200 bytes of 8 clients
        "<dt>kNN</dt><dd>Voted by &lt;five&gt;.</dd>",
        'alt="Attack MSE by megabytes moved"',
    ):
        assert words in page, words
    assert "top-1" not in page and "MAP@10" not in page and "Accuracy" not in page
    (axes,) = accuracy_by_round([made], LIGHT).axes
    assert axes.get_ylabel() == "attack MSE on an attack"
    assert axes.lines[0].get_xydata().tolist() == [[2, 0.7], [4, 0.45]]
    with RunProgress(["one"], 4, Console(force_terminal=False)) as progress:
        progress.advance(0, result.history[-1])
    assert "round 4/4, loss 0.250, attack MSE 0.4500," in capsys.readouterr().out


@pytest.mark.exhaustive
def test_a_comparison_chooses_rates_by_the_headline_and_has_all_columns(tmp_path, monkeypatch):
    """Beside a method with others; the least error is the best."""

    def here(configs, *others):
        for config in configs:
            run(config)
        return {}

    monkeypatch.setattr(jobs, "run_all", here)
    sizes = {"glyph_classes": 12, "glyph_writers": 12, "embedding_dim": 8}
    config = tiny_config(rounds=2, cache_dir=tmp_path / "cache", **sizes)
    found = compare(Plan(config, ["split", "fedss"], [0, 1], rates=[0.1, 0.3, 1.0]), tmp_path / "out")
    assert not found.failed
    split, _ = found.table
    assert split.client_lr == 0.3 and split.measured["attack_mse"] == (pytest.approx(0.5), 0.0)
    assert header(found.table)[:7] == [
        "method", "rate", "attack MSE", "kNN (%)", "top-1 (%)", "MAP@10 (%)", "|S_k| (of C)"
    ]  # fmt: skip
    assert cells(found.table)[0][:6] == ["Split", "0.3", "0.5000 ± 0.0000", "75.0 ± 0.0", "–", "–"]
    assert cells(found.table)[1][2:4] == ["–", "–"]
    first, second = table(tmp_path / "out/table.csv")
    assert list(first)[5:9] == ["knn", "knn_sd", "attack_mse", "attack_mse_sd"] and "saved_bytes" not in first
    assert [name for name in first if name.startswith("bytes_")] == [
        *("bytes_per_client_round", "bytes_extractor", "bytes_rows", "bytes_ids", "bytes_latents"),
        "bytes_total",
    ]
    assert (first["bytes_latents"], first["bytes_rows"], first["top1"]) == ("4200.0", "0.0", "")
    assert second["bytes_latents"] == "0.0" and second["attack_mse"] == "" and second["top1"]
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "attack MSE of Split" in page and "top-1 of FedSS" in page


def test_names_that_this_version_does_not_know_are_said(tmp_path, monkeypatch):
    train(out=tmp_path)
    monkeypatch.delitem(MEASURES, "knn")
    words = r"metrics.csv in .* is not as a run wrote it: fedss-kernels \S+ knows no column 'knn'"
    with pytest.raises(ValueError, match=words):
        read_run(tmp_path)
    monkeypatch.setitem(MEASURES, "knn", NEIGHBOURS)
    monkeypatch.delitem(KINDS, "latents")
    with pytest.raises(ValueError, match="knows no column 'bytes_up_latents'"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "name, found, words",
    [
        ("evaluate", {"top1": 1.0}, "measures: expected some of knn, saved_bytes, attack_mse, got .*, top1"),
        ("play", {"down_seed": 8}, "flows: expected some of up_latents, .*, got .*, down_seed"),
    ],
)
def test_what_has_no_column_is_refused(name, found, words, monkeypatch):
    entries = [Entry(1, 0, 0, 0, "accepted", "", Traffic(found))] if name == "play" else []
    made = Played(entries, 1.0, 6) if name == "play" else found
    monkeypatch.setattr(Split, name, lambda self, *given, **named: made)
    with pytest.raises(ValueError, match=words):
        train(rounds=3)


def test_a_measure_says_how_it_is_shown():
    assert (ERROR.column, NEIGHBOURS.column) == ("attack MSE", "kNN (%)")
    assert (NEIGHBOURS.text(0.1234), NEIGHBOURS.text(None), NEIGHBOURS.figure(0.5)) == ("12.3%", "–", "50.0")
    assert (ERROR.text(0.01234), ERROR.text(None), ERROR.text(1234.56)) == ("0.0123", "–", "1,234.6")
    assert COUNT.text(12_345) == "12,345"
    with pytest.raises(ValueError, match="there is a measure knn already"):
        measures.declare(replace(NEIGHBOURS, label="other"))
    assert measures.declare(NEIGHBOURS) == NEIGHBOURS


def test_what_is_no_measure_is_no_attribute():
    summary = train().summary
    assert summary.knn == 0.75 and summary.recall_at_1 is None
    with pytest.raises(AttributeError, match="'Summary' has no attribute 'top_1'"):
        _ = summary.top_1
