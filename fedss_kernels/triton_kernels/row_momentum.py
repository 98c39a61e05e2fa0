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
from torch.cuda import device_of

from .scatter_add import add_runs, options, own_runs, specimen, tile


@triton.jit(do_not_specialize=["C", "M"])
def row_momentum_kernel(
    weight,  # (C, D)
    velocity,  # (C, D) or None
    class_ids,  # (M,) ascending
    order,  # (M,) the i of each
    rows,  # (M, D)
    C,
    D,
    M,
    weight_row,
    weight_column,
    velocity_row,
    velocity_column,
    rows_row,
    rows_column,
    lr: tl.float64,  # unannotated, a Python number would come as float32
    momentum: tl.float64,
    weight_decay: tl.float64,
    DECAYS: tl.constexpr,
    NESTEROV: tl.constexpr,
    POSITIONS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    dtype: tl.constexpr = weight.dtype.element_ty
    at, ids, heads, columns = own_runs(class_ids, M, C, D, POSITIONS, COLUMNS)
    inside = (columns < D)[None, :]
    g = tl.zeros((POSITIONS, COLUMNS), dtype) * -1.0  # -0 + x is x, for x = -0 too
    first = rows + columns[None, :] * rows_column
    g = add_runs(g, at, ids, heads, inside, class_ids, order, M, first, rows_row, None, 0)
    wanted = heads[:, None] & inside
    cells = weight + ids[:, None] * weight_row + columns[None, :] * weight_column
    w = tl.load(cells, mask=wanted, other=0.0)
    if DECAYS:  # 0 * infinity is no gradient
        g = g + tl.full((), weight_decay, dtype) * w
    v = g
    if velocity is not None:
        velocity_cells = velocity + ids[:, None] * velocity_row + columns[None, :] * velocity_column
        v = tl.full((), momentum, dtype) * tl.load(velocity_cells, mask=wanted, other=0.0) + g
        tl.store(velocity_cells, v, mask=wanted)
    if NESTEROV:
        v = g + tl.full((), momentum, dtype) * v
    tl.store(cells, w - tl.full((), lr, dtype) * v, mask=wanted)


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
    (C, D), M = weight.shape, len(class_ids)
    positions, columns = tile(D)
    velocity_strides = (0, 0) if velocity is None else velocity.stride()
    sizes, strides = (C, D, M), (*weight.stride(), *velocity_strides, *rows.stride())
    programs = triton.cdiv(M, positions) * triton.cdiv(D, columns)
    tensors, numbers = (weight, velocity, class_ids, order, rows), (lr, momentum, weight_decay)
    with device_of(weight):
        row_momentum_kernel[(programs,)](
            *tensors,
            *sizes,
            *strides,
            *numbers,
            weight_decay != 0,
            nesterov,
            positions,
            columns,
            **options(weight.device),
        )


def specimens() -> list[tuple]:
    """Configurations that cover every branch and dtype, to compile ahead of time; see `specimen`."""
    made = []
    cases = ("fp32", "fp32", True, 64), ("fp32", "bf16", False, 7), ("fp64", "fp16", True, 4096)
    for dtype, row, moves, D in cases:
        types = {"weight": f"*{dtype}", "class_ids": "*i32", "order": "*i64", "rows": f"*{row}"}
        types |= dict.fromkeys(("lr", "momentum", "weight_decay"), "fp64")
        constants: dict = dict(zip(("POSITIONS", "COLUMNS"), tile(D), strict=True))
        constants |= {"DECAYS": moves, "NESTEROV": dtype == "fp64"}
        if moves:
            types |= {"velocity": f"*{dtype}", "weight_row": "i64"}
        else:
            constants |= {"velocity": None, "weight_column": 1, "rows_column": 1}
        made.append(specimen(row_momentum_kernel, types, constants))
    return made
