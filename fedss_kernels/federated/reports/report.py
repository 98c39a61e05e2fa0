"""Plots and a self-contained report.html, for readers who know nothing of the code."""

import base64
import dataclasses
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...plotting import plotting
from ..algorithms import METHODS, readers
from ..algorithms.parts import Part
from ..config import Config
from ..disk import write_whole
from ..files.round_metrics import RoundMetrics
from ..files.summary import Summary
from ..ledger import OUTCOMES, WIRE_DTYPES
from ..measures import MEASURES, Measure, percent
from ..plan import Case, case_of
from .parts_in_words import HEADER, PERSONALISED, in_a_round, matrix, place
from .parts_in_words import cells as places
from .remarks import remarks
from .styles import style
from .tables import markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIGHT = {"paper": "#ffffff", "ink": "#1c1e21", "grid": "#d9dce1"}
DARK = {"paper": "#1b1e24", "ink": "#e6e8ec", "grid": "#3a3f49"}
MEGABYTE = 10**6
_END = {"markersize": 9, "fillstyle": "none", "linestyle": ""}


@dataclass(frozen=True)
class Run:
    """What a report is made of: one run's settings, course and figures."""

    config: Config
    history: list[RoundMetrics]
    summary: Summary

    @property
    def updates(self) -> int:
        """Clients drawn, or that would be: what a figure per client and round divides by."""
        drawn = sum(getattr(self.summary, outcome) for outcome in OUTCOMES)
        return max(drawn, 1) * (self.summary.cohort if METHODS[self.summary.method].pooled else 1)

    @property
    def saving(self) -> float:
        """Share of all the bytes of FullSoftmax that this run did not move."""
        return 1 - self.summary.traffic.total / self.summary.full_traffic.total

    @property
    def class_saving(self) -> float:
        """The same for what depends on the number of classes: class rows and ids."""
        return 1 - self.summary.traffic.classification / self.summary.full_traffic.classification


def write_run_report(folder: Path, run: Run) -> None:
    """accuracy_by_round.png, accuracy_by_bytes.png and report.html of one run."""
    plots = _save_plots(folder, [run])
    write_whole(folder / "report.html", _run_page(folder, run, plots))


def write_comparison_report(
    folder: Path,
    runs: Sequence[Run],
    header: Sequence[str],
    table: Sequence[Sequence[str]],
    failed: Sequence[str],
) -> None:
    """The same files over several runs; `table` has a row for each method, `failed` a line on each loss."""
    plots = _save_plots(folder, runs)
    write_whole(folder / "report.html", _comparison_page(folder, runs, header, table, failed, plots))


def attempt(folder: Path, write: Callable[..., object], *arguments: object) -> list[str]:
    """Makes a report; [why it could not be made], which is no reason to lose what it is made of."""
    try:
        write(*arguments)
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        return [
            f"the results are in {folder}, but their report could not be made ({why}); "
            f"to try again: fedss report {folder}"
        ]
    return []


def write_section(
    folder: Path, name: str, title: str, words: str, header: Sequence[str], rows: Sequence[Sequence[str]]
) -> str:
    """NAME.md, and with NAME.png, which is there, a section of report.html; returns the table as text.

    Where the folder has a report already, of a run or of other sections, the section is added to it.
    """
    text = markdown(header, rows)
    write_whole(folder / f"{name}.md", text)
    image = f'<img alt="{escape(title)}" src="{_data_uri((folder / f"{name}.png").read_bytes())}">'
    parts = [f"<h2>{escape(title)}</h2>", f"<p>{escape(words)}</p>", _table(header, rows)]
    parts.append(f'<figure class="plain">{image}</figure>')
    write_whole(folder / f"section-{name}.html", "\n".join(parts) + "\n")
    report = folder / "report.html"
    page = report.read_text(encoding="utf-8") if report.exists() else _page(_MEASURED, [], folder)
    before, begun, rest = page.partition(_BESIDES)
    _, ended, after = rest.partition(_BESIDES_END)
    if not (begun and ended):  # a page without: at its end
        before, end, after = page.rpartition("</main>")
        before, after = before or after, end and end + after
    write_whole(report, before + _besides(folder) + after)
    return text


