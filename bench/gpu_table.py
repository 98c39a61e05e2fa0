"""The GPU benchmark's table and plot."""

import itertools
from collections.abc import Sequence

import torch

from .device import CUDA, Device
from .gpu_cases import CONTENDERS, GATHERING, ON_ROWS, versions
from .plot import Panel
from .results import (
    Figures,
    Group,
    Row,
    Table,
    decimal,
    mebibytes,
    milliseconds,
    numbers,
    quotient,
    share,
)

MEANINGLESS = "kernels interpreted on a CPU, whose times mean nothing"
NO_DEVICE = f"No GPU here: {MEANINGLESS}. They show that every part of this runs, no more."

# What a call may take beyond inputs and gradients, the compact rows of a gathering one aside: for its chunk.
# Promised by the design, so not asked of what is measured.
CHUNK_BYTES, CHUNK_SHARE = 64 * 2**20, 0.03  # at least, and of the inputs' and gradients' bytes

# What is timed: its title, and its part of what forward and backward are: three products and three passes.
OPERATIONS = {
    "forward_backward": ("with backward, as called", 3),
    "graph_forward_backward": ("with backward, as a graph", 3),
    "forward": ("forward, as called", 1),
    "graph_forward": ("forward, as a graph", 1),
    "backward": ("backward, as called", 2),
}
HEADER = (
    *("B, S, D", "rows\nms", "prod-\nucts", "of mm\nrate", "of\ncopies", *ON_ROWS.values()),
    *("C", "gather\nms", *GATHERING.values()),
    *("ours\nMiB", "gather\nMiB", "eager\nMiB", "beyond\nMiB", "chunk\nMiB"),
)
NOTES = (
    "rows: on the (S, D) rows, already gathered; gather: from all C rows, with a sparse gradient. C = S > B: "
    "a linear layer's cross-entropy, dot products without a correction; C = S = B: contrastive pairs in a "
    "batch, cosines without one; else FedSS' corrected cosines.",
    "products: the share of ours that is the time of its matrix products alone, the roofline: torch.mm of "
    "input and rows (forward), of a matrix like the softmax and each of them (backward), operands in the "
    "dtype, results in float32 where torch makes them so, in turns with the rest.",
    "The columns named after others are their times divided by the ms before them: eager PyTorch, "
    "torch.compile of that, F.linear_cross_entropy (at FedSS' loss on normalised inputs), the same in "
    "chunks; Liger, Cut Cross-Entropy and QuACK (a linear layer's alone), memeff (pairs in a batch alone, as "
    "its loss is of as many rows as targets, each row's own); eager PyTorch that gathers, with a dense and a "
    "sparse gradient.",
    "CCE, by PyPI's 25.1.1 and by its git head alike: the mean over rows that count; a tile in which softmax "
    "and one-hot differ by less than the dtype's epsilon / 32 (2^-12 in bfloat16) adds nothing to gradients; "
    "these are added up in the dtype, in no fixed order. The head alone goes backward in float32, and has "
    'impl="cce_exact": no tile skipped, float32 sums.',
    "QuACK keeps logits, or their exponentials, of 4,096 rows in memory; memeff multiplies float32 as tf32.",
    "as called: medians between events around a call, the host's share included. as a graph: replays of a "
    "CUDA graph, the device's share alone. Caches are warm in both, and contenders take turns. forward is "
    "that of training, in which some make the gradients too, as ours may of a large problem.",
    "of mm rate: 2·B·S·D operations forward, 6·B·S·D with backward, over the time, against a large torch.mm "
    "(float32 without tf32); of copies: input and rows read in each direction and gradients written, against "
    "a large copy.",
    "MiB: peak memory that a call with backward adds to its inputs, gradients among it. beyond: what ours "
    "adds on rows besides gradients; chunk: what it may, 64 MiB or 3% of inputs and gradients, the larger.",
)


def table(rows: Sequence[Row], device: Device, remarks: Sequence[str] = ()) -> Table:
    """remarks: of the run, first among the notes."""
    figures = Figures(rows)
    groups = []
    for dtype, operation in itertools.product(dict.fromkeys(row.dtype for row in rows), OPERATIONS):
        shapes = sorted(figures.shapes(operation, dtype))  # they are measured in another order
        lines = [_line(figures, device, shape, operation, dtype) for shape in shapes]
        if lines:
            groups.append(Group(f"{dtype}, {OPERATIONS[operation][0]}", lines))
    installed = ", ".join(f"{package} {version}" for package, version in versions().items())
    own = [*([] if CUDA else [NO_DEVICE]), *remarks, *([f"Installed: {installed}."] if installed else [])]
    return Table(title(), HEADER, groups, [*own, *NOTES, *figures.remarks()])


def title() -> str:
    return "Sampled-softmax loss on a GPU" if CUDA else f"Sampled-softmax loss, {MEANINGLESS}"


def _line(figures: Figures, device: Device, shape: tuple[int, ...], operation: str, dtype: str) -> list[str]:
    B, S, D, C = shape
    parts, elements, size = OPERATIONS[operation][1], (B + S) * D, getattr(torch, dtype).itemsize

    def seconds(name: str) -> float | None:
        return figures.seconds(shape, operation, dtype, name)

    own, gather = seconds("ours"), seconds("ours_gather")
    peaks = {name: figures.peak_bytes(shape, operation, dtype, name) for name in CONTENDERS}
    gradients = size * elements
    inputs = gradients + 8 * B + 4 * S  # targets and corrections among them
    beyond = None if peaks["ours"] is None else peaks["ours"] - gradients
    return [
        numbers((B, S, D)),
        milliseconds(own),
        share(seconds("products"), own),
        share(quotient(2 * parts * B * S * D, own), device.mm_flops[dtype]),
        share(quotient(parts * size * elements, own), device.copy_bytes),
        *(decimal(quotient(seconds(name), own)) for name in ON_ROWS),
        numbers((C,)) if C < 10**6 else f"{C / 1e6:g}M",
        milliseconds(gather),
        *(decimal(quotient(seconds(name), gather)) for name in GATHERING),
        *(mebibytes(peaks[name]) for name in ("ours", "ours_gather", "eager")),
        mebibytes(beyond),
        mebibytes(None if beyond is None else chunk_bytes(inputs + gradients)),
    ]


def chunk_bytes(inputs_and_gradients: int) -> int:
    return max(CHUNK_BYTES, int(CHUNK_SHARE * inputs_and_gradients))


def panels(rows: Sequence[Row]) -> list[Panel]:
    """For the plot: forward and backward on rows, as called and as graphs, and gathering, as called."""
    found = []
    rows = sorted(rows, key=lambda row: row.shape)
    on_rows = {"products": "products alone", **ON_ROWS}
    for dtype, operation in itertools.product(dict.fromkeys(row.dtype for row in rows), list(OPERATIONS)[:2]):
        of = [row for row in rows if (row.operation, row.dtype) == (operation, dtype)]
        title = f"{dtype}, {OPERATIONS[operation][0]}"
        found.append(Panel(f"rows: {title}", of, "ours", on_rows))
        gathering = [row for row in of if row.contender in ("ours_gather", *GATHERING)]
        if operation == "forward_backward":
            found.append(Panel(f"gather: {title}", gathering, "ours_gather", GATHERING))
    return [panel for panel in found if panel.rows]
