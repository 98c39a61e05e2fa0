"""Tables as text."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from .disk import write_whole


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others, of figures, to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def write_csv(path: Path, lines: Iterable[Sequence[object]]) -> None:
    """The file is there whole or, where that cannot be, as it was."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(lines)
    write_whole(path, text.getvalue())
