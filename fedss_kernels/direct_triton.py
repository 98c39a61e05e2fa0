"""The short way from Python to the GPU kernels: direct_route.py's counterpart, under autocast too.

Like it, one autograd.Function around what the registered operator runs, and the same bits.
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import FLOATING
from .implementations import triton_kernels
from .loss_operator import autocast_dtype


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
    if os.environ.get("FEDSS_VALIDATE") == "1" or not (input.is_cuda or input.is_cpu):
        return None
    kernels = triton_kernels("sampled_softmax", input.device)  # raises on a CPU, unless they are interpreted
    if not _fits(input, weight, constants, bias, scale, similarity, ignore_index, reduction):
        return None
    learned = scale if isinstance(scale, Tensor) else None
    rounding = autocast_dtype(input.device.type)
    rest = (kernels, constants, scale, similarity, ignore_index, reduction, sparse_grad, rounding)
    return _apply(input, weight, bias, learned, rest)


def _fits(input, weight, constants, bias, scale, similarity, ignore_index, reduction) -> bool:
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
        and (not isinstance(scale, Tensor) or scale.device == device or scale.is_cpu)
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
        kernels, constants, scale, similarity, ignore_index, reduction, sparse_grad, rounding = rest
        problem = kernels.Problem.of(
            input, weight, *constants, bias, scale, similarity, ignore_index, reduction, rounding
        )
        loss, kept = kernels.loss(problem)
        ctx.save_for_backward(*problem.tensors, learned, kept)
        ctx.rest = problem.others, (kernels, similarity, sparse_grad, rounding)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        *tensors, learned, kept = ctx.saved_tensors
        others, (kernels, similarity, sparse_grad, rounding) = ctx.rest
        problem = kernels.Problem(*tensors, *others)
        needed = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # create_graph: the operator refuses a second derivative
            scale = torch.tensor(problem.factor, dtype=torch.float64) if learned is None else learned
            options = (similarity, problem.ignore_index, problem.traits.reduction, sparse_grad, "triton")
            found = torch.ops.fedss_kernels.sampled_softmax_loss_backward(
                *(grad_loss, [kept] * 5, list(needed), *tensors[:7], scale, *options, [False] * 4, rounding)
            )
            return *(gradient if need else None for need, gradient in zip(needed, found, strict=True)), None
        dtype = None if learned is None else learned.dtype
        return *kernels.gradients(problem, kept, grad_loss, needed, sparse_grad, dtype), None


# Function.apply without what it does for function transforms, which do not come here.
_apply = super(torch.autograd.Function, _Loss).apply
