"""Where the time of a run goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

STAGES = ("select", "local training", "communication", "aggregation", "evaluation", "files")


class Stopwatch:
    """`with watch("select"): ...` adds up seconds by stage."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - begun
