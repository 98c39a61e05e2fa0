"""A report: what is asked for, what answers it, and the files it leaves."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .plot import Panel, save_plot
from .results import Row, Table, print_table, write_csv, write_markdown


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    quick: bool = False  # a few shapes instead of all
    shapes: Sequence[Sequence[int]] | None = None  # these instead
    contenders: Sequence[str] | None = None  # these alone
    seconds: float = 0.15  # for timing each contender, at each shape
    progress: Callable[[str], None] = lambda line: None  # told what is being measured

    def wants(self, contender: str) -> bool:
        return self.contenders is None or contender in self.contenders


@dataclass(frozen=True)
class Report:
    name: str
    title: str
    axes: Sequence[str]  # of a shape
    contenders: Sequence[str]
    measure: Callable[[Plan], Iterator[Row]]  # raises Mismatch before it times what is wrong
    table: Callable[[Sequence[Row], Any], Table]  # of what was measured, and on what machine
    panels: Callable[[Sequence[Row]], list[Panel]]
    wanting: Callable[[Sequence[int]], str] = lambda shape: (
        ""
    )  # what a shape should be and is not, or nothing

    def check(self, plan: Plan) -> None:
        """Raises ValueError for a plan that is not this report's."""
        for shape in plan.shapes or ():
            given = "x".join(map(str, shape))
            expected = "x".join(self.axes) if len(shape) != len(self.axes) else self.wanting(shape)
            if expected:
                raise ValueError(f"--shapes: expected {expected} for {self.name}, got {given!r}")
        unknown = [name for name in plan.contenders or () if name not in self.contenders]
        if unknown or plan.contenders == []:
            known, got = ", ".join(self.contenders), repr(unknown[0]) if unknown else "none"
            raise ValueError(f"--contenders: expected some of {known}, got {got}")

    def produce(self, plan: Plan, machine: Any, out: Path) -> None:
        """Measures, prints the table, writes NAME.csv, NAME.md and NAME.png to `out`, replacing earlier.

        Interrupted (Ctrl-C), it reports what was measured until then, if anything was.
        """
        rows: list[Row] = []
        try:
            rows.extend(self.measure(plan))
        except KeyboardInterrupt:
            if not rows:
                raise
            plan.progress("interrupted: what was measured until now")
        table = self.table(rows, machine)
        print_table(table, machine)
        write_csv(out / f"{self.name}.csv", self.axes, rows)
        write_markdown(out / f"{self.name}.md", table, machine)
        save_plot(out / f"{self.name}.png", f"{self.title}\n{machine.name}", self.axes, self.panels(rows))
