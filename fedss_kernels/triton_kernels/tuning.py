"""FEDSS_AUTOTUNE=1: for each new problem size, configurations near the table's are timed, the fastest kept.

It compiles some thirty variants of a kernel, which takes about a minute, once for each size and process. The
fastest may differ from one run to the next, and with it the last bits of results.
"""

import itertools
import os
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from functools import partial

import torch
import triton

from .configurations import MOST_TILES, Blocks, Configuration

_fastest: dict[Hashable, Configuration] = {}


def wanted(device: torch.device) -> bool:
    """Whether to search: never while a graph is captured, and never where kernels are interpreted."""
    return (
        os.environ.get("FEDSS_AUTOTUNE") == "1"
        and device.type == "cuda"
        and not torch.cuda.is_current_stream_capturing()
    )


def fastest(
    key: Hashable, table: Configuration, stage: str, run: Callable[[Configuration], object]
) -> Configuration:
    """The configuration with which `run` is fastest; the table's among them. `stage`: forward or backward."""
    if key not in _fastest:
        timed = [(_milliseconds(run, c), order, c) for order, c in enumerate(candidates(table, stage))]
        _fastest[key] = min(timed)[2]
    return _fastest[key]


def candidates(table: Configuration, stage: str) -> Iterator[Configuration]:
    """The table's configuration, then its neighbours in tiles of classes, warps and stages."""
    yield table
    for halvings, warps, stages in itertools.product((-1, 0, 1), (2, 4, 8), (1, 2, 3, 4)):
        near = partial(_near, halvings=halvings, warps=warps, stages=stages)
        tiling = table.tiling
        if stage == "forward":
            yield replace(table, tiling=replace(tiling, forward=near(tiling.forward)))
        else:
            tiles = near(tiling.tiles)
            grad_rows, grad_input = near(tiling.grad_rows), near(tiling.grad_input)
            tiling = replace(tiling, tiles=tiles, grad_rows=grad_rows, grad_input=grad_input)
            chunk = min(-(-table.chunk // tiles.classes), MOST_TILES) * tiles.classes
            yield replace(table, tiling=tiling, chunk=chunk)


def _near(blocks: Blocks, halvings: int, warps: int, stages: int) -> Blocks:
    classes = int(min(max(blocks.classes / 2**halvings, 16), 256))
    if blocks.stages == 1:  # not for speed: see forward.py
        stages = 1
    return replace(blocks, classes=classes, warps=warps, stages=stages)


def _milliseconds(run: Callable[[Configuration], object], configuration: Configuration) -> float:
    """Median time; infinite where the device has too little shared memory or too few registers."""
    try:
        return triton.testing.do_bench(lambda: run(configuration), warmup=5, rep=20, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return float("inf")
