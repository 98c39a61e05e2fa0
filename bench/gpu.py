"""The loss on a GPU beside what one would use instead: `python -m fedss_kernels.bench.gpu`.

First ours is checked against float64 at every shape; a wrong result stops the run. Then the contenders are
timed in turns as they are called, between events around the call, and but for the largest again as replays
of a CUDA graph; what one raises is reported, and the run goes on. It prints what time it plans to take, and
begins no contender after --minutes. Without a GPU the kernels are interpreted, on tiny shapes: that shows
that every part runs, and the times mean nothing.

On a machine with a GPU, all there is to say of it in 15 minutes, from the repository's root:

    python -m fedss_kernels.bench.gpu --tests tests --out runs/bench-gpu

first runs the tests that need a GPU, for 6 minutes at most, then this for 8. DIR then has the tests' output,
tests.txt, and the tables as .csv and .md with the GPU's name, a plot and the device's limits beside them.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..federated.cli.options import read_shapes
from . import bench_sampled_softmax as loss_bench
from .bench_sampled_softmax import (
    LOSS_TOLERANCE,
    OURS,
    Problem,
    Results,
    Shape,
    dtype_name,
    gradients,
    on_rows,
)
from .device import CUDA, GRAPH_CALLS, TURNS, Stopwatch, graph_of, measure_device, peak_bytes
from .gpu_cases import (
    CASES,
    CONTENDERS,
    INTERPRETED_CASES,
    LIBRARIES,
    QUICK_CASES,
    Case,
    contenders,
    stages,
    why_not,
)
from .gpu_table import NO_DEVICE, panels, table, title
from .measure import Timing
from .report import Plan, Report
from .results import Mismatch, Row, milliseconds

TEST_MINUTES = 6

# ---- the checks --------------------------------------------------------------------------------------------

GRADIENT_TOLERANCE = 0.1  # of contenders, in the norm: that it is the same gradient at all
FEWEST_ROWS = 256


def check(case: Case) -> None:
    """Raises Mismatch unless ours is right. With fewer rows where float64 would not fit in memory."""
    B, S, D, C = case.shape
    if CUDA:
        torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] if CUDA else math.inf
    while B > FEWEST_ROWS and 8 * (6 * B * S + 4 * (B + S) * D) > free / 2:
        B //= 2
    case = case._replace(shape=Shape(B, S, D, C))
    loss_bench.check(case.shape, case.problem(), [name for name in OURS if name in contenders(case)])


def check_rival(name: str, p: Problem, right: Results) -> None:
    """Raises Mismatch unless it computes about what ours does, which was checked."""
    c = CONTENDERS[name]
    if c.loss is None:
        return
    loss, to_input, to_matrix = gradients(c.loss, p, c.over)
    value, expected = loss.item(), right[0].item()
    if not abs(value - expected) <= LOSS_TOLERANCE[p.input.dtype] * (1 + abs(expected)):
        raise Mismatch(f"its loss is {value:.6g} instead of {expected:.6g}")
    got = {"input": to_input, "weight": on_rows(name, p, to_matrix)}
    for (of, gradient), truth in zip(got.items(), right[1:], strict=True):
        error = ((gradient.float() - truth.float()).norm() / truth.float().norm()).item()
        if not error <= GRADIENT_TOLERANCE:
            raise Mismatch(f"its gradient to {of} is off by {error:.1%}")


# ---- the time it takes -------------------------------------------------------------------------------------

# Seconds allowed for a contender's first calls at a case, most of them a compiler's, and for a case's checks
# and graphs. Allowances, generous ones, not measurements.
FIRST_CALLS = {"compile": 8.0, "ours": 5.0, "ours_gather": 3.0, **dict.fromkeys(LIBRARIES, 25.0)}
OTHER_FIRST_CALLS, CASE_SECONDS = 0.5, 4.0
LAST_SECONDS = 20  # of the minutes given, for the turns of what has begun, the tables and the plot


class Budget:
    """What a run at these cases takes."""

    def __init__(self, cases: Sequence[Case], seconds: float):
        """seconds: for each timing."""
        running = [(case, name) for case in cases for name in contenders(case) if not why_not(name, case)]
        self.cases, self.contenders = len(cases), len(running)
        self.timings = sum(len(TIMED) if CUDA and case.graphed else len(CALLED) for case, _ in running)
        self.timed = self.timings * seconds
        allowed = (FIRST_CALLS.get(name, OTHER_FIRST_CALLS) for _, name in running)
        self.allowed = len(cases) * CASE_SECONDS + sum(allowed)

    def __str__(self) -> str:
        return (
            f"{self.cases} cases, {self.contenders} contenders, "
            f"{self.timings} measurements in {TURNS} turns: {self.timed:.0f} s; "
            f"allowed for compilers, first calls and checks: {self.allowed:.0f} s; "
            f"in all {(self.timed + self.allowed) / 60:.1f} minutes"
        )


# ---- measuring ---------------------------------------------------------------------------------------------


def measure(plan: Plan, ends: float = math.inf) -> Iterator[Row]:
    """Every case is checked before the first one is timed.

    ends: of the time for it, by time.monotonic(): no contender begins later.
    """
    cases = cases_of(plan)
    for number, case in enumerate(cases, 1):
        plan.progress(f"check {number}/{len(cases)}: {case}")
        check(case)
    for number, case in enumerate(cases, 1):
        plan.progress(f"timing {number}/{len(cases)}: {case}")
        if CUDA:
            torch.compiler.reset()  # compiled code is one shape's; there is a limit to how many are kept
        for row in measure_case(case, plan.seconds, ends):
            median = None if row.timing is None else row.timing.median_s
            if row.operation.endswith("forward_backward"):  # should the run be cut short, these are left
                plan.progress(f"  {row.operation} {row.contender}: {milliseconds(median)} ms {row.note}")
            yield row


def cases_of(plan: Plan) -> list[Case]:
    if plan.shapes:
        return [
            Case(Shape(*sizes), dtype) for sizes in plan.shapes for dtype in (torch.float32, torch.bfloat16)
        ]
    return (QUICK_CASES if plan.quick else CASES) if CUDA else INTERPRETED_CASES


def measure_case(case: Case, seconds: float, ends: float = math.inf) -> Iterator[Row]:
    """Every contender's rows, or a row that says why there are none."""

    def prepare() -> tuple[Problem, Results]:
        p = case.problem()
        loss, *others = gradients(loss_bench.ours, p, "rows")
        return p, (loss.detach(), *others)

    def late() -> str:
        return "the minutes given were over" if time.monotonic() > ends else ""

    prepared, failure = (None, late()) if late() else attempt(prepare)
    entered: dict[str, tuple[Entrant | None, str]] = {}
    for name in contenders(case):
        note = failure or why_not(name, case) or late()
        enter = functools.partial(Entrant, case, name, prepared, seconds)
        entered[name] = (None, note) if note else attempt(enter)
    running = [entrant for entrant, _ in entered.values() if entrant is not None]
    for operations, _, entrant in itertools.product(TIMED, range(TURNS), running):
        entrant.turn(operations)
    for name, (entrant, note) in entered.items():
        if entrant is None:
            yield _row(case, name, "forward_backward", None, note=note)
        else:
            yield from entrant.rows()