def write_sections(folder: Path) -> None:
    """report.html of what was measured in this folder, where there is no run."""
    write_whole(folder / "report.html", _page(_MEASURED, [], folder))


# ---- plots -------------------------------------------------------------------------------------------------


def accuracy_by_round(runs: Sequence[Run], theme: dict[str, str]) -> "Figure":
    """Accuracy over rounds: a line for each method, the mean over its seeds, in a band of one sd.

    Where what the runs are judged by is measured at their end alone, it is a hollow mark there.
    """
    figure, (axes,) = _figure(runs, theme, panels=1)
    for look, group in _lines(runs):
        rounds, mean, sd = _curve(group)
        _draw(axes, rounds, mean, sd, look)
        _draw_end(axes, rounds[-1:], group, look)
    axes.set_xlabel("rounds of training")
    _from_zero(axes)
    return _finish(figure, axes, runs, theme, course(runs[0]))


def accuracy_by_bytes(runs: Sequence[Run], theme: dict[str, str]) -> "Figure":
    """Accuracy over what was moved: everything on the left, what the classes cost on the right."""
    figure, (left, right) = _figure(runs, theme, panels=2)
    lines = _lines([run for run in runs if run.summary.traffic.total]) or _lines(runs)
    by_class = [(look, group) for look, group in lines if group[0].summary.traffic.classification]
    for axes, of, drawn in ((left, 0, lines), (right, 1, by_class or lines)):
        for look, group in drawn:
            _, mean, sd = _curve(group)
            moved = np.mean([_megabytes(run)[of] for run in group], axis=0)
            _draw(axes, moved, mean, sd, look)
            _draw_end(axes, moved[-1:], group, look)
    left.set_xlabel("everything moved so far (MB)")
    _from_zero(left)
    right.set_xlabel("class rows and ids moved so far (MB)")
    if len(by_class) > 1:  # the methods are powers of ten apart
        right.set_xlabel("class rows and ids moved so far (MB, log scale)")
        _log_axis(right)
    else:
        _from_zero(right)
    right.tick_params(labelleft=False)
    return _finish(figure, left, runs, theme, course(runs[0]))


def accuracy_by_class_set(runs: Sequence[Run], theme: dict[str, str]) -> "Figure":
    """Accuracy at the end over |S_k|: a line for each method with negatives, a point for each without."""
    figure, (axes,) = _figure(runs, theme, panels=1)
    cases = by_case(runs)
    for method in dict.fromkeys(case.method for case in cases):
        points = []
        for group in (runs for case, runs in cases.items() if case.method == method):
            scale = group[0].summary.headline.scale
            values = [scale * run.summary.accuracy for run in group if run.summary.accuracy is not None]
            sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            sizes = [run.summary.mean_class_set for run in group]
            points.append((float(np.mean(sizes)), float(np.mean(values)), sd))
        x, mean, error = zip(*sorted(points), strict=True)
        axes.errorbar(x, mean, error, label=METHODS[method].label, capsize=3, **style(method))
    axes.set_xlabel("class rows on a client, |S_k| (mean, log scale)")
    _log_axis(axes)
    return _finish(figure, axes, runs, theme, runs[0].summary.headline)


def _figure(runs: Sequence[Run], theme: dict[str, str], panels: int) -> tuple["Figure", list]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 + 3.5 * panels, 4.6), layout="constrained", facecolor=theme["paper"])
    axes = [figure.add_subplot(1, panels, 1)]
    axes += [figure.add_subplot(1, panels, i, sharey=axes[0]) for i in range(2, panels + 1)]
    for ax in axes:
        ax.set_facecolor(theme["paper"])
        ax.grid(color=theme["grid"], linewidth=0.6)
        ax.tick_params(colors=theme["ink"], which="both")
        ax.spines[:].set_color(theme["grid"])
        ax.xaxis.label.set_color(theme["ink"])
        ax.yaxis.label.set_color(theme["ink"])
    return figure, axes


