"""What is said on the terminal: what the data are and how far their reading is, warnings, tables."""

import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Container, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from .. import data as of_data
from ..algorithms import METHODS
from ..config import Config
from ..data import FederatedData, Found
from ..idle_settings import idle, short_warmup
from ..loading import check_data, choices, dearer, fitted, load_data, trivial
from ..reports.tables import fitting, read_markdown

if TYPE_CHECKING:
    from ..reports.progress import RunProgress

PIPED = 160  # columns of a table in a file or a log


def read_data(
    config: Config,
    runs: Sequence[Config],
    ready: Callable[[], None] | None = None,
    given: Container[str] = (),
) -> tuple[Config, FederatedData]:
    """(the configuration, fitted to the data; the data). Before images are read says in a line what they are.

    And what is worth a word of the settings of `runs`, if there are any, `given` those that the user chose.
    Before that `ready` is called, as soon as it is known that the two fit; after the reading what the data
    are without images that cannot be read. Raises ConfigError where the two do not fit.
    """
    said = list[Found]()

    def say(found: Found) -> None:
        said.append(found)
        if ready:
            ready()
        if runs:
            there = _unsaid(found, ())
            if METHODS[config.method].pooled:
                there = dataclasses.replace(there, clients=0)
            words = "; ".join([there.line, *choices(config, found)])
            warmup = [] if "warmup_rounds" in given else short_warmup(config)
            for line in (f"{config.data}: {words}", *warmup, *idle(runs)):
                print(line, flush=True)

    from ..reports.progress import ReadingProgress

    with ReadingProgress() as progress:
        data = load_data(config, say, progress)
    if runs and data.notes != said[0].notes:
        left = _unsaid(data.found, said[0].notes)
        print(f"{config.data}: without what cannot be read: {left.line}", flush=True)
    remarks = (*trivial(config, data), *(line for run in runs for line in dearer(run, data))) if runs else ()
    for line in dict.fromkeys(remarks):
        print(f"{config.data}: {line}", flush=True)
    config = fitted(config, data.found)
    check_data(config, data)
    return config, data


def _unsaid(found: Found, said: Sequence[str]) -> Found:
    """Without the notes that were said, or logged as warnings."""
    handlers = logging.getLogger(of_data.__name__).handlers
    lines = [line for handler in handlers if isinstance(handler, _Lines) for line in handler.said]
    notes = [n for n in found.notes if n not in said and not any(line.endswith(n) for line in lines)]
    return dataclasses.replace(found, notes=tuple(notes))


def show_tuned(progress: "RunProgress", job: int, done: int, total: int) -> None:
    """How many clients of a job have fine-tuned its model: in its bar, or as rounds in a line at times."""
    from ..reports.progress import QUIET_SECONDS

    words, now = f"fine-tuning clients: {done:,} of {total:,}", time.monotonic()
    progress.bars.update(progress.tasks[job], accuracy=words)
    if progress.console.is_terminal or now - progress.said.setdefault(job, now) < QUIET_SECONDS:
        return
    progress.said[job] = now
    print(f"{progress.names[job]}: {words}", file=progress.console.file, flush=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], least: Sequence[str] = ()) -> None:
    """As many columns as there is room for; on a narrow terminal those in `least` go first, then the last.

    Figures are never cut. What is left out is said. Off a terminal the table is as wide as it is.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text  # a name is no markup

    console = Console()
    widths = _widths(header, rows)
    room = console.width if console.is_terminal else max(PIPED, sum(widths) + 1)
    shown = fitting(widths, room - 1, [header.index(title) for title in least if title in header])
    table = Table()
    for i in shown:
        table.add_column(Text(header[i]), justify="right" if i else "left", min_width=widths[i] - 3)
    for row in rows:
        table.add_row(*(Text(row[i]) for i in shown))
    Console(width=max(room, sum(widths[i] for i in shown) + 1)).print(table)
    if len(shown) < len(header):
        left_out = [title for i, title in enumerate(header) if i not in shown]
        print(f"no room for: {', '.join(left_out)}")


def print_markdown(text: str) -> None:
    """Tables of `markdown`, an empty line between, as they are, but on a terminal that would break lines."""
    from rich.console import Console

    console = Console()
    if console.is_terminal and max(map(len, text.splitlines())) > console.width:
        for table in text.split("\n\n"):
            print_table(*read_markdown(table))
    else:
        print(text, end="")


def _widths(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """Of each column on the terminal, its border in it: titles may break between words, figures may not."""
    from rich.cells import cell_len

    names = [word for row in rows for word in row[0].split()]
    cells = [names, *([row[i] for row in rows] for i in range(1, len(header)))]
    return [max(map(cell_len, [*title.split(), *of])) + 3 for title, of in zip(header, cells, strict=True)]


def print_profile(seconds: Mapping[str, float], rounds: int) -> None:
    total = sum(seconds.values())
    rows = [
        [stage, f"{spent:.2f}", f"{100 * spent / total:.1f}%", f"{1000 * spent / rounds:.2f}"]
        for stage, spent in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    print_table(["stage", "seconds", "share", "ms a round"], rows)


def say_what_is_logged(command: str, *modules: ModuleType) -> None:
    """Prints the warnings of these modules, and of those in them, a line each; the same line once."""
    for module in modules:
        logging.getLogger(module.__name__).handlers = [_Lines(command)]


class _Lines(logging.Handler):
    def __init__(self, command: str):
        super().__init__(logging.WARNING)
        self.command, self.said = command, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        line = f"fedss {self.command}: {record.getMessage()}"
        if line not in self.said:
            self.said.add(line)
            print(line, file=sys.stderr, flush=True)  # which a bar makes room for
