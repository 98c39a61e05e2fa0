"""The loss on a GPU beside what one would use instead: `python -m fedss_kernels.bench.gpu`.

First ours is checked against float64 at every shape; a wrong result stops the run. Then the contenders are
timed in turns as they are called, between events around the call, and at small shapes again as replays of a
CUDA graph; what one raises is reported, and the run goes on. Without a GPU the kernels are interpreted, on
tiny shapes: that shows that every part runs, and the times mean nothing.
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
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import bench_sampled_softmax as loss_bench
from .bench_sampled_softmax import (
    LOSS_TOLERANCE,
    OURS,
    Contender,
    Problem,
    Results,
    Shape,
    contender,
    dtype_name,
    first_product,
    gradients,
    last_products,
    on_rows,
)
from .device import (
    CUDA,
    DEVICE,
    GRAPH_CALLS,
    TURNS,
    Device,
    Stage,
    Stopwatch,
    graph_of,
    measure_device,
    peak_bytes,
)
from .measure import Timing
from .plot import Panel
from .report import Plan, Report
from .results import (
    Figures,
    Group,
    Mismatch,
    Row,
    Table,
    decimal,
    mebibytes,
    milliseconds,
    numbers,
    quotient,
    share,
)

IMPL = "auto" if CUDA else "triton"  # as users call it; on a CPU that would be the C++ kernel
MEANINGLESS = "kernels interpreted on a CPU, whose times mean nothing"


class Case(NamedTuple):
    shape: Shape
    dtype: torch.dtype = torch.float32
    linear: bool = False  # dot products with all rows and no correction: the other libraries' loss

    def __str__(self) -> str:
        return f"{numbers(self.shape)}, {dtype_name(self.dtype)}"

    @property
    def small(self) -> bool:
        """Whether a call's own time counts, so that it is timed as a CUDA graph too."""
        return self.shape.B * self.shape.S <= 2**18

    def problem(self) -> Problem:
        make = loss_bench.linear_problem if self.linear else loss_bench.problem
        return make(self.shape, self.dtype, DEVICE, IMPL)


# Federated clients; larger batches, gathering from up to ten million classes; a language model's last layer.
CASES = [
    Case(Shape(32, 100, 64, 11_318)),
    Case(Shape(32, 170, 64, 2_028)),
    Case(Shape(32, 410, 64, 21_000)),
    Case(Shape(32, 820, 64, 1_000_000)),
    Case(Shape(32, 170, 1280, 2_028)),
    Case(Shape(32, 820, 1280, 21_000)),
    Case(Shape(256, 1024, 128, 1_000_000)),
    Case(Shape(256, 1024, 128, 1_000_000), torch.bfloat16),
    Case(Shape(1024, 8192, 64, 10_000_000)),
    Case(Shape(4096, 8192, 512, 1_000_000), torch.bfloat16),
    Case(Shape(4096, 128_256, 4096, 128_256), torch.bfloat16, linear=True),
]
QUICK_CASES = [CASES[0], CASES[9]]
INTERPRETED_CASES = [Case(Shape(3, 5, 16, 9)), Case(Shape(3, 7, 16, 7), linear=True)]

# ---- the contenders ----------------------------------------------------------------------------------------


def liger(p: Problem) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(p.input, p.rows, p.target)


def cce(p: Problem) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(p.input, p.rows, p.target)


ON_ROWS = {
    **{"eager": "eager", "compile": "compile", "lce": "LCE", "lce_chunked": "LCE\nchunks"},
    **{"liger": "Liger", "cce": "CCE", "mm": "mm"},
}
GATHERING = {"eager_gather": "eager", "eager_gather_sparse": "eager\nsparse"}
LIBRARIES = {"liger": contender(liger, "rows"), "cce": contender(cce, "rows")}  # of the linear loss alone
CONTENDERS = {
    name: LIBRARIES.get(name) or loss_bench.CONTENDERS[name]
    for name in ("ours", *ON_ROWS, "ours_gather", *GATHERING)
}


def contenders(case: Case) -> dict[str, Contender]:
    """Those that can express the case."""
    return {
        name: c
        for name, c in CONTENDERS.items()
        if (c.over == "rows" if case.linear else name not in LIBRARIES)
    }


