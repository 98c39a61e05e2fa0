"""Comparing: the table's arithmetic, runs in their own processes, and runs that fail."""

import csv
import json
import logging
import math
import multiprocessing
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_data_image_folder import write_tree
from tiny_federation import tiny_config, tiny_data, tiny_model

from fedss_kernels.federated import CheckpointError, Config, ConfigError, cli, files, run
from fedss_kernels.federated.algorithms import METHODS
from fedss_kernels.federated.comparisons import compare as of_comparison
from fedss_kernels.federated.comparisons import jobs, rates, standing
from fedss_kernels.federated.comparisons.compare import compare, report_again
from fedss_kernels.federated.comparisons.table import cells, header, tabulate, write_tables
from fedss_kernels.federated.config import SharedConfig
from fedss_kernels.federated.data.holdout import held_out
from fedss_kernels.federated.files import checkpoint
from fedss_kernels.federated.loading import load_data
from fedss_kernels.federated.plan import LISTS, PRESETS, Case, Plan, read_preset, with_defaults
from fedss_kernels.federated.reports import plots
from fedss_kernels.federated.reports.mean_sd import mean_sd
from fedss_kernels.federated.reports.reported_run import Run
from fedss_kernels.federated.run_loop import Stopped

SMALL = {
    "glyph_classes": 12,
    "glyph_writers": 4,
    "cohort": 2,
    "rounds": 2,
    "num_negatives": 3,
    "embedding_dim": 8,
}


def play(method: str, task: str = "classification", **figures) -> Run:
    result = run(tiny_config(method=method), data=tiny_data(task), model=tiny_model())
    measured = {name: figures.pop(name) for name in result.summary.measured if name in figures}
    summary = replace(result.summary, measured=result.summary.measured | measured, **figures)
    return Run(result.config, result.history, summary)


def test_a_line_is_the_mean_and_the_sample_deviation_over_seeds():
    runs = [
        play("fedss", top1=0.5, map_at_10=0.2, seconds=10.0),
        play("fedss", top1=0.7, map_at_10=0.2, seconds=20.0),
    ]
    (line,) = tabulate(runs)
    # Two values: the sample deviation is half their difference times sqrt(2).
    assert line.measured["top1"] == pytest.approx((0.6, 0.1 * 2**0.5))
    assert (*line.measured["map_at_10"], line.seeds, line.seconds) == (0.2, 0.0, 2, 15.0)
    assert cells([line])[0][:4] == ["FedSS", "0.2", "60.0 ± 14.1", "20.0 ± 0.0"]
    assert header([line])[2:4] == ["top-1 (%)", "MAP@10 (%)"]
    of_retrieval = tabulate([play("fedss", "retrieval", recall_at_1=0.3)])
    assert header(of_retrieval)[2:4] == ["recall@1 (%)", "MAP@10 (%)"]
    assert cells(of_retrieval)[0][2] == "30.0" and of_retrieval[0].measured["top1"] == (None, None)


def test_a_line_counts_bytes_per_client_round_and_savings():
    one = play("pos_only", top1=0.5)  # 3 rounds of 3 clients
    (line,) = tabulate([one])
    held = one.summary.mean_class_set
    assert line.bytes_per_client_round == pytest.approx(148 * 8 + held * (4 * 8 + 8))
    assert line.bytes_total == pytest.approx(9 * line.bytes_per_client_round)
    assert line.class_saving == pytest.approx(1 - held * 40 / (7 * 32))
    assert line.saving == pytest.approx(1 - (148 * 8 + held * 40) / (148 * 8 + 7 * 32))
    assert line.class_set_share == pytest.approx(held / 7)
    assert line.measured["top1"] == (0.5, None) and cells([line])[0][2] == "50.0"


def test_the_tables_say_the_same(tmp_path):
    table = tabulate([play("fedss"), play("full_softmax")])
    write_tables(tmp_path, table)
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["fedss", "full_softmax"]
    assert [float(row["top1"]) for row in rows] == [line.measured["top1"][0] for line in table]
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4 and len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert lines[3].startswith("| FullSoftmax |") and "| 7.0 (100.0%) |" in lines[3]
    assert lines[3].count("| 0.0% |") == 2  # nothing saved against itself


def test_nothing_is_said_of_what_classes_cost_where_there_are_no_class_rows():
    of_classes = ["|S_k| (of C)", "MB for classes", "saved of these"]
    without, beside = tabulate([play("simclr")]), tabulate([play("simclr"), play("fedss")])
    assert not {*of_classes} & {*header(without)} and len(cells(without)[0]) == len(header(without))
    assert {*of_classes} < {*header(beside)}
    first, second = (dict(zip(header(beside), row, strict=True)) for row in cells(beside))
    assert [first[name] for name in of_classes] == ["–"] * 3
    assert not [name for name in of_classes if second[name] == "–"]


def test_numpys_numbers_are_saved_as_pythons(tmp_path):
    plan = Plan(Config(), ["fedss"], np.arange(2), [np.int64(3)], [np.float32(0.5)])
    plan.save(tmp_path)
    assert Plan.read(tmp_path) == plan and plan.seeds == [0, 1] and type(plan.rates[0]) is float
    with pytest.raises(ConfigError, match="seeds: expected numbers, got True"):
        Plan(Config(), ["fedss"], [np.True_])