def _draw(axes, x: np.ndarray, mean: np.ndarray, sd: np.ndarray, look: dict[str, str]) -> None:
    axes.plot(x, mean, linewidth=1.8, markersize=4, markevery=max(1, len(x) // 12), **look)
    axes.fill_between(x, mean - sd, mean + sd, color=look["color"], alpha=0.18, linewidth=0)


def _draw_end(axes, x: np.ndarray, group: Sequence[Run], look: dict[str, str]) -> None:
    """What runs are judged by, where their curve shows something else."""
    measure = group[0].summary.headline
    values = [run.summary.accuracy for run in group if run.summary.accuracy is not None]
    if course(group[0]) != measure and values:
        axes.plot(x, measure.scale * np.mean(values), color=look["color"], marker=look["marker"], **_END)


def _from_zero(axes) -> None:
    axes.set_xlim(0, 1.03 * max(axes.dataLim.x1, 0) or 1)


def _log_axis(axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _finish(figure: "Figure", axes, runs: Sequence[Run], theme: dict[str, str], measure: Measure) -> "Figure":
    axes.set_ylabel(measure.axis)
    axes.set_ylim(bottom=0)
    headline = runs[0].summary.headline
    if measure != headline:
        axes.plot([], color="grey", marker="o", label=f"hollow: {headline.label}, at the end", **_END)
    # Above the axes, not in them: wherever the curves go, the legend hides none.
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=4, frameon=False, labelcolor=theme["ink"]
    )
    return figure


def course(run: Run) -> Measure:
    """What a run's curves show: its headline, or where that is measured at the end alone, what is so before.

    That is the first of its measures, of the headline's kind, that is measured more than once.
    """

    def times(name: str) -> int:
        return sum(m.measured.get(name) is not None for m in run.history)

    measures = run.summary.measures.alike
    return next((measure for measure in measures if times(measure.name) > 1), run.summary.headline)


def by_case(runs: Sequence[Run]) -> dict[Case, list[Run]]:
    """Runs that differ in their seed alone; a number of negatives counts where there are several."""
    several = len({run.config.num_negatives for run in runs if METHODS[run.summary.method].samples}) > 1
    groups: dict[Case, list[Run]] = {}
    for run in runs:
        groups.setdefault(case_of(run.config, several), []).append(run)
    return groups


def _lines(runs: Sequence[Run]) -> list[tuple[dict[str, str], list[Run]]]:
    """(style, runs) of one case of each method: of several numbers of negatives the one in the middle."""
    lines: dict[str, list[tuple[Case, list[Run]]]] = {}
    for case, group in by_case(runs).items():
        lines.setdefault(case.method, []).append((case, group))
    found = []
    for cases in lines.values():
        case, group = sorted(cases, key=lambda each: each[0].num_negatives or 0)[len(cases) // 2]
        measure = course(group[0])
        other = "" if measure == course(runs[0]) else f" ({measure.label})"  # than the axis says
        found.append((style(case.method) | {"label": case.label + other}, group))
    return found


def _evaluations(run: Run) -> list[tuple[RoundMetrics, float]]:
    """(round, what it measured of the run's `course`) where it did."""
    name = course(run).name
    values = [(m, m.measured.get(name)) for m in run.history]
    return [(m, value) for m, value in values if value is not None]


def _curve(group: Sequence[Run]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rounds, mean, sd) at every evaluation, as they are shown; the runs of a group share their rounds."""
    rounds = np.array([m.round for m, _ in _evaluations(group[0])])
    values = np.array([[value for _, value in _evaluations(run)] for run in group], dtype=np.float64)
    shown = course(group[0]).scale * values
    sd = shown.std(axis=0, ddof=1) if len(group) > 1 else np.zeros(len(rounds))
    return rounds, shown.mean(axis=0), sd


def _megabytes(run: Run) -> np.ndarray:
    """(2, evaluations): all bytes, and those of class rows and ids, moved until each evaluation."""
    done = [m.round - 1 for m, _ in _evaluations(run)]
    total = np.cumsum([m.traffic.total for m in run.history])[done]
    classes = np.cumsum([m.traffic.classification for m in run.history])[done]
    return np.stack([total, classes]) / MEGABYTE


def _save_plots(folder: Path, runs: Sequence[Run]) -> list[str]:
    """Writes the light PNG files; returns each plot's HTML, in the reader's light or dark theme."""
    pictures = []
    subject = _subject(runs[0].summary.headline)
    plots = [
        (accuracy_by_round, f"{subject} by rounds of training"),
        (accuracy_by_bytes, f"{subject} by megabytes moved"),
    ]
    if len(by_case(runs)) > len({run.summary.method for run in runs}):
        plots.append((accuracy_by_class_set, f"{subject} by class rows on a client"))
    for plot, alt in plots:
        with plotting():
            light, dark = _png(plot(runs, LIGHT)), _png(plot(runs, DARK))
        (folder / f"{plot.__name__}.png").write_bytes(light)
        pictures.append(
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_data_uri(dark)}">'
            f'<img alt="{escape(alt)}" src="{_data_uri(light)}"></picture>'
        )
    return pictures


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, metadata={"Software": None})
    return buffer.getvalue()


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


# ---- pages -------------------------------------------------------------------------------------------------


def _run_page(folder: Path, run: Run, plots: Sequence[str]) -> str:
    summary, method = run.summary, METHODS[run.summary.method]
    measure = summary.headline
    figures = [
        (measure.text(summary.accuracy), f"{measure.label}: {measure.meaning}"),
        (f"{summary.mean_class_set:.0f} of {summary.num_classes:,}", place(method).held),
        *_savings(run),
    ]
    return _page(
        f"{method.label} on {summary.data}",
        [
            _what_was_run([run]),
            _remarks(remarks(summary)),
            _unfinished(run),
            _cards(figures),
            "<h2>What came out</h2>",
            *_plots([run], plots),
            "<h2>What was moved</h2>",
            _traffic_table(run),
            _methods([run.summary.method, "full_softmax"]),
            _glossary([run]),
            _settings([run]),
        ],
        folder,
    )


def _savings(run: Run) -> list[tuple[str, str]]:
    """Against FullSoftmax."""
    method = METHODS[run.summary.method]
    if not run.summary.traffic.total:
        return [("0 MB", f"what moves: {place(method).moves}")]
    everything = percent(run.saving), "saved of everything moved, against FullSoftmax"
    if method.rows is not Part.TRAINED:
        return [("none", "of the class rows moves"), everything]
    return [
        (percent(run.class_saving), "saved of what the classes cost to move, against FullSoftmax"),
        everything,
    ]


def _comparison_page(
    folder: Path,
    runs: Sequence[Run],
    header: Sequence[str],
    table: Sequence[Sequence[str]],
    failed: Sequence[str],
    plots: Sequence[str],
) -> str:
    names = list(dict.fromkeys(run.summary.method for run in runs))
    sd = _SD if _several_seeds(runs) else ""
    return _page(
        f"{len(names)} method{'s' * (len(names) > 1)} on {runs[0].summary.data}",
        [
            _what_was_run(runs),
            _remarks(failed),
            _method_cards(runs),
            "<h2>What came out</h2>",
            _table(header, table),
            f"<p>{_TABLE_NOTE}{sd}{_SEVERAL_HEADLINES * _several_headlines(runs)}</p>",
            *_plots(runs, plots),
            _methods(names),
            _glossary(runs),
            _settings(runs),
        ],
        folder,
    )


def _method_cards(runs: Sequence[Run]) -> str:
    """Each case's accuracy, the mean over its seeds, and what share of the classes its clients got."""
    figures = []
    for case, group in by_case(runs).items():
        summaries = [run.summary for run in group]
        accuracies = [s.accuracy for s in summaries if s.accuracy is not None]
        accuracy = float(np.mean(accuracies)) if accuracies else None
        share = float(np.mean([s.mean_class_set / s.num_classes for s in summaries]))
        measure = summaries[0].headline
        where = "all the images in one place"
        if not METHODS[case.method].pooled:
            where = f"{percent(share)} of the class rows on a client"
        text = f"{measure.label} of {case.label}, with {where}"
        figures.append((measure.text(accuracy), text))
    return _cards(figures)


def _remarks(lines: Sequence[str]) -> str:
    return "".join(f'<p class="failed">{escape(line)}</p>' for line in lines)


def _what_was_run(runs: Sequence[Run]) -> str:
    s, names = runs[0].summary, _names(runs)
    seeds = len({run.summary.seed for run in runs})
    everyone = s.cohort >= s.num_clients
    cohort = "all clients" if everyone else f"{s.cohort} clients, drawn at random,"
    bias = ", and a bias," if runs[0].config.similarity == "dot" else ""
    repeated = f" Every method was run {seeds} times, with different random numbers." if seeds > 1 else ""
    round = in_a_round(names).format(rounds=f"{s.rounds:,}", cohort=cohort, size=s.cohort)
    notes = f"<p>Of the data: {escape('; '.join(s.notes))}.</p>" if s.notes else ""
    return (
        f"<p>{s.num_clients:,} clients, such as phones, each hold a few images of a few classes. A model is "
        f"a net that maps an image to {s.embedding_dim} numbers, its <em>embedding</em>, and one row of "
        f"{s.embedding_dim} numbers{bias} for each of {s.num_classes:,} classes. "
        f"{round} There are {s.num_train_images:,} training images; "
        f"{_tested(runs)}.{_rows_cost(names)}{repeated}</p>{notes}"
    )


def _names(runs: Sequence[Run]) -> list[str]:
    """The methods, each once."""
    return list(dict.fromkeys(run.summary.method for run in runs))


def _several_seeds(runs: Sequence[Run]) -> bool:
    return len({run.summary.seed for run in runs}) > 1


def _several_headlines(runs: Sequence[Run]) -> bool:
    return len({run.summary.headline for run in runs}) > 1


def _tested(runs: Sequence[Run]) -> str:
    """On what, and after what."""
    s, config = runs[0].summary, runs[0].config
    images = f"{s.num_test_images:,} images " + (
        "of classes that no client holds" if s.task == "retrieval" else "that no client holds"
    )
    if config.holdout:
        images = f"{s.num_test_images:,} images of clients who do not train, of the same classes"
    who, share = "each client", f"its share of {images}"
    if config.holdout:  # of whose clients the test images are
        who = "each client who is held out" if not all(METHODS[name].alone for name in _names(runs)) else who
        share = "others of its own images"
    if config.personalise_epochs:
        epochs = "an epoch" if config.personalise_epochs == 1 else f"{config.personalise_epochs:,} epochs"
        return (
            f"at the end {who} trains {PERSONALISED[config.personalise_part]} for {epochs} more on its own "
            f"images, and what it then has is tested on {share}"
        )
    own = {METHODS[name].personal for name in _names(runs)}
    if own == {True}:
        return f"each client's own model is tested on {share}"
    beside = (
        ", or where each client has a model of its own, that on its share of these" if True in own else ""
    )
    return f"the result is tested on {images}{beside}"


def _rows_cost(names: Sequence[str]) -> str:
    """Why methods differ, where it is in which rows travel."""
    if any(METHODS[name].pooled or METHODS[name].rows is not Part.TRAINED for name in names):
        return ""
    return (
        " The more classes, the more the rows cost to move: the methods differ in which rows a client gets."
    )


def _unfinished(run: Run) -> str:
    done, rounds = len(run.history), run.config.rounds
    return f'<p class="failed">Not finished: {done:,} of {rounds:,} rounds are done.</p>' * (done < rounds)


def _traffic_table(run: Run) -> str:
    """Bytes per client and round by kind, next to FullSoftmax's."""
    own, full, n = run.summary.traffic, run.summary.full_traffic, run.updates
    kinds = [
        (f"{kind.label}, {' and '.join(kind.directions)}", own.of(kind.name), full.of(kind.name))
        for kind in (own + full).kinds
    ]
    kinds.append(("all", own.total, full.total))
    rows = [
        (
            name,
            _kilobytes(a / n),
            _kilobytes(b / n),
            percent(1 - a / b) if b else "–",
            f"{a / MEGABYTE:,.1f}",
        )
        for name, a, b in kinds
        if a or b
    ]
    label = METHODS[run.summary.method].label
    header = ("", f"{label}, kB per client and round", "FullSoftmax, kB", "saved", f"{label}, MB in all")
    return _table(header, rows)


def _kilobytes(count: float) -> str:
    """With more digits where one would be all zeros."""
    return f"{count / 1e3:,.1f}" if count >= 50 or not count else f"{count / 1e3:.3f}"


def _methods(names: Sequence[str]) -> str:
    methods = [METHODS[name] for name in dict.fromkeys(names)]
    items = "".join(f"<dt>{escape(each.label)}</dt><dd>{escape(each.summary)}</dd>" for each in methods)
    return f"<h2>The methods</h2><dl>{items}</dl>{_table(HEADER, [*map(places, methods)], words=True)}"


def _glossary(runs: Sequence[Run]) -> str:
    config = runs[0].config
    names = dict.fromkeys(name for run in runs for name in run.summary.measures.names)
    terms = {
        "class row": _ROW[config.similarity],
        "class matrix W": matrix(_names(runs)),
        **GLOSSARY,
        **{MEASURES[name].label: MEASURES[name].words for name in names if MEASURES[name].words},
        "sd": _DEVIATION,
        "MB, kB": _BYTES.format(WIRE_DTYPES[config.wire_dtype].itemsize),
    }
    items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in terms.items())
    return f"<h2>Glossary</h2><dl>{items}</dl>"


def _settings(runs: Sequence[Run]) -> str:
    """Those that all the runs have in common, but for what is of other methods."""
    rows = [
        (field.name, _value(getattr(runs[0].config, field.name)), field.metadata["help"])
        for field in dataclasses.fields(Config)
        if field.metadata["saved"]
        and not _is_of_others(field.name, _names(runs))
        and len({str(getattr(run.config, field.name)) for run in runs}) == 1
    ]
    return f"<h2>Settings</h2>{_table(('option', 'value', 'meaning'), rows, words=True)}"


def _is_of_others(option: str, names: Sequence[str]) -> bool:
    reading = readers(option)
    return bool(reading) and not set(reading) & set(names)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else str(value)


def _cards(figures: Sequence[tuple[str, str]]) -> str:
    cards = "".join(f"<div><strong>{escape(value)}</strong>{escape(text)}</div>" for value, text in figures)
    return f'<div class="cards">{cards}</div>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], words: bool = False) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    kind = "words" if words else "figures"
    head, body = f"<thead><tr>{head}</tr></thead>", f"<tbody>{body}</tbody>"
    return f'<div class="wide"><table class="{kind}">{head}{body}</table></div>'


def _besides(folder: Path) -> str:
    """The sections of what else was measured in this folder, between marks that another is put in by."""
    found = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("section-*.html"))]
    return "\n".join([_BESIDES, *found, _BESIDES_END])


