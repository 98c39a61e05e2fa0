"""Bars of what goes on, on a terminal of any width: a figure is there as a whole, or not at all."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.table import Table
from rich.text import Text

from .tables import fitting

BAR = 4, 40  # columns of the terminal that a bar takes, at least and at most
_NAME, _BAR = 0, 1  # places among a line's cells


class Bars(Progress):
    """A line for each task: its name, a bar, and `figures`.

    Where there is no room for all of it the bar shrinks, then goes; then those of the figures that are in
    `least` go, one after the other; and where only the others are left names are shortened.
    """

    def __init__(self, *figures: ProgressColumn, least: Sequence[ProgressColumn], **options: Any):
        self.cells = (_Name(), BarColumn(bar_width=None), *figures)
        self.least = [_BAR, *map(self.cells.index, least)]
        super().__init__(*self.cells, **options)

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        lines = [[cell(task) for cell in self.cells] for task in tasks if task.visible]
        if not lines:
            return Table.grid()
        widths = [self._width(column) for column in zip(*lines, strict=True)]
        widths[_BAR] = BAR[0] + 1
        shown = self._shown(widths)
        shrinks = _BAR if _BAR in shown else _NAME
        grid = Table.grid(padding=(0, 1, 0, 0))
        for i in shown:
            grid.add_column(no_wrap=i != shrinks, max_width=BAR[1] if i == _BAR else None)
        for line in lines:
            grid.add_row(*(line[i] for i in shown))
        return grid

    def _width(self, column: Iterable[Any]) -> int:
        """Of the terminal's columns, with the space after it."""
        return max(self.console.measure(cell).maximum for cell in column) + 1

    def _shown(self, widths: list[int]) -> list[int]:
        """Places of the cells that there is room for; of names that for one letter is enough."""
        room = self.console.width + 1  # the last has no space after it
        kept = [i for i in range(len(widths)) if i not in self.least]
        if sum(widths[i] for i in kept) <= room:
            return fitting(widths, room, self.least)
        return [kept[i] for i in fitting([2, *(widths[i] for i in kept[1:])], room)]


class _Name(ProgressColumn):
    """What a task is called, on one line whatever its width."""

    def render(self, task: Task) -> Text:
        return Text(task.description, no_wrap=True, overflow="ellipsis")
