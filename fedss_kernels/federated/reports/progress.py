"""What a run says while it goes on: a bar on a terminal, a plain line now and then where there is none.

First while its data are read, then after every round.
"""

import sys
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import (
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..files.round_metrics import RoundMetrics
from .bars import Bars
from .remarks import remarks

QUIET_SECONDS = 20.0  # between two plain lines of one job
QUICK_SECONDS = 0.5  # reading that takes no longer needs no plain line


class RunProgress:
    """Loss, accuracy and time left of one or more jobs. A context manager; `advance` it after every round."""

    def __init__(self, names: Sequence[str], rounds: int | Sequence[int], console: Console | None = None):
        """rounds: of all of them, or of each."""
        self.names = names
        self.rounds = [rounds] * len(names) if isinstance(rounds, int) else rounds
        self.console = console or Console()
        self.accuracy = ["–"] * len(names)
        self.said: dict[int, float] = {}  # job -> when its last plain line was
        self.remarked: set[tuple[int, bool]] = set()  # (job, whether it was of its model)
        loss, accuracy = TextColumn("loss {task.fields[loss]}"), TextColumn("{task.fields[accuracy]}")
        spent, left = TimeElapsedColumn(), TimeRemainingColumn()
        self.bars = Bars(
            MofNCompleteColumn(),
            loss,
            accuracy,
            spent,
            left,
            least=(spent, left, loss),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        # A job's clock starts with its first round, so those that wait their turn show no time.
        self.tasks = [
            self.bars.add_task(name, total=total, loss="–", accuracy="–", start=len(names) == 1)
            for name, total in zip(names, self.rounds, strict=True)
        ]

    def __enter__(self) -> "RunProgress":
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def start(self, job: int) -> None:
        self.bars.start_task(self.tasks[job])

    def advance(self, job: int, metrics: RoundMetrics) -> None:
        for measure in metrics.measures.alike:
            if (value := metrics.measured.get(measure.name)) is not None:
                self.accuracy[job] = f"{measure.label} {measure.text(value)}"
                break
        if metrics.not_finite_since is not None:  # an earlier one says nothing of what the model is now
            self.accuracy[job] = "–"
        self._remark(job, metrics)
        self.bars.update(
            self.tasks[job],
            completed=metrics.round,
            loss=f"{metrics.loss:.3f}",
            accuracy=self.accuracy[job],
        )
        if not self.console.is_terminal:
            self._say(job, metrics)

    def _remark(self, job: int, metrics: RoundMetrics) -> None:
        """What is to be said of a job, when there is something for the first time; of its model anew."""
        for line in remarks(metrics):
            about = job, metrics.not_finite_since is not None
            if about not in self.remarked:
                self.remarked.add(about)
                print(f"{self.names[job]}: {line}", file=sys.stderr, flush=True)

    def _say(self, job: int, metrics: RoundMetrics) -> None:
        rounds, now = self.rounds[job], time.monotonic()
        last = metrics.round == rounds
        if not last and now - self.said.setdefault(job, now) < QUIET_SECONDS:
            return
        self.said[job] = now
        left = metrics.seconds / metrics.round * (rounds - metrics.round)
        print(
            f"{self.names[job]}: round {metrics.round}/{rounds}, loss {metrics.loss:.3f}, "
            f"{self.accuracy[job]}, {metrics.seconds:.0f} s, {left:.0f} s left",
            file=self.console.file,
            flush=True,
        )


class ReadingProgress:
    """How far the reading of a data set is; a context manager, and `on_progress` of load_data."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console()
        self.said: dict[str, float] = {}  # what is going on -> when its last plain line was
        times = TimeElapsedColumn(), TimeRemainingColumn()
        self.bars = Bars(
            MofNCompleteColumn(),
            *times,
            least=times,
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self.task: TaskID | None = None

    def __enter__(self) -> "ReadingProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if not self.console.is_terminal:
            self._say(what, done, total)
            return
        if self.task is None:
            self.bars.start()
            self.task = self.bars.add_task(what)
        self.bars.update(self.task, description=what, completed=done, total=total or None)

    def _say(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.said.setdefault(what, now - QUIET_SECONDS + QUICK_SECONDS) < QUIET_SECONDS:
            return
        self.said[what] = now
        print(f"{what}: {done:,} of {total:,}" if total else what, file=self.console.file, flush=True)
