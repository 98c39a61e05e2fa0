"""Tables over clients and paired differences by hand, and the command on small runs."""

import csv
import shutil
from dataclasses import replace
from itertools import product
from math import sqrt

import pytest
import torch
from PIL import Image

from fedss_kernels.federated import Config, cli, run
from fedss_kernels.federated.algorithms import METHODS
from fedss_kernels.federated.cli import personalise as personalise_command
from fedss_kernels.federated.comparisons.paired_differences import Measured, differences, unpaired
from fedss_kernels.federated.comparisons.personalisation import write
from fedss_kernels.federated.fine_tuning import Personal, Tuning
from fedss_kernels.federated.plan import Plan
from fedss_kernels.federated.reports.measured import NotWritten
from fedss_kernels.federated.reports.styles import style
from fedss_kernels.federated.reports.tables import read_markdown

FEW = Tuning(epochs=(0, 1))


def measured(method: str, seed: int, *accuracies: float, tuning: Tuning = FEW) -> Measured:
    """Clients 0, 2, 4, ... with these after an epoch, a tenth less initially."""
    people = [
        Personal(2 * k, 10, 2, 5, a - 0.1, a - 0.05, a - 0.02, {0: a - 0.1, 1: a})
        for k, a in enumerate(accuracies)
    ]
    return Measured(f"runs/{method}-{seed}", method, seed, tuning, people)


def tables(text: str) -> list[dict[str, list[str]]]:
    found = []
    for table in text.split("\n\n"):
        header, rows = read_markdown(table)
        found.append({row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows})
    return found


def test_the_table_has_what_lies_between_the_clients_of_a_run(tmp_path):
    (table,) = tables(write(tmp_path, [measured("A", 0, *[k / 10 for k in range(1, 10)], 1.0, 0.5)]))
    assert {name: line["after 1"] for name, line in table.items()} == {
        "A: mean": "54.5",
        "A: sd": "28.8",
        "A: min": "10.0",
        "A: 10%": "20.0",
        "A: max": "100.0",
    }
    assert table["A: mean"]["initial"] == table["A: mean"]["after 0"] == "44.5"
    assert (table["A: mean"]["restricted"], table["A: mean"]["nearest mean"]) == ("49.5", "52.5")


def test_of_several_seeds_there_is_a_line_each_and_their_mean(tmp_path):
    runs = [measured("A", 0, 0.2, 0.4), measured("A", 1, 0.5, 0.9), measured("B", 0, 0.3, 0.3)]
    table, _ = tables(write(tmp_path, runs))
    assert {name: line["after 1"] for name, line in table.items() if "min" in name} == {
        "A, seed 0: min": "20.0",
        "A, seed 1: min": "50.0",
        "A, mean of 2 seeds: min": "35.0",
        "B: min": "30.0",
    }


def test_differences_are_by_seed_and_client():
    runs = [
        measured("A", 0, 0.5, 0.6, 0.9),
        measured("B", 0, 0.4, 0.7, 0.5),
        measured("A", 1, 0.7, 0.6, 0.8),
        measured("B", 1, 0.6, 0.5, 0.6),
        measured("B", 2, 0.0, 0.0, 0.0),  # of a seed that A has not
    ]
    (found,) = differences(runs)
    assert (found.first, found.second, found.seeds, found.clients) == ("A", "B", 2, 3)
    each = [0.1, 0.0, 0.3]  # means over the seeds
    mean, error = found.of["after_1"]
    assert mean == pytest.approx(sum(each) / 3)
    assert error == pytest.approx(sqrt(sum((d - sum(each) / 3) ** 2 for d in each) / 2 / 3))


def test_a_client_that_one_run_lacks_is_in_no_difference():
    lacking = measured("B", 0, 0.4, 0.7, 0.1)
    lacking = replace(lacking, people=lacking.people[1:])
    (found,) = differences([measured("A", 0, 0.5, 0.5, 0.5), lacking])
    assert found.clients == 2 and found.of["after_1"][0] == pytest.approx((0.5 - 0.7 + 0.5 - 0.1) / 2)


