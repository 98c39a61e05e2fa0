"""The GPU: how long calls take on it, what memory they need, and its own limits.

Without a GPU everything here works on a CPU, where kernels are interpreted; graphs and memory are left out.
"""

import functools
import gc
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
WARMUPS, TURNS, FEWEST, MOST = (5, 5, 2, 200) if CUDA else (0, 2, 1, 1)  # calls: of a turn
GRAPH_CALLS = 20  # in one graph, so that its launch does not count
Stage = Callable[[Any], Any]  # of a call: given what the one before it returned


def _mark() -> Any:
    if not CUDA:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds_between(begin: Any, end: Any) -> float:
    return begin.elapsed_time(end) / 1e3 if CUDA else end - begin


def _wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


class Stopwatch:
    """Times the stages of a call, one right after the other, over TURNS turns of many calls.

    What is compared takes its turns in alternation, so that what slows the machine slows all of it.
    """

    def __init__(self, seconds: float, *stages: Stage):
        """seconds: that its turns take together. Warms up."""
        self.stages = stages
        self.seconds: list[list[float]] = [[] for _ in stages]  # of each stage, every call
        for _ in range(WARMUPS):
            self._call()
        _wait()
        begun = time.perf_counter()
        self._call()
        _wait()
        self.calls = min(max(int(seconds / TURNS / (time.perf_counter() - begun)), FEWEST), MOST)

    def turn(self) -> None:
        if CUDA:  # not counted: it finds the caches full of something else, the device with nothing to do
            self._call()
        calls = [self._call() for _ in range(self.calls)]
        _wait()
        for nth, seconds in enumerate(self.seconds):
            seconds += [_seconds_between(marks[nth], marks[nth + 1]) for marks in calls]

    def _call(self) -> list[Any]:
        marks, value = [_mark()], None
        for stage in self.stages:
            value = stage(value)
            marks.append(_mark())
        return marks


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """One for all captures: for each stream that it meets, cuBLAS keeps memory of its own."""
    return torch.cuda.Stream()


def graph_of(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """GRAPH_CALLS of the call."""
    graph, side = torch.cuda.CUDAGraph(), _side_stream()
    side.wait_stream(torch.cuda.current_stream())
    gc.collect()
    gc.disable()  # the end of a kernel unloads it, which breaks a capture
    try:
        with torch.cuda.stream(side):  # also leads back from it, which a capture that fails does not
            for _ in range(WARMUPS):
                call()
            side.synchronize()
            with torch.cuda.graph(graph, stream=side):
                for _ in range(GRAPH_CALLS):
                    call()
    finally:
        gc.enable()
    torch.cuda.synchronize()
    return graph


def peak_bytes(step: Callable[[], object]) -> int | None:
    """Device memory that a call adds at its peak, its gradients among it; None on a CPU."""
    if not CUDA:
        return None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


# ---- the device and its own limits -------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """What a figure means nothing without, and the device's limits: the best of many calls."""

    model: str
    driver: str
    torch: str
    triton: str
    mm_flops: dict[str, float]  # operations per second of torch.mm of two large square matrices, by precision
    copy_bytes: float  # bytes per second, read and written, of a large copy

    @property
    def name(self) -> str:
        return f"{self.model}, driver {self.driver}, torch {self.torch}, triton {self.triton}"

    def __str__(self) -> str:
        rates = ", ".join(f"{precision} {rate / 1e12:.3g}" for precision, rate in self.mm_flops.items())
        return f"{self.name}; large torch.mm: {rates} TFLOP/s; copies {self.copy_bytes / 1e9:,.0f} GB/s"


def measure_device(seconds: float) -> Device:
    import triton

    return Device(
        torch.cuda.get_device_name() if CUDA else "CPU interpreted",
        _driver() if CUDA else "none",
        torch.__version__,
        triton.__version__,
        {
            "bfloat16": _mm_flops(seconds, torch.bfloat16),
            "tf32": _mm_flops(seconds, torch.float32, "high"),
            "float32": _mm_flops(seconds, torch.float32),
        },
        _copied_bytes(seconds),
    )


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return lines[0] if lines else "unknown"


def _mm_flops(seconds: float, dtype: torch.dtype, precision: str = "highest") -> float:
    size, before = 8192 if CUDA else 128, torch.get_float32_matmul_precision()
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    torch.set_float32_matmul_precision(precision)
    best = _least(seconds, lambda _: torch.mm(a, b))
    torch.set_float32_matmul_precision(before)
    return 2 * size**3 / best


def _copied_bytes(seconds: float) -> float:
    source = torch.ones(2**30 if CUDA else 2**20, dtype=torch.uint8, device=DEVICE)
    copy = torch.empty_like(source)
    return 2 * source.numel() / _least(seconds, lambda _: copy.copy_(source))


def _least(seconds: float, call: Stage) -> float:
    watch = Stopwatch(seconds, call)
    for _ in range(TURNS):
        watch.turn()
    return min(watch.seconds[0])
