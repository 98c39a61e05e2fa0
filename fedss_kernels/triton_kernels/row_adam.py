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
from torch.cuda import device_of

from .scatter_add import add_runs, options, own_runs, specimen, tile


@triton.jit
def quotient(x, y):
    """Rounded to nearest, as float64's always is."""
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def root_of(x):
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit(do_not_specialize=["C", "M"])
def row_adam_kernel(
    weight,  # (C, D)
    exp_avg,  # (C, D)
    exp_avg_sq,  # (C, D)
    row_steps,  # (C,)
    class_ids,  # (M,) ascending
    order,  # (M,) the i of each
    rows,  # (M, D)
    steps,  # (M,) n of each
    rate,  # (M,) lr / (1 - beta1^n)
    root,  # (M,) sqrt(1 - beta2^n)
    C,
    D,
    M,
    weight_row,
    weight_column,
    exp_avg_row,
    exp_avg_column,
    exp_avg_sq_row,
    exp_avg_sq_column,
    row_steps_stride,
    rows_row,
    rows_column,
    keep: tl.float64,  # unannotated, a Python number would come as float32
    first: tl.float64,
    beta2: tl.float64,
    second: tl.float64,
    eps: tl.float64,
    POSITIONS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    dtype: tl.constexpr = weight.dtype.element_ty
    at, ids, heads, columns = own_runs(class_ids, M, C, D, POSITIONS, COLUMNS)
    inside = (columns < D)[None, :]
    wanted = heads[:, None] & inside
    n = tl.load(steps + at, mask=heads, other=1)
    counts = row_steps + ids[:, None] * row_steps_stride + columns[None, :] * 0
    tl.store(counts, n[:, None], mask=wanted & (columns == 0)[None, :])
    step_rate = tl.load(rate + at, mask=heads, other=1.0)[:, None]
    step_root = tl.load(root + at, mask=heads, other=1.0)[:, None]
    g = tl.zeros((POSITIONS, COLUMNS), dtype) * -1.0  # -0 + x is x, for x = -0 too
    row = rows + columns[None, :] * rows_column
    g = add_runs(g, at, ids, heads, inside, class_ids, order, M, row, rows_row, None, 0)
    cells = exp_avg + ids[:, None] * exp_avg_row + columns[None, :] * exp_avg_column
    m = tl.load(cells, mask=wanted, other=0.0)
    m = m + tl.full((), first, dtype) * (g - m)
    tl.store(cells, m, mask=wanted)
    cells = exp_avg_sq + ids[:, None] * exp_avg_sq_row + columns[None, :] * exp_avg_sq_column
    v = tl.full((), beta2, dtype) * tl.load(cells, mask=wanted, other=0.0)
    v = v + tl.full((), second, dtype) * (g * g)
    tl.store(cells, v, mask=wanted)
    cells = weight + ids[:, None] * weight_row + columns[None, :] * weight_column
    w = tl.load(cells, mask=wanted, other=0.0)
    moved = quotient(
        m, quotient(root_of(v), tl.broadcast_to(step_root, POSITIONS, COLUMNS)) + tl.full((), eps, dtype)
    )
    tl.store(cells, tl.full((), keep, dtype) * w - step_rate * moved, mask=wanted)


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
    (C, D), M = weight.shape, len(class_ids)
    steps = row_steps[class_ids.long().clamp(0, C - 1)] + 1
    n = steps.double()
    rate, root = (lr / (1 - beta1**n)).to(weight.dtype), (1 - beta2**n).sqrt().to(weight.dtype)
    positions, columns = tile(D)
    programs = triton.cdiv(M, positions) * triton.cdiv(D, columns)
    state = weight, exp_avg, exp_avg_sq, row_steps
    strides = (stride for tensor in (*state, rows) for stride in tensor.stride())
    with device_of(weight):
        row_adam_kernel[(programs,)](
            *(*state, class_ids, order, rows, steps, rate, root),
            *(C, D, M, *strides),
            *(1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, eps),
            *(positions, columns),
            **options(weight.device),
        )


def specimens() -> list[tuple]:
    """Configurations that cover every branch and dtype, to compile ahead of time; see `specimen`."""
    made = []
    for dtype, row, D in (("fp32", "fp32", 64), ("fp32", "bf16", 7), ("fp64", "fp16", 4096)):
        floating = ("weight", "exp_avg", "exp_avg_sq", "rate", "root")
        types = dict.fromkeys(floating, f"*{dtype}") | dict.fromkeys(("row_steps", "order", "steps"), "*i64")
        types |= {"class_ids": "*i32", "rows": f"*{row}", "exp_avg_row": "i64"}
        types |= dict.fromkeys(("keep", "first", "beta2", "second", "eps"), "fp64")
        constants: dict = dict(zip(("POSITIONS", "COLUMNS"), tile(D), strict=True))
        constants |= {"weight_column": 1, "rows_column": 1} if D == 7 else {}
        made.append(specimen(row_adam_kernel, types, constants))
    return made
