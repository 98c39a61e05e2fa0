"""What share of a model its class matrix is, over C and D, and what FedSS saves: Fig. 8 of the FedSS paper.

    share = C D / (P + C D),  saved = (C - |S_k|) D / (P + C D)      P: parameters of the extractor, at this D

Numbers that travel in one direction; the ids, 8 bytes a row, are in a run's ledger.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from ..models import build_model
from ..reports.measured import write_figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# C, the paper's |S_k| in its summary of savings, and what it says is saved at D = 64 and 1280 (section 4.3)
PAPER = {
    "Landmarks-User-160k": (2028, 170, {64: 0.0338, 1280: 0.38}),
    "SOP": (11_318, 100, {64: 0.16, 1280: 0.79}),
    "ImageNet-21k": (21_841, 820, {}),
}

WORDS = (
    "A model is a net, the extractor, that maps an image to an embedding of D numbers, and a class "
    "matrix, D numbers for each of C classes. The share is the class matrix' of all the numbers. Saved is"
    " what a client need not load that gets the rows of |S_k| classes instead of all, again of all the "
    "numbers; beside it what the FedSS paper says."
)


@dataclass(frozen=True)
class Line:
    data: str
    num_classes: int  # C
    embedding_dim: int  # D
    extractor: int  # P
    class_matrix: int  # C D
    share: float
    class_set: int  # |S_k|
    saved: float
    paper_saved: float | None


def measure(model: str, dims: Sequence[int]) -> list[Line]:
    """A line for each of the paper's data sets and each D."""
    lines = []
    for dim in dims:
        extractor = num_parameters(model, dim)
        for data, (classes, class_set, saved) in PAPER.items():
            matrix = classes * dim
            whole = extractor + matrix
            saving = (classes - class_set) * dim / whole
            of_paper = saved.get(dim)
            lines.append(
                Line(data, classes, dim, extractor, matrix, matrix / whole, class_set, saving, of_paper)
            )
    return lines


def num_parameters(model: str, embedding_dim: int) -> int:
    return sum(p.numel() for p in build_model(model, embedding_dim, seed=0).parameters())


def write(out: Path, model: str, lines: Sequence[Line]) -> str:
    """parameters.csv, parameters.md, parameters.png, a section of report.html; returns the table's text."""
    every = [[field.name for field in fields(Line)], *map(astuple, lines)]
    header = ["data", "C", "D", "extractor", "class matrix", "share", "|S_k|", "saved", "the paper's"]
    rows = []
    for line in lines:
        of_paper = "–" if line.paper_saved is None else f"{100 * line.paper_saved:.3g}%"
        counts = [f"{n:,}" for n in (line.num_classes, line.embedding_dim, line.extractor, line.class_matrix)]
        shares = _percent(line.share), f"{line.class_set:,}", _percent(line.saved), of_paper
        rows.append([line.data, *counts, *shares])
    dims = sorted({line.embedding_dim for line in lines})
    title = f"The class matrix' share of {model}"
    return write_figures(out, "parameters", every, lambda: _plot(model, dims), title, WORDS, header, rows)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _plot(model: str, dims: Sequence[int]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.add_subplot()
    classes = [round(10 ** (2 + step / 8)) for step in range(33)]  # a hundred to a million
    for dim in dims:
        extractor = num_parameters(model, dim)
        axes.plot(classes, [100 * c * dim / (extractor + c * dim) for c in classes], label=f"D = {dim:,}")
    for name, (count, _, _) in PAPER.items():
        axes.axvline(count, color="grey", linewidth=0.8, linestyle=":")
        above = axes.get_xaxis_transform()  # y: a share of the height
        axes.text(count, 1.02, name, transform=above, rotation=20, fontsize=8, color="grey")
    axes.set(xscale="log", xlabel="classes C", ylabel="class matrix, % of the parameters", ylim=(0, 100))
    axes.legend(title=model, loc="upper left")
    axes.grid(alpha=0.4)
    return figure
