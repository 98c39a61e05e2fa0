"""The GPU benchmark, where there is no GPU too: the kernels interpreted, on tiny shapes."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch
from fedss_kernels.bench import bench_sampled_softmax, gpu
from fedss_kernels.bench.device import Device
from fedss_kernels.bench.measure import Timing
from fedss_kernels.bench.results import Row

CASE, LINEAR_CASE = gpu.INTERPRETED_CASES


def test_without_a_gpu_it_runs_interpreted_and_says_so(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "fedss_kernels.bench.gpu", "--quick", f"--out={tmp_path}"],
        capture_output=True,
        text=True,
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, run.stderr
    meaningless = "kernels interpreted on a CPU, whose times mean nothing"
    assert meaningless in run.stdout and meaningless in run.stderr
    name = "cpu-interpreted"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{name}.{end}" for end in ("csv", "json", "md", "png")
    ]

    with (tmp_path / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    both = [row for row in rows if row["operation"] == "forward_backward"]
    timed = {(row["S"], row["contender"]) for row in both if row["median_seconds"]}
    gathering = {("5", name) for name in ("ours_gather", "eager_gather", "eager_gather_sparse")}
    assert {("5", "ours"), ("5", "eager"), ("7", "ours"), ("7", "mm")} | gathering <= timed
    assert {row["contender"] for row in both if row["S"] == "7"} >= {"liger", "cce"}
    assert all(bool(row["median_seconds"]) != bool(row["note"]) for row in rows)
    assert {row["operation"] for row in rows} == {"forward_backward", "forward", "backward"}

    text = (tmp_path / f"{name}.md").read_text(encoding="utf-8")
    assert meaningless in text and torch.__version__ in text and "triton 3" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 3 * (2 + 2) and len({line.count("|") for line in lines}) == 1
    assert "compile not run at (3, 5, 16, 9), (3, 7, 16, 7): nothing is compiled" in text
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    limits = json.loads((tmp_path / f"{name}.json").read_text())
    assert set(limits["mm_flops"]) == {"bfloat16", "tf32", "float32"} and limits["copy_bytes"] > 0


def test_a_wrong_kernel_stops_it_before_anything_is_timed(tmp_path, monkeypatch, capsys):
    right = bench_sampled_softmax.sampled_softmax_loss
    monkeypatch.setattr(bench_sampled_softmax, "sampled_softmax_loss", lambda *a, **k: 1.001 * right(*a, **k))
    assert gpu.main(["--quick", f"--out={tmp_path}"]) == 1
    err = capsys.readouterr().err
    assert "wrong result, nothing is timed: ours at (" in err and "the loss is off by" in err
    assert "timing" not in err.replace("nothing is timed", "") and not list(tmp_path.iterdir())


def out_of_memory(p):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


def broken(p):
    raise ValueError("a first line\nand a second")


def other_loss(p):
    return 1.2 * bench_sampled_softmax.eager(p)


def other_gradient(p):
    return bench_sampled_softmax.eager(p) + (p.input - p.input.detach()).sum()


@pytest.mark.parametrize(
    "loss, note",
    [
        (out_of_memory, "out of memory"),
        (broken, "ValueError: a first line"),
        (other_loss, "Mismatch: its loss is "),
        (other_gradient, "Mismatch: its gradient to input is off by "),
    ],
)
def test_a_contender_that_fails_is_named_and_the_others_go_on(loss, note, monkeypatch):
    monkeypatch.setattr(gpu, "why_not", lambda name, shape: "" if name in ("eager", "mm") else "left out")
    monkeypatch.setitem(gpu.CONTENDERS, "eager", bench_sampled_softmax.contender(loss, "rows"))
    rows = [row for row in gpu.measure_case(CASE, 0.001) if row.contender in ("eager", "mm")]
    failed, *others = rows
    assert failed.contender == "eager" and failed.timing is None and failed.note.startswith(note)
    assert [row.operation for row in others[:3]] == ["forward_backward", "forward", "backward"]
    assert all(row.contender == "mm" and row.timing is not None for row in others)


class Replays:
    """A CUDA graph of one call, where there is no CUDA."""

    def __init__(self, call):
        self.replay = call


def test_small_problems_are_timed_as_graphs_in_the_same_turns(monkeypatch):
    taken = []

    def graph_of(call):
        if len(taken) == 1:  # the second graph: the first contender's of the forward pass
            taken.append("failed")
            raise RuntimeError("operation not permitted when stream is capturing")
        taken.append("captured")
        return Replays(call)

    monkeypatch.setattr(gpu, "why_not", lambda name, shape: "" if name in ("eager", "mm") else "left out")
    monkeypatch.setattr(gpu, "graph_of", graph_of)
    monkeypatch.setattr(gpu, "CUDA", True)
    turns = []
    turn = gpu.Entrant.turn
    monkeypatch.setattr(
        gpu.Entrant, "turn", lambda self, of: (turns.append((of[0], self.name)), turn(self, of))[1]
    )
    rows = [row for row in gpu.measure_case(CASE, 0.001) if row.contender in ("eager", "mm")]

    both = "graph_forward_backward"
    assert [name for operation, name in turns if operation == both] == ["eager", "mm"] * gpu.TURNS
    by_name = {(row.contender, row.operation): row for row in rows}
    assert len(by_name) == len(rows) == 2 * 5
    assert by_name["mm", both].timing.rounds == gpu.TURNS
    assert by_name["eager", both].timing.min_s < by_name["eager", "forward_backward"].timing.min_s
    failed = by_name["eager", "graph_forward"]
    assert failed.timing is None and failed.note.startswith("as a graph: RuntimeError: operation not")
    assert by_name["mm", "graph_forward"].timing is not None


def test_what_cannot_be_prepared_is_reported_for_every_contender(monkeypatch):
    monkeypatch.setattr(bench_sampled_softmax, "linear_problem", out_of_memory_problem)
    rows = list(gpu.measure_case(LINEAR_CASE, 0.001))
    assert [row.contender for row in rows] == list(gpu.contenders(LINEAR_CASE))
    assert {"ours", "liger", "cce", "mm"} <= {row.contender for row in rows}
    assert all(row.timing is None and row.note == "out of memory" for row in rows)


def out_of_memory_problem(*args):
    out_of_memory(None)


def row(operation: str, contender: str, milliseconds: float, peak: int | None = None) -> Row:
    timing = Timing.of([milliseconds / 1e3] * 2)
    return Row((32, 100, 64, 11_318), operation, "float32", contender, timing, peak)


def test_the_table_shows_others_in_units_of_ours_and_shares_of_the_limits():
    both, graph = "forward_backward", "graph_forward_backward"
    B, S, D = 32, 100, 64
    flops, moved = 6 * B * S * D, 3 * 4 * (B + S) * D
    device = Device("G", "1", "2", "3", {"float32": 4 * flops / 0.02e-3}, 2 * moved / 0.02e-3)
    gradients, inputs = 4 * (B + S) * D, 4 * (B + S) * D + 8 * B + 4 * S
    rows = [
        row(both, "ours", 0.02, gradients + (inputs + gradients) // 10),
        row(both, "eager", 0.1),
        row(both, "compile", 0.03),
        row(both, "ours_gather", 0.04),
        row(both, "eager_gather", 0.2),
        row(graph, "ours", 0.01),
        row(graph, "eager", 0.03),
    ]
    table = gpu.table(rows, device)
    assert [group.title for group in table.groups] == [
        "float32, with backward, as called",
        "float32, with backward, as a graph",
    ]
    called, as_graph = (group.lines[0] for group in table.groups)
    ours = ["32, 100, 64", "0.020", "25%", "50%"]
    assert called[:11] == [*ours, "5.00", "1.50", "–", "–", "–", "–", "–"]
    assert called[11:15] == ["11,318", "0.040", "5.00", "–"]
    assert called[-1] == "110%"
    assert as_graph[1] == "0.010" and as_graph[4] == "3.00" and as_graph[-1] == "–"
    assert [(panel.ours, len(panel.rows)) for panel in gpu.panels(rows)] == [
        ("ours", 5),
        ("ours_gather", 2),
        ("ours", 2),
    ]