def why_not(name: str, shape: Shape) -> str:
    if name == "compile":
        return "" if CUDA else "nothing is compiled where kernels are interpreted"
    return CONTENDERS[name].why_not(shape)


def stages(c: Contender, p: Problem) -> tuple[Stage, Stage]:
    """Forward and backward."""
    if c.loss is None:
        return lambda _: first_product(p), lambda _: last_products(p)
    loss, leaves = c.loss, (p.input, getattr(p, c.over))
    return lambda _: loss(p), lambda value: torch.autograd.grad(value, leaves)


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


# ---- measuring ---------------------------------------------------------------------------------------------


def measure(plan: Plan) -> Iterator[Row]:
    """Every case is checked before the first one is timed."""
    cases = (QUICK_CASES if plan.quick else CASES) if CUDA else INTERPRETED_CASES
    for number, case in enumerate(cases, 1):
        plan.progress(f"check {number}/{len(cases)}: {case}")
        check(case)
    for number, case in enumerate(cases, 1):
        plan.progress(f"timing {number}/{len(cases)}: {case}")
        if CUDA:
            torch.compiler.reset()  # compiled code is one shape's; there is a limit to how many are kept
        for row in measure_case(case, plan.seconds):
            median = None if row.timing is None else row.timing.median_s
            if row.operation.endswith("forward_backward"):  # should the run be cut short, these are left
                plan.progress(f"  {row.operation} {row.contender}: {milliseconds(median)} ms {row.note}")
            yield row


def measure_case(case: Case, seconds: float) -> Iterator[Row]:
    """Every contender's rows, or a row that says why there are none."""

    def prepare() -> tuple[Problem, Results]:
        p = case.problem()
        loss, *others = gradients(loss_bench.ours, p, "rows")
        return p, (loss.detach(), *others)

    prepared, failure = attempt(prepare)
    entered: dict[str, tuple[Entrant | None, str]] = {}
    for name in contenders(case):
        note = failure or why_not(name, case.shape)
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
TIMED = (BOTH, STAGES, GRAPH_OF_BOTH, GRAPH_OF_FORWARD)


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
        if CUDA and case.small:
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


# ---- the report --------------------------------------------------------------------------------------------

# What is timed: its title, and its part of what forward and backward are: three products and three passes.
OPERATIONS = {
    "forward_backward": ("with backward, as called", 3),
    "graph_forward_backward": ("with backward, as a graph", 3),
    "forward": ("forward, as called", 1),
    "graph_forward": ("forward, as a graph", 1),
    "backward": ("backward, as called", 2),
}
HEADER = (
    *("B, S, D", "rows\nms", "of mm\nrate", "of\ncopies", *ON_ROWS.values()),
    *("C", "gather\nms", *GATHERING.values()),
    *("ours\nMiB", "gather\nMiB", "eager\nMiB", "of inputs\n+ grads"),
)
NOTES = (
    "rows: on the (S, D) rows, already gathered; gather: from all C rows, with a sparse gradient. C = S: "
    "a linear layer's cross-entropy, dot products without a correction; else FedSS' corrected cosines.",
    "The columns after each are the times of others divided by it: eager PyTorch, torch.compile of that, "
    "F.linear_cross_entropy (at FedSS' loss on normalised inputs), the same in chunks, Liger and Cut "
    "Cross-Entropy (the linear loss alone), the bare torch.mm of the same sizes (one forward, two backward); "
    "eager PyTorch that gathers, with a dense and a sparse gradient.",
    "as called: medians between events around a call, the host's share included; forward is that of "
    "training. as a graph: replays of a CUDA graph, the device's share alone. Caches are warm in both, and "
    "contenders take turns.",
    "of mm rate: 2·B·S·D operations forward, 6·B·S·D with backward, over the time, against a large torch.mm "
    "(float32 without tf32); of copies: input and rows read in each direction and gradients written, against "
    "a large copy.",
    "MiB: peak memory that a call with backward adds to its inputs, gradients among it. of inputs + grads: "
    "what inputs and ours take together at its peak, of inputs and gradients alone.",
)
NO_DEVICE = f"No GPU here: {MEANINGLESS}. They show that every part of this runs, no more."


