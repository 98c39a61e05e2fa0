"""The plots of a report, for light paper and dark, and what is said below them."""

import dataclasses
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...plotting import as_it_is, plotting
from ..algorithms import METHODS
from ..disk import replacing
from ..files.round_metrics import RoundMetrics
from ..measures import MEASURES, Measure
from ..plan import Case
from .page import data_uri, png_of
from .reported_run import MEGABYTE, Run, beside, by_case, course, several_seeds
from .styles import styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIGHT = {"paper": "#ffffff", "ink": "#1c1e21", "grid": "#d9dce1"}
OF_A_CLIENT = ("client_memory", "client_multiply_adds")  # measures of a round
DARK = {"paper": "#1b1e24", "ink": "#e6e8ec", "grid": "#3a3f49"}
_WHOLE = {"clip_on": False, "in_layout": False}  # marks on the frame are not cut off
_END = {"markersize": 9, "fillstyle": "none", "linestyle": ""} | _WHOLE


def accuracy_by_round(runs: Sequence[Run], theme: dict[str, str]) -> "Figure":
    """Accuracy over rounds: a line for each method, the mean over its seeds, in a band of one sd.

    Where what the runs are judged by is measured at their end alone, it is a hollow mark there. Of one method
    alone there are lines of what else was measured, too.
    """
    figure, (axes,) = _figure(runs, theme, panels=1)
    for look, group, measure in _lines(runs):
        rounds, mean, sd = _curve(group, measure)
        _draw(axes, rounds, mean, sd, look)
        _draw_end(axes, rounds[-1:], group, look)
    _rounds_axis(axes)
    return _finish(figure, axes, runs, theme, _drawn(runs))


def accuracy_by_bytes(runs: Sequence[Run], theme: dict[str, str]) -> "Figure":
    """Accuracy over what was moved: everything on the left, what the classes cost on the right.

    That is left out where no method has class rows.
    """
    figure, (left, *beside) = _figure(runs, theme, panels=1 + _any_rows(runs))
    lines = [line for line in _lines(runs) if line[1][0].summary.traffic.total] or _lines(runs)
    by_class = [line for line in lines if line[1][0].summary.traffic.classification]
    panels = [(left, lines), *((right, by_class or lines) for right in beside)]
    for of, (axes, drawn) in enumerate(panels):
        for look, group, measure in drawn:
            _, mean, sd = _curve(group, measure)
            moved = np.mean([_megabytes(run, measure)[of] for run in group], axis=0)
            _draw(axes, moved, mean, sd, look)
            _draw_end(axes, moved[-1:], group, look)
    left.set_xlabel("everything moved so far (MB)")
    _from_zero(left)
    for right in beside:
        right.set_xlabel("class rows and ids moved so far (MB)")
        if len(by_class) > 1 and len(by_case(runs)) > 1:  # the methods are powers of ten apart
            right.set_xlabel("class rows and ids moved so far (MB, log scale)")
            _log_axis(right)
        else:
            _from_zero(right)
        right.tick_params(labelleft=False)
    return _finish(figure, left, runs, theme, _drawn(runs))


