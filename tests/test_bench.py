"""The benchmarks check what they time, time it, and save what they print."""

import csv
import json
import os
import time

import pytest
import torch
from fedss_kernels.bench import bench_row_momentum, bench_sampled_softmax, bench_scatter_add
from fedss_kernels.bench.measure import PASSES, ROUNDS_PER_PASS, Timing, time_calls
from fedss_kernels.bench.peak_memory import peak_bytes
from fedss_kernels.bench.report import Plan
from fedss_kernels.bench.results import Figures, Mismatch, Row, decimal, milliseconds
from fedss_kernels.bench.row_operation import Shape
from fedss_kernels.bench.run import REPORTS, select

from fedss_kernels.federated import cli

QUICKLY = ["--seconds=0.001", "--threads=1"]


@pytest.fixture(autouse=True)
def no_worker_of_tests(monkeypatch):
    """pytest-benchmark, inside, refuses to time where it finds itself in a worker of pytest-xdist."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


def read(path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---- whole runs --------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_the_loss_is_checked_timed_printed_and_saved(tmp_path, capsys):
    names = ["ours", "eager", "lce", "mm", "ours_gather", "eager_gather_sparse", "dense"]
    argv = ["--shapes=5x7x8x20", f"--contenders={','.join(names)}", f"--out={tmp_path}"]
    assert cli.main(["bench", "loss", *argv, *QUICKLY]) == 0
    out, err = capsys.readouterr()
    assert "5, 7, 8" in out and "bfloat16" in out and "1 threads" in out and str(tmp_path) in out
    assert err.splitlines()[-1] == "fedss bench: loss 1/1: 5, 7, 8, 20, bfloat16"

    rows = read(tmp_path / "loss.csv")
    assert [(row["operation"], row["dtype"], row["contender"]) for row in rows] == [
        (operation, dtype, name)
        for dtype in ("float32", "bfloat16")
        for operation in ("forward", "forward_backward")
        for name in names
    ]
    for row in rows:
        assert [row[axis] for axis in "BSDC"] == ["5", "7", "8", "20"]
        assert 0 < float(row["min_seconds"]) <= float(row["median_seconds"]) < 1
        assert int(row["rounds"]) >= PASSES * ROUNDS_PER_PASS
        assert bool(row["peak_bytes"]) == (
            row["operation"] == "forward_backward" and row["dtype"] == "float32"
        )
    table = (tmp_path / "loss.md").read_text(encoding="utf-8")
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 4 * 3 and len({line.count("|") for line in lines}) == 1
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    machine = json.loads((tmp_path / "machine.json").read_text())
    assert machine["threads"] == 1 and machine["copy_bytes"] > 0


@pytest.mark.exhaustive
def test_the_aggregator_is_checked_timed_printed_and_saved(tmp_path, capsys):
    argv = ["--shapes=50x8x20,6x4x9", f"--out={tmp_path}"]
    assert cli.main(["bench", "aggregator", *argv, *QUICKLY]) == 0
    out = capsys.readouterr().out
    assert "50, 8, 20" in out and "6, 4, 9" in out
    rows = [row for row in read(tmp_path / "aggregator.csv") if row["operation"] == "scatter_add"]
    assert [row["contender"] for row in rows] == 2 * list(bench_scatter_add.CONTENDERS)
    assert all(float(row["median_seconds"]) > 0 and int(row["peak_bytes"]) >= 0 for row in rows)
    assert (tmp_path / "aggregator.md").exists() and (tmp_path / "aggregator.png").exists()


def test_everything_quick_is_all_reports():
    assert select("all", Plan(quick=True)) == list(REPORTS.values())
    assert [report.name for report in REPORTS.values()] == ["loss", "aggregator", "libraries"]


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, line",
    [
        (["everything"], "SUBJECT: expected one of loss, aggregator, libraries, all, got 'everything'"),
        (["loss", "--shapes=5x7x8"], "--shapes: expected BxSxDxC for loss, got '5x7x8'"),
        (["aggregator", "--shapes=5x7x8x20"], "--shapes: expected MxDxC for aggregator, got '5x7x8x20'"),
        (
            ["loss", "--shapes=5x7x0x20"],
            "--shapes: expected sizes of at least 1 with x between, as in 32x100x64x11318, got '0'",
        ),
        (["loss", "--shapes=5x7x8x6"], "--shapes: expected S of at most C for loss, got '5x7x8x6'"),
        (["loss", "--shapes=,"], "--shapes: expected at least one shape, got ','"),
        (
            ["--shapes=5x7x8x20"],
            "--shapes and --contenders: say which they are of, loss, aggregator or libraries",
        ),
        (["--seconds=0"], "--seconds: expected a number of at least 0.001 and at most 3600, got '0'"),
        (["--seconds=nan"], "--seconds: expected a number of at least 0.001 and at most 3600, got 'nan'"),
        (["--threads=0"], "--threads: expected an integer of at least 1 and at most 1024, got '0'"),
        (["--quik"], "no such option --quik (did you mean --quick?)"),
    ],
)
def test_a_mistake_is_one_line(argv, line, capsys):
    assert cli.main(["bench", *argv]) == 2
    assert capsys.readouterr() == ("", f"fedss bench: {line}\n")


def test_an_unknown_contender_is_one_line(capsys):
    assert cli.main(["bench", "aggregator", "--contenders=ours,theirs"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("fedss bench: --contenders: expected some of ours, index_add, ")
    assert err.endswith(", got 'theirs'\n")
    assert cli.main(["bench", "loss", "--contenders=,"]) == 2
    assert capsys.readouterr().err.endswith(", got none\n")


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["bench", f"--out={tmp_path}/file/out"]) == 2
    assert capsys.readouterr().err.endswith("file/out cannot be written to: Not a directory\n")


def wrong_loss(*args, **kwargs):
    return 1.001 * bench_sampled_softmax_loss(*args, **kwargs)


def wrong_gradient(input, *args, **kwargs):
    loss = bench_sampled_softmax_loss(input, *args, **kwargs)
    return loss + 0.01 * (input - input.detach()).sum()


def wrong_rows(input, weight, target, class_ids=None, *args, **kwargs):
    others = None if class_ids is None else (class_ids + 1) % len(weight)
    return bench_sampled_softmax_loss(input, weight, target, others, *args, **kwargs)


bench_sampled_softmax_loss = bench_sampled_softmax.sampled_softmax_loss


@pytest.mark.parametrize(
    "broken, words",
    [
        (wrong_loss, "ours at (5, 7, 8, 20), float32: the loss is off by "),
        (wrong_gradient, "ours at (5, 7, 8, 20), float32: the gradient to input is off by "),
        (wrong_rows, "ours_gather at (5, 7, 8, 20), float32: the gradient is not on the rows of class_ids"),
    ],
)
def test_a_wrong_loss_is_not_timed(broken, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_sampled_softmax, "sampled_softmax_loss", broken)
    argv = ["--shapes=5x7x8x20", "--contenders=ours,ours_gather", f"--out={tmp_path}"]
    assert cli.main(["bench", "loss", *argv, *QUICKLY]) == 1
    out, err = capsys.readouterr()
    assert out == "" and f"fedss bench: wrong result, nothing is timed: {words}" in err
    assert not (tmp_path / "loss.csv").exists()


@pytest.mark.exhaustive
def test_a_wrong_scatter_add_is_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_scatter_add, "scatter_add_", lambda out, ids, rows, scale=None: out)
    argv = ["bench", "aggregator", "--shapes=50x8x20", f"--out={tmp_path}", *QUICKLY]
    assert cli.main(argv) == 1
    assert "ours of scatter_add at (50, 8, 20) is off by " in capsys.readouterr().err


def test_another_loss_than_ours_is_no_contender(monkeypatch):
    p = bench_sampled_softmax.problem(shape := bench_sampled_softmax.Shape(5, 7, 8, 20), torch.float32)
    bench_sampled_softmax.check(shape, p, ["lce", "lce_chunked", "eager_gather", "eager_gather_sparse", "mm"])
    monkeypatch.setattr(torch.nn.functional, "linear_cross_entropy", lambda *a, **k: torch.ones(()))
    with pytest.raises(Mismatch, match=r"lce at \(5, 7, 8, 20\), float32: the loss is 1 instead of"):
        bench_sampled_softmax.check(shape, p, ["lce"])


def test_the_momentum_step_of_torch_is_the_one_of_the_rows():
    bench_row_momentum.check(Shape(5, 4, 9), ["eager", "dense"])


# ---- the parts ---------------------------------------------------------------------------------------------


def test_calls_take_turns():
    order = []
    timings = time_calls({name: lambda name=name: order.append(name) for name in "ab"}, 1e-4)
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert turns == ["a", "b"] * PASSES and set(timings) == {"a", "b"}


def test_a_call_takes_as_long_as_it_takes():
    timing = time_calls({"sleep": lambda: time.sleep(0.01)}, 0.001)["sleep"]
    assert 0.01 <= timing.min_s <= timing.median_s < 0.1 and timing.rounds == PASSES * ROUNDS_PER_PASS


def test_what_a_call_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        time_calls({"good": lambda: 1, "bad": lambda: 1 // 0}, 0.001)
    assert time_calls({}, 0.001) == {}


def test_quartiles():
    timing = Timing.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert timing == Timing(median_s=3.0, min_s=1.0, iqr_s=2.0, rounds=5)
    assert not timing.steady and Timing.of([2.0, 2.9, 3.0]).steady


MEBIBYTE = 2**20


def allocate_16_mebibytes():
    inputs = torch.ones(64 * MEBIBYTE)

    def call():
        return inputs[: 4 * MEBIBYTE].clone()

    def warm_up():
        for _ in range(3):  # the allocator keeps what these free
            call()

    return warm_up, call


@pytest.mark.exhaustive
def test_peak_memory_is_that_of_the_call_alone():
    """Not its inputs', nor less because of what was freed before."""
    peak = peak_bytes(allocate_16_mebibytes)
    # Linux adds up the pages of each core 32 at a time.
    uncounted = (os.cpu_count() or 1) * 32 * os.sysconf("SC_PAGE_SIZE")
    assert peak is not None and 16 * MEBIBYTE - uncounted <= peak < 20 * MEBIBYTE


def test_figures_as_text():
    assert [decimal(value) for value in (None, 0.853, 9.996, 12.34, 1450.2)] == [
        "–",
        "0.85",
        "10.0",
        "12.3",
        "1,450",
    ]
    assert [milliseconds(value) for value in (None, 22e-6, 12.34e-3)] == ["–", "0.022", "12.3"]


def test_remarks_say_why_and_where_there_is_no_figure():
    timing = Timing(median_s=2.0, min_s=1.0, iqr_s=0.5, rounds=6)
    rows = [Row((i, 3), "forward", "float32", "dense", None, None, "too large") for i in (1, 20_000)]
    rows.append(Row((1, 3), "forward", "float32", "ours", timing, None))
    excuse, busy = Figures(rows).remarks()
    assert excuse == "dense not run at (1, 3), (20,000, 3): too large."
    assert busy.startswith("1 of 1 timings were unsteady")