def test_methods_without_a_common_seed_are_not_paired_nor_other_rates():
    apart = [measured("A", 0, 0.5), measured("B", 1, 0.5)]
    assert differences(apart) == [] and unpaired(apart) == [("A", "B")]
    fast = replace(FEW, rate=0.1)
    assert unpaired([measured("A", 0, 0.5), measured("B", 1, 0.5, tuning=fast)]) == []
    runs = [measured(m, 0, 0.5, tuning=t) for m, t in product("AB", (FEW, fast))]
    assert [(found.first, found.second) for found in differences(runs)] == [
        ("A, rate 0.01", "B, rate 0.01"),
        ("A, rate 0.1", "B, rate 0.1"),
    ]
    assert differences(runs)[0].of["initial"][1] is None  # of one client


def test_the_table_of_differences(tmp_path):
    runs = [measured("A", 0, 0.5, 0.6, 0.9), measured("B", 0, 0.5, 0.5, 0.6)]
    _, table = tables(write(tmp_path, runs))
    error = sqrt((0.4 / 3) ** 2 + (0.1 / 3) ** 2 + (0.5 / 3) ** 2) / sqrt(6)
    assert {name: line["after 1"] for name, line in table.items()} == {
        "A − B: mean": "13.3",
        "A − B: standard error": f"{100 * error:.1f}",
        "A − B: 95% from": f"{100 * (0.4 / 3 - 1.96 * error):.1f}",
        "A − B: 95% to": f"{100 * (0.4 / 3 + 1.96 * error):.1f}",
    }


def test_methods_look_as_in_every_other_plot_whatever_is_beside_them(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *a, **k: figures.append(figure))
    runs = [replace(measured(name, 0, 0.5, 0.6), name=name) for name in ("fedper", "fedavg", "fedbabu")]
    write(tmp_path, [*runs, replace(measured("fedbabu, flip", 0, 0.5, 0.6), name="fedbabu")])
    epochs, apart = (figure.axes[0] for figure in figures)
    lines = {line.get_label(): _look(line) for line in epochs.lines}
    for name in ("fedper", "fedavg", "fedbabu"):
        assert lines[name] == tuple(style(name).values())
    assert lines["fedbabu, flip"][0] == lines["fedbabu"][0]
    assert lines["fedbabu, flip"] not in [tuple(style(name).values()) for name in METHODS]
    for bars, name in zip(apart.containers, ("fedavg", "fedbabu", "fedbabu, flip"), strict=True):
        assert bars.get_label() == f"fedper − {name}"
        assert _look(bars.lines[0]) == lines[name]


def _look(line):
    return line.get_color(), line.get_marker(), line.get_linestyle()


def test_a_difference_of_rounding_alone_is_no_negative_zero(tmp_path):
    _, table = tables(write(tmp_path, [measured("A", 0, 0.3), measured("B", 0, 0.1 + 0.2)]))
    assert table["A − B: mean"]["after 1"] == "0.0"


