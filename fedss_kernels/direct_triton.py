"""The short way from Python to the GPU kernels: direct_route.py's counterpart, under autocast too.

Like it, one autograd.Function around what the registered operator runs, and the same bits. What a call has in
common with earlier ones is looked up by dtypes, shapes, strides and options, and not looked at again.
"""

import os
from collections.abc import Hashable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .checks import FLOATING
from .implementations import triton_kernels
from .loss_operator import OPERATORS, autocast_dtype, refuse_batches, shaped_like

_kernels: dict[str, ModuleType] = {}  # by type of device
_known: dict[Hashable, Any] = {}  # -> Calls, of problems whose tensors kernels read as they are
_MOST_KNOWN = 4096


def direct_triton_loss(
    input: Tensor,
    weight: Tensor,
    constants: Sequence[Tensor | None],  # target, class_ids, log_expected_count, target_log_expected_count
    bias: Tensor | None,
    scale: float | Tensor,
    similarity: str,
    ignore_index: int,
    reduction: str,
    sparse_grad: bool,
) -> Tensor | None:
    """The loss, or None for what needs a closer look: a wrong argument too.

    Raises ValueError for CPU tensors, unless the kernels run interpreted.
    """
    if (
        type(similarity) is not str
        or type(reduction) is not str
        or not (input.is_cuda or input.is_cpu)
        or os.environ.get("FEDSS_VALIDATE") == "1"
    ):
        return None
    kernels = _kernels.get(input.device.type)
    if kernels is None:  # raises on a CPU, unless they are interpreted
        kernels = _kernels[input.device.type] = triton_kernels("sampled_softmax", input.device)
    rounding = autocast_dtype(input.device.type)
    learned, factor, on_device = None, scale, None
    if isinstance(scale, Tensor):
        learned = scale
        if scale.is_cpu:
            factor = scale.item()
        elif scale.device == input.device:
            on_device, factor = scale, 1.0
        else:
            return None
    tensors = (input, weight, *constants, bias, on_device, None, None, None)  # no labels
    options = (similarity, ignore_index, reduction, rounding)
    key = (*map(_kind, tensors), *options, *kernels.circumstances(input, weight, similarity, factor))
    calls = _known.get(key)
    if calls is None:
        if not _fits(input, weight, constants, bias, similarity, ignore_index, reduction):
            return None
        with torch.no_grad():
            problem = kernels.Problem.of(input, weight, *constants, bias, scale, *options)
        calls = kernels.calls_like(problem)
        if all(mine is given for mine, given in zip(problem.tensors, tensors, strict=True)):
            if len(_known) >= _MOST_KNOWN:
                _known.clear()
            _known[key] = calls
        tensors = problem.tensors
    if not torch.is_grad_enabled():  # needs_input_grad does not know
        return calls.loss(tensors, factor, None)[0]
    return _apply(input, weight, bias, learned, (kernels, calls, tensors, factor, sparse_grad, rounding))


def _kind(tensor: Tensor | None) -> Hashable:
    if tensor is None or tensor.layout is not torch.strided:
        return None if tensor is None else tensor.layout
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def _fits(input, weight, constants, bias, similarity, ignore_index, reduction) -> bool:
    """Whether shapes, dtypes and devices are those of the most common call."""
    target, class_ids, counts, target_counts = constants
    if input.dim() != 2 or weight.dim() != 2 or (class_ids is not None and class_ids.dim() != 1):
        return False
    (B, D), (C, D_weight), device = input.shape, weight.shape, input.device
    S = C if class_ids is None else class_ids.shape[0]
    return (
        D == D_weight
        and input.dtype in FLOATING
        and weight.dtype in FLOATING
        and weight.device == device
        and _is(target, (B,), device, (torch.int64,))
        and (class_ids is None or _is(class_ids, (S,), device, (torch.int64,)))
        and (counts is None or _is(counts, (S,), device, FLOATING))
        and (target_counts is None or _is(target_counts, (B,), device, FLOATING))
        and (bias is None or _is(bias, (C,), device, (weight.dtype,)))
        and similarity in ("cosine", "dot")
        and reduction in ("mean", "sum", "none")
        and -(2**63) <= ignore_index < 2**63
    )


def _is(tensor: Tensor, shape: tuple[int, ...], device: torch.device, dtypes: Sequence[torch.dtype]) -> bool:
    return (
        tensor.shape == shape
        and tensor.device == device
        and tensor.dtype in dtypes
        and tensor.layout is torch.strided
    )


class _Loss(torch.autograd.Function):
    """Differentiable in its first four arguments; `rest` travels as one, as each argument costs time."""

    @staticmethod
    def forward(ctx, input, weight, bias, learned, rest):
        kernels, calls, tensors, factor, sparse_grad, rounding = rest
        needed = ctx.needs_input_grad[:4]
        if True not in needed:
            return calls.loss(tensors, factor, None)[0]
        wanted = kernels.Wanted(needed, sparse_grad, None if learned is None else learned.dtype)
        prepared = calls.prepare(tensors, wanted)
        loss, made = calls.loss(tensors, factor, wanted, prepared)
        ctx.save_for_backward(*tensors, learned, *made)
        ctx.rest = calls, factor, wanted, rounding
        ctx.prepared = prepared
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        refuse_batches(grad_loss)
        grad_loss = grad_loss.resolve_neg()
        saved = ctx.saved_tensors
        tensors, learned, made = saved[:11], saved[11], saved[12:]
        calls, factor, wanted, rounding = ctx.rest
        if torch.is_grad_enabled():  # create_graph: the operator refuses a second derivative
            traits, needed = calls.traits, wanted.needed
            scale = torch.tensor(factor, dtype=torch.float64) if learned is None else learned
            similarity = "cosine" if traits.cosine else "dot"
            options = (similarity, calls.ignore_index, traits.reduction, wanted.sparse, "triton")
            there = [made[0].new_empty(0) if each is None else each for each in made]
            found = OPERATORS.sampled_softmax_loss_backward(
                *(grad_loss, there, list(needed), *tensors[:7], scale, *options, [False] * 4, rounding)
            )
            found = [gradient if need else None for need, gradient in zip(needed, found, strict=True)]
        elif (prepared := ctx.prepared) is not None:
            ctx.prepared = None  # handed on; a second backward pass allocates its own
            found = calls.gradients(tensors, factor, made, grad_loss, wanted, prepared)
        else:
            found = calls.gradients(tensors, factor, made, grad_loss, wanted)
        return *shaped_like(learned, found), None


# Function.apply without what it does for function transforms, which do not come here.
_apply = super(torch.autograd.Function, _Loss).apply
