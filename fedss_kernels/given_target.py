"""The losses of rows, whose targets' logits may be given: margins, lse and sharded classes build on it.

    loss_i = log(1 + sum_j exp(o(i, j) - o_i))        over the entries with entry_labels_j != target_labels_i

A row's target is a label then, to tell accidental hits by, and no row of `weight`.
"""

from typing import Any

import torch
from torch import Tensor

from .class_table import ClassTable
from .direct_route import gradients_by_operator, ordinary, plain_eager
from .loss_operator import (
    Arguments,
    call_operator,
    finish_gradients,
    grad_target_logit,
    refuse_batches,
    run,
    scale_tensor,
)

_NOTHING = [False] * 4


def row_losses(
    input: Tensor,  # (B, D)
    weight: ClassTable,  # (C, D)
    target: Tensor,  # (B,)
    corrections: tuple[Tensor | None, Tensor | None, Tensor | None],
    bias: ClassTable | None,
    scale: float | Tensor,
    similarity: str,
    ignore_index: int,
    impl: str,  # "cpp" | "triton"
    rounding: torch.dtype | None,  # of rows as they are read, whatever autocast says
    labels: tuple[Tensor | None, Tensor | None, Tensor | None],  # of entries, of targets; targets' logits
) -> Tensor:
    """(B,), by the shortest route to the kernel; d loss_i / d o_i = expm1(-loss_i) where o_i is given.

    Shapes and dtypes are the caller's to check.
    """
    stand_in, values = (None, None) if bias is None else (bias.stand_in, bias.values)
    options = (similarity, ignore_index, "none", weight.sparse_parts, impl, _NOTHING, rounding)
    tensors = (input, weight.stand_in, target, *corrections, stand_in, scale_tensor(scale))
    p = Arguments._make((*tensors, *options, *labels, weight.values, values))
    if impl == "cpp" and plain_eager() and all(ordinary(t) for t in p.tensors if t is not None):
        return _apply(p.input, p.weight, p.bias, p.scale, p.target_logit, p)
    return call_operator(*p)


class _RowLosses(torch.autograd.Function):
    """What the operator does, without its dispatch: in plain eager mode, for ordinary tensors on the CPU.

    Differentiable in its first five arguments, which are `p`'s.
    """

    @staticmethod
    def forward(ctx: Any, input, weight, bias, scale, target_logit, p: Arguments) -> Tensor:
        loss, _, _ = run(p, _NOTHING)
        ctx.save_for_backward(*p.tensors, loss)
        ctx.options = p.options
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        *tensors, loss = ctx.saved_tensors
        p, needed = Arguments.of(tensors, ctx.options), list(ctx.needs_input_grad[:4])
        refuse_batches(grad_loss)
        if torch.is_grad_enabled():  # create_graph
            found = gradients_by_operator(p, grad_loss, needed)
        else:
            found = finish_gradients(p, None, None, grad_loss, needed)
        of_logit = None
        if ctx.needs_input_grad[4]:
            of_logit = grad_target_logit(grad_loss, loss, tensors[-3])
        return *found, of_logit, None


# Function.apply without what it does for function transforms, which do not come here.
_apply = super(torch.autograd.Function, _RowLosses).apply