@pytest.mark.parametrize(
    "methods, seeds, message",
    [
        (["fedss", "fedsss"], [0], "methods: expected some of .*, got 'fedsss'.*did you mean fedss"),
        ([], [0], "methods: expected at least one, each once, got none"),
        (["fedss"], [1, 1], "seeds: expected at least one, each once, got 1, 1"),
        (["fedss"], [[1]], r"seeds: expected numbers, got \[1\]"),
        ([1], [0], "methods: expected some of .*, got 1"),
        (
            ["fedss", "fedsss", "none"],
            [1, 1, 2],
            r"methods: .* got 'fedsss'.*; methods: .* got 'none' \(--plugin .*\); "
            "seeds: .* once, got 1, 1, 2",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused(methods, seeds, message):
    with pytest.raises(ConfigError, match=message):
        Plan(Config(), methods, seeds)


@pytest.mark.exhaustive
def test_a_run_that_fails_leaves_the_others(tmp_path):
    """An earlier comparison is replaced, but one of its folders now holds something that is nobody's run."""
    out = tmp_path / "out"
    (out / "pos_only-seed0").mkdir(parents=True)
    (out / "pos_only-seed0" / "thesis.txt").write_text("mine")
    config = Config(**SMALL, cache_dir=tmp_path / "cache", overwrite=True)
    (out / "comparison.json").write_text(json.dumps({"config": config.to_dict()}))
    seen: dict[int, list] = {0: [], 1: []}
    comparison = compare(
        Plan(config, ["fedss", "pos_only"], [0]),
        out,
        jobs=2,
        on_round=lambda job, m: seen[job].append(m and m.round),
    )
    assert seen == {0: [None, 1, 2], 1: [None]}
    (failure,) = comparison.failed
    assert failure.startswith("PosOnly, seed 0 failed: FileExistsError: the folder ")
    assert [line.method for line in comparison.table] == ["fedss"]
    assert (out / "pos_only-seed0" / "thesis.txt").read_text() == "mine"
    for name in ("table.csv", "table.md", "report.html", "accuracy_by_round.png", "fedss-seed0/report.html"):
        assert (out / name).stat().st_size > 0
    assert "PosOnly, seed 0 failed" in (out / "report.html").read_text(encoding="utf-8")
    # A process of its own gives the bits of this one.
    alone = run(replace(config, seed=0))
    assert comparison.runs[0].summary == replace(alone.summary, seconds=comparison.runs[0].summary.seconds)


@pytest.mark.exhaustive
def test_a_run_that_is_killed_is_told(tmp_path):
    def kill(job, metrics):
        if metrics:
            (child,) = multiprocessing.active_children()
            os.kill(child.pid, signal.SIGKILL)

    config = Config(**(SMALL | {"rounds": 10**6}), cache_dir=tmp_path / "cache")
    comparison = compare(Plan(config, ["fedss"], [0]), tmp_path / "out", on_round=kill)
    assert comparison.table == [] and comparison.failed == [
        "FedSS, seed 0 failed: its process was ended by signal 9 (SIGKILL: out of memory, or killed by hand)"
    ]


class Stop(Exception):
    pass


@pytest.mark.exhaustive
def test_a_comparison_that_is_stopped_goes_on_and_plays_nothing_twice(tmp_path):
    """Stopped while the second of three runs is between checkpoints; the third had not begun."""
    config = Config(**(SMALL | {"rounds": 6}), checkpoint_every=2, cache_dir=tmp_path / "cache")
    methods, out = ["fedss", "pos_only", "neg_only"], tmp_path / "stopped"
    whole = [run(replace(config, method=method, seed=0)) for method in methods]

    def stop(job, metrics):
        if job == 1 and metrics and metrics.round == 3:
            raise Stop

    with pytest.raises(Stop):
        compare(Plan(config, methods, [0]), out, on_round=stop)
    played: list[tuple[int, int]] = []
    resumed = compare(
        Plan(config, methods, [0]),
        out,
        resume=True,
        on_round=lambda job, m: m and played.append((job, m.round)),
    )
    first = {job: min(round for j, round in played if j == job) for job, _ in played}
    assert set(first) == {1, 2} and first[1] in (3, 5) and first[2] == 1
    for a, b in zip(resumed.runs, whole, strict=True):
        assert replace(a.summary, seconds=0) == replace(b.summary, seconds=0)
    assert not resumed.failed and len(resumed.table) == 3

    with pytest.raises(CheckpointError, match=r"is another: rounds: 6 there, 7 here; seeds: \[0\] there"):
        compare(Plan(replace(config, rounds=7), methods, [1]), out, resume=True)
    with pytest.raises(CheckpointError, match="no comparison to go on with in"):
        compare(Plan(config, methods, [0]), tmp_path / "nowhere", resume=True)


def test_cases_are_methods_and_where_they_ask_for_negatives_counts():
    plan = Plan(Config(), ["fedss", "full_softmax"], [0, 1], counts=[5, 9], rates=[0.1])
    assert plan.cases == [Case("fedss", 5), Case("fedss", 9), Case("full_softmax", None)]
    assert [case.name for case in plan.cases] == ["fedss-m5", "fedss-m9", "full_softmax"]
    rates = {Case("fedss", 9): 0.3}
    runs = plan.runs(Path("out"), rates)
    assert [c.out.name for c in runs[:3]] == ["fedss-m5-seed0", "fedss-m9-seed0", "full_softmax-seed0"]
    assert [c.client_lr for c in runs] == [0.05, 0.3, 0.05] * 2
    assert [c.seed for c in runs] == [0] * 3 + [1] * 3
    trials = plan.trials(Path("out"))
    assert [c.out.name for c in trials] == ["fedss-m5-lr0.1", "fedss-m9-lr0.1", "full_softmax-lr0.1"]
    assert all((c.holdout, c.client_lr, c.seed) == (0.1, 0.1, 0) for c in trials)
    one = Plan(Config(num_negatives=7), ["fedss"], [0])
    assert one.cases == [Case("fedss", None)] and one.runs(Path("out"), {})[0].num_negatives == 7


@pytest.mark.exhaustive
def test_each_case_has_the_best_of_the_rates(tmp_path):
    """One rate trains, the other is so small that nothing moves; resumed, no trial is played again."""
    options = SMALL | {"rounds": 40, "glyph_writers": 12, "warmup_rounds": 0}
    config = Config(**options, cache_dir=tmp_path / "cache")
    plan = Plan(config, ["fedss"], [0], counts=[5], rates=[1e-12, 0.1])
    trials = []
    comparison = compare(
        plan, tmp_path / "out", jobs=2, on_trial=lambda job, m: m and m.round == 1 and trials.append(job)
    )
    assert sorted(trials) == [0, 1] and not comparison.failed
    with (tmp_path / "out" / "rates.csv").open(newline="") as file:
        tried = list(csv.DictReader(file))
    accuracy = {(line["case"], float(line["client_lr"])): float(line["accuracy"]) for line in tried}
    lines = {Case(line.method, line.num_negatives): line for line in comparison.table}
    assert list(lines) == plan.cases
    for case, line in lines.items():
        best = max(plan.rates, key=lambda rate, case=case: accuracy[case.name, rate])
        assert line.client_lr == best
    assert 0.1 in {line.client_lr for line in lines.values()}
    assert (tmp_path / "out" / "rates" / "fedss-lr0.1" / "summary.json").stat().st_size > 0
    assert [run.config.num_negatives for run in comparison.runs] == [5]
    again = compare(plan, tmp_path / "out", resume=True, on_trial=lambda job, m: m and trials.append(job))
    assert len(trials) == 2 and again.table == comparison.table


def test_no_rate_is_chosen_while_a_trial_is_missing(tmp_path, monkeypatch):
    """With it another rate might be the best, and runs that are done would stand with the first."""
    played = []

    def fail_one(configs, *rest):
        played.extend(config.out.name for config in configs)
        return {0: jobs.Failure("OSError: no space left")}

    monkeypatch.setattr(jobs, "run_all", fail_one)
    plan = Plan(Config(**SMALL, cache_dir=tmp_path / "cache"), ["pos_only"], [0], rates=[0.1])
    comparison = compare(plan, tmp_path / "out")
    assert comparison.failed == [
        "a trial of pos_only-lr0.1 failed: OSError: no space left; PosOnly is not compared without it: go on "
        "with --resume"
    ]
    assert comparison.table == comparison.runs == [] and played == ["pos_only-lr0.1"]


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs one after the other, here: a process of its own for each takes seconds."""

    def run_here(configs, number, on_round, resume, stop):
        errors = {}
        for job, config in enumerate(configs):
            if not (resume and jobs._is_done(config)):
                sent = []
                jobs._child(SimpleNamespace(send=sent.append, poll=stop), config, resume)
                if sent and isinstance(sent[-1], jobs.Failure):
                    errors[job] = sent[-1]
        return errors

    monkeypatch.setattr(logging.getLogger(files.__name__), "handlers", [])  # it gets others there
    monkeypatch.setattr(jobs, "run_all", run_here)
    monkeypatch.setattr(jobs, "_end_with_parent", lambda: None)
    monkeypatch.setattr(jobs, "ignore", lambda: None)  # of signals
    monkeypatch.setattr(jobs, "write_run_report", lambda folder, run: (folder / "report.html").touch())


@pytest.mark.exhaustive
def test_a_rate_that_is_no_clear_choice_is_said(tmp_path, in_this_process, monkeypatch):
    config = Config(**SMALL, cache_dir=tmp_path / "cache")
    plan = Plan(config, ["pos_only"], [0], rates=[0.2, 0.05, 0.1])
    merits = {0.05: 0.5, 0.1: 0.5, 0.2: 0.2}
    monkeypatch.setattr(rates, "_merit", lambda run: merits[run.config.client_lr])
    monkeypatch.setattr(rates, "FEW", 0)
    out = tmp_path / "out"
    comparison = compare(plan, out)
    (note,) = comparison.notes
    assert re.fullmatch(
        r"PosOnly: rates 0.05 and 0.1 came out equal, top-1 \(%\) [\d.]+ on \d+ images of clients who do not "
        "train: the smallest is taken",
        note,
    )
    assert report_again(out) == [note]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert note in page
    assert [line.client_lr for line in comparison.table] == [0.05]
    monkeypatch.setattr(of_comparison, "_write_report", lambda *what: None)
    for best, words in ((0.2, "largest"), (0.05, "smallest"), (0.1, None)):
        merits.update(dict.fromkeys(merits, 0.1) | {best: 0.6})
        said = f"PosOnly: the best rate, {best:g}, is the {words} that was tried"
        assert report_again(out) == ([said] if words else [])


@pytest.mark.exhaustive
def test_a_report_of_a_comparison_whose_trials_are_not_done_says_which(tmp_path, in_this_process):
    """And chooses no rate: of those that are there yet."""
    config, out = Config(**SMALL, cache_dir=tmp_path / "cache"), tmp_path / "out"
    plan = Plan(config, ["pos_only"], [0], rates=[0.05, 0.1])
    compare(plan, out)
    shutil.rmtree(out / "rates" / "pos_only-lr0.1")
    lost = f"PosOnly, rate 0.1 has no result: not begun: there is no {out / 'rates' / 'pos_only-lr0.1'}"
    assert report_again(out) == [lost]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "method, options",
    [("fedss", {}), ("fedss", {"personalise_epochs": 1}), ("local_only", {})],
    ids=["top1", "personalised", "own"],
)
def test_a_choice_says_on_how_many_images(method, options, tmp_path, in_this_process, monkeypatch):
    """Those that the headline is measured on: of all who are held out, or those each is tested on itself."""
    data = {"glyph_writers": 12, "partition": "dirichlet", "num_clients": 12}
    config = Config(**SMALL | data | options, cache_dir=tmp_path / "cache")
    plan = Plan(config, [method], [0], rates=[0.05, 0.1])
    (trial, _) = plan.trials(tmp_path)
    held = load_data(trial)
    own = [tested for _, tested in held.newcomers] or held.test_clients
    count = sum(map(len, own)) if options or method == "local_only" else len(held.test_images)
    assert 1 < count < rates.FEW and sum(map(len, own)) < len(held.test_images)
    label, merits = METHODS[method].label, {0.05: 0.5, 0.1: 0.5}
    monkeypatch.setattr(rates, "_merit", lambda run: merits[run.config.client_lr])
    out = tmp_path / "out"
    (note,) = compare(plan, out).notes
    assert re.search(rf"came out equal, .* [\d.]+ on {count} images of clients who do not train: ", note)
    merits[0.1] = 0.6
    (note,) = report_again(out)
    words = f"{label}: the best rate, 0.1, was found on {count} images of clients who do not train, of which"
    assert note == f"{words} one is {100 / count:.1f}%"
    monkeypatch.setattr(rates, "FEW", count)
    assert report_again(out) == []


def test_a_trial_is_cut_to_the_clients_that_it_has(tmp_path, caplog):
    config = Config(cohort=12, min_clients=12, min_holders=11)
    planned = Plan(config, ["fedss", "fedbabu"], [0], rates=[0.1, 0.2]).trials(tmp_path)
    for clients, left in ((12, (12, 12, 11)), (11, (11, 11, 11)), (3, (3, 3, 3))):
        trials = [rates.fitting(trial, clients) for trial in planned]
        assert {(trial.cohort, trial.min_clients, trial.min_holders) for trial in trials} == {left}
        rates.say_fitted(planned, trials)
    have = "trials of a rate have {} clients, as a tenth is held out: cohort is {}, not 12, min_clients is {}"
    assert [record.getMessage() for record in caplog.records] == [
        f"{have.format(11, 11, 11)}, not 12",
        f"{have.format(3, 3, 3)}, not 12, min_holders is 3, not 11",
    ]
    left = Config(data="image_folder", data_dir=tmp_path)  # is chosen when the trial's clients are known
    assert left.cohort is None and rates.fitting(left, 3) == left


@pytest.mark.exhaustive
def test_trials_have_no_more_clients_in_a_round_than_are_not_held_out(
    tmp_path, in_this_process, monkeypatch, caplog
):
    """Of 12 clients 11, of a method whose clients never meet the other one. The same when it is resumed."""
    data = {"glyph_writers": 12, "partition": "dirichlet", "num_clients": 12}
    sizes = {"cohort": 12, "min_clients": 12, "min_holders": 2}
    config = Config(**SMALL | data | sizes, cache_dir=tmp_path / "cache")
    plan, out = Plan(config, ["fedss", "local_only"], [0], rates=[0.1]), tmp_path / "out"
    first = compare(plan, out)
    assert not first.failed and len(first.table) == 2
    assert [run.config.cohort for run in first.runs] == [12, 12]
    trials = [Config.load(out / "rates" / f"{case.name}-lr0.1" / "config.json") for case in plan.cases]
    found = [(trial.cohort, trial.min_clients, trial.min_holders) for trial in trials]
    assert found == [(11, 11, 2), (1, 1, 2)]
    words = "trials of a rate have 11 clients, as a tenth is held out: cohort is 11, not 12, "
    words += "min_clients is 11, not 12"

    def said():
        lines = [record.getMessage() for record in caplog.records if record.name == rates.__name__]
        caplog.clear()
        return lines

    assert said() == [words]
    assert report_again(out) == first.notes
    shutil.rmtree(out / "rates" / "local_only-lr0.1")
    again = compare(plan, out, resume=True)
    assert not again.failed and said() == [words] and len(again.table) == 2


def test_a_trial_needs_somebody_to_be_held_out(tmp_path):
    config = Config(**SMALL | {"glyph_writers": 1, "cohort": 1}, cache_dir=tmp_path / "cache")
    with pytest.raises(ConfigError, match="^rates: expected at least 2 clients, one of them held out"):
        compare(Plan(config, ["fedss"], [0], rates=[0.1]), tmp_path / "out")


PRIVATE = {"noise_multiplier": 1.0, "clip_norm": 1.0}


def test_options_clash_with_the_methods_that_are_compared_alone(tmp_path):
    """Those of all are a Config's, whose method is as a rule none of them."""
    shared = SharedConfig(**PRIVATE)
    plan = Plan(shared, ["fedbabu", "full_softmax"], [0])
    assert [run.noise_multiplier for run in plan.runs(tmp_path, {})] == [1.0, 1.0]
    plan.save(tmp_path)
    assert Plan.read(tmp_path) == plan
    with pytest.raises(ConfigError) as wrong:
        Plan(shared, ["fedbabu", "pos_only", "local_only"], [0])
    words = [f"{option} {words.split(', ')[0]}" for option, words in wrong.value.mistakes]
    assert words == [f"noise_multiplier expected 0 with {name}" for name in ("pos_only", "local_only")]
    own = {"private": {"method": "fedbabu", "clip_norm": 1.0}}
    assert Plan(SharedConfig(noise_multiplier=1.0), ["private"], [0], own=own)
    with pytest.raises(ConfigError, match="^clip_norm: expected a number with noise, which .* got none$"):
        Plan(SharedConfig(noise_multiplier=1.0), ["private", "full_softmax"], [0], own=own)


@pytest.mark.exhaustive
def test_a_comparison_whose_options_clash_with_another_method_is_replaced_and_resumed(
    tmp_path, in_this_process
):
    config = SharedConfig(**SMALL | PRIVATE, cache_dir=tmp_path / "cache", overwrite=True)
    plan, out = Plan(config, ["full_softmax"], [0]), tmp_path / "out"
    for resume in (False, False, True):
        assert not compare(plan, out, resume=resume).failed


def test_every_case_is_looked_at_beside_the_data(tmp_path):
    """layerwise has a stage for each block at most, and the net's blocks are counted with the data there."""
    net = {"model": "isotropic:depth=2", "embedding_dim": 32}
    config = Config(**SMALL | net, stages=7, cache_dir=tmp_path / "cache")
    with pytest.raises(ConfigError, match="^stages: "):
        compare(Plan(config, ["simclr", "layerwise"], [0]), tmp_path / "out")
    config = Config(**SMALL | {"cohort": 3}, holdout=0.3, cache_dir=tmp_path / "cache")
    with pytest.raises(ConfigError, match="^cohort: expected at most 1, the clients there are, got 3"):
        compare(Plan(config, ["fedss", "local_only"], [0]), tmp_path / "out")


@pytest.mark.exhaustive
def test_a_comparison_goes_on_with_the_data_and_the_methods_of_its_runs(
    tmp_path, in_this_process, monkeypatch, capsys
):
    config, out = Config(**SMALL, cache_dir=tmp_path / "cache"), tmp_path / "out"
    plan = Plan(config, ["pos_only"], [0], rates=[0.1])
    compare(plan, out)
    data = load_data(config)
    other = replace(METHODS["pos_only"], penalty_gradient=lambda now, received: now - received)
    for words, change in {
        "the training images": lambda patch: patch.setattr(
            standing, "load_data", lambda config: replace(data, images=255 - data.images)
        ),
        "what the method computes": lambda patch: patch.setitem(METHODS, "pos_only", other),
    }.items():
        with monkeypatch.context() as patch:
            change(patch)
            found = f"the run in .*pos_only-.* is of other data, another method or another net .*: {words}"
            with pytest.raises(CheckpointError, match=found):
                compare(plan, out, resume=True)
            capsys.readouterr()
            assert cli.main(["compare", f"--resume={out}"]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert re.match(f"fedss compare: {found}", line)
    assert not compare(plan, out, resume=True).failed


@pytest.mark.exhaustive
def test_a_comparison_does_not_go_on_with_a_schedule_that_was_edited(tmp_path, in_this_process, monkeypatch):
    net = {"model": "isotropic:depth=2", "embedding_dim": 32}
    config, out = Config(**SMALL | net | {"rounds": 4}, cache_dir=tmp_path / "cache"), tmp_path / "out"
    plan, layerwise = Plan(config, ["layerwise"], [0]), METHODS["layerwise"]
    compare(plan, out)

    def by_round(config, num_blocks):
        assert num_blocks == 4  # the stem, two blocks and the head
        stages = layerwise.by_round(config, num_blocks)
        return SimpleNamespace(stage=lambda r: r, whole=stages.whole, parts=stages.parts)

    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "layerwise", replace(layerwise, by_round=by_round))
        with pytest.raises(CheckpointError, match="not as it was: what the method computes$"):
            compare(plan, out, resume=True)
    assert not compare(plan, out, resume=True).failed


@pytest.mark.exhaustive
def test_a_comparison_says_where_runs_that_stand_were_made_with_other_versions(
    tmp_path, in_this_process, monkeypatch, capsys
):
    config, out = Config(**SMALL, cache_dir=tmp_path / "cache"), tmp_path / "out"
    compare(Plan(config, ["pos_only"], [0]), out)
    assert cli.main(["compare", f"--resume={out}"]) == 0
    assert "made with" not in capsys.readouterr().err
    versions = checkpoint.versions()
    monkeypatch.setattr(checkpoint, "versions", lambda: versions | {"torch": "9.9", "another": "1"})
    assert cli.main(["compare", f"--resume={out}"]) == 0
    words = f"of the runs that stand some were made with torch {versions['torch']}: bits of the others"
    assert f"fedss compare: {words} may differ\n" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_a_comparison_goes_on_with_the_net_that_its_runs_began_with(tmp_path, in_this_process):
    """Whose file has the same name, and another net by now."""
    file = tmp_path / "net.pt"
    first, other = (run(Config(**SMALL | {"seed": seed})).extractor for seed in (0, 1))
    torch.save(first.state_dict(), file)
    config = Config(**SMALL, cache_dir=tmp_path / "cache", init_checkpoint=file)
    plan, out = Plan(config, ["pos_only"], [0]), tmp_path / "out"
    compare(plan, out)
    assert not compare(plan, out, resume=True).failed
    torch.save(other.state_dict(), file)
    with pytest.raises(CheckpointError, match="another net .*: the net's trained parameters"):
        compare(plan, out, resume=True)


@pytest.mark.exhaustive
def test_a_rate_that_does_not_train_is_the_worst_and_the_rest_goes_on(tmp_path, in_this_process):
    """Resumed too, where it fails again; a method that trains at no rate is left out, with the reason."""
    config = Config(**SMALL, warmup_rounds=0, cache_dir=tmp_path / "cache")
    plan, out = Plan(config, ["fedss", "pos_only"], [0], rates=[0.1, 1e6]), tmp_path / "out"
    for resume in (False, True):
        comparison = compare(plan, out, resume=resume)
        assert comparison.failed == []
        chosen = [(line.method, line.client_lr) for line in comparison.table]
        assert chosen == [("fedss", 0.1), ("pos_only", 0.1)]
        for label, note in zip(("FedSS", "PosOnly"), comparison.notes, strict=True):
            assert note.startswith(f"{label}, rate 1e+06 is the worst: TooFewClients: round 1: of ")
            assert note.endswith("left out: norm over --max-norm: is --client-lr or --scale too high?")
    with (out / "rates.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["failed"][:13] for line in lines] == ["", "TooFewClients"] * 2
    assert [bool(line["accuracy"]) for line in lines] == [True, False] * 2
    assert "rate 1e+06 is the worst" in (out / "report.html").read_text(encoding="utf-8")
    assert report_again(out) == comparison.notes
    assert comparison.notes[0].replace(">", "&gt;") in (out / "report.html").read_text(encoding="utf-8")

    nothing = compare(replace(plan, methods=["fedss"], rates=[1e6, 1e7]), tmp_path / "nothing")
    (failure,) = nothing.failed
    assert failure.startswith("FedSS failed, as it trains at none of the rates 1e+06, 1e+07: TooFewClients: ")
    assert nothing.table == nothing.runs == nothing.notes == []
    with pytest.raises(ValueError, match=f"no run of .* is done: {re.escape(failure)}$"):
        report_again(tmp_path / "nothing")


def test_a_report_that_is_made_again_says_why_a_run_failed(tmp_path, in_this_process):
    """Until it goes on: what is said then is how far it is."""
    config = Config(**SMALL, warmup_rounds=0, client_lr=1e6, cache_dir=tmp_path / "cache")
    plan, out = Plan(config, ["fedss"], [0]), tmp_path / "out"
    (failure,) = compare(plan, out).failed
    with pytest.raises(ValueError) as said:
        report_again(out)
    assert str(said.value).endswith(failure.replace("failed", "is left out"))
    config = replace(config, out=out / "fedss-seed0", client_lr=0.1, overwrite=True)
    with pytest.raises(Stopped):
        run(config, stop=lambda: True)
    replace(plan, config=replace(plan.config, client_lr=0.1)).save(out)
    with pytest.raises(ValueError, match="seed 0 is left out: 1 round is done, of a comparison of 2"):
        report_again(out)


@pytest.mark.exhaustive
def test_runs_that_stay_of_a_comparison_that_is_replaced_are_told(tmp_path, in_this_process, caplog):
    config = Config(**SMALL | {"rounds": 1}, cache_dir=tmp_path / "cache", overwrite=True)
    out = tmp_path / "out"
    compare(Plan(config, ["pos_only"], [0, 1]), out)
    compare(Plan(config, ["pos_only"], [0]), out)
    words = f"runs of the comparison that was there stay, and count in no table: {out / 'pos_only-seed1'}"
    assert [record.getMessage() for record in caplog.records if record.name == standing.__name__] == [words]
    assert (out / "pos_only-seed1" / "summary.json").exists()


@pytest.mark.exhaustive
def test_a_run_that_was_made_anew_with_other_options_is_in_no_mean(tmp_path, in_this_process):
    """In a comparison's folder, whether it goes on or its report is made again; a trial likewise."""
    config, out = Config(**SMALL, cache_dir=tmp_path / "cache"), tmp_path / "out"
    plan = Plan(config, ["pos_only"], [0, 1], rates=[0.1])
    compare(plan, out)
    folder = out / "pos_only-seed1"
    run(replace(plan.runs(out, {})[1], client_lr=0.1, batch_size=3, overwrite=True))
    words = f"{folder} holds a run that is not of this comparison (batch_size: 3 there, 10 here): remove it"
    comparison = compare(plan, out, resume=True)
    assert [line.seeds for line in comparison.table] == [1]
    assert comparison.failed == [f"PosOnly, seed 1 failed: {words}, and go on with --resume"]
    assert report_again(out) == [f"PosOnly, seed 1 is left out: {words}, and go on with --resume"]
    shutil.rmtree(folder)
    assert [line.seeds for line in compare(plan, out, resume=True).table] == [2]

    run(replace(plan.trials(out / "rates")[0], batch_size=3, overwrite=True))
    (failure,) = compare(plan, out, resume=True).failed
    assert "pos_only-lr0.1 holds a run that is not of this comparison (batch_size: 3 there" in failure


@pytest.mark.exhaustive
def test_the_numbers_that_are_chosen_for_the_data_are_those_of_every_run(tmp_path, in_this_process):
    """Of photos in folders: a run that was made anew with a cohort of its own is not of the comparison."""
    photos = write_tree(tmp_path / "photos", {"ant": 10, "bee": 10})
    config = Config(data="image_folder", data_dir=photos, cache_dir=tmp_path / "cache", model="conv4_rgb")
    config = replace(config, rounds=1, image_size=36, crop_size=32, embedding_dim=8)
    plan, out = Plan(config, ["pos_only"], [0]), tmp_path / "out"
    (made,) = compare(plan, out).runs
    assert plan.config.cohort is None and made.config.cohort > 1
    assert not compare(plan, out, resume=True).failed
    run(replace(made.config, cohort=1, min_clients=1, out=out / "pos_only-seed0", overwrite=True))
    (failure,) = compare(plan, out, resume=True).failed
    assert f"cohort: 1 there, {made.config.cohort} here" in failure


@pytest.mark.exhaustive
def test_the_table_has_the_plans_order_whichever_run_failed(tmp_path, in_this_process, monkeypatch):
    """FedSS' first seed is lost: no reason to go to the table's end."""
    here = jobs.run_all

    def kill_first(configs, *rest):
        errors = here(configs[1:], *rest)
        return {0: jobs.Failure("killed")} | {job + 1: failure for job, failure in errors.items()}

    config = Config(**SMALL, cache_dir=tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "run_all", kill_first)
        comparison = compare(Plan(config, ["fedss", "pos_only"], [0, 1]), tmp_path / "out")
    assert [(line.method, line.seeds) for line in comparison.table] == [("fedss", 1), ("pos_only", 2)]
    assert comparison.go_on, "it may not be killed the next time"
    report_again(tmp_path / "out")
    assert (tmp_path / "out" / "table.csv").read_text().splitlines()[1].startswith("fedss,")
    hopeless = compare(Plan(replace(config, client_lr=1e6, warmup_rounds=0), ["fedss"], [0]), tmp_path / "b")
    assert hopeless.failed and not hopeless.go_on


def test_what_is_to_be_said_of_a_folder_is_said_by_the_parent(tmp_path, in_this_process, monkeypatch, caplog):
    """A table that somebody saved from a spreadsheet, before the comparison went on."""
    config = Config(**SMALL, cache_dir=tmp_path / "cache", checkpoint_every=1, out=tmp_path / "run")
    with pytest.raises(Stopped):
        run(config, stop=lambda: True)
    (config.out / "metrics.csv").write_text("round;loss\n")
    receiver, sender = multiprocessing.Pipe(duplex=False)
    jobs._child(SimpleNamespace(send=sender.send, poll=lambda: False), config, True)
    caplog.clear()
    running = {receiver: (0, None)}
    while receiver.poll():
        jobs._receive(receiver, running, {}, lambda job, metrics: None)
    (said,) = [record.getMessage() for record in caplog.records if record.name == jobs.__name__]
    assert "run/metrics.csv was changed by another program" in said


@pytest.mark.exhaustive
def test_a_method_whose_trial_was_killed_waits_and_the_others_go_on(tmp_path, in_this_process, monkeypatch):
    here, played = jobs.run_all, []

    def kill_one(configs, *rest):
        played.append([config.out.name for config in configs])
        errors = here(configs, *rest)
        killed = played[-1].index("fedss-lr0.1") if "fedss-lr0.1" in played[-1] else None
        return errors | ({} if killed is None else {killed: jobs.Failure("killed")})

    monkeypatch.setattr(jobs, "run_all", kill_one)
    config = Config(**SMALL, cache_dir=tmp_path / "cache")
    plan, seen = Plan(config, ["fedss", "pos_only"], [0], rates=[0.1]), []
    comparison = compare(plan, tmp_path / "out", on_round=lambda job, metrics: seen.append(job))
    assert [line.method for line in comparison.table] == ["pos_only"]
    (failure,) = comparison.failed
    assert failure.startswith("a trial of fedss-lr0.1 failed: killed; FedSS is not compared without it")
    assert played == [["fedss-lr0.1", "pos_only-lr0.1"], ["pos_only-seed0"]]


@pytest.mark.exhaustive
def test_a_run_whose_model_is_not_finite_is_in_no_mean(tmp_path, in_this_process):
    """Of two seeds: in one an answer with a NaN counts; in the other all the rubbish has finite numbers."""
    config = Config(**SMALL, trust_updates=True, poison_rate=0.2, cache_dir=tmp_path / "cache")
    runs = {seed: run(replace(config, seed=seed)).summary for seed in range(8)}
    ruined = next(seed for seed, summary in runs.items() if summary.not_finite_since)
    sound = next(seed for seed, summary in runs.items() if not summary.not_finite_since)
    comparison = compare(Plan(config, ["fedss"], [sound, ruined]), tmp_path / "out")
    (line,) = comparison.table
    assert (line.measured["top1"], line.seeds) == ((runs[sound].top1, None), 1)
    (failure,) = comparison.failed
    since = runs[ruined].not_finite_since
    assert failure.startswith(f"FedSS, seed {ruined} failed: after round {since} the model has numbers that")


@pytest.mark.exhaustive
def test_answers_that_are_left_out_of_a_comparison_are_said(tmp_path, in_this_process):
    """With a bound on norms that some are over; not where rubbish is asked for."""
    config = Config(**(SMALL | {"cohort": 3, "rounds": 8}), warmup_rounds=0, cache_dir=tmp_path / "cache")
    config = replace(config, max_norm_ratio=1.0)  # whoever moves further than the median
    comparison = compare(Plan(config, ["fedss"], [0]), tmp_path / "out")
    rejected = comparison.runs[0].summary.rejected
    assert rejected > 0 and comparison.failed == []
    words = f"{rejected} of 24 clients' answers were left out: {rejected} norm over --max-norm or "
    words += "--max-norm-ratio: is --client-lr or --scale too high? if not, give larger bounds"
    assert comparison.notes == [f"FedSS, seed 0: {words}"]
    ledger = tmp_path / "out" / "fedss-seed0" / "ledger.csv"
    ledger.write_text(ledger.read_text().replace(",", ";"))  # as a spreadsheet may save it
    assert report_again(tmp_path / "out") == comparison.notes
    poisoned = Plan(replace(config, poison_rate=0.1), ["fedss"], [0])
    assert compare(poisoned, tmp_path / "other").notes == []


def test_a_deviation_of_what_is_not_finite_is_not():
    assert mean_sd([1.0, 3.0]) == (2.0, pytest.approx(2**0.5)) and mean_sd([1.0]) == (1.0, None)
    for bad in (math.nan, math.inf):
        mean, sd = mean_sd([1.0, bad, -bad])
        assert math.isnan(mean) and math.isnan(sd)


def test_a_job_that_dies_in_the_middle_of_a_message_is_one_jobs_failure():
    receiver, sender = multiprocessing.Pipe(duplex=False)
    os.write(sender.fileno(), (100).to_bytes(4, "big") + b"half")  # its length, and 4 bytes of 100
    sender.close()
    process = SimpleNamespace(join=lambda: None, exitcode=-9)
    running, errors = {receiver: (3, process)}, {}
    jobs._receive(receiver, running, errors, lambda job, metrics: None)
    words = "its process was ended by signal 9 (SIGKILL: out of memory, or killed by hand)"
    assert running == {} and errors == {3: jobs.Failure(words)}


def test_a_job_that_cannot_be_started_and_one_that_leaves_nothing_leave_the_others(tmp_path, monkeypatch):
    class Process:
        def __init__(self, target, args, daemon):
            self.sender, self.number, self.exitcode = args[0], args[1].seed, 0

        def start(self):
            if self.number == 1:
                raise BlockingIOError(11, "Resource temporarily unavailable")

        def join(self):
            pass

    monkeypatch.setattr(multiprocessing.get_context("spawn"), "Process", Process, raising=False)
    configs = [Config(seed=seed, out=tmp_path / str(seed)) for seed in (0, 1, 2)]
    found, failures = jobs.play_all(configs, 2, lambda job, metrics: None, False)
    assert found == {} and list(failures) == [0, 1, 2]
    assert failures[1].words == "its process could not be started: Resource temporarily unavailable"
    for job in (0, 2):
        assert failures[job].words == f"not begun: there is no {tmp_path / str(job)}"


OWN = {
    "fedss": {"rounds": 4},
    "FedSS, eager": {"method": "fedss", "client_lr": 0.3, "rounds": 5},
}


def test_a_method_may_be_there_twice_with_options_of_its_own(tmp_path):
    plan = Plan(Config(cohort=3), ["fedss", "FedSS, eager", "pos_only"], [0, 1], own=OWN)
    assert plan.cases == [
        Case("fedss", None),
        Case("fedss", None, "FedSS, eager"),
        Case("pos_only", None),
    ]
    first = plan.runs(Path("out"), {})[:3]
    assert [run.rounds for run in first] == [4, 5, Config().rounds]
    assert [run.client_lr for run in first] == [Config().client_lr, 0.3, Config().client_lr]
    assert [run.label for run in first] == [None, "FedSS, eager", None]
    assert [run.out.name for run in first] == ["fedss-seed0", "fedss-eager-seed0", "pos_only-seed0"]
    assert all(run.cohort == 3 for run in first)
    rates = {case: 0.1 for case in plan.cases}
    assert {run.client_lr for run in plan.runs(Path("out"), rates)} == {0.1}  # chosen: no longer its own
    plan.save(tmp_path)
    assert Plan.read(tmp_path) == plan
    with pytest.raises(CheckpointError, match="is another: .*own: .*'rounds': 4.* there, .} here"):
        Plan(Config(cohort=3), ["fedss"], [0, 1]).check_same(tmp_path)


@pytest.mark.parametrize(
    "own, message",
    [
        ({"fedsss": {}}, "own: expected options of fedss, got 'fedsss'"),
        ({"fedss": {"round": 3}}, "own: fedss: no such option: round .did you mean rounds"),
        ({"fedss": {"seed": 3}}, "own: fedss: seed is the same for all that is compared"),
        ({"fedss": {"partition": "iid"}}, "own: fedss: partition is the same for all that is compared"),
        ({"fedss": {"method": "none"}}, "methods: expected some of .*, got 'fedss'"),
        ({"fedss": {"rounds": 0}}, "rounds: expected an integer of at least 1, got 0"),
    ],
)
def test_options_of_its_own_that_cannot_be_are_refused(own, message):
    with pytest.raises(ConfigError, match=message):
        Plan(Config(), ["fedss"], [0], own=own)


def test_names_that_would_share_a_folder_are_refused():
    own = {name: {"method": "fedss"} for name in ("a b", "A, b")}
    with pytest.raises(ConfigError, match="methods: expected one name for the folder a-b, got several"):
        Plan(Config(), [*own], [0], own=own)
    other = Plan(Config(), ["fedss"], [0], own={"fedss": {"method": "pos_only", "rounds": 3}})
    assert other.cases == [Case("pos_only", None, "fedss")] and other.runs(Path("out"), {})[0].rounds == 3


def test_a_methods_own_defaults_are_taken_where_nothing_was_chosen():
    usual = METHODS["mocosfl"].presets
    found = with_defaults(["fedss", "mocosfl", "x"], {"x": {"method": "mocosfl", "cut": 2}}, {"rounds"})
    left = {name: value for name, value in usual.items() if name != "rounds"}
    assert found == {"mocosfl": left, "x": {"method": "mocosfl", "cut": 2} | left}
    assert with_defaults(["mocosfl"], {"mocosfl": {"batch_size": 7}}, ())["mocosfl"]["batch_size"] == 7


def test_runs_of_one_method_with_names_have_lines_and_curves_of_their_own(tmp_path):
    runs = [play("fedss"), play("fedss", top1=0.25), play("fedss", top1=0.75)]
    runs[1:] = [replace(run, config=replace(run.config, label="eager")) for run in runs[1:]]
    table = tabulate(runs)
    assert [(line.label, line.seeds) for line in table] == [("FedSS", 1), ("eager", 2)]
    assert cells(table)[1][0] == "eager" and cells(table)[1][2].startswith("50.0 ")
    looks = [look for look, *_ in plots._lines(runs)]
    assert [look["label"] for look in looks] == ["FedSS", "eager"]
    assert looks[0]["color"] == looks[1]["color"] and looks[0]["marker"] != looks[1]["marker"]


def test_presets_are_plans_and_files_that_can_be_edited(tmp_path):
    names = [path.stem for path in PRESETS.glob("*.json")]
    assert {"glyphs", "omniglot"} <= set(names)
    for name in names:
        found = read_preset(name)
        lists = {part: found[part] for part in LISTS}
        plan = Plan(Config.from_dict(found["config"]), **lists, own=found.get("own", {}))
        data = {"requests": ("glyphs",)}.get(name, (name, name.rpartition("_")[2], "cifar10"))
        assert plan.config.data in data and plan.cases
    own = tmp_path / "own.json"
    own.write_text(json.dumps(read_preset("glyphs") | {"seeds": [5]}))
    assert read_preset(str(own))["seeds"] == [5]
    for content, message in {
        '{"method": ["fedss"]}': "preset: no such entry in .*: method .did you mean methods",
        '{"rounds": 3}': "preset: no such entry in .*: rounds; options of all runs stand under config$",
        '{"seeds": 3}': "preset: expected a list for seeds in .*, got 3",
        '{"own": {"fedss": 3}}': "preset: expected an object of objects for own in .*, got .'fedss': 3.",
        "nothing": "config: .* is not JSON",
    }.items():
        own.write_text(content)
        with pytest.raises(ConfigError, match=message):
            read_preset(str(own))
    with pytest.raises(ConfigError, match="preset: expected a file or one of .*glyphs.*, got 'glyph'"):
        read_preset("glyph")


def test_held_out_clients_do_not_train_and_are_tested_on():
    data = tiny_data()
    held = held_out(data, 0.4, seed=3)
    assert len(held.clients) == 3 and held.num_classes == data.num_classes
    trained = {int(row) for rows in held.clients for row in rows}
    tested = [row for rows in data.clients for row in rows.tolist() if row not in trained]
    assert torch.equal(held.test_images, data.images[tested])
    assert torch.equal(held.test_labels, data.labels[tested])
    assert held_out(data, 0.4, seed=3).client_names == held.client_names
    assert len({held_out(data, 0.4, seed=seed).client_names for seed in range(20)}) > 1
    with pytest.raises(ValueError, match="holdout: expected to leave some of 5 clients, got 0.95"):
        held_out(data, 0.95, seed=0)


def test_no_jobs_is_a_mistake_and_not_a_wait(tmp_path):
    with pytest.raises(ConfigError, match="jobs: expected an integer of at least 1, got 0"):
        compare(Plan(Config(), ["fedss"], [0]), tmp_path / "out", jobs=0)
    with pytest.raises(ConfigError, match="workers: expected 1 in a comparison"):
        Plan(Config(workers=2), ["fedss"], [0])


def test_class_stores_lie_as_the_runs_do_whatever_the_comparison_is_called_by(tmp_path, monkeypatch):
    plan = Plan(Config(class_store=Path("stores")), ["fedss"], [0], rates=[0.1, 0.1000001])
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    for out in (tmp_path / "a", Path()):
        trials, (run,) = plan.trials(out / "rates"), plan.runs(out, {})
        places = [trial.class_store for trial in trials]
        assert places == [Path(f"stores/a/rates/fedss-lr{rate}") for rate in ("0.1", "0.1000001")]
        assert run.class_store == Path("stores/a/fedss-seed0")


def test_a_method_whose_class_rows_are_nowhere_has_no_class_store_beside_others_that_have(tmp_path):
    config = Config(class_store=tmp_path / "stores")
    plan = Plan(config, ["fedss", "fedbabu", "local_only"], [0], rates=[0.1])
    for runs in (plan.trials(tmp_path / "rates"), plan.runs(tmp_path, {})):
        assert [(run.method, run.class_store is None) for run in runs] == [
            ("fedss", False),
            ("fedbabu", True),
            ("local_only", False),
        ]
    assert plan.storeless == ["fedbabu"] and Plan(Config(), ["fedbabu"], [0]).storeless == []
    with pytest.raises(ConfigError, match="^class_store: expected none with fedbabu, whose class rows"):
        Plan(config, ["fedbabu"], [0])
    with pytest.raises(ConfigError, match="^methods: expected some of"):
        Plan(config, ["fedbabi"], [0])
