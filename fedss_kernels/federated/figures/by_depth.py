"""What the nets of several runs are worth at several depths: means over seeds, beside the nets at random."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...plotting import as_it_is
from ..config import Config
from ..measures import MEASURES, Measure
from ..probes import Line
from ..reports.mean_sd import mean_sd
from ..reports.measured import write_figures
from ..reports.styles import styles
from .probe import RANDOM, TRAINED, lost

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "What the features of the nets are worth, block by block"
WORDS = (
    "The features of each run's net after so many of its blocks, means ± standard deviations over the seeds, "
    "and of the same nets as they are drawn from the seeds, at random: training added the difference. "
)


@dataclass(frozen=True)
class Probed:
    """A net of a seed: a run's, or one at random."""

    label: str
    method: str  # "": at random
    seed: int
    lines: Sequence[Line]  # one for each depth

    @classmethod
    def of(cls, config: Config, label: str, lines: Sequence[Line], random: str = RANDOM) -> list["Probed"]:
        """A run's net, and if it was measured the one at random, which is called `random`."""
        named = {TRAINED: (label, config.method), RANDOM: (random, "")}
        there = dict.fromkeys(line.weights for line in lines)
        return [
            cls(*named[weights], config.seed, [line for line in lines if line.weights == weights])
            for weights in there
        ]


def write(out: Path, probed: Sequence[Probed]) -> str:
    """by_depth.csv, by_depth.md, by_depth.png and a section of report.html; returns the table's text.

    The table and the plot have the first of what was measured, the file all of it.
    """
    names = list(probed[0].lines[0].measured)
    measure = MEASURES[names[0]]
    cells = [[p.label, p.seed, x.depth, *x.measured.values(), x.not_finite] for p in probed for x in p.lines]
    depths = list(dict.fromkeys(line.depth for p in probed for line in p.lines))
    header = [f"{measure.column} after block", *map(str, depths), "seeds"]
    rows = list[list[str]]()
    for label in _labels(probed):
        own = [p for p in probed if p.label == label]
        rows.append([label, *(_mean(own, depth, measure) for depth in depths), str(len(own))])
    figures: list[Sequence[object]] = [["net", "seed", "depth", *names, "not_finite"], *cells]
    words = f"{WORDS}{measure.label}: {measure.meaning}."
    if words_on_lost := lost([line for p in probed for line in p.lines]):
        words += f" {words_on_lost}."
    return write_figures(out, "by_depth", figures, lambda: plot(probed), TITLE, words, header, rows)


def _labels(probed: Sequence[Probed]) -> dict[str, str]:
    """With their methods, the net at random last."""
    return {p.label: p.method for p in sorted(probed, key=lambda p: not p.method)}


def _values(probed: Sequence[Probed], depth: int, name: str) -> list[float]:
    return [line.measured[name] for p in probed for line in p.lines if line.depth == depth]


def _mean(probed: Sequence[Probed], depth: int, measure: Measure) -> str:
    values = _values(probed, depth, measure.name)
    if not values:  # a net of fewer blocks
        return "–"
    mean, sd = mean_sd(values)
    return measure.figure(mean) + ("" if sd is None else f" ± {measure.figure(sd)}")


def plot(probed: Sequence[Probed]) -> "Figure":
    """A line for each method, with a bar of a standard deviation to each side, and a dashed one at random."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    measure = MEASURES[next(iter(probed[0].lines[0].measured))]
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    labels = _labels(probed)
    colours = iter(styles([method for method in labels.values() if method]))
    for label, method in labels.items():
        own = [p for p in probed if p.label == label]
        depths = sorted({line.depth for p in own for line in p.lines})
        found = [mean_sd([100 * v for v in _values(own, depth, measure.name)]) for depth in depths]
        look: dict[str, Any] = (
            {**next(colours)} if method else {"color": "gray", "linestyle": "--", "marker": "o"}
        )
        means, bars = [mean for mean, _ in found], [sd or 0.0 for _, sd in found]
        axes.errorbar(depths, means, bars, label=as_it_is(label), capsize=2, markersize=5, **look)
    axes.set(xlabel="after so many blocks of the net", ylabel=measure.axis)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.4)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure
