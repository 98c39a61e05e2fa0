"""The GPU benchmark, where there is no GPU too: the kernels interpreted, on tiny shapes."""

import csv
import dataclasses
import json
import math
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from fedss_kernels.bench import bench_sampled_softmax, gpu, gpu_cases, gpu_table, plot
from fedss_kernels.bench.bench_sampled_softmax import Shape
from fedss_kernels.bench.device import Device
from fedss_kernels.bench.gpu_cases import Case
from fedss_kernels.bench.measure import Timing
from fedss_kernels.bench.results import Row

CASE, LINEAR_CASE, IN_BATCH_CASE, _ = gpu.INTERPRETED_CASES


# ---- whole runs --------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
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
    assert "4 cases, " in run.stderr and " measurements in 2 turns: " in run.stderr and "of 8\n" in run.stderr
    name = "cpu-interpreted"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{name}.{end}" for end in ("csv", "json", "md", "png")
    ]

    with (tmp_path / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    both = [row for row in rows if row["operation"] == "forward_backward"]
    timed = {(row["S"], row["contender"]) for row in both if row["median_seconds"]}
    assert {(row["B"], row["contender"]) for row in both if row["median_seconds"]} >= {("130", "ours")}
    gathering = {("5", name) for name in ("ours_gather", "eager_gather", "eager_gather_sparse")}
    everywhere = {(S, name) for S in ("5", "7", "4") for name in ("ours", "products", "eager", "lce")}
    assert everywhere | gathering <= timed
    assert {row["contender"] for row in both if row["S"] == "7"} >= {"liger", "cce", "quack"}
    assert {row["contender"] for row in both if row["S"] == "4"} >= {"memeff"}
    assert all(bool(row["median_seconds"]) != bool(row["note"]) for row in rows)
    assert {row["operation"] for row in rows} == {"forward_backward", "forward", "backward"}

    text = (tmp_path / f"{name}.md").read_text(encoding="utf-8")
    assert meaningless in text and torch.__version__ in text and "triton 3" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 3 * (2 + 4) and len({line.count("|") for line in lines}) == 1
    shapes = "(3, 5, 16, 9), (3, 7, 16, 7), (4, 4, 16, 4), (130, 5, 16, 9)"
    assert f"compile not run at {shapes}: nothing is compiled" in text
    shares = {line.split("|")[3].strip() for line in lines if line.startswith(("| 3", "| 4", "| 130"))}
    assert shares and all(share.endswith("%") for share in shares)  # of the products, at every shape
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


@pytest.mark.exhaustive
def test_what_would_begin_after_the_minutes_given_is_left_out(tmp_path):
    assert gpu.main(["--minutes=0.01", f"--out={tmp_path}"]) == 0
    with (tmp_path / "cpu-interpreted.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    expected = [(str(case.shape.S), name) for case in gpu.INTERPRETED_CASES for name in gpu.contenders(case)]
    assert [(row["S"], row["contender"]) for row in rows] == expected
    assert {row["note"] for row in rows} == {"the minutes given were over"}
    assert "ours not run at (3, 5, 16, 9), " in (tmp_path / "cpu-interpreted.md").read_text(encoding="utf-8")


def test_what_began_in_time_is_timed_to_its_end(monkeypatch):
    monkeypatch.setattr(gpu, "why_not", lambda name, case: "" if name in ("ours", "eager") else "left out")
    clock = iter([0.0, 0.0, 9.0])  # read before the case, ours and eager
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    rows = list(gpu.measure_case(IN_BATCH_CASE, 0.001, ends=5.0))
    notes = {row.contender: row.note for row in rows}
    assert notes["ours"] == "" and notes["eager"] == "the minutes given were over"
    assert [row.operation for row in rows if row.contender == "ours"] == [
        *("forward_backward", "forward", "backward")
    ]


def a_test(tmp_path, body: str):
    (folder := tmp_path / "tests").mkdir(exist_ok=True)
    (folder / "test_it.py").write_text(
        f"import pytest, time\n@pytest.mark.gpu\ndef test_it():\n    {body}\ndef test_other():\n    1 / 0\n"
    )
    return folder


@pytest.mark.exhaustive
def test_tests_that_need_a_gpu_run_first_and_the_table_says_how_they_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "INTERPRETED_CASES", [])
    monkeypatch.setattr(gpu, "cases_of", lambda plan: [IN_BATCH_CASE])
    monkeypatch.setattr(gpu, "why_not", lambda name, case: "" if name == "products" else "left out")
    arguments = [f"--tests={a_test(tmp_path, 'assert 1 == 2')}", "--seconds=0.001", f"--out={tmp_path}"]
    assert gpu.main(arguments) == 1
    assert "assert 1 == 2" in (tmp_path / "tests.txt").read_text(encoding="utf-8")
    text = (tmp_path / "cpu-interpreted.md").read_text(encoding="utf-8")
    assert "- pytest -m gpu: 1 failed, 1 deselected" in text and "| 4, 4, 16 |" in text


@pytest.mark.exhaustive
def test_tests_that_take_too_long_are_stopped(tmp_path, monkeypatch):
    passed = gpu.run_tests(a_test(tmp_path, "pass"), tmp_path / "tests.txt")
    assert passed[0] and passed[1].startswith("1 passed")
    monkeypatch.setattr(gpu, "TEST_MINUTES", 0.02)
    stopped = gpu.run_tests(a_test(tmp_path, "time.sleep(60)"), tmp_path / "tests.txt")
    assert stopped == (False, "stopped after 0.02 minutes")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seconds=0"], "--seconds: expected more than 0, got 0"),
        (["--minutes=-1"], "--minutes: expected more than 0, got -1"),
        (["--tests=nowhere"], "--tests: expected a folder of tests, found none at nowhere"),
        (["--shapes=32x100"], "--shapes: expected BxSxDxC, got '32x100'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert message in capsys.readouterr().err


# ---- the plan ----------------------------------------------------------------------------------------------


def test_all_of_it_is_planned_to_take_less_than_eight_minutes(monkeypatch):
    monkeypatch.setattr(gpu, "CUDA", True)
    monkeypatch.setattr(gpu, "why_not", lambda name, case: "")  # everything is installed
    whole, quick = (gpu.Budget(cases, seconds=0.1) for cases in (gpu.CASES, gpu.QUICK_CASES))
    assert whole.timed + whole.allowed < 60 * 8 - gpu.LAST_SECONDS
    assert quick.timed + quick.allowed < (whole.timed + whole.allowed) / 5
    # A client's case: nine contenders, of which each is timed as called, in stages, and as two graphs.
    client = gpu.Budget([gpu_cases.CLIENT], seconds=0.1)
    assert (client.contenders, client.timings) == (9, 36) and math.isclose(client.timed, 3.6)
    assert str(client).startswith(f"1 cases, 9 contenders, 36 measurements in {gpu.TURNS} turns: 4 s; ")
    # A language model's: ours, products, four of PyTorch's, Liger, CCE and QuACK; no graphs.
    language_model = gpu.Budget(gpu.CASES[:1], seconds=0.1)
    assert (language_model.contenders, language_model.timings) == (9, 18)


def test_shapes_of_ones_own_are_measured_instead():
    cases = gpu.cases_of(gpu.Plan(quick=True, shapes=[(3, 5, 16, 9)]))
    assert cases == [Case(Shape(3, 5, 16, 9), dtype) for dtype in (torch.float32, torch.bfloat16)]


def test_the_shapes_that_count_are_measured():
    linear = Case(Shape(4096, 128_256, 4096, 128_256), torch.bfloat16, "linear")
    assert gpu.CASES[0] == linear and not linear.graphed
    measured = {(*case.shape[:3], case.dtype) for case in gpu.CASES if case.graphed}
    both = [(256, 1024, 128, dtype) for dtype in (torch.float32, torch.bfloat16)]
    clients = [(32, S, 64, torch.float32) for S in (100, 170, 410, 820)]
    wide = [(32, S, 1280, torch.float32) for S in (170, 820)]
    assert measured >= {*both, *clients, *wide, (4096, 8192, 512, torch.bfloat16)}
    assert len({case.shape + (case.dtype,) for case in gpu.CASES}) == len(gpu.CASES)  # a row is found by them


def test_every_contender_has_a_mark_of_its_own():
    panel = max(gpu.panels([row("forward_backward", "ours", 1.0)]), key=lambda panel: len(panel.contenders))
    assert set(panel.contenders) == {*gpu_cases.ON_ROWS, "products"}
    assert len(panel.contenders) <= len(set(plot.MARKERS)) == len(set(plot.COLOURS))


# ---- the contenders ----------------------------------------------------------------------------------------

# What the libraries' functions compute by their documentation, with their own arguments and defaults.
STAND_INS = {
    "quack/linear_cross_entropy.py": """
        import torch.nn.functional as F

        def chunked_linear_cross_entropy(
            x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True,
            use_scaled_exp=None,
        ):
            assert x.shape[0] % 8 == 0
            return F.cross_entropy(x @ weight.mT, target, ignore_index=ignore_index, reduction=reduction)
    """,
    "cut_cross_entropy/__init__.py": """
        import torch.nn.functional as F

        def linear_cross_entropy(e, c, targets, bias=None, ignore_index=-100):
            return F.cross_entropy((e @ c.T).float(), targets, ignore_index=ignore_index)
    """,
    "liger_kernel/transformers/functional.py": """
        import torch.nn.functional as F

        def liger_fused_linear_cross_entropy(input, weight, target, bias=None, ce_weight=None):
            return F.cross_entropy(input @ weight.T, target)
    """,
    "memeff/__init__.py": """
        import torch
        import torch.nn.functional as F

        class MemoryEfficientQwen3Loss:
            def __init__(self, temperature=0.07, margin=0.1, use_qq_negatives=False, use_dd_negatives=False,
                         normalized_inputs=False, stable=True, tau_plus=0.0, label_smoothing=0.0):
                self.temperature, self.margin, self.stable = temperature, margin, stable
                self.normalized_inputs = normalized_inputs

            def __call__(self, query_features, doc_features):
                q, d = query_features, doc_features
                if not self.normalized_inputs:
                    q, d = F.normalize(q, dim=-1), F.normalize(d, dim=-1)
                cosines = q @ d.T
                mistaken = cosines > (cosines.diagonal() + self.margin)[:, None]
                logits = cosines.masked_fill(mistaken, -torch.inf) / self.temperature
                loss = F.cross_entropy(logits, torch.arange(len(q)))
                factor = (len(q) * self.temperature) ** 0.5 if self.stable else 1.0
                return factor * loss - (factor - 1) * loss.detach()
    """,
}


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    for path, text in STAND_INS.items():
        (tmp_path / path).parent.mkdir(parents=True)
        for folder in (tmp_path / path).parents:
            if folder == tmp_path:
                break
            (folder / "__init__.py").touch()
        (tmp_path / path).write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    modules = {library.module for library in gpu_cases.LIBRARIES.values()}
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in modules]:
        del sys.modules[name]


@pytest.mark.parametrize("kind", ["linear", "in_batch"])
def test_libraries_are_called_for_the_loss_that_ours_is(kind, libraries):
    case = Case(Shape(8, 16 if kind == "linear" else 8, 16, 16 if kind == "linear" else 8), kind=kind)
    names = [name for name, library in gpu_cases.LIBRARIES.items() if library.kind == kind]
    assert names and all(gpu.why_not(name, case) == "" for name in names)
    p = case.problem()
    right = bench_sampled_softmax.gradients(bench_sampled_softmax.ours, p, "rows")
    for name in names:
        gpu.check_rival(name, p, right)
        got = bench_sampled_softmax.gradients(gpu.CONTENDERS[name].loss, p, "rows")
        for value, truth in zip(got, right, strict=True):
            torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-6)


