"""`fedss probe`: features by depth of a finished run, beside the net's random init."""

import argparse
import csv
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedss_kernels.federated import Config, cli, run
from fedss_kernels.federated.cli import probe as probe_command
from fedss_kernels.federated.cli.probe import PROBE, _say_idle
from fedss_kernels.federated.cli.several_runs import say_differences, titles
from fedss_kernels.federated.figures import by_depth as by_several
from fedss_kernels.federated.figures import probe
from fedss_kernels.federated.interrupts import Interrupted
from fedss_kernels.federated.loading import load_data
from fedss_kernels.federated.models import build_model
from fedss_kernels.federated.plan import Plan
from fedss_kernels.federated.probes import Line, Probing, by_depth
from fedss_kernels.federated.reports import progress
from fedss_kernels.federated.reports.mean_sd import mean_sd
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


@pytest.mark.exhaustive
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


@pytest.mark.exhaustive
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


def test_a_retrieval_needs_no_labels(tmp_path, capsys):
    out = tmp_path / "run"
    run(Config(**SMALL | {"task": "retrieval", "glyph_classes": 30}, out=out))
    assert cli.main(["probe", str(out), "--depths=1,3", "--labels=0.5"]) == 0
    line = "--labels has no effect: nothing is trained for a retrieval"
    assert capsys.readouterr().out.startswith(f"{line}\n")
    (header, rows), lines = read_markdown((out / "probe.md").read_text()), read_csv(out / "probe.csv")
    assert header[3:] == ["MAP@10 (%)", "recall@1 (%)", "recall@10 (%)"] and len(rows) == len(lines) == 4
    assert "probe" not in lines[0] and float(lines[0]["recall_at_1"]) > 0


IDLE = {
    "rate": "there is no --fine-tune",
    "batch-size": "there is no --fine-tune",
    "seed": "all labels are known, and there is no --fine-tune",
}


@pytest.mark.parametrize(
    "task, given, idle",
    [
        ("classification", {"rate": 0.5, "batch-size": 3, "seed": 1}, IDLE),
        ("classification", {"rate": 0.5, "seed": 1, "fine-tune": 1}, {}),
        ("classification", {"labels": 0.5, "neighbours": 3, "temperature": 0.5, "seed": 1}, {}),
        (
            "retrieval",
            {"labels": 0.5, "neighbours": 3, "temperature": 0.5, "seed": 1, "fine-tune": 2, "rate": 0.5},
            dict.fromkeys(
                ["labels", "neighbours", "temperature", "seed", "fine-tune", "rate"],
                "nothing is trained for a retrieval",
            ),
        ),
    ],
)
def test_options_that_nothing_is_measured_by_are_told(task, given, idle, capsys):
    parser = argparse.ArgumentParser()
    PROBE.add_arguments(parser)
    _say_idle(parser.parse_args(["run", *(f"--{name}={value}" for name, value in given.items())]), task)
    lines = [f"--{name} has no effect: {why}" for name, why in idle.items()]
    assert capsys.readouterr().out.splitlines() == lines


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
    assert fails(capsys, str(folder)) == f"{folder} is left out: the net has numbers that are not finite"


def test_a_run_without_class_rows_is_probed_too(folder):
    found = torch.load(folder / "model.pt", weights_only=True)
    torch.save({"extractor": found["extractor"]}, folder / "model.pt")
    assert cli.main(["probe", str(folder), "--depths=1"]) == 0


@pytest.mark.exhaustive
def test_of_several_runs_there_are_means_over_seeds(folder, tmp_path, capsys):
    """Two methods, two seeds; the nets at random, which methods have in common, are measured once."""
    other = {"full_softmax-seed3": {"method": "full_softmax"}, "fedss-seed4": {"seed": 4}}
    runs = [folder, *(tmp_path / name for name in other)]
    for run_folder, options in zip(runs[1:], other.values(), strict=True):
        run(Config(**(SMALL | options), out=run_folder))
    assert cli.main(["probe", *map(str, runs), "--depths=1,3", f"--out={tmp_path / 'all'}"]) == 0
    measured = read_csv(tmp_path / "all" / "by_depth.csv")
    nets = [(row["net"], row["seed"], row["depth"]) for row in measured]
    expected = [
        ("FedSS", "3"),
        ("random init", "3"),
        ("FullSoftmax", "3"),
        ("FedSS", "4"),
        ("random init", "4"),
    ]
    assert nets == [(*net, depth) for net in expected for depth in ("1", "3")]
    header, rows = read_markdown((tmp_path / "all" / "by_depth.md").read_text())
    assert header == ["linear probe (%) after block", "1", "3", "seeds"]
    assert [(row[0], row[3]) for row in rows] == [("FedSS", "2"), ("FullSoftmax", "1"), ("random init", "2")]
    mean, sd = mean_sd([float(r["probe"]) for r in measured if (r["net"], r["depth"]) == ("FedSS", "3")])
    assert rows[0][2] == f"{100 * mean:.1f} ± {100 * sd:.1f}" and "±" not in rows[1][1]
    cli.main(["probe", str(folder), "--depths=1,3", f"--out={tmp_path / 'one'}"])  # each as by itself
    alone = read_csv(tmp_path / "one" / "probe.csv")
    assert [r["probe"] for r in alone if r["net"] == "trained"] == [r["probe"] for r in measured[:2]]
    assert "random init" in (tmp_path / "all" / "section-by_depth.html").read_text()
    assert (tmp_path / "all" / "by_depth.png").stat().st_size > 10_000


