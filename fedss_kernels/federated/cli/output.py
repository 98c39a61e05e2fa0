"""Tables on the terminal, and how far the reading of the data is."""

from collections.abc import Mapping, Sequence

from ..config import Config
from ..data import FederatedData
from ..loading import load_data


def load_shown(config: Config) -> FederatedData:
    """`load_data`, which shows how far it is."""
    from ..progress import ReadingProgress

    with ReadingProgress() as progress:
        return load_data(config, progress)


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