def step_by_round(runs: Sequence[Run], theme: dict[str, str]) -> "Figure":
    """What a step takes of a client, the one of the round that needs most, over rounds: stages are steps."""
    figure, panels = _figure(runs, theme, panels=len(OF_A_CLIENT), alike=False)
    for axes, name in zip(panels, OF_A_CLIENT, strict=True):
        for look, group in _looks(runs):
            found = [
                (m.round, m.measured[name]) for m in group[0].history if m.measured.get(name) is not None
            ]
            if found:
                every = max(1, len(found) // 12)
                axes.step(*zip(*found, strict=True), where="mid", markersize=4, markevery=every, **look)
        axes.set_ylabel(MEASURES[name].column)
        axes.set_ylim(bottom=0)
        _rounds_axis(axes)
    return _with_legend(figure, panels[0], theme)


def _any_steps(runs: Sequence[Run]) -> bool:
    """Whether rounds say what a step takes of a client."""
    return any(m.measured.get(OF_A_CLIENT[0]) is not None for run in runs for m in run.history)


def _any_rows(runs: Sequence[Run]) -> bool:
    return not all(METHODS[run.summary.method].rowless for run in runs)


def accuracy_by_class_set(runs: Sequence[Run], theme: dict[str, str]) -> "Figure":
    """Accuracy at the end over |S_k|: a line for each method with negatives, a point for each without."""
    figure, (axes,) = _figure(runs, theme, panels=1)
    for look, cases in _cases_by_name(runs):
        points = []
        for _, group in cases:
            scale = group[0].summary.headline.scale
            values = [scale * run.summary.accuracy for run in group if run.summary.accuracy is not None]
            sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            sizes = [run.summary.mean_class_set for run in group]
            points.append((float(np.mean(sizes)), float(np.mean(values)), sd))
        x, mean, error = zip(*sorted(points), strict=True)
        case, _ = cases[0]
        label = as_it_is(case.called or METHODS[case.method].label)
        axes.errorbar(x, mean, error, label=label, capsize=3, **look)
    axes.set_xlabel("class rows on a client, |S_k| (mean, log scale)")
    _log_axis(axes)
    return _finish(figure, axes, runs, theme, runs[0].summary.headline)


def _figure(
    runs: Sequence[Run], theme: dict[str, str], panels: int, *, alike: bool = True
) -> tuple["Figure", list]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 + 3.5 * panels, 4.6), layout="constrained", facecolor=theme["paper"])
    axes = [figure.add_subplot(1, panels, 1)]
    shared = axes[0] if alike else None
    axes += [figure.add_subplot(1, panels, i, sharey=shared) for i in range(2, panels + 1)]
    for ax in axes:
        ax.set_facecolor(theme["paper"])
        ax.grid(color=theme["grid"], linewidth=0.6)
        ax.tick_params(colors=theme["ink"], which="both")
        ax.spines[:].set_color(theme["grid"])
        ax.xaxis.label.set_color(theme["ink"])
        ax.yaxis.label.set_color(theme["ink"])
    return figure, axes


