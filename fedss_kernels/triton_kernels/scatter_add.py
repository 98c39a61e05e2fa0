"""The deterministic scatter-add: one program owns a row of `out` and adds to it in order.

    out[class_ids[i]] += scale[i] * rows[i] for i = 0, 1, ..., M - 1

The ids come sorted, by a stable sort: equal ones lie side by side as a run, in the order of i. Where a run
starts, its program reads the row of `out`, adds the run's rows one after another, and writes it: no atomics,
and the same bits however programs are scheduled.

Bytes: each row of `rows` is read once, and each row of `out` that is listed read and written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from .configurations import table_of
from .tiles import rounded


def options(device: torch.device) -> dict[str, int]:
    """A fused multiply-add would skip one rounding."""
    return {"enable_fp_fusion": False} | table_of(device).all_registers


ELEMENTS = 256  # of one program's tile: with more, one target or another spills registers
STEPS = tl.constexpr(4)  # rows added before a program asks whether any of its runs goes on


def tile(D: int) -> tuple[int, int]:
    """(positions, columns) of one program: whole rows while they fit."""
    columns = min(triton.next_power_of_2(D), ELEMENTS)
    return ELEMENTS // columns, columns


@triton.jit
def own_runs(class_ids, M, C, D, POSITIONS: tl.constexpr, COLUMNS: tl.constexpr):
    """(positions, ids there, where a run of a good id starts, columns) of this program."""
    column_tiles = tl.cdiv(D, COLUMNS)
    at = (tl.program_id(0) // column_tiles).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    columns = (tl.program_id(0) % column_tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    ids = tl.load(class_ids + at, mask=at < M, other=-1).to(tl.int64)
    before = tl.load(class_ids + at - 1, mask=(at > 0) & (at < M), other=-1).to(tl.int64)
    return at, ids, (ids != before) & (ids >= 0) & (ids < C), columns


@triton.jit
def add_runs(
    sums,  # (POSITIONS, COLUMNS)
    at,
    ids,
    heads,
    inside,  # (1, COLUMNS)
    class_ids,
    order,
    M,
    cells,  # (1, COLUMNS) pointers to those of the first row
    rows_row,
    scale,
    scale_stride,
):
    """`sums` with the rows of the run that starts `at` each position added, rounded after each step."""
    alive = heads
    while tl.max(alive.to(tl.int32), 0) > 0:
        for _ in tl.static_range(STEPS):
            i = tl.load(order + at, mask=at < M, other=0)
            wanted = alive[:, None] & inside
            row = tl.load(cells + i[:, None] * rows_row, mask=wanted, other=0.0).to(sums.dtype)
            if scale is not None:
                factor = tl.load(scale + i * scale_stride, mask=alive, other=0.0).to(sums.dtype)
                row = factor[:, None] * row
            sums = tl.where(wanted, sums + row, sums)
            at += 1
            alive = heads & (tl.load(class_ids + at, mask=at < M, other=-1) == ids)
    return sums


@triton.jit(do_not_specialize=["C", "M"])
def scatter_add_kernel(
    out,  # (C, D)
    class_ids,  # (M,) ascending
    order,  # (M,) the i of each
    rows,  # (M, D)
    scale,  # (M,) or None
    C,
    D,
    M,
    out_row,
    out_column,
    rows_row,
    rows_column,
    scale_stride,
    SUM: tl.constexpr,  # the dtype of sums
    POSITIONS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    at, ids, heads, columns = own_runs(class_ids, M, C, D, POSITIONS, COLUMNS)
    inside = (columns < D)[None, :]
    cells = out + ids[:, None] * out_row + columns[None, :] * out_column
    sums = tl.load(cells, mask=heads[:, None] & inside, other=0.0).to(SUM)
    first = rows + columns[None, :] * rows_column
    sums = add_runs(sums, at, ids, heads, inside, class_ids, order, M, first, rows_row, scale, scale_stride)
    tl.store(cells, rounded(sums, out.dtype.element_ty), mask=heads[:, None] & inside)


def scatter_add(
    out: Tensor,  # (C, D) floating; 16-bit rows are summed in float32 and rounded once
    class_ids: Tensor,  # (M,) int32 | int64, ascending; those outside [0, C) are passed over
    order: Tensor,  # (M,) int64: the i of each, ascending where ids are equal
    rows: Tensor,  # (M, D)
    scale: Tensor | None,  # (M,)
) -> None:
    if rows.numel() == 0:
        return
    (C, D), M = out.shape, len(class_ids)
    positions, columns = tile(D)
    scale_stride = 0 if scale is None else scale.stride(0)
    sizes, strides = (C, D, M), (*out.stride(), *rows.stride(), scale_stride)
    programs = triton.cdiv(M, positions) * triton.cdiv(D, columns)
    with device_of(out):
        scatter_add_kernel[(programs,)](
            *(out, class_ids, order, rows, scale, *sizes, *strides),
            tl.float64 if out.dtype == torch.float64 else tl.float32,
            *(positions, columns),
            **options(out.device),
        )


def specimen(kernel, types: dict[str, str], constants: dict) -> tuple:
    """(kernel, signature, constants, options): as `triton.compile` wants what a launch would compile."""
    others = {name: "constexpr" if name in constants else "i32" for name in kernel.arg_names}
    return kernel, others | types, constants, options(torch.device("cpu"))


def specimens() -> list[tuple]:
    """Configurations that cover every branch and dtype, to compile ahead of time; see `specimen`."""
    made = []
    cases = (
        ("fp32", "fp32", "fp32", 64),
        ("fp32", "bf16", None, 7),
        ("fp64", "fp16", "fp64", 4096),
        ("bf16", "fp32", None, 64),
    )
    for out, row, scale, D in cases:
        types = {"out": f"*{out}", "class_ids": "*i32", "order": "*i64", "rows": f"*{row}"}
        constants: dict = dict(zip(("POSITIONS", "COLUMNS"), tile(D), strict=True))
        constants["SUM"] = tl.float64 if out == "fp64" else tl.float32
        if scale is None:
            constants |= {"scale": None, "out_column": 1, "rows_column": 1}
        else:
            types |= {"scale": f"*{scale}", "out_row": "i64"}
        made.append(specimen(scatter_add_kernel, types, constants))
    return made
