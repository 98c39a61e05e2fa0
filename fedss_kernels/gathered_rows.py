"""Rows of a matrix by their classes, with a gradient that is rounded once for each class."""

from typing import Any

import torch
from torch import Tensor

from .direct_route import plain_eager


def gathered_rows(
    table: Tensor,  # (C, D) or (C,)
    classes: Tensor,  # (n,) int64 in [0, C)
    dtype: torch.dtype,
    sparse: bool,
    counted: Tensor | None = None,  # (n,) bool: rows that take part; None: all
) -> Tensor:
    """table[classes] in `dtype`. Deterministic, in its gradient too.

    sparse: the gradient as a sparse COO tensor over the classes that take part; on the CPU its indices are
    unique and ascending, elsewhere they may repeat a class, with zeros. Dense when compiled and under vmap.
    """
    if not plain_eager():  # compilers and torch.vmap know plain operations best
        return table.index_select(0, classes).to(dtype)
    return _Gathered.apply(table, classes, counted, dtype, sparse)


def added(n: int, places: Tensor, values: Tensor) -> Tensor:
    """(n, ...) sums of the values for each place, in their order."""
    sums = values.new_zeros((n, *values.shape[1:]))
    if values.is_cpu:
        return sums.index_add(0, places, values)
    return sums.index_put((places,), values, accumulate=True)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table, classes, counted, dtype, sparse):
        ctx.save_for_backward(classes, counted)
        ctx.shape, ctx.dtype, ctx.sparse = table.shape, table.dtype, sparse
        return table.index_select(0, classes).to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient):
        classes, counted = ctx.saved_tensors
        if ctx.sparse and counted is not None and counted.is_cpu:
            classes, gradient = classes[counted], gradient[counted]
        listed, order = classes.sort(stable=True)
        place = torch.searchsorted(listed, listed)  # the sum of a class is where the first of its rows is
        sums = added(listed.shape[0], place, gradient[order]).to(ctx.dtype)
        if not ctx.sparse:
            dense = added(ctx.shape[0], listed, sums)  # the others of its rows are zeros
            return dense, None, None, None, None
        if sums.is_cpu:
            first = place == torch.arange(place.shape[0])
            listed, sums = listed[first], sums[first]
        sparse = torch.sparse_coo_tensor(
            listed[None], sums, ctx.shape, check_invariants=False, is_coalesced=sums.is_cpu
        )
        return sparse, None, None, None, None