def table(rows: Sequence[Row], device: Device) -> Table:
    figures = Figures(rows)
    groups = []
    for dtype, operation in itertools.product(dict.fromkeys(row.dtype for row in rows), OPERATIONS):
        lines = [
            _line(figures, device, shape, operation, dtype) for shape in figures.shapes(operation, dtype)
        ]
        if lines:
            groups.append(Group(f"{dtype}, {OPERATIONS[operation][0]}", lines))
    notes = [*NOTES, *figures.remarks()]
    return Table(_title(), HEADER, groups, notes if CUDA else [NO_DEVICE, *notes])


def _title() -> str:
    return "Sampled-softmax loss on a GPU" if CUDA else f"Sampled-softmax loss, {MEANINGLESS}"


def _line(figures: Figures, device: Device, shape: tuple[int, ...], operation: str, dtype: str) -> list[str]:
    B, S, D, C = shape
    parts, elements, size = OPERATIONS[operation][1], (B + S) * D, getattr(torch, dtype).itemsize

    def seconds(name: str) -> float | None:
        return figures.seconds(shape, operation, dtype, name)

    own, gather = seconds("ours"), seconds("ours_gather")
    peaks = {name: figures.peak_bytes(shape, operation, dtype, name) for name in CONTENDERS}
    added, inputs = peaks["ours"], size * elements + 8 * B + 4 * S  # targets and corrections among them
    return [
        numbers((B, S, D)),
        milliseconds(own),
        share(quotient(2 * parts * B * S * D, own), device.mm_flops[dtype]),
        share(quotient(parts * size * elements, own), device.copy_bytes),
        *(decimal(quotient(seconds(name), own)) for name in ON_ROWS),
        numbers((C,)) if C < 10**6 else f"{C / 1e6:g}M",
        milliseconds(gather),
        *(decimal(quotient(seconds(name), gather)) for name in GATHERING),
        *(mebibytes(peaks[name]) for name in ("ours", "ours_gather", "eager")),
        share(None if added is None else inputs + added, inputs + size * elements),
    ]


def panels(rows: Sequence[Row]) -> list[Panel]:
    """For the plot: forward and backward on rows, as called and as graphs, and gathering, as called."""
    found = []
    for dtype, operation in itertools.product(dict.fromkeys(row.dtype for row in rows), list(OPERATIONS)[:2]):
        of = [row for row in rows if (row.operation, row.dtype) == (operation, dtype)]
        title = f"{dtype}, {OPERATIONS[operation][0]}"
        found.append(Panel(f"rows: {title}", of, "ours", ON_ROWS))
        gathering = [row for row in of if row.contender in ("ours_gather", *GATHERING)]
        if operation == "forward_backward":
            found.append(Panel(f"gather: {title}", gathering, "ours_gather", GATHERING))
    return [panel for panel in found if panel.rows]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fedss_kernels.bench.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two shapes instead of all")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each timing (default 0.2)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-gpu"), metavar="DIR")
    given = parser.parse_args(arguments)
    if not given.seconds > 0:
        parser.error(f"--seconds: expected more than 0, got {given.seconds:g}")
    if not CUDA:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels import triton
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")  # infinities on purpose

    def progress(line: str) -> None:
        print(f"bench.gpu: {line}", file=sys.stderr, flush=True)

    plan = Plan(quick=given.quick, seconds=given.seconds, progress=progress)
    progress("the device's own limits" if CUDA else NO_DEVICE)
    device = measure_device(plan.seconds)
    name = re.sub(r"[^a-z0-9]+", "-", device.model.lower()).strip("-")
    report = Report(name, _title(), Shape._fields, list(CONTENDERS), measure, table, panels)
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        report.produce(plan, device, given.out)
    except Mismatch as wrong:
        print(f"bench.gpu: wrong result, nothing is timed: {wrong}", file=sys.stderr)
        return 1
    (given.out / f"{name}.json").write_text(json.dumps(dataclasses.asdict(device), indent=2) + "\n")
    print(f"{given.out / name}.csv, .md, .png, .json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
