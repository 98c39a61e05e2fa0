"""Plots and a self-contained report.html, for readers who know nothing of the code."""

import dataclasses
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from ..algorithms import METHODS, Method, readers
from ..algorithms.own_numbers import in_words
from ..algorithms.parts import Part
from ..config import Config
from ..defaults import OWN
from ..disk import why, write_whole
from ..given_data import OPTIONS
from ..measures import percent
from ..to_paste import to_paste
from .glossary import glossary
from .page import cards, html_page, html_table
from .parts_in_words import HEADER, place
from .parts_in_words import cells as places
from .plots import plots_with_captions, save_plots
from .remarks import remarks
from .reported_run import MEGABYTE, Run, by_case, method_names, several_seeds
from .what_was_run import what_was_run


def write_run_report(folder: Path, run: Run) -> None:
    """accuracy_by_round.png, accuracy_by_bytes.png and report.html of one run."""
    plots = save_plots(folder, [run])
    write_whole(folder / "report.html", _run_page(folder, run, plots))


def write_comparison_report(
    folder: Path,
    runs: Sequence[Run],
    header: Sequence[str],
    table: Sequence[Sequence[str]],
    failed: Sequence[str],
) -> None:
    """The same files over several runs; `table` has a row for each method, `failed` a line on each loss."""
    plots = save_plots(folder, runs)
    write_whole(folder / "report.html", _comparison_page(folder, runs, header, table, failed, plots))


def attempt(folder: Path, write: Callable[..., object], *arguments: object) -> list[str]:
    """Makes a report; [why it could not be made], which is no reason to lose what it is made of."""
    try:
        write(*arguments)
    except Exception as error:
        return [
            f"the results are in {folder}, but their report could not be made ({why(error)}); "
            f"to try again: {to_paste('report', folder)}"
        ]
    return []


def _run_page(folder: Path, run: Run, plots: Sequence[str]) -> str:
    summary, method = run.summary, METHODS[run.summary.method]
    measure = summary.headline
    rows = (f"{summary.mean_class_set:.0f} of {summary.num_classes:,}", place(method).held)
    figures = [
        (measure.text(summary.accuracy), f"{measure.label}: {measure.meaning}"),
        *([] if method.rowless else [rows]),
        *_savings(run),
    ]
    return html_page(
        f"{method.label} on {summary.data}",
        [
            what_was_run([run]),
            _remarks(remarks(summary)),
            _unfinished(run),
            cards(figures),
            "<h2>What came out</h2>",
            *plots_with_captions([run], plots),
            *([] if method.pooled else ["<h2>What was moved</h2>", _traffic_table(run)]),
            _methods([method.name, method.baseline], [run]),
            glossary([run]),
            _settings([run]),
        ],
        folder,
    )


