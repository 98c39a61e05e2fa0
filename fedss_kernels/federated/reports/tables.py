"""Tables as text."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..disk import write_whole


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others, of figures, to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def write_csv(path: Path, lines: Iterable[Sequence[object]]) -> None:
    """The file is there whole or, where that cannot be, as it was."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(lines)
    write_whole(path, text.getvalue())


def read_markdown(text: str) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of what `markdown` wrote."""
    lines = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in text.splitlines()]
    header, _, *rows = [[cell.replace("\\|", "|") for cell in line] for line in lines]
    return header, rows


def fitting(widths: Sequence[int], room: int, least: Sequence[int] = ()) -> list[int]:
    """Which columns there is room for: those in `least` go first, then the last, but never the first two."""
    shown = list(range(len(widths)))
    for i in dict.fromkeys([*least, *reversed(range(2, len(widths)))]):
        if sum(widths[k] for k in shown) <= room:
            break
        shown.remove(i)
    return shown