# What is timed together: operations that are the stages of one call.
BOTH, STAGES = ("forward_backward",), ("forward", "backward")
GRAPH_OF_BOTH, GRAPH_OF_FORWARD = ("graph_forward_backward",), ("graph_forward",)
CALLED = (BOTH, STAGES)
TIMED = (*CALLED, GRAPH_OF_BOTH, GRAPH_OF_FORWARD)


class Entrant:
    """A contender at one case, checked and warm."""

    def __init__(self, case: Case, name: str, prepared: tuple[Problem, Results], seconds: float):
        p, right = prepared
        if name not in OURS:
            check_rival(name, p, right)
        self.case, self.name = case, name
        forward, backward = stages(CONTENDERS[name], p)

        def step(_: None = None) -> object:
            return backward(forward(None))

        self.watches: dict[tuple[str, ...], Stopwatch] = {
            BOTH: Stopwatch(seconds, step),
            STAGES: Stopwatch(seconds, forward, backward),
        }
        self.notes: dict[tuple[str, ...], str] = {}  # why there are no times
        self.peak = peak_bytes(step)
        if CUDA and case.graphed:
            self._add_graphs(p, seconds)

    def _add_graphs(self, p: Problem, seconds: float) -> None:
        # Leaves of their own: what autograd remembers of the stream of earlier calls would break the capture.
        leaves = {of: getattr(p, of).detach().requires_grad_() for of in ("input", "rows", "weight")}
        forward, backward = stages(CONTENDERS[self.name], p._replace(**leaves))
        calls = {GRAPH_OF_BOTH: lambda: backward(forward(None)), GRAPH_OF_FORWARD: lambda: forward(None)}
        for operations, call in calls.items():
            graph, note = attempt(functools.partial(graph_of, call))
            if note:
                self.notes[operations] = f"as a graph: {note}"
            else:
                self.watches[operations] = Stopwatch(seconds, lambda _, graph=graph: graph.replay())

    def turn(self, operations: tuple[str, ...]) -> None:
        if operations in self.watches and operations not in self.notes:
            _, note = attempt(self.watches[operations].turn)
            if note:
                self.notes[operations] = note

    def rows(self) -> Iterator[Row]:
        for operations in TIMED:
            if operations in self.notes:
                yield _row(self.case, self.name, operations[0], None, note=self.notes[operations])
            elif operations in self.watches:
                for operation, spans in zip(operations, self.watches[operations].seconds, strict=True):
                    if operation.startswith("graph"):
                        spans = [span / GRAPH_CALLS for span in spans]
                    peak = self.peak if operation == "forward_backward" else None
                    yield _row(self.case, self.name, operation, spans, peak)


