"""What runs' models are worth to their clients, side by side: over clients, and client by client."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...plotting import as_it_is
from ..reports.mean_sd import mean_sd
from ..reports.measured import all_written, write_figures
from ..reports.page import remove_section
from ..reports.parts_in_words import PERSONALISED
from ..reports.styles import styles
from .paired_differences import INTERVAL, Difference, Measured, by_method, differences

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATISTICS: dict[str, Callable[[Sequence[float]], float | None]] = {
    "mean": statistics.fmean,
    "sd": lambda values: mean_sd(values)[1],
    "min": min,
    "10%": lambda values: float(np.quantile(values, 0.1)),
    "max": max,
}
WORDS = (
    "The share of a client's own test images that the model names rightly, over clients: their mean, "
    "standard deviation, least, tenth percentile and most, in %. Initial: the model as it is, of all "
    "classes. Restricted: of the client's own classes alone, without training. Nearest mean: by the means "
    "of the embeddings of the client's training images of its classes. After E: as initial, after the "
    "client has fine-tuned {part} for E epochs on its training images at rate {rate}, with a loss over "
    "{rows}. Every client counts the same."
)
OF_DIFFERENCES = (
    "The difference between two methods' accuracies, in points of %, client by client: of each client the "
    "mean over the seeds that both have, then over clients its mean, the standard error of that, and the "
    "interval of {interval:.2f} standard errors on either side, 95% by the normal distribution. What other "
    "seeds would give is not in it."
)
ROWS_WORDS = {"all": "all classes", "own": "its own classes"}


def write(out: Path, found: Sequence[Measured]) -> str:
    """personalise.csv, a line for each run and client, a table with its plot, and a section of the report.

    The same as personalise_differences where there are two methods, a line for each two. Returns both tables'
    text; raises NotWritten, as write_figures does.
    """
    return all_written(lambda: _write_accuracies(out, found), lambda: _write_differences(out, found))


def _write_accuracies(out: Path, found: Sequence[Measured]) -> str:
    names = _names(found)
    tuning = found[0].tuning
    rates = " or ".join(dict.fromkeys(f"{each.tuning.rate:g}" for each in found))
    words = WORDS.format(part=PERSONALISED[tuning.part], rows=ROWS_WORDS[tuning.rows], rate=rates)
    title = "What the model is worth to a client, before and after it trains on its own images"
    header = ["", *(name.replace("_", " ") for name in names)]
    every = _every_accuracy(found)
    return write_figures(
        out, "personalise", every, lambda: _plot(found), title, words, header, _lines(found, names)
    )


def _every_accuracy(found: Sequence[Measured]) -> list[list[Any]]:
    of_run = ["run", "method", "seed", "part", "rate", "rows"]
    of_client = ["client", "images", "classes", "tested"]
    lines = [
        [run.run, run.method, run.seed, run.tuning.part, run.tuning.rate, run.tuning.rows]
        + [getattr(each, name) for name in of_client]
        + [*each.accuracies.values()]
        for run in found
        for each in run.people
    ]
    return [[*of_run, *of_client, *_names(found)], *lines]


def _write_differences(out: Path, found: Sequence[Measured]) -> str:
    apart, name = differences(found), "personalise_differences"
    if not apart:
        for kind in ("csv", "md", "png"):
            (out / f"{name}.{kind}").unlink(missing_ok=True)
        remove_section(out, name)
        return ""
    names = _names(found)
    every: list[list[Any]] = [
        ["first", "second", *(f"{name}{of}" for name in names for of in ("", "_standard_error"))]
    ]
    every += [[pair.first, pair.second, *(n for name in names for n in pair.of[name])] for pair in apart]
    title, words = "Methods apart, client by client", OF_DIFFERENCES.format(interval=INTERVAL)
    header = ["", *(name.replace("_", " ") for name in names)]
    plot = partial(_plot_differences, apart, found)
    return write_figures(out, name, every, plot, title, words, header, _lines_apart(apart, names))


def _names(found: Sequence[Measured]) -> list[str]:
    return [*found[0].people[0].accuracies]


# ---- tables


def _lines(found: Sequence[Measured], names: Sequence[str]) -> list[list[str]]:
    """For each run a line of each statistic; and for a method of several seeds their means."""
    lines = []
    for title, runs in by_method(found).items():
        tables = [
            {kind: [of(run.values(name)) for name in names] for kind, of in STATISTICS.items()}
            for run in runs
        ]
        titles = [f"{title}, seed {run.seed}" for run in runs] if len(runs) > 1 else [title]
        if len(runs) > 1:
            titles.append(f"{title}, mean of {len(runs)} seeds")
            tables.append({kind: _means([table[kind] for table in tables]) for kind in STATISTICS})
        lines += [
            [f"{each}: {kind}", *map(_percent, values)]
            for each, table in zip(titles, tables, strict=True)
            for kind, values in table.items()
        ]
    return lines


def _means(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    return [
        None if None in column else statistics.fmean(value for value in column if value is not None)
        for column in zip(*rows, strict=True)
    ]


def _percent(share: float | None) -> str:
    text = "–" if share is None else f"{100 * share:.1f}"
    return "0.0" if text == "-0.0" else text


def _lines_apart(apart: Sequence[Difference], names: Sequence[str]) -> list[list[str]]:
    lines = []
    for pair in apart:
        means, errors = zip(*(pair.of[name] for name in names), strict=True)
        sides = [None if error is None else INTERVAL * error for error in errors]
        rows = {
            "mean": means,
            "standard error": errors,
            "95% from": [None if s is None else m - s for m, s in zip(means, sides, strict=True)],
            "95% to": [None if s is None else m + s for m, s in zip(means, sides, strict=True)],
        }
        title = f"{pair.first} − {pair.second}"
        lines += [[f"{title}: {kind}", *map(_percent, values)] for kind, values in rows.items()]
    return lines


# ---- plots


def _looks(found: Sequence[Measured]) -> Mapping[str, dict[str, str]]:
    """How each of the groups is drawn."""
    groups = by_method(found)
    return dict(zip(groups, styles([runs[0].name for runs in groups.values()]), strict=True))


def _plot(found: Sequence[Measured]) -> "Figure":
    """Accuracy over epochs, a line for each method, the mean over clients and seeds; marks: untrained."""
    figure, axes = _figure("accuracy on its own test images (%, mean over clients)")
    epochs, looks = found[0].tuning.epochs, _looks(found)
    for title, runs in by_method(found).items():
        look = looks[title]

        def mean(name: str, runs: Sequence[Measured] = runs) -> float:
            return 100 * statistics.fmean(statistics.fmean(run.values(name)) for run in runs)

        axes.plot(epochs, [mean(f"after_{done}") for done in epochs], label=as_it_is(title), **look)
        for name, mark in _UNTRAINED.items():
            axes.plot(0, mean(name), color=look["color"], **mark)
    for name, mark in _UNTRAINED.items():
        axes.plot([], color="grey", label=name, **mark)
    axes.set_ylim(0, 100)
    return _with_legend(figure)


_MARK = {"markersize": 9, "fillstyle": "none", "linestyle": ""}
_UNTRAINED: dict[str, dict[str, Any]] = {
    "initial": {"marker": "o", **_MARK},
    "restricted": {"marker": "*", **_MARK},
}


def _plot_differences(apart: Sequence[Difference], found: Sequence[Measured]) -> "Figure":
    """Differences from the first method over epochs, with their intervals."""
    figure, axes = _figure("difference (points of %, mean over clients, 95%)")
    epochs, looks = found[0].tuning.epochs, _looks(found)
    shown = [pair for pair in apart if pair.first == apart[0].first]
    for pair in shown:
        means, errors = zip(*(pair.of[f"after_{done}"] for done in epochs), strict=True)
        axes.errorbar(
            epochs,
            [100 * mean for mean in means],
            [100 * INTERVAL * (error or 0.0) for error in errors],
            **looks[pair.second],
            capsize=3,
            label=as_it_is(f"{pair.first} − {pair.second}"),
        )
    axes.axhline(0, color="grey", linewidth=0.8)
    return _with_legend(figure)


def _figure(ylabel: str) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel="epochs of fine-tuning on the client's own images", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.4)
    return figure, axes


def _with_legend(figure: "Figure") -> "Figure":
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure
