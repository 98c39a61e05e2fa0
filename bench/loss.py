"""One report for the loss, against the FMA peak."""

import itertools
from collections.abc import Sequence

from .bench_sampled_softmax import CONTENDERS, DIRECTIONS, Shape, measure
from .machine import Machine
from .plot import Panel
from .report import Report
from .results import Figures, Group, Row, Table, decimal, mebibytes, milliseconds, numbers, quotient, share

# What is timed on rows already gathered, and gathering: the heads of its columns.
ON_ROWS = {"eager": "eager", "compile": "compile", "lce": "LCE", "lce_chunked": "LCE\nchunks", "mm": "mm"}
GATHERING = {"eager_gather": "eager", "eager_gather_sparse": "eager\nsparse", "dense": "dense"}
TITLES = {"forward_backward": "with backward", "forward": "forward only"}
HEADER = (
    *("B, S, D", "rows\nms", "GFLOP\n/s", "of\npeak", *ON_ROWS.values()),
    *("C", "gather\nms", *GATHERING.values(), "ours\nMiB", "eager\nMiB"),
)
NOTES = (
    "rows: on the (S, D) rows, already gathered; gather: from all C rows, with a sparse gradient.",
    "The columns after each are the times of others divided by it: eager PyTorch, torch.compile of that, "
    "F.linear_cross_entropy on normalised inputs (the correction as its bias, in the input's dtype), the "
    "same in chunks, the bare torch.mm of the same sizes (one forward, three with backward); "
    "eager PyTorch that gathers, with a dense and a sparse gradient, and the softmax over all C.",
    "GFLOP/s: 2·B·S·D operations forward, 6·B·S·D with backward; of peak: of the float32 FMA peak.",
    "MiB: peak memory that a call adds to its inputs, gather and eager gather, in a process of its own.",
)


def table(rows: Sequence[Row], machine: Machine) -> Table:
    figures = Figures(rows)
    groups = []
    for dtype, direction in itertools.product(dict.fromkeys(row.dtype for row in rows), TITLES):
        shapes = figures.shapes(direction, dtype)
        lines = [_line(figures, machine, shape, direction, dtype) for shape in shapes]
        groups.append(Group(f"{dtype}, {TITLES[direction]}", lines))
    return Table(REPORT.title, HEADER, groups, [*NOTES, *figures.remarks()])


def _line(
    figures: Figures, machine: Machine, shape: tuple[int, ...], direction: str, dtype: str
) -> list[str]:
    B, S, D, C = shape

    def seconds(name: str) -> float | None:
        return figures.seconds(shape, direction, dtype, name)

    def memory(name: str) -> str:
        return mebibytes(figures.peak_bytes(shape, direction, dtype, name))

    own, gather = seconds("ours"), seconds("ours_gather")
    flops = quotient(DIRECTIONS[direction] * B * S * D, own)
    return [
        numbers((B, S, D)),
        milliseconds(own),
        decimal(flops, 1e9),
        share(flops, machine.fma_flops),
        *(decimal(quotient(seconds(name), own)) for name in ON_ROWS),
        numbers((C,)) if C < 10**6 else f"{C / 1e6:g}M",
        milliseconds(gather),
        *(decimal(quotient(seconds(name), gather)) for name in GATHERING),
        memory("ours_gather"),
        memory("eager_gather"),
    ]


def panels(rows: Sequence[Row]) -> list[Panel]:
    """For the plot: forward and backward in float32, on rows and gathering."""
    of = [row for row in rows if (row.operation, row.dtype) == ("forward_backward", "float32")]
    return [
        Panel("on rows already gathered, float32, with backward", of, "ours", ON_ROWS),
        Panel("gathering from all C rows, float32, with backward", of, "ours_gather", GATHERING),
    ]


REPORT = Report(
    name="loss",
    title="Sampled-softmax loss",
    axes=Shape._fields,
    contenders=list(CONTENDERS),
    measure=measure,
    table=table,
    panels=panels,
    wanting=lambda shape: "" if shape[1] <= shape[3] else "S of at most C",
)
