"""A step of SGD with momentum on the rows that have a gradient; runs of equal ids as in `scatter_add`.

    g = sum of rows[i] with class_ids[i] = c, in the order of i, + weight_decay * weight[c]
    velocity[c] = v = momentum * velocity[c] + g
    weight[c] -= lr * v                                 (nesterov: lr * (g + momentum * v))

Bytes: each row of `rows` is read once, and each row of `weight` and `velocity` that is listed
read and written once.
"""

import triton
import triton.language as tl
from torch import Tensor

from .scatter_add import cells, matrix, over_runs, own_runs, sum_of_runs


@triton.jit(do_not_specialize=["C", "M"])
def row_momentum_kernel(
    class_ids, M, C, weight, velocity, order, rows,
    lr: tl.float64,  # unannotated, a Python number would come as float32
    momentum: tl.float64, weight_decay: tl.float64,
    DECAYS: tl.constexpr, NESTEROV: tl.constexpr, POSITIONS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = weight.at.dtype.element_ty
    at, ids, heads, columns, wanted = own_runs(class_ids, M, C, weight.D, POSITIONS, COLUMNS)
    g = sum_of_runs(at, ids, heads, columns, class_ids, order, M, rows, dtype)
    w = tl.load(cells(weight, ids, columns), mask=wanted, other=0.0)
    if DECAYS:  # 0 * infinity is no gradient
        g = g + tl.full((), weight_decay, dtype) * w
    v = g
    if velocity is not None:
        before = tl.load(cells(velocity, ids, columns), mask=wanted, other=0.0)
        v = tl.full((), momentum, dtype) * before + g
        tl.store(cells(velocity, ids, columns), v, mask=wanted)
    if NESTEROV:
        v = g + tl.full((), momentum, dtype) * v
    tl.store(cells(weight, ids, columns), w - tl.full((), lr, dtype) * v, mask=wanted)


def row_momentum_step(
    weight: Tensor,  # (C, D) float32 | float64
    velocity: Tensor | None,  # (C, D)
    class_ids: Tensor,  # (M,) int32 | int64, ascending; those outside [0, C) are passed over
    order: Tensor,  # (M,) int64: the i of each, ascending where ids are equal
    rows: Tensor,  # (M, D)
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    if rows.numel() == 0:
        return
    velocity_cells = None if velocity is None else matrix(velocity)
    arguments = (velocity_cells, order, matrix(rows), lr, momentum, weight_decay)
    constants = {"DECAYS": weight_decay != 0, "NESTEROV": nesterov}
    over_runs(row_momentum_kernel, class_ids, weight, *arguments, **constants)