def _page(title: str, sections: Sequence[str], folder: Path) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><main><h1>{escape(title)}</h1>\n"
        + "\n".join([*sections, _besides(folder)])
        + "\n</main></body></html>\n"
    )


def _subject(measure: Measure) -> str:
    return measure.noun[:1].upper() + measure.noun[1:]


def _plots(runs: Sequence[Run], plots: Sequence[str]) -> list[str]:
    """The plots with what they show."""
    captions = [_by_round(runs), _by_bytes(runs), _by_class_set(runs[0].summary.headline)]
    if not any(run.summary.traffic.total for run in runs):
        plots = [plots[0], *plots[2:]]
        captions = [f"{captions[0]} Nothing moves, so there is no plot by what was moved.", captions[2]]
    return [
        f"<figure>{plot}<figcaption>{escape(caption, quote=False)}</figcaption></figure>"
        for plot, caption in zip(plots, captions, strict=False)
    ]


def _by_round(runs: Sequence[Run]) -> str:
    measure, headline = course(runs[0]), runs[0].summary.headline
    words = f"{_subject(measure)} {measure.of} as training goes on."
    for other in dict.fromkeys(course(run) for run in runs if course(run) != measure):
        names = _labels([run.summary.method for run in runs if course(run) == other])
        words += f" Of {names} it is the {other.label} {other.of}."
    if measure != headline:
        words += f" The hollow marks are {headline.label} {headline.of}, which is measured at the end."
    return words + _BAND * _several_seeds(runs)


