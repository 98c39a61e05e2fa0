"""What clients compute, in the ledger and in the measures of a run: a model of one client, kind by kind."""

import csv
import dataclasses

import pytest
import torch
from layered_net import layered_net
from tiny_federation import PIXELS, tiny_config, tiny_data

from fedss_kernels.federated import Stopped, run
from fedss_kernels.federated.comparisons.compare import COMPARISON_FILES
from fedss_kernels.federated.files.run_folder import RUN_FILES, read_run
from fedss_kernels.federated.ledger import WORK
from fedss_kernels.federated.measures import MEASURES, OF_A_STEP
from fedss_kernels.federated.probes import client_work
from fedss_kernels.federated.reports.plots import LIGHT, OF_A_CLIENT, step_by_round
from fedss_kernels.federated.reports.report import write_run_report
from fedss_kernels.federated.reports.reported_run import Run

WIDTH, LAYERS, ROUNDS, BATCH, EPOCHS = 12, 4, 8, 3, 2  # two rounds for each block
STEM, BLOCK = PIXELS * WIDTH + WIDTH, WIDTH * WIDTH + WIDTH


def federation():
    """Of clients with 7, 6, 2, 5 and 8 images: the last of the first is alone in its batch."""
    data = tiny_data()
    held = torch.cat(data.clients)
    return dataclasses.replace(data, clients=held.split([7, 6, 2, 5, 8]))


def train(**options):
    resume, stop_after, seen = options.pop("resume", False), options.pop("stop_after", None), []
    settings = {
        "method": "layerwise",
        "rounds": ROUNDS,
        "batch_size": BATCH,
        "local_epochs": EPOCHS,
        "embedding_dim": WIDTH,
        "eval_every": 4,
        "cohort": 2,
    }
    return run(
        tiny_config(**(settings | options)),
        data=federation(),
        model=layered_net(LAYERS, WIDTH),
        on_round=seen.append,
        resume=resume,
        stop=None if stop_after is None else lambda: seen[-1].round == stop_after,
    )


def table(folder, name) -> list[dict[str, str]]:
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


def multiply_adds(stage: int, budget: int | None) -> int:
    """Of an image: forward 1, backward 2, less what would go to an image, or to a frozen block."""
    if stage == 0:
        return 2 * PIXELS * WIDTH + 3 * WIDTH**2
    fixed = min(stage, (budget or LAYERS) - 1)
    return PIXELS * WIDTH + (fixed + 2) * WIDTH**2


@pytest.mark.parametrize("budget", [None, 2])
def test_the_ledger_says_what_a_step_and_all_of_them_take(budget, tmp_path, monkeypatch):
    measured = []
    once = client_work.measure
    monkeypatch.setattr(client_work, "measure", lambda *of: measured.append(of) or once(*of))
    options = {} if budget is None else {"depth_budget": budget}
    result = train(**options, out=tmp_path, dropout_rate=0.2)
    lines, kinds = table(tmp_path, "ledger.csv"), set()
    assert list(lines[0])[-len(WORK) :] == list(WORK)
    for line in lines:
        if line["outcome"] == "dropped":
            assert [line[column] for column in WORK] == [""] * len(WORK)
            continue
        stage, client = (int(line["round"]) - 1) // 2, int(line["client"])
        batch, trained = ((3, 6), (3, 6), (2, 2), (3, 5), (3, 8))[client]
        held = STEM + BLOCK * (1 + min(stage, (budget or LAYERS) - 1))
        each = 2 * multiply_adds(stage, budget)
        assert int(line["step_held"]) == 4 * held
        assert int(line["step_multiply_adds"]) == batch * each
        assert int(line["multiply_adds"]) == EPOCHS * trained * each
        assert 0 < int(line["step_saved"]) < int(line["step_peak"])
        kinds.add((min(stage, 1) if budget else stage, batch))
    assert any(line["outcome"] == "dropped" for line in lines) and len(measured) == len(kinds)
    rounds = table(tmp_path, "metrics.csv")
    for metrics, line in zip(result.history, rounds, strict=True):
        of_round = [e for e in lines if e["round"] == line["round"] and e["multiply_adds"]]
        memory = max(int(e["step_held"]) + int(e["step_peak"]) for e in of_round)
        assert float(line["client_memory"]) == metrics.client_memory == memory / 1e6
        assert metrics.client_saved == max(int(e["step_saved"]) for e in of_round) / 1e6
    s, done = result.summary, [e for e in lines if e["multiply_adds"]]
    assert s.client_memory == max(metrics.client_memory for metrics in result.history)
    assert s.client_multiply_adds == max(int(e["step_multiply_adds"]) for e in done) / 1e9
    assert s.all_multiply_adds == pytest.approx(sum(int(e["multiply_adds"]) for e in done) / 1e9, rel=1e-12)
    assert set(OF_A_STEP) < {*s.measures.shown}


def test_a_run_that_goes_on_has_the_figures_of_one_that_never_stopped(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    result = train(out=whole, checkpoint_every=1)
    with pytest.raises(Stopped):
        train(out=stopped, checkpoint_every=1, stop_after=3)  # in the middle of a stage
    again = train(out=stopped, checkpoint_every=1, resume=True)
    assert (stopped / "ledger.csv").read_bytes() == (whole / "ledger.csv").read_bytes()
    for name in OF_A_STEP:
        assert [getattr(m, name) for m in again.history] == [getattr(m, name) for m in result.history]
        assert getattr(again.summary, name) == getattr(result.summary, name)


def test_a_report_has_a_plot_of_what_a_step_takes_over_the_rounds(tmp_path):
    result = train(out=tmp_path, rounds=LAYERS, eval_every=LAYERS)
    run_of = Run(*read_run(tmp_path))
    figure = step_by_round([run_of], LIGHT)
    for axes, name in zip(figure.axes, OF_A_CLIENT, strict=True):
        assert axes.get_ylabel() == MEASURES[name].column
        (line,) = axes.lines
        assert line.get_xydata().tolist() == [[m.round, getattr(m, name)] for m in result.history]
    write_run_report(tmp_path, run_of)
    assert (tmp_path / "step_by_round.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figcaption>") == 3 and "The highest says who can take part." in page
    assert "step_by_round.png" in RUN_FILES and "step_by_round.png" in COMPARISON_FILES


def test_of_other_methods_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("fedss_kernels.federated.fedavg_round.ClientWork", None)
    result = train(method="fedss", out=tmp_path, rounds=1)
    assert not {*WORK} & {*table(tmp_path, "ledger.csv")[0]}
    assert not {*OF_A_STEP} & {*result.summary.measured}


def test_the_whole_net_is_one_kind(tmp_path):
    train(method="simclr", rounds=2, out=tmp_path)
    found = {line["step_held"] for line in table(tmp_path, "ledger.csv")}
    assert found == {str(4 * (STEM + LAYERS * BLOCK))}
