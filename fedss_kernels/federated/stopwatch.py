"""Where the time of a run goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

STAGES = ("select", "answers", "local training", "communication", "aggregation", "evaluation", "files")


class Stopwatch:
    """`with watch("select"): ...` adds up seconds by stage; those of a stage inside it are not its own."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._inside = 0.0  # of the stages in the one that runs

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begun, before, self._inside = time.perf_counter(), self._inside, 0.0
        try:
            yield
        finally:
            spent = time.perf_counter() - begun
            self.seconds[stage] += spent - self._inside
            self._inside = before + spent