def _by_bytes(runs: Sequence[Run]) -> str:
    words = (
        f"The same {course(runs[0]).noun} by what had been moved until then, down and up, by all clients "
        "together: on the left everything; on the right only what depends on the number of classes. Further "
        "left is cheaper."
    )
    still = [run.summary.method for run in runs if not run.summary.traffic.total]
    rowless = [run.summary.method for run in runs if not run.summary.traffic.classification]
    if still:
        words += f" Not in it, as nothing moves: {_labels(still)}."
    if others := [name for name in rowless if name not in still]:
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


GLOSSARY = {
    "extractor φ": "The net that maps an image to its embedding.",
    "positives": "The classes in a client's own data.",
    "negatives": "Classes drawn at random from those that a client does not hold.",
    "|S_k|": "How many class rows a client has in a round: those of its positives and its negatives, or all; "
    "whether they are sent to it, drawn by it from a seed, or kept by it.",
    "round": "Some clients train on their own images; what they share is sent to them before, and averaged "
    "by the server after.",
}
_ROW = {  # by similarity
    "cosine": "The numbers that stand for one class. An image is given the class whose row points most "
    "nearly the way its embedding does.",
    "dot": "The numbers that stand for one class, and its bias. An image is given the class for which the "
    "product of row and embedding, and the bias, come to most.",
}
_DEVIATION = "Standard deviation over the seeds, that is over repetitions with different random numbers."
_BYTES = "A million and a thousand bytes. Numbers travel as {} bytes, ids as 8."
_MEASURED = "What was measured"
_BESIDES = "<!-- what else was measured -->"
_BESIDES_END = "<!-- the end of what else was measured -->"
_SD = " ± is the standard deviation over the seeds."
_SEVERAL_HEADLINES = (
    " These methods are not all judged by one measure: where each client has a model of its own there is "
    "none for everybody's images. With personalise_epochs all have the initial and the personalised top-1."
)
_BAND = " A line is the mean over the seeds, its band one standard deviation."
_TABLE_NOTE = (
    "|S_k| is the mean number of class rows that a client has in a round, whether they are sent to it, drawn "
    "by it from a seed, or kept by it. MB count everything that moved, down and up, "
    "and what of it were class rows and ids, the part that grows with the number of classes. Savings are "
    "against FullSoftmax in as many rounds."
)
_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c1e21; --soft: #5b6270; --line: #d9dce1; --card:
#f4f5f7; } @media (prefers-color-scheme: dark) {
  :root { --paper: #1b1e24; --ink: #e6e8ec; --soft: #a4abb8; --line: #3a3f49; --card: #262a32; } }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; }
p, dd, figcaption { max-width: 46rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: 1rem; margin: 1.5rem
0; } .cards div { background: var(--card); border-radius: .6rem; padding: 1rem; color: var(--soft); font-size:
.9rem; } .cards strong { display: block; color: var(--ink); font-size: 1.6rem; } .failed { border-left: 4px
solid #D55E00; padding-left: .75rem; } figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
.plain img { background: #ffffff; }
figcaption { color: var(--soft); font-size: .9rem; } .wide { overflow-x: auto; } table { border-collapse:
collapse; font-size: .92rem; font-variant-numeric: tabular-nums; } th, td { padding: .4rem .65rem;
border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; } th { color: var(--soft);
font-weight: 600; vertical-align: bottom; } .figures td:not(:first-child), .figures th:not(:first-child) {
text-align: right; } .figures td:not(:first-child) { white-space: nowrap; } dt { font-weight: 600; margin-top:
.6rem; } dd { margin: 0 0 0 1rem; color: var(--soft); }
"""