def attempt(run: Callable[[], Any]) -> tuple[Any, str]:
    """(what it returns, ""), or (None, why it failed)."""
    try:
        return run(), ""
    except torch.OutOfMemoryError:
        note = "out of memory"
    except Exception as error:
        note = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:160]}"
    if CUDA:
        with contextlib.suppress(RuntimeError):  # after an error that the device does not recover from
            gc.collect()
            torch.cuda.empty_cache()
    return None, note


def _row(
    case: Case, name: str, operation: str, spans: list[float] | None, peak: int | None = None, note: str = ""
) -> Row:
    timing = None if spans is None else Timing.of(spans)
    return Row(case.shape, operation, dtype_name(case.dtype), name, timing, peak, note)


# ---- the command -------------------------------------------------------------------------------------------


def run_tests(tests: Path, out: Path) -> tuple[bool, str]:
    """(whether `pytest -m gpu` of `tests` passed, what it said in the end). Its output goes to `out`."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--durations=10", str(tests)]
    with out.open("w", encoding="utf-8") as file:
        try:
            code = subprocess.run(command, stdout=file, stderr=file, timeout=60 * TEST_MINUTES).returncode
        except subprocess.TimeoutExpired:
            return False, f"stopped after {TEST_MINUTES} minutes"
    lines = out.read_text(encoding="utf-8").split("\n")
    return code == 0, next((line.strip("= ") for line in reversed(lines) if line), "no output")


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parse(arguments)
    if not CUDA:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels import triton
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")  # infinities on purpose
    given.out.mkdir(parents=True, exist_ok=True)
    passed, remarks = True, []
    if given.tests is not None:
        progress(f"pytest -m gpu, at most {TEST_MINUTES} minutes")
        passed, said = run_tests(given.tests, given.out / "tests.txt")
        remarks.append(f"pytest -m gpu: {said}")
        progress(remarks[0])
    begun = time.monotonic()
    plan = Plan(given.quick, given.shapes, seconds=given.seconds, progress=progress)
    progress(f"{Budget(cases_of(plan), plan.seconds)}, of {given.minutes:g}")
    progress("the device's own limits" if CUDA else NO_DEVICE)
    device = measure_device(plan.seconds)
    name = re.sub(r"[^a-z0-9]+", "-", device.model.lower()).strip("-")
    timed = functools.partial(measure, ends=begun + 60 * given.minutes - LAST_SECONDS)
    shown = functools.partial(table, remarks=remarks)
    report = Report(name, title(), Shape._fields, list(CONTENDERS), timed, shown, panels)
    try:
        report.produce(plan, device, given.out)
    except Mismatch as wrong:
        print(f"bench.gpu: wrong result, nothing is timed: {wrong}", file=sys.stderr)
        return 1
    (given.out / f"{name}.json").write_text(json.dumps(dataclasses.asdict(device), indent=2) + "\n")
    print(f"{given.out / name}.csv, .md, .png, .json")
    progress(f"{(time.monotonic() - begun) / 60:.1f} minutes")
    return 0 if passed else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fedss_kernels.bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="two shapes instead of all")
    parser.add_argument(
        "--shapes",
        type=read_shapes,
        metavar="BxSxDxC,...",
        help="these instead, each in float32 and in bfloat16",
    )
    parser.add_argument("--seconds", type=float, default=0.1, help="for each timing (default 0.1)")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="after which nothing more begins (default 8)"
    )
    parser.add_argument("--tests", type=Path, metavar="DIR", help="first run the tests there that need a GPU")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-gpu"), metavar="DIR")
    given = parser.parse_args(arguments)
    for name in ("seconds", "minutes"):
        if not getattr(given, name) > 0:
            parser.error(f"--{name}: expected more than 0, got {getattr(given, name):g}")
    for sizes in given.shapes or ():
        if len(sizes) != len(Shape._fields):
            parser.error(f"--shapes: expected BxSxDxC, got {'x'.join(map(str, sizes))!r}")
    if given.tests is not None and not given.tests.is_dir():
        parser.error(f"--tests: expected a folder of tests, found none at {given.tests}")
    return given


def progress(line: str) -> None:
    print(f"bench.gpu: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
