"""The one timing helper: pytest-benchmark over several calls, in turns."""

import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

PASSES = 2
ROUNDS_PER_PASS = 3  # at least, however long a call takes
WARMUPS = 1


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, over all rounds; where a call is short, a round is the mean of many."""

    median_s: float
    min_s: float
    iqr_s: float  # the 75th minus the 25th percentile
    rounds: int

    @property
    def steady(self) -> bool:
        """Whether the typical call was nearly as fast as the fastest: not so where others used the cores."""
        return self.median_s <= 1.5 * self.min_s

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, min(seconds), high - low, len(seconds))


def time_calls(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Timing]:
    """Times every call for about `seconds`, warmed up, without garbage collection.

    The calls take turns, PASSES times each, so that a drift of the machine's clock hits all of them. What a
    call raises is raised here.
    """
    if not calls:
        return {}
    session = _Session(calls, seconds / PASSES)
    options = {
        "max-time": seconds / PASSES,
        "min-rounds": ROUNDS_PER_PASS,
        "warmup": "on",
        "warmup-iterations": WARMUPS,
    }
    code = pytest.main(
        [
            *_ALONE,
            "--benchmark-disable-gc",
            *(f"--benchmark-{name}={value}" for name, value in options.items()),
        ],
        plugins=[session],
    )
    if session.error is not None:
        raise session.error
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if code != pytest.ExitCode.OK:
        raise RuntimeError(f"pytest-benchmark did not run: exit code {int(code)}")
    return {name: Timing.of(session.seconds[name]) for name in calls}


# pytest as an engine: no configuration, plugin or output of the project one happens to stand in.
_ALONE = [
    str(Path(__file__).with_name("timed_call.py")),
    *("-c", os.devnull, "--rootdir", str(Path(__file__).parent), "-o", "python_functions=bench_*"),
    *(
        "--import-mode=importlib",
        "--capture=no",
        "--disable-plugin-autoload",
        "-p",
        "pytest_benchmark.plugin",
    ),
    *(
        f"-pno:{plugin}"
        for plugin in ("terminal", "cacheprovider", "faulthandler", "threadexception", "unraisableexception")
    ),
    *("--exitfirst", "--benchmark-quiet"),
]


class _Session:
    """A pytest plugin: hands out the calls, keeps their times and what one of them raised."""

    def __init__(self, calls: Mapping[str, Callable[[], object]], enough: float):
        self.calls, self.enough = calls, enough
        self.seconds: dict[str, list[float]] = {name: [] for name in calls}
        self.error: BaseException | None = None

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        metafunc.parametrize("name", [name for _ in range(PASSES) for name in self.calls])

    @pytest.fixture(name="call")
    def _call(self, name: str) -> Callable[[], object]:
        return self.calls[name]

    @pytest.fixture(name="seconds")
    def _seconds(self, name: str) -> list[float]:
        return self.seconds[name]

    @pytest.fixture(name="enough")
    def _enough(self) -> float:
        """Seconds for one call and pass."""
        return self.enough

    @pytest.fixture(name="rounds")
    def _rounds(self) -> int:
        return ROUNDS_PER_PASS

    def pytest_exception_interact(self, call: pytest.CallInfo) -> None:
        if self.error is None and call.excinfo is not None:
            self.error = call.excinfo.value
