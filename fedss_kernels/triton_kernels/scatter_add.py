"""The deterministic scatter-add: one program owns a row of `out` and adds to it in order.

    out[class_ids[i]] += scale[i] * rows[i] for i = 0, 1, ..., M - 1

The ids come sorted, by a stable sort: equal ones lie side by side as a run, in the order of i. Where a run
starts, its program reads the row of `out`, adds the run's rows one after another, and writes it: no atomics,
and the same bits however programs are scheduled.

Bytes: each row of `rows` is read once, and each row of `out` that is listed read and written once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from .configurations import table_of
from .tiles import Matrix, rounded

ELEMENTS = 256  # of one program's tile: with more, one target or another spills registers
STEPS = tl.constexpr(4)  # rows added before a program asks whether any of its runs goes on


def over_runs(kernel: Any, class_ids: Tensor, out: Tensor, *arguments: Any, **constants: Any) -> None:
    """Launches a kernel that goes by `own_runs` over rows of `out`: whole ones while they fit a program."""
    (C, D), M = out.shape, len(class_ids)
    columns = min(triton.next_power_of_2(D), ELEMENTS)
    positions = ELEMENTS // columns
    programs = triton.cdiv(M, positions) * triton.cdiv(D, columns)
    # A fused multiply-add would skip one rounding.
    options = {"enable_fp_fusion": False} | table_of(out.device).all_registers
    with device_of(out):
        kernel[(programs,)](
            *(class_ids, M, C, matrix(out), *arguments),
            **constants,
            POSITIONS=positions,
            COLUMNS=columns,
            **options,
        )


def matrix(tensor: Tensor) -> Matrix:
    return Matrix(tensor, tensor.shape[1], *tensor.stride())


@triton.jit
def cells(matrix, rows, columns):
    """(R, COLUMNS) pointers"""
    return matrix.at + rows[:, None] * matrix.row + columns[None, :] * matrix.column


@triton.jit
def own_runs(class_ids, M, C, D, POSITIONS: tl.constexpr, COLUMNS: tl.constexpr):
    """(positions, ids there, where a run of a good id starts, columns, cells that are there), a program's."""
    column_tiles = tl.cdiv(D, COLUMNS)
    at = (tl.program_id(0) // column_tiles).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    columns = (tl.program_id(0) % column_tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    ids = tl.load(class_ids + at, mask=at < M, other=-1).to(tl.int64)
    before = tl.load(class_ids + at - 1, mask=(at > 0) & (at < M), other=-1).to(tl.int64)
    heads = (ids != before) & (ids >= 0) & (ids < C)
    return at, ids, heads, columns, heads[:, None] & (columns < D)[None, :]


@triton.jit
def add_runs(
    sums,  # (POSITIONS, COLUMNS)
    at,
    ids,
    heads,
    columns,
    class_ids,
    order,
    M,
    rows,  # a `Matrix`
    scale,
    scale_stride,
):
    """`sums` with the rows of the run that starts `at` each position added, rounded after each step."""
    inside = (columns < rows.D)[None, :]
    first = rows.at + columns[None, :] * rows.column
    alive = heads
    while tl.max(alive.to(tl.int32), 0) > 0:
        for _ in tl.static_range(STEPS):
            i = tl.load(order + at, mask=at < M, other=0)
            wanted = alive[:, None] & inside
            row = tl.load(first + i[:, None] * rows.row, mask=wanted, other=0.0).to(sums.dtype)
            if scale is not None:
                factor = tl.load(scale + i * scale_stride, mask=alive, other=0.0).to(sums.dtype)
                row = factor[:, None] * row
            sums = tl.where(wanted, sums + row, sums)
            at += 1
            alive = heads & (tl.load(class_ids + at, mask=at < M, other=-1) == ids)
    return sums


@triton.jit
def sum_of_runs(at, ids, heads, columns, class_ids, order, M, rows, dtype: tl.constexpr):
    zero = tl.zeros((at.shape[0], columns.shape[0]), dtype) * -1.0  # -0 + x is x, for x = -0 too
    return add_runs(zero, at, ids, heads, columns, class_ids, order, M, rows, None, 0)


@triton.jit(do_not_specialize=["C", "M"])
def scatter_add_kernel(
    class_ids, M, C, out, order, rows, scale, scale_stride,
    SUM: tl.constexpr, POSITIONS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """SUM: the dtype of sums"""
    at, ids, heads, columns, wanted = own_runs(class_ids, M, C, out.D, POSITIONS, COLUMNS)
    sums = tl.load(cells(out, ids, columns), mask=wanted, other=0.0).to(SUM)
    sums = add_runs(sums, at, ids, heads, columns, class_ids, order, M, rows, scale, scale_stride)
    tl.store(cells(out, ids, columns), rounded(sums, out.at.dtype.element_ty), mask=wanted)


def scatter_add(
    out: Tensor,  # (C, D) floating; 16-bit rows are summed in float32 and rounded once
    class_ids: Tensor,  # (M,) int32 | int64, ascending; those outside [0, C) are passed over
    order: Tensor,  # (M,) int64: the i of each, ascending where ids are equal
    rows: Tensor,  # (M, D)
    scale: Tensor | None,  # (M,)
) -> None:
    if rows.numel() == 0:
        return
    scale_stride = 0 if scale is None else scale.stride(0)
    sums = tl.float64 if out.dtype == torch.float64 else tl.float32
    arguments = (order, matrix(rows), scale, scale_stride)
    over_runs(scatter_add_kernel, class_ids, out, *arguments, SUM=sums)
