"""A step of AdamW on the rows that have a gradient; runs of equal ids as in `scatter_add`.

    g = sum of rows[i] with class_ids[i] = c, in the order of i;    n = row_steps[c] + 1
    m = exp_avg[c] + (1 - beta1) * (g - exp_avg[c]);    v = beta2 * exp_avg_sq[c] + (1 - beta2) * g^2
    weight[c] = (1 - lr * weight_decay) * weight[c]
                - lr / (1 - beta1^n) * m / (sqrt(v) / sqrt(1 - beta2^n) + eps)

Bytes: each row of `rows` is read once, and each row of `weight` and of the averages that is listed read and
written once.
"""

import triton
import triton.language as tl
from torch import Tensor

from .scatter_add import cells, matrix, over_runs, own_runs, sum_of_runs


@triton.jit
def quotient(x, y):
    """Rounded to nearest, as float64's always is."""
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def root_of(x):
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit(do_not_specialize=["C", "M"])
def row_adam_kernel(
    class_ids, M, C, weight, exp_avg, exp_avg_sq, row_steps, row_steps_stride, order, rows,
    steps,  # (M,) n of each
    rate,  # (M,) lr / (1 - beta1^n)
    root,  # (M,) sqrt(1 - beta2^n)
    keep: tl.float64,  # unannotated, a Python number would come as float32
    first: tl.float64, beta2: tl.float64, second: tl.float64, eps: tl.float64,
    POSITIONS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = weight.at.dtype.element_ty
    at, ids, heads, columns, wanted = own_runs(class_ids, M, C, weight.D, POSITIONS, COLUMNS)
    n = tl.load(steps + at, mask=heads, other=1)
    counts = row_steps + ids[:, None] * row_steps_stride + columns[None, :] * 0
    tl.store(counts, n[:, None], mask=wanted & (columns == 0)[None, :])
    step_rate = tl.load(rate + at, mask=heads, other=1.0)[:, None]
    step_root = tl.load(root + at, mask=heads, other=1.0)[:, None]
    g = sum_of_runs(at, ids, heads, columns, class_ids, order, M, rows, dtype)
    m = tl.load(cells(exp_avg, ids, columns), mask=wanted, other=0.0)
    m = m + tl.full((), first, dtype) * (g - m)
    tl.store(cells(exp_avg, ids, columns), m, mask=wanted)
    v = tl.full((), beta2, dtype) * tl.load(cells(exp_avg_sq, ids, columns), mask=wanted, other=0.0)
    v = v + tl.full((), second, dtype) * (g * g)
    tl.store(cells(exp_avg_sq, ids, columns), v, mask=wanted)
    w = tl.load(cells(weight, ids, columns), mask=wanted, other=0.0)
    deviation = quotient(root_of(v), tl.broadcast_to(step_root, POSITIONS, COLUMNS))
    moved = quotient(m, deviation + tl.full((), eps, dtype))
    tl.store(cells(weight, ids, columns), tl.full((), keep, dtype) * w - step_rate * moved, mask=wanted)


def row_adam_step(
    weight: Tensor,  # (C, D) float32 | float64
    exp_avg: Tensor,  # (C, D)
    exp_avg_sq: Tensor,  # (C, D)
    row_steps: Tensor,  # (C,) int64
    class_ids: Tensor,  # (M,) int32 | int64, ascending; those outside [0, C) are passed over
    order: Tensor,  # (M,) int64: the i of each, ascending where ids are equal
    rows: Tensor,  # (M, D)
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    if rows.numel() == 0 or weight.numel() == 0:
        return
    steps = row_steps[class_ids.long().clamp(0, len(weight) - 1)] + 1
    n = steps.double()
    rate, root = (lr / (1 - beta1**n)).to(weight.dtype), (1 - beta2**n).sqrt().to(weight.dtype)
    over_runs(
        *(row_adam_kernel, class_ids, weight, matrix(exp_avg), matrix(exp_avg_sq)),
        *(row_steps, row_steps.stride(0), order, matrix(rows), steps, rate, root),
        *(1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, eps),
    )