def _draw(axes, x: np.ndarray, mean: np.ndarray, sd: np.ndarray, look: dict[str, str]) -> None:
    every = max(1, len(x) // 12)
    axes.plot(x, mean, linewidth=1.8, markersize=4, markevery=every, **_WHOLE, **look)
    axes.fill_between(x, mean - sd, mean + sd, color=look["color"], alpha=0.18, linewidth=0)


def _draw_end(axes, x: np.ndarray, group: Sequence[Run], look: dict[str, str]) -> None:
    """What runs are judged by, where their curve shows something else."""
    measure = group[0].summary.headline
    values = [run.summary.accuracy for run in group if run.summary.accuracy is not None]
    if course(group[0]) != measure and values:
        axes.plot(x, measure.scale * np.mean(values), color=look["color"], marker=look["marker"], **_END)


def _rounds_axis(axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("rounds of training")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _from_zero(axes)


def _from_zero(axes) -> None:
    axes.set_xlim(0, 1.03 * max(axes.dataLim.x1, 0) or 1)


def _around_values(axes) -> None:
    """From 0, or where all are high from a little below them, to a little above: no mark is cut off."""
    low, high = axes.dataLim.y0, axes.dataLim.y1
    if not np.isfinite([low, high]).all():  # nothing is drawn
        low = high = 0.0
    room = 0.06 * max(high - low, 0.05 * high)
    bottom = low - room if 2 * low > high > 0 else 0.0
    axes.set_ylim(bottom, high + max(room, 0.06 * (high - bottom)) if high > 0 else 1.0)


def _log_axis(axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _finish(figure: "Figure", axes, runs: Sequence[Run], theme: dict[str, str], measure: Measure) -> "Figure":
    axes.set_ylabel(measure.axis)
    _around_values(axes)
    headline = runs[0].summary.headline
    if course(runs[0]) != headline:
        axes.plot([], color="grey", marker="o", label=f"hollow: {headline.label}, at the end", **_END)
    return _with_legend(figure, axes, theme)


def _with_legend(figure: "Figure", axes, theme: dict[str, str]) -> "Figure":
    """Above the axes, not in them: wherever the curves go, the legend hides none."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=4, frameon=False, labelcolor=theme["ink"]
    )
    return figure


Line = tuple[dict[str, str], list[Run], Measure]  # its style, the runs it is of, what of them it shows


def _lines(runs: Sequence[Run]) -> list[Line]:
    found = list[Line]()
    for look, group in _looks(runs):
        measure = course(group[0])
        other = "" if measure == course(runs[0]) else f" ({measure.label})"  # than the axis says
        found.append((look | {"label": look["label"] + other}, group, measure))
    return [*_with_others(*found[0])] if len(by_case(runs)) == 1 else found


def _cases_by_name(runs: Sequence[Run]) -> list[tuple[dict[str, str], list[tuple[Case, list[Run]]]]]:
    """How each name of a method looks, and its cases: they differ in their number of negatives."""
    lines: dict[tuple[str, str | None], list[tuple[Case, list[Run]]]] = {}
    for case, group in by_case(runs).items():
        lines.setdefault((case.method, case.called), []).append((case, group))
    return list(zip(styles([method for method, _ in lines]), lines.values(), strict=True))


def _looks(runs: Sequence[Run]) -> list[tuple[dict[str, str], list[Run]]]:
    """Of one case of each method: of several numbers of negatives the one in the middle."""
    found = []
    for look, cases in _cases_by_name(runs):
        case, group = sorted(cases, key=lambda each: each[0].num_negatives or 0)[len(cases) // 2]
        found.append((look | {"label": as_it_is(case.label)}, group))
    return found


def _with_others(look: dict[str, str], group: list[Run], measure: Measure) -> Iterator[Line]:
    """The line of the only case, and dashed ones of what else was measured of it."""
    others = beside(group[0])
    yield look | {"label": f"{look['label']}, {measure.label}"} if others else look, group, measure
    for other, dashes in zip(others, ("--", ":", "-."), strict=False):
        label = f"{look['label']}, {other.label}"
        yield look | {"label": label, "linestyle": dashes, "fillstyle": "none"}, group, other


def _drawn(runs: Sequence[Run]) -> Measure:
    """What is measured along the axis: of lines of several measures by all their names."""
    names = [course(runs[0]).label]
    if len(by_case(runs)) == 1:
        names += [measure.label for measure in beside(runs[0])]
    label = " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
    return dataclasses.replace(course(runs[0]), label=label)


def _evaluations(run: Run, measure: Measure) -> list[tuple[RoundMetrics, float]]:
    """(round, what it measured) where it did."""
    values = [(m, m.measured.get(measure.name)) for m in run.history]
    return [(m, value) for m, value in values if value is not None]


def _curve(group: Sequence[Run], measure: Measure) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rounds, mean, sd) at every evaluation, as they are shown; the runs of a group share their rounds."""
    rounds = np.array([m.round for m, _ in _evaluations(group[0], measure)])
    values = np.array([[value for _, value in _evaluations(run, measure)] for run in group], dtype=np.float64)
    shown = measure.scale * values
    sd = shown.std(axis=0, ddof=1) if len(group) > 1 else np.zeros(len(rounds))
    return rounds, shown.mean(axis=0), sd


def _megabytes(run: Run, measure: Measure) -> np.ndarray:
    """(2, evaluations): all bytes, and those of class rows and ids, moved until each evaluation."""
    done = [m.round - 1 for m, _ in _evaluations(run, measure)]
    total = np.cumsum([m.traffic.total for m in run.history])[done]
    classes = np.cumsum([m.traffic.classification for m in run.history])[done]
    return np.stack([total, classes]) / MEGABYTE


def save_plots(folder: Path, runs: Sequence[Run]) -> list[str]:
    """Writes the light PNG files; returns each plot's HTML, in the reader's light or dark theme."""
    pictures = []
    subject = _subject(runs[0].summary.headline)
    plots = [(accuracy_by_round, f"{subject} by rounds of training")]
    if _anything_moves(runs):
        plots.append((accuracy_by_bytes, f"{subject} by megabytes moved"))
    else:
        (folder / "accuracy_by_bytes.png").unlink(missing_ok=True)  # an earlier version's
    if _any_steps(runs):
        plots.append((step_by_round, "What a step takes of a client by rounds of training"))
    if any(case.num_negatives is not None for case in by_case(runs)):
        plots.append((accuracy_by_class_set, f"{subject} by class rows on a client"))
    for plot, alt in plots:
        with plotting():
            light, dark = _png(plot(runs, LIGHT)), _png(plot(runs, DARK))
        with replacing(folder / f"{plot.__name__}.png") as file:
            file.write(light)
        pictures.append(
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{data_uri(dark)}">'
            f'<img alt="{escape(alt)}" src="{data_uri(light)}"></picture>'
        )
    return pictures


def _png(figure: "Figure") -> bytes:
    return png_of(figure, dpi=140, metadata={"Software": None})


def _subject(measure: Measure) -> str:
    return measure.noun[:1].upper() + measure.noun[1:]


def plots_with_captions(runs: Sequence[Run], plots: Sequence[str]) -> list[str]:
    """The plots with what they show."""
    steps = [_STEPS] if _any_steps(runs) else []
    captions = [_by_round(runs), _by_bytes(runs), *steps, _by_class_set(runs[0].summary.headline)]
    if not _anything_moves(runs):
        captions = [f"{captions[0]} Nothing moves, so there is no plot by what was moved.", *captions[2:]]
    return [
        f"<figure>{plot}<figcaption>{escape(caption, quote=False)}</figcaption></figure>"
        for plot, caption in zip(plots, captions, strict=False)
    ]


def _anything_moves(runs: Sequence[Run]) -> bool:
    return any(run.summary.traffic.total for run in runs)


def _by_round(runs: Sequence[Run]) -> str:
    measure, headline = course(runs[0]), runs[0].summary.headline
    words = f"{_subject(measure)} {measure.of} as training goes on."
    if len(by_case(runs)) == 1 and (others := beside(runs[0])):
        words += f" Dashed: {', '.join(other.label for other in others)}."
    for other in dict.fromkeys(course(run) for run in runs if course(run) != measure):
        names = _labels([run.summary.method for run in runs if course(run) == other])
        words += f" Of {names} it is the {other.label} {other.of}."
    if measure.name == "top1":
        classes = runs[0].summary.num_classes
        words += f" Who guesses is right for {100 / classes:.2g}% of them, one in {classes:,}."
    if measure != headline:
        words += f" The hollow marks are {headline.label} {headline.of}, which is measured at the end."
    return words + _BAND * several_seeds(runs)


def _by_bytes(runs: Sequence[Run]) -> str:
    words = (
        f"The same {course(runs[0]).noun} by what had been moved until then, down and up, by all clients "
        "together"
    )
    if _any_rows(runs):
        words += ": on the left everything; on the right only what depends on the number of classes"
    words += ". Further left is cheaper."
    still = [run.summary.method for run in runs if not run.summary.traffic.total]
    rowless = [run.summary.method for run in runs if not run.summary.traffic.classification]
    if still:
        words += f" Not in it, as nothing moves: {_labels(still)}."
    if _any_rows(runs) and (others := [name for name in rowless if name not in still]):
        where = "Not on the right, as" if len(rowless) < len(runs) else "At 0 on the right, as"
        words += f" {where} no class row moves: {_labels(others)}."
    return words


def _labels(names: Sequence[str]) -> str:
    return "; ".join(METHODS[name].label for name in dict.fromkeys(names))


def _by_class_set(measure: Measure) -> str:
    return (
        f"{_subject(measure)} at the end by how many class rows a client got. In the plots above are, of "
        "each method, the runs with the number of negatives in the middle."
    )


_STEPS = (
    "What a client has in memory in a step, and what a step computes, of the client that needs most in each "
    "round. The highest says who can take part. It is a model of one client, of the first of the seeds."
)
_BAND = " A line is the mean over the seeds, its band one standard deviation."
