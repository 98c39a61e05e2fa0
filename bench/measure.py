"""The one timing helper, and the table that every benchmark prints and saves."""

import csv
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def median_seconds(
    run: Callable[[], object], budget_s: float = 1.0, least: int = 5, most: int = 200
) -> float:
    """Median wall time of one call, over as many calls as fit the budget, after two that are not counted."""
    for _ in range(2):
        run()
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < least or (len(times) < most and time.perf_counter() - begun < budget_s):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def machine() -> str:
    """Processor, threads and torch version: what a figure means nothing without."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 256 MiB."""
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / median_seconds(lambda: target.copy_(source))


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], out: Path | None) -> None:
    """Prints a Markdown table and, if asked, saves it as CSV."""
    print(f"\n{title} ({machine()})\n")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