def _savings(run: Run) -> list[tuple[str, str]]:
    """Against the method's baseline."""
    method = METHODS[run.summary.method]
    against = METHODS[method.baseline].label
    if not run.summary.traffic.total:
        return [("0 MB", f"what moves: {place(method).moves}")]
    everything = percent(run.saving), f"saved of everything moved, against {against}"
    if method.rowless:
        return [everything]
    if method.rows is not Part.TRAINED:
        return [("none", "of the class rows moves"), everything]
    return [
        (percent(run.class_saving), f"saved of what the classes cost to move, against {against}"),
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
    sd = _SD if several_seeds(runs) else ""
    return html_page(
        f"{len(names)} method{'s' * (len(names) > 1)} on {runs[0].summary.data}",
        [
            what_was_run(runs),
            _remarks(failed),
            _method_cards(runs),
            "<h2>What came out</h2>",
            html_table(header, table),
            f"<p>{_TABLE_NOTE}{sd}{_SEVERAL_HEADLINES * _several_headlines(runs)}</p>",
            *plots_with_captions(runs, plots),
            _methods(names, runs),
            glossary(runs),
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
        if METHODS[case.method].rowless:
            where = "no class rows"
        elif not METHODS[case.method].pooled:
            where = f"{percent(share)} of the class rows on a client"
        text = f"{measure.label} of {case.label}, with {where}"
        figures.append((measure.text(accuracy), text))
    return cards(figures)


def _remarks(lines: Sequence[str]) -> str:
    return "".join(f'<p class="failed">{escape(line)}</p>' for line in lines)


def _several_headlines(runs: Sequence[Run]) -> bool:
    return len({run.summary.headline for run in runs}) > 1


def _unfinished(run: Run) -> str:
    done, rounds = len(run.history), run.config.rounds
    return f'<p class="failed">Not finished: {done:,} of {rounds:,} rounds are done.</p>' * (done < rounds)


def _traffic_table(run: Run) -> str:
    """Bytes per client and round by kind, next to those of the method's baseline."""
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
    method = METHODS[run.summary.method]
    label, against = method.label, METHODS[method.baseline].label
    header = ("", f"{label}, kB per client and round", f"{against}, kB", "saved", f"{label}, MB in all")
    return html_table(header, rows)


def _kilobytes(count: float) -> str:
    """With more digits where one would be all zeros."""
    return f"{count / 1e3:,.1f}" if count >= 50 or not count else f"{count / 1e3:.3f}"


def _methods(names: Sequence[str], runs: Sequence[Run]) -> str:
    methods = [METHODS[name] for name in dict.fromkeys(names)]
    items = "".join(
        f"<dt>{escape(each.label)}</dt><dd>{escape(_in_words(each, runs))}</dd>" for each in methods
    )
    return f"<h2>The methods</h2><dl>{items}</dl>{html_table(HEADER, [*map(places, methods)], words=True)}"


def _in_words(method: Method, runs: Sequence[Run]) -> str:
    paper = f" {method.paper}." if method.paper else ""
    return f"{method.summary}{_own_numbers(method, runs)}{paper}"


def _own_numbers(method: Method, runs: Sequence[Run]) -> str:
    """Of a method that has some, as these runs had them."""
    found = dict[str, list[str]]()
    for case, group in by_case(runs).items():
        if case.method == method.name and method.settings:
            numbers = {name: group[0].config.settings.get(name, own) for name, own in method.settings.items()}
            found.setdefault(in_words(numbers), []).append(case.label)
    if len(found) < 2:
        return "".join(f" With {numbers}." for numbers in found)
    each = [f"{', '.join(labels)}: {numbers}" for numbers, labels in found.items()]
    return f" {'; '.join(each)}."


OF_FILES = {*OPTIONS} - {"task"}  # say nothing of data that were handed over


def _settings(runs: Sequence[Run]) -> str:
    """Those that all the runs have in common, but for what is of other methods or data."""
    rows = [
        (field.name, _value(getattr(runs[0].config, field.name)), field.metadata["help"])
        for field in dataclasses.fields(Config)
        if field.metadata["saved"]
        and not _is_of_others(field.name, method_names(runs))
        and not (runs[0].config.data == OWN and field.name in OF_FILES)
        and len({str(getattr(run.config, field.name)) for run in runs}) == 1
    ]
    return f"<h2>Settings</h2>{html_table(('option', 'value', 'meaning'), rows, words=True)}"


def _is_of_others(option: str, names: Sequence[str]) -> bool:
    reading = readers(option)
    return bool(reading) and not set(reading) & set(names)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return in_words(value)
    return "–" if value is None else str(value)


_SD = " ± is the standard deviation over the seeds."
_SEVERAL_HEADLINES = (
    " These methods are not all judged by one measure: where each client has a model of its own there is "
    "none for everybody's images. With personalise_epochs all have the initial and the personalised top-1."
)
_TABLE_NOTE = (
    "|S_k| is the mean number of class rows that a client has in a round, whether they are sent to it, drawn "
    "by it from a seed, or kept by it. MB count everything that moved, down and up, "
    "and what of it were class rows and ids, the part that grows with the number of classes. Savings are "
    "against FullSoftmax in as many rounds, of methods without labels against SimCLR."
)
