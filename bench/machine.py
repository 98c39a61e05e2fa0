"""The machine and its own limits, measured in the same run as what is held against them."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from fedss_kernels import _C

from .measure import time_calls

COPIED_BYTES = 2**28  # far more than any cache holds
MATMUL_SIZE = 1024


@dataclass(frozen=True)
class Machine:
    """What a figure means nothing without, and the machine's limits: the best of many calls."""

    model: str
    cores: int
    threads: int
    load: float | None  # runnable processes over the minute before: others' use of the cores
    torch: str
    instruction_set: str  # the one that the kernels use
    fma_flops: float  # float32 operations per second of a loop of fused multiply-adds, all threads
    matmul_flops: float  # of torch.mm of two square float32 matrices: what the library reaches here
    copy_bytes: float  # bytes per second, read and written, of a large torch copy, all threads

    @property
    def name(self) -> str:
        return f"{self.model}, {self.cores} cores, {self.threads} threads, torch {self.torch}"

    def __str__(self) -> str:
        return (
            f"{self.name}, instruction set {self.instruction_set}; "
            f"FMA peak {self.fma_flops / 1e9:,.0f} GFLOP/s (float32), "
            f"large torch.mm {self.matmul_flops / 1e9:,.0f} GFLOP/s, copies {self.copy_bytes / 1e9:.1f} GB/s"
            + ("" if self.load is None else f"; load before {self.load:.1f}")
        )


def measure_machine(seconds: float) -> Machine:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    source = torch.ones(COPIED_BYTES // 4)
    copy = torch.empty_like(source)
    square = torch.randn(MATMUL_SIZE, MATMUL_SIZE)
    timings = time_calls({"copy": lambda: copy.copy_(source), "matmul": lambda: square @ square}, seconds)
    threads = torch.get_num_threads()
    return Machine(
        model=_processor(),
        cores=os.cpu_count() or 1,
        threads=threads,
        load=load,
        torch=torch.__version__,
        instruction_set=_C.instruction_set(),
        fma_flops=_C.fma_peak(threads),
        matmul_flops=2 * MATMUL_SIZE**3 / timings["matmul"].min_s,
        copy_bytes=2 * COPIED_BYTES / timings["copy"].min_s,
    )


def _processor() -> str:
    """The processor's name. Linux has it in /proc/cpuinfo, on ARM under no name at all."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
