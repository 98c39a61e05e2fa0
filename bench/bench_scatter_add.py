"""The aggregator's scatter-add beside torch's own ways to add rows."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedss_kernels import scatter_add_

from .results import Mismatch, numbers
from .row_operation import RowContender, RowOperation, Shape


class Problem(NamedTuple):
    out: Tensor  # (C, D)
    class_ids: Tensor  # (M,) repeats allowed
    rows: Tensor  # (M, D)
    scale: Tensor  # (M,)


def problem(shape: Shape) -> Problem:
    M, D, C = shape
    g = torch.Generator().manual_seed(0)
    class_ids = torch.randint(C, (M,), generator=g)
    rows, scale = torch.randn(M, D, generator=g), torch.rand(M, generator=g)
    return Problem(torch.zeros(C, D), class_ids, rows, scale)


def ours(p: Problem) -> Tensor:
    return scatter_add_(p.out, p.class_ids, p.rows, p.scale)


def index_add(p: Problem) -> Tensor:
    return p.out.index_add_(0, p.class_ids, p.rows * p.scale[:, None])


def ours_plain(p: Problem) -> Tensor:
    return scatter_add_(p.out, p.class_ids, p.rows)


def index_add_plain(p: Problem) -> Tensor:
    return p.out.index_add_(0, p.class_ids, p.rows)


def index_put_plain(p: Problem) -> Tensor:
    return p.out.index_put_((p.class_ids,), p.rows, accumulate=True)


CONTENDERS = {
    "ours": RowContender("scatter_add_ with scale", ours),
    "index_add": RowContender("index_add_ of rows * scale", index_add),
    "ours_plain": RowContender("scatter_add_", ours_plain, "ours_plain"),
    "index_add_plain": RowContender("index_add_", index_add_plain, "ours_plain"),
    "index_put_plain": RowContender("index_put_, accumulate=True", index_put_plain, "ours_plain"),
}
TOLERANCE = 1e-5  # a few dozen roundings of sums of normal variables


def check(shape: Shape, contenders: Sequence[str]) -> None:
    """Raises Mismatch unless every contender adds what float64 does."""
    p = problem(shape)
    for name in contenders:
        scaled = CONTENDERS[name].ours == "ours"
        rows = p.rows.double() * p.scale.double()[:, None] if scaled else p.rows.double()
        exact = torch.zeros(p.out.shape, dtype=torch.float64).index_add_(0, p.class_ids, rows)
        p.out.zero_()
        CONTENDERS[name].run(p)
        error = (p.out - exact).abs().max().item()
        if not error <= TOLERANCE:
            raise Mismatch(f"{name} of scatter_add at ({numbers(shape)}) is off by {error:.3g}")


SCATTER_ADD = RowOperation(
    name="scatter_add",
    shapes=[
        Shape(64_000, 64, 100_000),
        Shape(16_000, 1280, 50_000),
        Shape(64_000, 64, 1_000_000),
        Shape(3_520, 64, 2_028),
    ],
    contenders=CONTENDERS,
    problem=problem,
    check=check,
    passes=3,  # reads each row, reads and writes its class
)
