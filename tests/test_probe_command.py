"""`fedss probe`: features by depth of a finished run, beside the net's random init."""

import csv
import shutil

import pytest
import torch

from fedss_kernels.federated import Config, cli, run
from fedss_kernels.federated.figures import probe
from fedss_kernels.federated.loading import load_data
from fedss_kernels.federated.models import build_model
from fedss_kernels.federated.probes import Line, Probing, by_depth
from fedss_kernels.federated.reports import progress
from fedss_kernels.federated.reports.tables import read_markdown

SMALL = {"glyph_classes": 12, "glyph_writers": 6, "rounds": 2, "cohort": 2, "embedding_dim": 8, "seed": 3}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FEDSS_CACHE", str(tmp_path_factory.getbasetemp() / "probed-glyphs"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSS_CACHE", str(tmp_path_factory.getbasetemp() / "probed-glyphs"))
        run(Config(**SMALL, out=folder))
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def read_csv(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def fails(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert cli.main(["probe", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n") and err.count("\n") == 1
    return err.rstrip().removeprefix("fedss probe: ")


def test_a_run_is_probed_by_depth_beside_its_random_init(folder, capsys):
    assert cli.main(["probe", str(folder), "--neighbours=5"]) == 0
    said = capsys.readouterr()
    header, rows = read_markdown((folder / "probe.md").read_text())
    assert header == ["net", "after block", "features", "linear probe (%)", "kNN (%)"]
    assert [row[:3] for row in rows] == [
        [net, depth, str(4 * channels)]
        for depth, channels in (("1", 32), ("2", 64), ("3", 64))
        for net in ("trained", "random init")
    ]
    assert (folder / "probe.md").read_text() in said.out and f"{folder / 'report.html'}" in said.out
    assert said.err.splitlines()[-1].startswith(f"fedss probe: {folder}: 6 measured in ")
    assert (folder / "probe.png").read_bytes().startswith(b"\x89PNG")
    assert "random init" in (folder / "report.html").read_text()
    lines = read_csv(folder / "probe.csv")
    assert lines[0] | {"method": "fedss", "rounds": "2", "labels": "1.0", "neighbours": "5"} == lines[0]
    assert [100 * float(line["probe"]) for line in lines] == pytest.approx(
        [float(row[3]) for row in rows], abs=0.051
    )


def test_the_random_init_is_the_runs_own_and_the_other_net_is_what_it_trained(folder):
    data = load_data(Config.load(folder / "config.json"))
    assert cli.main(["probe", str(folder), "--depths=3"]) == 0
    begun, net = (build_model("conv4", 8, SMALL["seed"]) for _ in range(2))
    net.load_state_dict(torch.load(folder / "model.pt", weights_only=True)["extractor"])
    expected = by_depth({"trained": net, "random init": begun}, data, Probing(depths=(3,)))
    lines = read_csv(folder / "probe.csv")
    for line, other in zip(lines, expected, strict=True):
        found = {name: float(line[name]) for name in ("probe", "knn")}
        assert (line["net"], found) == (other.weights, other.measured)
    assert lines[0]["knn"] != lines[1]["knn"]


def test_few_labels_and_fine_tuning(folder):
    out, options = folder.parent / "out", ["--depths=1", "--fine-tune=2", "--batch-size=8"]
    found = []
    for labels in ("1", "0.2"):
        assert cli.main(["probe", str(folder), *options, f"--labels={labels}", f"--out={out}"]) == 0
        found.append(read_csv(out / "probe.csv"))
    for lines in found:
        assert [line["depth"] for line in lines] == ["1", "1"] and float(lines[0]["fine_tuned"]) > 0
    assert found[0][0]["probe"] != found[1][0]["probe"] and found[1][0]["labels"] == "0.2"
    assert not (folder / "probe.csv").exists()
    words = " ".join((out / "report.html").read_text().split())
    assert "20% of the training images of each class" in words and "2 epochs" in words


def test_a_retrieval_needs_no_labels(tmp_path):
    out = tmp_path / "run"
    run(Config(**SMALL | {"task": "retrieval", "glyph_classes": 30}, out=out))
    assert cli.main(["probe", str(out), "--depths=1,3"]) == 0
    (header, rows), lines = read_markdown((out / "probe.md").read_text()), read_csv(out / "probe.csv")
    assert header[3:] == ["MAP@10 (%)", "recall@1 (%)", "recall@10 (%)"] and len(rows) == len(lines) == 4
    assert "probe" not in lines[0] and float(lines[0]["recall_at_1"]) > 0


def test_what_was_probed_is_replaced_with_the_run(folder):
    assert cli.main(["probe", str(folder), "--depths=1"]) == 0
    run(Config(**SMALL | {"rounds": 1}, out=folder, overwrite=True))
    assert not list(folder.glob("*probe*"))


def test_how_far_it_is_is_said(folder, capsys, monkeypatch):
    monkeypatch.setattr(progress, "QUICK_SECONDS", 0)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0)
    assert cli.main(["probe", str(folder), "--depths=1"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "measuring" in line]
    assert lines == [f"fedss probe: {folder}: measuring: {done} of 2" for done in (0, 1)]


# ---- what cannot be


def test_what_is_no_finished_run_is_told(folder, tmp_path, capsys):
    nowhere = tmp_path / "nowhere"
    assert fails(capsys, str(nowhere)) == f"no run in {nowhere}: no config.json, no checkpoint"
    (folder / "summary.json").unlink()
    assert fails(capsys, str(folder)) == f"no finished run in {folder}: no summary.json"


def test_numbers_that_cannot_be_are_told_at_once(folder, capsys):
    argv = ("--labels=0", "--neighbours=0", "--fine-tune=-1", "--rate=0", "--temperature=x", "--depths=a")
    assert fails(capsys, str(folder), *argv).split("; ") == [
        "--labels: expected a number greater than 0 and at most 1, got '0'",
        "--neighbours: expected an integer of at least 1, got '0'",
        "--fine-tune: expected an integer of at least 0, got '-1'",
        "--rate: expected a number greater than 0, got '0'",
        "--temperature: expected a number greater than 0, got 'x'",
        "--depths: expected integers of at least 0 with commas between, got 'a'",
    ]
    assert fails(capsys, str(folder), "--depths=1,4") == "--depths: expected one in [0, 3], got 4"


def test_a_run_without_one_net_for_all_and_a_net_that_is_not_finite_are_refused(folder, tmp_path, capsys):
    alone = tmp_path / "alone"
    run(Config(**SMALL | {"method": "local_only", "partition": "iid", "num_clients": 3}, out=alone))
    assert fails(capsys, str(alone)) == (
        "expected a run with one net for all, got one of local_only, whose clients have their own"
    )
    found = torch.load(folder / "model.pt", weights_only=True)
    next(iter(found["extractor"].values()))[0] = torch.nan
    torch.save(found, folder / "model.pt")
    assert fails(capsys, str(folder)) == "the net has numbers that are not finite"


def test_a_run_without_class_rows_is_probed_too(folder):
    found = torch.load(folder / "model.pt", weights_only=True)
    torch.save({"extractor": found["extractor"]}, folder / "model.pt")
    assert cli.main(["probe", str(folder), "--depths=1"]) == 0


def test_the_plot_has_a_line_for_each_net_and_measure():
    lines = [
        Line(net, depth, 8, {"probe": 0.1 * depth + (net == "trained") / 2, "knn": 0.3})
        for depth in (1, 3)
        for net in ("trained", "random init")
    ]
    (axes,) = probe.plot(lines).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert list(drawn) == [
        *("linear probe, trained", "linear probe, random init", "kNN, trained", "kNN, random init"),
    ]
    assert drawn["linear probe, trained"] == [[1, pytest.approx(60)], [3, pytest.approx(80)]]