@pytest.mark.exhaustive
def test_a_comparisons_runs_are_probed_by_its_folder(folder, tmp_path, capsys):
    inside = tmp_path / "compared"
    for name in ("fedss-seed3", "a-copy-of-seed3"):  # the second is no run of the plan's
        shutil.copytree(folder, inside / name)
    run(Config(**SMALL | {"seed": 4}, out=inside / "fedss-seed4"))
    Plan(Config(**SMALL), ["fedss"], [3, 4, 5]).save(inside)
    capsys.readouterr()
    assert cli.main(["probe", str(inside), "--depths=1"]) == 0
    assert f"{inside / 'fedss-seed5'} is left out: it is not finished\n" in capsys.readouterr().err
    found = [(row["net"], row["seed"]) for row in read_csv(inside / "by_depth.csv")]
    assert found == [("FedSS", "3"), ("random init", "3"), ("FedSS", "4"), ("random init", "4")]
    assert cli.main(["probe", str(inside), str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_runs_of_other_settings_are_no_seeds_of_one_and_none_counts_twice(folder, tmp_path, capsys):
    other, out = tmp_path / "other", tmp_path / "out"
    run(Config(**SMALL | {"rounds": 1}, out=other))
    assert cli.main(["probe", str(folder), str(other), "--depths=1", f"--out={out}"]) == 0
    _, rows = read_markdown((out / "by_depth.md").read_text())
    assert [row[0] for row in rows] == ["FedSS, rounds 2", "FedSS, rounds 1", "random init"]
    assert fails(capsys, str(folder), str(folder)) == f"{folder}: expected it once"
    copied = shutil.copytree(folder, tmp_path / "copied")
    words = f"{copied} and {folder} are of one method, settings and seed: expected each once"
    assert fails(capsys, str(folder), str(copied)) == words


@pytest.mark.exhaustive
def test_nets_of_other_sizes_have_each_their_own_at_random(folder, tmp_path):
    wide, out = tmp_path / "wide", tmp_path / "out"
    run(Config(**SMALL | {"model": "isotropic:depth=1", "embedding_dim": 32}, out=wide))
    assert cli.main(["probe", str(folder), str(wide), "--depths=1", f"--out={out}"]) == 0
    _, rows = read_markdown((out / "by_depth.md").read_text())
    models = ("conv4, embedding_dim 8", "isotropic:depth=1, embedding_dim 32")
    assert [row[0] for row in rows] == [f"{n}, model {m}" for n in ("FedSS", "random init") for m in models]
    assert [row[2] for row in rows] == ["1"] * 4, "each the mean of one"


@pytest.mark.exhaustive
def test_features_that_are_not_finite_are_counted_and_said(folder, tmp_path, capsys, monkeypatch):
    """As of a net that divides by the spread of a blank image: of 3 in training and 2 in the test."""
    data = load_data(Config(**SMALL))
    for part, count in ((data.images, 3), (data.test_images, 2)):
        part[:count] = 0
    by_depth_module = sys.modules[by_depth.__module__]  # which has its function's name
    features = by_depth_module.features

    def divided(net, images, depth, **options):
        spread = images.flatten(1).float().std(dim=1, keepdim=True)
        return features(net, images, depth, **options) + 0 / spread

    monkeypatch.setattr(by_depth_module, "features", divided)
    monkeypatch.setattr(probe_command, "read_data", lambda config, told: (config, data))
    monkeypatch.setattr(probe_command, "check_trained_on", lambda folder, data: None)
    words = "The features of 5 images are not finite after block 1, trained: of training they are left out, "
    words += "of the test they are misses"
    assert cli.main(["probe", str(folder), "--depths=1"]) == 0
    assert f"fedss probe: {folder}: {words}\n" in capsys.readouterr().err
    assert [row["not_finite"] for row in read_csv(folder / "probe.csv")] == ["5", "5"]
    assert words in (folder / "report.html").read_text()
    other, out = tmp_path / "other", tmp_path / "out"
    run(Config(**SMALL | {"seed": 4}, out=other))
    assert cli.main(["probe", str(folder), str(other), "--depths=1", f"--out={out}"]) == 0
    assert [row["not_finite"] for row in read_csv(out / "by_depth.csv")] == ["5"] * 4
    assert words in (out / "section-by_depth.html").read_text()


def test_runs_that_differ_in_more_than_their_methods_are_told(capsys):
    one, other = Config(**SMALL), Config(**SMALL | {"method": "fedaws", "rounds": 12, "cohort": 4})
    say_differences("probe", {Path("a"): one, Path("b"): other, Path("c"): one})
    words = "the runs differ in more than their methods: rounds 12 and 2, cohort 2 and 4"
    assert capsys.readouterr().err == f"fedss probe: {words}\n"
    say_differences("probe", {Path("a"): one, Path("b"): replace(one, method="fedaws", client_lr=0.3)})
    say_differences("probe", {Path("a"): one, Path("b"): replace(one, rounds=9)})  # in their titles
    assert capsys.readouterr().err == ""


def test_a_run_that_cannot_be_measured_leaves_the_others(folder, tmp_path, capsys):
    """One net is not finite; of the other two one has fewer blocks than are looked at."""
    spoilt, small, out = tmp_path / "spoilt", tmp_path / "small", tmp_path / "out"
    shutil.copytree(folder, spoilt)
    found = torch.load(spoilt / "model.pt", weights_only=True)
    next(iter(found["extractor"].values()))[0] = torch.nan
    torch.save(found, spoilt / "model.pt")
    run(Config(**SMALL | {"model": "isotropic:depth=1", "embedding_dim": 32}, out=small))
    capsys.readouterr()
    assert cli.main(["probe", *map(str, (spoilt, folder, small)), "--depths=1,3", f"--out={out}"]) == 1
    err = capsys.readouterr().err
    assert f"fedss probe: {spoilt} is left out: the net has numbers that are not finite\n" in err
    assert f"fedss probe: {small} is left out: --depths: expected one in [0, 1], got 3\n" in err
    nets = {row["net"] for row in read_csv(out / "by_depth.csv")}
    varied = "model conv4, embedding_dim 8"
    assert nets == {f"FedSS, {varied}", f"random init, {varied}"}


@pytest.mark.exhaustive
def test_nets_that_are_done_when_a_signal_comes_are_written(folder, tmp_path, capsys, monkeypatch):
    other, out, once = tmp_path / "other", tmp_path / "out", probe_command._measured
    run(Config(**SMALL | {"seed": 4}, out=other))

    def measured(which, *given, **options):
        if which == other:
            raise Interrupted(signal.SIGTERM)
        return once(which, *given, **options)

    monkeypatch.setattr(probe_command, "_measured", measured)
    assert cli.main(["probe", str(folder), str(other), "--depths=1", f"--out={out}"]) == 143
    assert "fedss probe: stopped: what is not there was not measured\n" in capsys.readouterr().err
    assert {row["seed"] for row in read_csv(out / "by_depth.csv")} == {"3"}


def test_runs_of_other_data_are_not_put_together(folder, tmp_path, capsys):
    other = tmp_path / "other"
    run(Config(**SMALL | {"data_seed": 5}, out=other))
    words = fails(capsys, str(folder), str(other), f"--out={tmp_path / 'out'}")
    assert f"the data are not those that {other} was trained on" in words
    assert not (tmp_path / "out" / "by_depth.csv").exists()


def test_a_plot_of_several_has_a_line_for_each_net_of_its_own_look():
    def probed(label, method, seed, depths=(1, 2)):
        lines = [Line("trained", depth, 4, {"probe": 0.1 * depth + 0.01 * seed}) for depth in depths]
        return by_several.Probed(label, method, seed, lines)

    nets = [probed("A", "fedss", 0), probed("A", "fedss", 1), probed("B", "fedss", 0, (1, 2, 3))]
    axes = by_several.plot([*nets, probed("random init", "", 0)]).axes[0]
    assert [bars.get_label() for bars in axes.containers] == ["A", "B", "random init"]
    lines = [bars.lines[0] for bars in axes.containers]
    assert [list(line.get_xdata()) for line in lines] == [[1, 2], [1, 2, 3], [1, 2]]
    assert list(lines[0].get_ydata()) == pytest.approx([10.5, 20.5])
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}) == 3


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


def test_runs_that_began_with_other_nets_are_no_seeds_of_one():
    configs = {
        Path("a"): Config(seed=0),
        Path("b"): Config(seed=1, init_checkpoint=Path("net.pt")),
    }
    found, twice = titles(configs, dict.fromkeys(configs, "FedSS"))
    assert len({*found.values()}) == 2 and not twice and "net.pt" in found[Path("b")]