def test_what_a_library_cannot_do_is_said(libraries):
    notes = {row.contender: row.note for row in gpu.measure_case(LINEAR_CASE, 0.001)}
    assert notes["quack"] == "ValueError: it needs B, S and D that 8 divides" and notes["cce"] == ""
    assert "memeff" not in notes and "quack" not in gpu.contenders(IN_BATCH_CASE)
    told = " ".join(gpu_table.NOTES)
    assert "QuACK (a linear layer's alone)" in told and "memeff (pairs in a batch alone, as" in told


def test_what_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(gpu_cases.importlib.util, "find_spec", lambda name: None)
    found = {name: gpu.why_not(name, CASE) for name in gpu_cases.LIBRARIES}
    assert found == {
        "liger": "not installed (pip install liger-kernel)",
        "cce": "not installed (pip install cut-cross-entropy)",
        "quack": "not installed (pip install quack-kernels)",
        "memeff": "not installed (pip install memeff)",
    }


def test_the_table_names_the_versions_of_what_is_installed(monkeypatch):
    def version(package):
        if package == "memeff":
            return "0.3.1"
        raise gpu_cases.importlib.metadata.PackageNotFoundError(package)

    device = Device("G", "1", "2", "3", {"float32": 1.0}, 1.0)
    rows = [row("forward_backward", "ours", 1.0)]
    monkeypatch.setattr(gpu_cases.importlib.metadata, "version", version)
    assert "Installed: memeff 0.3.1." in gpu.table(rows, device).notes


