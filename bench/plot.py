"""The plot of a report: times relative to ours, a line for each shape and a mark for each contender."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..plotting import plotting
from .results import Figures, Row, numbers, quotient

COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),  # Okabe and Ito's
    *("#7F7F7F", "#8C510A"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")


@dataclass(frozen=True)
class Panel:
    """One pair of axes: the contenders, by the names they are shown under, relative to `ours`."""

    title: str
    rows: Sequence[Row]  # of one operation and dtype
    ours: str
    contenders: Mapping[str, str]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """In the order they were measured."""
        return list(dict.fromkeys(row.shape for row in self.rows))

    def points(self, contender: str) -> list[tuple[float, int]]:
        """(time relative to ours, number of the shape) wherever both were measured."""
        figures, found = Figures(self.rows), []
        for number, shape in enumerate(self.shapes):
            of = (shape, self.rows[0].operation, self.rows[0].dtype)
            relative = quotient(figures.seconds(*of, contender), figures.seconds(*of, self.ours))
            if relative is not None:
                found.append((relative, number))
        return found


@plotting()
def save_plot(path: Path, title: str, axes_names: Sequence[str], panels: Sequence[Panel]) -> None:
    """Marks to the right of the line at 1 are slower than ours, those to the left faster."""
    from matplotlib.figure import Figure

    lines = max(len(panel.shapes) for panel in panels)
    rows = 1 if len(panels) <= 4 else 2
    columns = math.ceil(len(panels) / rows)
    size = (1.5 + 5 * columns, 1 + rows * (1.6 + 0.3 * lines))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=11)
    parts = figure.subfigures(rows, columns, squeeze=False).flat
    for part, panel in zip(parts, panels, strict=False):  # the last place may stay empty
        axes = part.add_subplot()
        for i, (contender, label) in enumerate(panel.contenders.items()):
            if points := panel.points(contender):
                x, y = zip(*points, strict=True)
                axes.plot(x, y, MARKERS[i], color=COLOURS[i], label=label.replace("\n", " "), markersize=5)
        _style(axes, panel)
        axes.set_ylabel(", ".join(axes_names))
        if panel_labels := axes.get_legend_handles_labels()[0]:
            part.legend(handles=panel_labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def _style(axes, panel: Panel) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.axvline(1.0, color="#1c1e21", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8)
    axes.set_yticks(range(len(panel.shapes)), [numbers(shape) for shape in panel.shapes])
    axes.set_ylim(len(panel.shapes) - 0.5, -0.5)  # the first shape on top, as in the table
    axes.grid(color="#d9dce1", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel("time relative to ours (log scale)", fontsize=9)
