"""Operations on M rows of C: what bench_scatter_add.py and bench_row_momentum.py have in common."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .measure import time_calls
from .peak_memory import Prepared, peak_bytes
from .results import Row


class Shape(NamedTuple):
    M: int
    D: int
    C: int


TINY = Shape(2, 8, 3)


@dataclass(frozen=True)
class RowContender:
    label: str
    run: Callable[[Any], object]  # a module's function, of a problem
    ours: str = "ours"  # the contender that its time is compared with


@dataclass(frozen=True)
class RowOperation:
    name: str
    shapes: Sequence[Shape]  # the last is the quick one
    contenders: Mapping[str, RowContender]
    problem: Callable[[Shape], Any]
    check: Callable[[Shape, Sequence[str]], None]  # raises Mismatch
    passes: int  # how often memory of the size of the rows, M x D, is read or written at the least
    repeats: bool = True  # whether a class may come more than once: otherwise M is at most C

    def measure(self, shape: Shape, names: Sequence[str], seconds: float) -> Iterator[Row]:
        """Time and peak memory of every contender, once they were checked."""
        self.check(shape, names)
        p = self.problem(shape)
        runs = {name: self.contenders[name].run for name in names}
        timings = time_calls({name: functools.partial(run, p) for name, run in runs.items()}, seconds)
        for name, run in runs.items():
            peak = peak_bytes(_prepare, run, self.problem, shape)
            yield Row(shape, self.name, "float32", name, timings[name], peak)

    def bytes_per_second(self, shape: Sequence[int], seconds: float) -> float:
        M, D, _C = shape
        return self.passes * M * D * 4 / seconds


def _prepare(run: Callable[[Any], object], problem: Callable[[Shape], Any], shape: Shape) -> Prepared:
    tiny, p = problem(TINY), problem(shape)
    return lambda: run(tiny), lambda: run(p)