def test_products_keep_float32_sums_where_torch_has_them(monkeypatch):
    p = Case(Shape(3, 5, 16, 5), torch.bfloat16).problem()
    exact = p.input.float() @ p.rows.float().T
    mm = torch.mm

    def with_out_dtype(a, b, out_dtype=None):  # as on a GPU
        return mm(a, b) if out_dtype is None else mm(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(torch, "mm", with_out_dtype)
    gpu_cases._float32_out.cache_clear()
    try:
        forward, *backward = gpu_cases.products(p)
    finally:
        gpu_cases._float32_out.cache_clear()
    assert torch.equal(forward, exact) and [g.dtype for g in backward] == [torch.float32] * 2
    torch.testing.assert_close(backward[0], p.probs.float() @ p.rows.float())
    torch.testing.assert_close(backward[1], p.probs.float().T @ p.input.float())
    monkeypatch.undo()
    assert [g.dtype for g in gpu_cases.products(p)] == [torch.bfloat16] * 3  # a CPU has no such argument


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
    monkeypatch.setattr(
        gpu, "why_not", lambda name, case: "" if name in ("eager", "products") else "left out"
    )
    monkeypatch.setitem(gpu.CONTENDERS, "eager", bench_sampled_softmax.contender(loss, "rows"))
    rows = [row for row in gpu.measure_case(CASE, 0.001) if row.contender in ("eager", "products")]
    failed, *others = rows
    assert failed.contender == "eager" and failed.timing is None and failed.note.startswith(note)
    assert [row.operation for row in others[:3]] == ["forward_backward", "forward", "backward"]
    assert all(row.contender == "products" and row.timing is not None for row in others)


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

    monkeypatch.setattr(
        gpu, "why_not", lambda name, case: "" if name in ("eager", "products") else "left out"
    )
    monkeypatch.setattr(gpu, "graph_of", graph_of)
    monkeypatch.setattr(gpu, "CUDA", True)
    turns = []
    turn = gpu.Entrant.turn
    monkeypatch.setattr(
        gpu.Entrant, "turn", lambda self, of: (turns.append((of[0], self.name)), turn(self, of))[1]
    )
    rows = [row for row in gpu.measure_case(CASE, 0.001) if row.contender in ("eager", "products")]

    both = "graph_forward_backward"
    assert [name for operation, name in turns if operation == both] == ["eager", "products"] * gpu.TURNS
    by_name = {(row.contender, row.operation): row for row in rows}
    assert len(by_name) == len(rows) == 2 * 5
    assert by_name["products", both].timing.rounds == gpu.TURNS
    assert by_name["eager", both].timing.min_s < by_name["eager", "forward_backward"].timing.min_s
    failed = by_name["eager", "graph_forward"]
    assert failed.timing is None and failed.note.startswith("as a graph: RuntimeError: operation not")
    assert by_name["products", "graph_forward"].timing is not None


def test_what_cannot_be_prepared_is_reported_for_every_contender(monkeypatch):
    monkeypatch.setattr(bench_sampled_softmax, "linear_problem", out_of_memory_problem)
    rows = list(gpu.measure_case(LINEAR_CASE, 0.001))
    assert [row.contender for row in rows] == list(gpu.contenders(LINEAR_CASE))
    assert {"ours", "liger", "cce", "quack", "products"} <= {row.contender for row in rows}
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
        row(both, "products", 0.006),
        row(both, "eager", 0.1),
        row(both, "compile", 0.03),
        row(both, "ours_gather", 0.04),
        row(both, "eager_gather", 0.2),
        row(graph, "ours", 0.01),
        row(graph, "products", 0.009),
        row(graph, "eager", 0.03),
    ]
    table = gpu.table(rows, device)
    assert [group.title for group in table.groups] == [
        "float32, with backward, as called",
        "float32, with backward, as a graph",
    ]
    called, as_graph = (group.lines[0] for group in table.groups)
    ours = ["32, 100, 64", "0.020", "30%", "25%", "50%"]
    assert called[:13] == [*ours, "5.00", "1.50", "–", "–", "–", "–", "–", "–"]
    assert called[13:17] == ["11,318", "0.040", "5.00", "–"]
    assert called[-2:] == [f"{(inputs + gradients) // 10 / 2**20:.2f}", "64.0"]
    assert as_graph[1:3] == ["0.010", "90%"] and as_graph[5] == "3.00" and as_graph[-2:] == ["–", "–"]
    assert len(called) == len(as_graph) == len(table.header)
    assert [(panel.ours, len(panel.rows)) for panel in gpu.panels(rows)] == [
        ("ours", 6),
        ("ours_gather", 2),
        ("ours", 3),
    ]


def test_lines_are_by_shape_in_whatever_order_they_were_measured():
    device = Device("G", "1", "2", "3", {"float32": 1.0}, 1.0)
    rows = [dataclasses.replace(row("forward", "ours", 1.0), shape=(B, 5, 16, 9)) for B in (256, 32)]
    lines = gpu.table(rows, device).groups[0].lines
    assert [line[0] for line in lines] == ["32, 5, 16", "256, 5, 16"]
    rows = [dataclasses.replace(row, operation="forward_backward") for row in rows]
    assert gpu.panels(rows)[0].shapes == [(32, 5, 16, 9), (256, 5, 16, 9)]


def test_a_chunk_may_take_64_mib_or_3_percent():
    assert gpu_table.chunk_bytes(2 * 2**30) == 64 * 2**20  # 3%: 61.4 MiB
    assert gpu_table.chunk_bytes(4 * 2**30) == int(0.03 * 4 * 2**30)  # 122.9 MiB
