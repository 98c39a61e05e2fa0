"""Tables and other lines on the terminal."""

import logging
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for i, title in enumerate(header):
        table.add_column(title, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    # Off a terminal rich would squeeze the table into 80 columns; a file or a log takes it as wide as it is.
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


def print_profile(seconds: Mapping[str, float], rounds: int) -> None:
    total = sum(seconds.values())
    rows = [
        [stage, f"{spent:.2f}", f"{100 * spent / total:.1f}%", f"{1000 * spent / rounds:.2f}"]
        for stage, spent in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    print_table(["stage", "seconds", "share", "ms a round"], rows)


def say_what_is_logged(command: str, *modules: ModuleType) -> None:
    """Prints the warnings of these modules, a line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"fedss {command}: %(message)s"))
    for module in modules:
        logging.getLogger(module.__name__).handlers = [handler]
