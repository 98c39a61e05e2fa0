"""What a command measured, as files: every figure, a table, a plot and a section of the report."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...plotting import plotting
from ..disk import replacing, why, write_whole
from .page import add_section, png_of
from .tables import markdown, write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class NotWritten(Exception):
    """Says what is in the folder and what is not, and why. `table` is the text of what was measured."""

    def __init__(self, words: str, table: str):
        super().__init__(words)
        self.table = table


def write_figures(
    folder: Path,
    name: str,
    lines: Iterable[Sequence[object]],
    plot: Callable[[], "Figure"],
    title: str,
    words: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
) -> str:
    """NAME.csv of `lines`, NAME.md, NAME.png, a section of report.html; returns the table as text.

    What cannot be written keeps none of the others from it. Raises NotWritten after the last.
    """
    text, pictures, lost = markdown(header, rows), list[bytes](), dict[str, str]()

    def draw() -> None:
        with plotting():
            pictures.append(png_of(plot(), dpi=150))
        with replacing(folder / f"{name}.png") as file:
            file.write(pictures[0])

    files = {
        f"{name}.csv": lambda: write_csv(folder / f"{name}.csv", lines),
        f"{name}.md": lambda: write_whole(folder / f"{name}.md", text),
        f"{name}.png": draw,
        "report.html": lambda: add_section(folder, name, title, words, header, rows, *pictures),
    }
    for file, write in files.items():
        try:
            write()
        except Exception as error:
            lost[file] = why(error)
    if lost:
        there = ", ".join(file for file in files if file not in lost) or "nothing"
        reason = next(iter(lost.values()))
        raise NotWritten(f"written to {folder}: {there}; not {', '.join(lost)}: {reason}", text)
    return text


def all_written(*writes: Callable[[], str]) -> str:
    """What each returns, one below the other. Raises NotWritten after the last, as write_figures does."""
    texts, lost = [], []
    for write in writes:
        try:
            texts.append(write())
        except NotWritten as error:
            texts.append(error.table)
            lost.append(str(error))
        except OSError as error:
            lost.append(why(error))
    text = "\n".join(filter(None, texts))
    if lost:
        raise NotWritten("; ".join(lost), text)
    return text
