"""Time of one server's answers to a client that asks in private, beside the time of reading the same bytes.

A client of Landmarks or SOP asks for as many class rows as in the FedSS paper, of 64 numbers each. Reading is
measured in the same run, on an array larger than any cache; a table that fits a cache is read faster. Held
against it are two bounds: the table read once, which no server can do without, and once for each query, which
is what one that takes them one after the other does.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from ..federated import private_retrieval
from ..xor_rows import xor_rows
from .machine import COPIED_BYTES, measure_machine
from .measure import time_calls
from .results import Mismatch, decimal, milliseconds

DIM = 64


class Shape(NamedTuple):
    name: str
    classes: int
    rows: int  # that a client asks for


SHAPES = (Shape("Landmarks", 2028, 110), Shape("SOP", 11_318, 100))
HEADER = (
    *("data", "C", "rows asked for", "KB up", "KB down", "answers of one server, ms"),
    *("reading all rows once, ms", "/ once", "for each query, ms", "/ each"),
)


def measure(shape: Shape, seconds: float) -> list[str]:
    """The line of a shape. Raises Mismatch where the rows are not those that were asked for."""
    rng = torch.Generator().manual_seed(0)
    table = torch.randn(shape.classes, DIM, generator=rng)
    class_ids = torch.randperm(shape.classes, generator=rng)[: shape.rows]
    asked = private_retrieval.queries(class_ids, shape.classes)
    if not torch.equal(private_retrieval.opened(*(xor_rows(table, of) for of in asked)), table[class_ids]):
        raise Mismatch(f"the rows of {shape.name} are not those that were asked for")
    large = torch.ones(COPIED_BYTES // 4)
    timings = time_calls({"answers": partial(xor_rows, table, asked[0]), "read": large.sum}, seconds)
    answers, read = timings["answers"].min_s, timings["read"].min_s
    once = read * table.numel() / large.numel()
    moved = private_retrieval.traffic(shape.classes, shape.rows, DIM)
    sizes = [f"{moved[flow] / 1000:.0f}" for flow in private_retrieval.FLOWS]
    bounds = [cell for least in (once, once * shape.rows) for cell in _beside(answers, least)]
    return [shape.name, f"{shape.classes:,}", str(shape.rows), *sizes, milliseconds(answers), *bounds]


def _beside(seconds: float, least: float) -> tuple[str, str]:
    return milliseconds(least), decimal(seconds / least)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fedss_kernels.bench.private_retrieval", description=__doc__
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each time that is measured")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    print(f"The best of many calls, {measure_machine(0.1)}:\n")
    lines = [HEADER, ["---:"] * len(HEADER), *(measure(shape, given.seconds) for shape in SHAPES)]
    for cells in lines:
        print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
