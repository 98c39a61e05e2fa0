"""The figures of a report: rows, and the tables made of them, on a terminal, as CSV and as Markdown."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..federated.reports.tables import fitting
from .measure import Timing

BLANK = "–"  # not measured


class Mismatch(Exception):
    """What is being measured computes something wrong."""


@dataclass(frozen=True)
class Row:
    """One contender at one shape: a line of the CSV."""

    shape: tuple[int, ...]
    operation: str
    dtype: str
    contender: str
    timing: Timing | None
    peak_bytes: int | None  # None: not measured
    note: str = ""  # why there is no timing


COLUMNS = (
    *("operation", "dtype", "contender"),
    *("median_seconds", "min_seconds", "iqr_seconds", "rounds", "peak_bytes", "note"),
)


def write_csv(path: Path, axes: Sequence[str], rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*axes, *COLUMNS])
        for row in rows:
            t = row.timing
            times = ["", "", "", ""] if t is None else [t.median_s, t.min_s, t.iqr_s, t.rounds]
            peak = "" if row.peak_bytes is None else row.peak_bytes
            writer.writerow([*row.shape, row.operation, row.dtype, row.contender, *times, peak, row.note])


class Figures:
    """Rows, found by what they are of."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = {(row.shape, row.operation, row.dtype, row.contender): row for row in rows}

    def shapes(self, operation: str, dtype: str) -> list[tuple[int, ...]]:
        """In the order they were measured."""
        of = [row.shape for row in self.rows.values() if (row.operation, row.dtype) == (operation, dtype)]
        return list(dict.fromkeys(of))

    def seconds(self, shape: tuple[int, ...], operation: str, dtype: str, contender: str) -> float | None:
        row = self.rows.get((shape, operation, dtype, contender))
        return None if row is None or row.timing is None else row.timing.median_s

    def peak_bytes(self, shape: tuple[int, ...], operation: str, dtype: str, contender: str) -> int | None:
        row = self.rows.get((shape, operation, dtype, contender))
        return None if row is None else row.peak_bytes

    def remarks(self) -> list[str]:
        """A line for each reason that something was not measured, and one on how steady the timings were."""
        timings = [row.timing for row in self.rows.values() if row.timing is not None]
        unsteady = sum(not timing.steady for timing in timings)
        if not unsteady:
            return self._excuses()
        busy = f"{unsteady} of {len(timings)} timings were unsteady, their median above 1.5 times the least: "
        return [*self._excuses(), busy + "something else was using the machine."]

    def _excuses(self) -> list[str]:
        shapes: dict[tuple[str, str], dict[str, None]] = {}
        for row in self.rows.values():
            if row.note:
                shapes.setdefault((row.contender, row.note), {})[numbers(row.shape)] = None
        return [
            f"{contender} not run at ({'), ('.join(where)}): {note}."
            for (contender, note), where in shapes.items()
        ]


# ---- figures as text ---------------------------------------------------------------------------------------


def quotient(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def decimal(value: float | None, unit: float = 1.0) -> str:
    """Three digits or so: 0.85, 12.3, 1,450."""
    if value is None:
        return BLANK
    value /= unit
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return BLANK
    return f"{seconds * 1e3:.3f}" if seconds < 10e-3 else decimal(seconds * 1e3)


def share(part: float | None, whole: float | None) -> str:
    fraction = quotient(part, whole)
    return BLANK if fraction is None else f"{fraction:.0%}"


def mebibytes(size: int | None) -> str:
    return BLANK if size is None else decimal(size, 2**20)


def numbers(values: Sequence[int]) -> str:
    return ", ".join(f"{value:,}" if value >= 10**4 else str(value) for value in values)


# ---- tables ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Lines of a table that belong together, under a title."""

    title: str
    lines: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Table:
    title: str
    header: Sequence[str]  # "\n" where a narrow terminal breaks it
    groups: Sequence[Group]
    notes: Sequence[str]


def print_table(table: Table, machine: object) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text  # what a machine or a library calls itself is no markup

    console = Console()
    widths = _widths(table)
    if not console.is_terminal:  # rich would squeeze it into 80 columns
        console = Console(width=max(160, sum(widths)))
    shown = fitting(widths, console.width)
    if sum(widths[i] for i in shown) > console.width:
        console = Console(width=sum(widths[i] for i in shown))
    grid = Grid(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for i in shown:
        grid.add_column(Text(table.header[i]), justify="right" if i else "left", no_wrap=True)
    for group in table.groups:
        grid.add_row(Text(group.title.replace(", ", "\n"), style="bold"))  # within the first column's width
        for line in group.lines:
            grid.add_row(*(Text(line[i]) for i in shown))
        grid.add_section()
    console.print(Text.assemble((table.title, "bold"), f" ({machine})"))
    console.print(grid)
    left_out = [title.replace("\n", " ") for i, title in enumerate(table.header) if i not in shown]
    if left_out:
        console.print(Text(f"no room for: {', '.join(left_out)}"))
    for note in table.notes:
        console.print(Text(note, style="dim"))


def _widths(table: Table) -> list[int]:
    """Of each column on the terminal, the blank beside it in it."""
    texts = [[*title.split("\n")] for title in table.header]
    for group in table.groups:
        texts[0] += group.title.split(", ")
        for line in group.lines:
            for column, cell in zip(texts, line, strict=False):
                column.append(cell)
    return [max(map(len, column)) + 1 for column in texts]


def write_markdown(path: Path, table: Table, machine: object) -> None:
    """A table for each group, ready for a README."""
    rule = ["---", *["---:"] * (len(table.header) - 1)]
    parts = [f"**{table.title}** ({machine})"]
    for group in table.groups:
        header = [title.replace("\n", " ") for title in table.header]
        lines = [_markdown(cells) for cells in (header, rule, *group.lines)]
        parts.append(f"{group.title}:\n\n" + "\n".join(lines))
    parts.append("\n".join(f"- {note}" for note in table.notes))
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _markdown(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