def test_the_files_and_what_an_earlier_look_left(tmp_path):
    write(tmp_path, [measured("A", 0, 0.5, 0.6), measured("B", 0, 0.5, 0.5)])
    with (tmp_path / "personalise.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["run"], line["client"]) for line in lines] == [
        (f"runs/{method}-0", client) for method in "AB" for client in "02"
    ]
    assert (
        lines[1]
        | {
            "method": "A",
            "seed": "0",
            "part": "head",
            "rate": "0.01",
            "rows": "all",
            "images": "10",
            "classes": "2",
            "tested": "5",
            "initial": "0.5",
            "restricted": "0.5499999999999999",
            "after_1": "0.6",
        }
        == lines[1]
    )
    with (tmp_path / "personalise_differences.csv").open(newline="") as file:
        (apart,) = csv.DictReader(file)
    assert (apart["first"], apart["second"]) == ("A", "B")
    assert float(apart["after_1"]) == float(apart["after_1_standard_error"]) == pytest.approx(0.05)
    report = (tmp_path / "report.html").read_text()
    assert report.index("own images") < report.index("client by client")
    for name in ("personalise", "personalise_differences"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    write(tmp_path, [measured("A", 0, 0.5, 0.6)])
    assert not list(tmp_path.glob("*differences*"))
    assert "client by client" not in (tmp_path / "report.html").read_text()


def test_what_cannot_be_written_keeps_nothing_else_from_it(tmp_path):
    (tmp_path / "personalise.png").mkdir()
    with pytest.raises(
        NotWritten, match=r"personalise.csv, personalise.md, .*; not personalise.png: "
    ) as lost:
        write(tmp_path, [measured("A", 0, 0.5, 0.6), measured("B", 0, 0.5, 0.5)])
    accuracies, apart = tables(lost.value.table)
    assert accuracies["A: mean"]["initial"] == "45.0" and apart["A − B: mean"]["initial"] == "5.0"
    assert (tmp_path / "personalise_differences.png").is_file()
    assert "client by client" in (tmp_path / "report.html").read_text()


# ---- the command

SMALL = {"glyph_classes": 12, "glyph_writers": 6, "partition": "classes", "num_clients": 4, "rounds": 1}
SMALL |= {"classes_per_client": 4, "cohort": 2, "embedding_dim": 8}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folder(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("FEDSS_CACHE", str(cache))
    return tmp_path


def train(folder, name: str, **options) -> str:
    run(Config(**SMALL | options, out=folder / name))
    return str(folder / name)


def read_csv(folder) -> list[dict[str, str]]:
    with (folder / "personalise.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.exhaustive
def test_the_command_on_runs_of_methods_and_seeds(folder, capsys):
    runs = [
        train(folder, f"{method}-{seed}", method=method, seed=seed)
        for method in ("fedss", "full_softmax")
        for seed in (0, 1)
    ]
    model = (folder / "fedss-0/model.pt").read_bytes()
    capsys.readouterr()
    out = folder / "out"
    assert cli.main(["personalise", *runs, "--epochs=0,2", "--rate=0.01,0.1", f"--out={out}"]) == 0
    said = capsys.readouterr()
    texts = [(out / f"{name}.md").read_text() for name in ("personalise", "personalise_differences")]
    assert "\n".join(texts) in said.out and f"{out / 'report.html'}" in said.out
    assert "FedSS, rate 0.1 − FullSoftmax, rate 0.1: mean" in texts[1]
    lines = read_csv(out)
    assert len(lines) == 4 * 2 * 4 and {line["after_0"] == line["initial"] for line in lines} == {True}
    assert (folder / "fedss-0/model.pt").read_bytes() == model
    # The same whatever else is looked at, and where the report of a run is the section is added to it.
    assert cli.main(["personalise", runs[1], "--epochs=2", "--clients=2", f"--out={runs[1]}"]) == 0
    alone = read_csv(folder / "fedss-1")
    mine = [line for line in lines if line["run"] == runs[1] and line["rate"] == "0.01"]
    assert [line["after_2"] for line in alone] == [line["after_2"] for line in mine[:2]]
    assert "own images" in (folder / "fedss-1/report.html").read_text()


@pytest.mark.exhaustive
def test_a_comparison_is_all_its_runs_and_one_that_is_not_finished_is_left_out(folder, capsys):
    out, comparison = folder / "out", folder / "all"
    plan = Plan(Config(**SMALL), ["fedss", "pos_only"], [0, 1])
    comparison.mkdir()
    plan.save(comparison)
    for config in plan.runs(comparison, {}):
        run(config)
    assert cli.main(["personalise", str(comparison), "--epochs=0", f"--out={out}"]) == 0
    assert len({line["run"] for line in read_csv(out)}) == 4
    (comparison / "pos_only-seed1/summary.json").unlink()
    capsys.readouterr()
    assert cli.main(["personalise", str(comparison), "--epochs=0", f"--out={out}"]) == 0
    assert len({line["run"] for line in read_csv(out)}) == 3
    assert "pos_only-seed1 is left out: it is not finished" in capsys.readouterr().err


def test_methods_between_which_there_is_no_difference_are_told(folder, capsys):
    runs = [train(folder, name, method=name, seed=seed) for seed, name in enumerate(("fedss", "pos_only"))]
    capsys.readouterr()
    assert cli.main(["personalise", *runs, "--epochs=0", f"--out={folder / 'out'}"]) == 0
    words = "FedSS and PosOnly have no seed in common: there is no difference of the two"
    assert capsys.readouterr().err.splitlines()[-1] == f"fedss personalise: {words}"


def test_a_model_that_is_not_finite_leaves_the_others(folder, capsys):
    runs, out = [folder / "run", folder / "spoilt"], folder / "out"
    for nth, each in enumerate(runs):
        train(folder, each.name, seed=nth)
    found = torch.load(runs[1] / "model.pt", weights_only=True)
    found["weight"][0] = torch.nan
    torch.save(found, runs[1] / "model.pt")
    capsys.readouterr()
    assert cli.main(["personalise", *map(str, runs), "--epochs=0", f"--out={out}"]) == 1
    words = "is left out, rate 0.01: its model: it has numbers that are not finite"
    assert f"fedss personalise: {runs[1]} {words}\n" in capsys.readouterr().err
    assert {line["run"] for line in read_csv(out)} == {str(runs[0])}


@pytest.mark.exhaustive
def test_runs_that_are_done_when_a_signal_comes_are_written(folder, capsys, monkeypatch):
    runs, once = [train(folder, "a"), train(folder, "b", seed=1)], personalise_command._measured

    def measured(arguments, which, *given):
        if str(which) == runs[1]:
            raise KeyboardInterrupt
        return once(arguments, which, *given)

    monkeypatch.setattr(personalise_command, "_measured", measured)
    argv = ["personalise", *runs, "--epochs=1", "--clients=2", f"--out={folder / 'tuned'}"]
    assert cli.main(argv) == 130
    assert "fedss personalise: stopped: what is not there was not measured\n" in capsys.readouterr().err
    assert {line["run"] for line in read_csv(folder / "tuned")} == {runs[0]}


def test_heads_that_clients_keep_are_what_they_are_measured_by(folder):
    trained = folder / "run"
    train(folder, "run")
    initial = []
    for keeping in (False, True):
        if keeping:
            found = torch.load(trained / "model.pt", weights_only=True)
            heads = torch.stack([found["weight"].roll(1, 0), found["weight"].flip(0)])
            torch.save({**found, "clients": torch.tensor([3, 1]), "heads": heads}, trained / "model.pt")
        assert cli.main(["personalise", str(trained), "--epochs=0", f"--out={folder / 'out'}"]) == 0
        initial.append([line["initial"] for line in read_csv(folder / "out")])
    same = [one == other for one, other in zip(*initial, strict=True)]
    assert same[0] and same[2] and not (same[1] and same[3])


@pytest.mark.exhaustive
def test_a_model_is_not_measured_on_data_that_changed_since(folder, capsys):
    """As where somebody renamed the folders of two classes."""
    images = folder / "images"
    for name, value in {"a": 40, "b": 120, "c": 200}.items():
        (images / name).mkdir(parents=True)
        for i in range(8):
            Image.new("L", (28, 28), value + i).save(images / name / f"{i}.png")
    options = {
        "data": "image_folder",
        "data_dir": images,
        "image_size": 28,
        "crop_size": 0,
        "model": "conv4_rgb",
    }
    options |= {"num_clients": 2, "classes_per_client": 2, "cache_dir": folder / "made"}
    trained, other = (train(folder, name, method=name, **options) for name in ("fedss", "pos_only"))
    commands = (
        ["personalise", trained, other],
        ["confusion", trained, other],
        ["noise", f"--run={trained}", "--counts=1"],
    )
    for command in commands:
        assert cli.main([*command, f"--out={folder / 'out'}"]) == 0
    (images / "a").rename(images / "d")
    shutil.rmtree(folder / "made")
    capsys.readouterr()
    for command in commands:
        assert cli.main([*command, f"--out={folder / 'out'}"]) == 2
        err = capsys.readouterr().err
        for each in {trained, other}.intersection(command) or {trained}:
            assert f"the data are not those that {each} was trained on: the training" in err


def test_a_method_of_two_settings_is_two_methods(folder):
    runs = [train(folder, name, scale=scale) for name, scale in (("flat", 4.0), ("steep", 16.0))]
    assert cli.main(["personalise", *runs, "--epochs=0", f"--out={folder / 'out'}"]) == 0
    assert {line["method"] for line in read_csv(folder / "out")} == {"FedSS, scale 4.0", "FedSS, scale 16.0"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_seed": 1}, "is on other data than {first}: data_seed 1 and 0: expected runs on the same"),
        ({"num_clients": 3}, "is on other data than {first}: num_clients 3 and 4: expected"),
        ({}, "and {first} are of one method, settings and seed: expected each once"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(folder, capsys, options, message):
    first, other = train(folder, "first"), train(folder, "other", **options)
    capsys.readouterr()
    assert cli.main(["personalise", first, other, f"--out={folder / 'out'}"]) == 2
    assert f"fedss personalise: {other} {message.format(first=first)}" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_runs_without_clients_test_images_are_refused(folder, capsys):
    natural = train(folder, "natural", partition="natural", num_clients=0)
    search = train(folder, "search", task="retrieval", glyph_classes=30, partition="iid")
    trial = train(folder, "trial", partition="natural", num_clients=0, holdout=0.3)
    out = f"--out={folder / 'out'}"
    capsys.readouterr()
    assert cli.main(["personalise", natural, out]) == 2
    assert "fedss personalise: nobody knows which test images of glyphs are whose" in capsys.readouterr().err
    assert cli.main(["personalise", search, out]) == 2
    assert "expected a classification, got a retrieval" in capsys.readouterr().err
    assert cli.main(["personalise", str(folder / "nowhere"), out]) == 2
    assert cli.main(["personalise", natural, "--part=tail", out]) == 2
    assert not (folder / "out").exists()
    assert cli.main(["personalise", trial, "--epochs=1", out]) == 0
    assert len(read_csv(folder / "out")) == 2  # of 6 writers a third were held out


# ---- all mistakes at once


def mistakes_of(capsys, *argv: str) -> list[str]:
    """What one refusal tells, mistake by mistake."""
    capsys.readouterr()
    assert cli.main(["personalise", *argv]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return said.err.rstrip().removeprefix("fedss personalise: ").split("; ")


def test_what_is_wrong_with_each_run_is_told_at_once(folder, capsys):
    first, other = train(folder, "first"), train(folder, "other", data_seed=1, num_clients=3)
    again, stopped = train(folder, "again"), train(folder, "stopped", seed=1)
    (folder / "stopped/summary.json").unlink()
    file = folder / "file"
    file.touch()
    told = mistakes_of(
        capsys, first, str(folder / "a"), other, str(folder / "b"), again, stopped, f"--out={file}"
    )
    assert told == [
        f"no run in {folder / 'a'}: no config.json, no checkpoint",
        f"no run in {folder / 'b'}: no config.json, no checkpoint",
        f"no finished run in {stopped}: no summary.json",
        f"{other} is on other data than {first}: data_seed 1 and 0, num_clients 3 and 4: expected runs on "
        "the same data, with one data_seed and partition",
        f"{again} and {first} are of one method, settings and seed: expected each once",
        f"the folder {file} cannot be written to: it is a file",
    ]


def test_numbers_that_cannot_be_are_told_at_once(capsys):
    assert mistakes_of(capsys, "RUN", "--part=tail", "--epochs=1,-1", "--rate=0", "--clients=0") == [
        "--part: expected one of head, body, full, got 'tail'",
        "--epochs: expected integers of at least 0 with commas between, got '-1'",
        "--rate: expected numbers greater than 0 with commas between, got '0'",
        "--clients: expected an integer of at least 1, got '0'",
    ]
    assert mistakes_of(capsys, "--rate=0") == [
        "--rate: expected numbers greater than 0 with commas between, got '0'",
        "the following arguments are required: RUN",
    ]


def test_places_that_are_lost_are_told_of_each_run(folder, capsys, monkeypatch):
    """But not the nets that they began with, which nobody needs."""
    net = run(Config(**SMALL)).extractor
    monkeypatch.chdir(folder)
    runs = []
    for seed, name in enumerate(("one", "two")):
        torch.save(net.state_dict(), f"{name}.pt")
        (folder / f"data-{name}").mkdir()
        options = {"init_checkpoint": f"{name}.pt", "data_dir": f"data-{name}"}
        runs.append(train(folder, name, seed=seed, **options))
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    lost = (
        "--data-dir: no such folder: data-{}, relative to where the run began; start this there, or, if "
        "the folder was moved, put a link to it in its place"
    )
    assert "; ".join(mistakes_of(capsys, *runs)) == "; ".join(lost.format(name) for name in ("one", "two"))


def test_runs_on_the_same_data_may_have_read_them_in_two_places(folder, capsys):
    """What a checkpoint knows of them decides; without one the places do."""
    runs = []
    for seed, place in enumerate(("old", "new")):
        (folder / place).mkdir()
        runs.append(train(folder, f"run-{place}", seed=seed, data_dir=folder / place))
    first, other = runs
    out = f"--out={folder / 'out'}"
    assert cli.main(["personalise", *runs, "--epochs=0", "--clients=1", out]) == 0
    shutil.rmtree(next((folder / "run-new").glob("checkpoint-*")))
    (said,) = mistakes_of(capsys, *runs, out)
    assert said.startswith(f"{other} is on other data than {first}: data_dir {folder / 'new'} and ")
