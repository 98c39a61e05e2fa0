"""Weight or bias as several parts of one loss use it: with one gradient for all of them, rounded once.

    table.rows(classes, dtype)   some of its rows
    table.values                 what a kernel reads
    table.stand_in               what a kernel's gradients go to

Each part gives the stand-in its gradient in float32 or better. autograd adds them up, and the sum is rounded
to the dtype of weight or bias.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import refuse_forward_mode
from .direct_route import plain_eager
from .vmapped import each_problem

_SMALL_SHARE = 16  # one class in so many: then sparse parts of a dense gradient are faster


class ClassTable(NamedTuple):
    """Weight or bias: a row, or a number, for each class."""

    values: Tensor  # (C, D) or (C,), a constant
    stand_in: Tensor  # as large, but in float32 or float64: there are no numbers in it
    sparse_parts: bool  # whether gradients of the stand-in are sparse COO tensors

    def rows(
        self,
        classes: Tensor,  # (n,) int64 in [0, C)
        dtype: torch.dtype,
        counted: Tensor | None = None,  # (n,) bool: rows that take part; None: all
    ) -> Tensor:
        """values[classes] in `dtype`. Deterministic, in its gradient too.

        A sparse gradient lists the classes that take part: on the CPU unique and ascending, elsewhere they
        may repeat a class, with zeros.
        """
        if torch.compiler.is_compiling():
            return self.stand_in.index_select(0, classes).to(dtype)
        return _applied(_Rows)(self.values, self.stand_in, classes, counted, dtype, self.sparse_parts)


def class_tables(
    weight: Tensor,
    bias: Tensor | None,
    sparse_grad: bool,
    entries: int | None,  # of the class set and the batch; None: all classes
) -> tuple[ClassTable, ClassTable | None]:
    """Both, whose gradients are sparse or dense.

    The parts of dense ones are sparse too where the entries are a small share of the classes, on the CPU, if
    no compiler or transform is there. On GPUs they are dense and stay in the tables' dtype, as each is as
    large as the table; so they do where a compiler, which knows plain operations best, makes the sum.
    """
    few = entries is not None and entries * _SMALL_SHARE < weight.shape[0]
    parts = sparse_grad or (few and weight.is_cpu and plain_eager())
    wide = torch.promote_types(weight.dtype, torch.float32)
    fits = weight.dtype is wide and parts == sparse_grad
    on_gpu = not (weight.is_cpu or sparse_grad)

    def table(values: Tensor) -> ClassTable:
        if fits or on_gpu or torch.compiler.is_compiling():
            return ClassTable(values, values, sparse_grad)
        stand_in = _applied(_StandIn)(values, wide, sparse_grad)
        return ClassTable(values.detach(), stand_in, parts)

    return table(weight), None if bias is None else table(bias)


def _applied(function: type[torch.autograd.Function]) -> Callable[..., Tensor]:
    """Function.apply, without what it does for function transforms where there are none: half its time."""
    refuse_forward_mode("sampled_softmax_loss")
    above: Any = super(torch.autograd.Function, function)
    return above.apply if plain_eager() else function.apply


class _StandIn(torch.autograd.Function):
    """A place for gradients, which takes no memory."""

    @staticmethod
    def forward(table: Tensor, wide: torch.dtype, sparse: bool) -> Tensor:
        return table.new_zeros((), dtype=wide).expand(table.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        table, _, ctx.sparse = inputs
        ctx.dtype = table.dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if not gradient.is_sparse:
            return gradient.to(ctx.dtype), None, None
        if gradient.is_cpu and not gradient.is_coalesced():
            gradient = gradient.coalesce()
        ids, values = gradient._indices(), gradient._values().to(ctx.dtype)
        if not ctx.sparse:
            return values.new_zeros(gradient.shape).index_copy_(0, ids[0], values), None, None
        return _sparse(ids, values, gradient.shape, gradient.is_coalesced()), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, table: Tensor, wide: torch.dtype, sparse: bool) -> tuple[Tensor, int]:
        return _StandIn.apply(table.movedim(in_dims[0], 0), wide, sparse), 0


class _Rows(torch.autograd.Function):
    """Rows of a table; their gradient goes to its stand-in."""

    @staticmethod
    def forward(table, stand_in, classes, counted, dtype, sparse):
        return table.index_select(0, classes).to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, stand_in, classes, counted, _, ctx.sparse = inputs
        ctx.save_for_backward(classes, counted)
        ctx.shape, ctx.dtype = stand_in.shape, stand_in.dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        classes, counted = ctx.saved_tensors
        if ctx.sparse and counted is not None and counted.is_cpu:
            classes, gradient = classes[counted], gradient[counted]
        listed, order = classes.sort(stable=True)
        place = torch.searchsorted(listed, listed)  # the sum of a class is where the first of its rows is
        sums = added(listed.shape[0], place, gradient[order]).to(ctx.dtype)
        if not ctx.sparse:
            dense = added(ctx.shape[0], listed, sums)  # the others of its rows are zeros
            return None, dense, None, None, None, None
        if sums.is_cpu:
            first = place == torch.arange(place.shape[0])
            listed, sums = listed[first], sums[first]
        sparse = _sparse(listed[None], sums, ctx.shape, coalesced=sums.is_cpu)
        return None, sparse, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
        problems = each_problem(arguments, in_dims, info.batch_size)
        return torch.stack([_Rows.apply(*one) for one in problems]), 0


def _sparse(ids: Tensor, values: Tensor, shape: torch.Size, coalesced: bool) -> Tensor:
    return torch.sparse_coo_tensor(ids, values, shape, check_invariants=False, is_coalesced=coalesced)


def first_place(there: Tensor) -> Tensor:
    """(1,) the first place of a bool that is true, or 0."""
    return there.to(torch.uint8).argmax(0, keepdim=True)


def added(n: int, places: Tensor, values: Tensor) -> Tensor:
    """(n, ...) sums of the values for each place, in their order."""
    sums = values.new_zeros((n, *values.shape[1:]))
    if values.is_cpu:
        return sums.index_add(0, places, values)
    return sums.index_put((places,), values, accumulate=True)
