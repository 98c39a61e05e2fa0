"""torch.vmap over the loss: many problems of one size, a federation's clients say.

    torch.vmap(loss)(inputs (K, B, D), weights (K, C, D), targets (K, B))        (K,) losses

On GPUs small problems take one launch of each kernel for all of them; else there is one call a problem. The
same bits as K calls, with autograd through them; smaller problems are padded, rows with `ignore_index` and
entries of the class set with a correction of +inf.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import refuse_forward_mode
from .loss_operator import (
    ARGUMENTS,
    LEARNED,
    MADE,
    OPERATORS,
    Arguments,
    autocast_dtype,
    library,
    nothing,
    refuse_batches,
    refuse_double_backward,
)
from .operator_names import named_by_schema

# of as many problems; stacked: which of the first eight arguments are tensors of all problems, one after
# the other, and not one that they share
_LOSSES, _losses_schema = named_by_schema(
    f"sampled_softmax_losses(int problems, bool[8] stacked, {ARGUMENTS}) -> (Tensor, Tensor)"
)
_BACKWARD, _backward_schema = named_by_schema(
    "sampled_softmax_losses_backward(Tensor grad_losses, Tensor kept, bool[4] needed, int problems, "
    f"bool[8] stacked, {ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
library.define(_losses_schema)
library.define(_backward_schema)
sampled_softmax_losses, sampled_softmax_losses_backward = (
    getattr(torch.ops.fedss_kernels, name) for name in (_LOSSES, _BACKWARD)
)


# ---- the rules ---------------------------------------------------------------------------------------------


def each_problem(arguments: Sequence[Any], in_dims: Sequence[Any], K: int) -> list[tuple[Any, ...]]:
    """The arguments of each problem; those that are not batched are all problems'."""
    apart = [
        argument.unbind(dim) if isinstance(argument, Tensor) and dim is not None else (argument,) * K
        for argument, dim in zip(arguments, in_dims, strict=True)
    ]
    return list(zip(*apart, strict=True))


def _losses(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    K = info.batch_size
    if not K:
        raise ValueError("sampled_softmax_loss: torch.vmap expected at least 1 problem, got 0")
    p = Arguments(*arguments)
    most = _at_once(p, in_dims[:8])
    if most:
        losses = _losses_of_stacks(p, in_dims[:8], K, most)
    else:
        each = each_problem(arguments, in_dims, K)
        losses = torch.stack([OPERATORS.sampled_softmax_loss(*one)[0] for one in each])
    # Autograd is below: it has what gradients are made of, of each call.
    return (losses, *(losses.new_empty((K, 0)) for _ in range(MADE))), (0,) * (1 + MADE)


def _at_once(p: Arguments, dims: Sequence[int | None]) -> int:
    """How many problems take one launch of each kernel; 0 where each takes its own."""
    if p.impl != "triton" or p.sparse_grad or any(given is not None for given in p.tensors[8:]):
        return 0
    from .triton_kernels.stacked import at_once

    of_one: list[Any] = [
        t if t is None or dim is None else t.select(dim, 0)
        for t, dim in zip((p.input, p.weight, p.class_ids), (dims[0], dims[1], dims[3]), strict=True)
    ]
    input, weight, class_ids = of_one
    B, D = input.shape
    S = weight.shape[0] if class_ids is None else class_ids.shape[0]
    return at_once(B, S, D, input, weight, p.rounding)


def _losses_of_stacks(p: Arguments, dims: Sequence[int | None], K: int, most: int) -> Tensor:
    stacked = [dim is not None for dim in dims]
    tensors = [t if dim is None else t.movedim(dim, 0) for t, dim in zip(p.tensors, dims, strict=False)]
    rounding = p.rounding or autocast_dtype(p.input.device.type)
    found = []
    for first in range(0, K, most):
        some = [t[first : first + most] if own else t for t, own in zip(tensors, stacked, strict=True)]
        p = Arguments.of((*some, *[None] * 5), p.options)._replace(rounding=rounding)
        found.append(sampled_softmax_losses(min(most, K - first), stacked, *p)[0])
    return found[0] if len(found) == 1 else torch.cat(found)


def _stacks_of_losses(info: Any, in_dims: Sequence[Any], *arguments: Any) -> Any:
    """vmap in vmap: a launch for each of the outer one's."""
    each = each_problem(arguments, in_dims, info.batch_size)
    losses = torch.stack([sampled_softmax_losses(*one)[0] for one in each])
    return (losses, losses.new_empty((info.batch_size, 0))), (0, 0)


def _gradients(info: Any, in_dims: Sequence[Any], *arguments: Any) -> Any:
    raise RuntimeError(
        "sampled_softmax_loss: expected torch.vmap around the loss alone and gradients of what comes out "
        'of it, got gradients inside of torch.vmap; take them outside, or impl="reference"'
    )


# ---- the operator of many problems -------------------------------------------------------------------------


def _calls(problems: int, stacked: Sequence[bool], p: Arguments) -> Any:
    from .triton_kernels.stacked import stacked_calls

    return stacked_calls(
        problems, stacked, p.tensors[:8], p.similarity, p.ignore_index, p.reduction, p.rounding
    )


def _forward(problems: int, stacked: Sequence[bool], *arguments: Any) -> tuple[Tensor, Tensor]:
    refuse_forward_mode("sampled_softmax_loss")
    calls, tensors, factor = _calls(problems, stacked, Arguments(*arguments))
    losses, (kept,) = calls.loss(tensors, factor, None)
    return losses, kept


def _backward(
    grad_losses: Tensor,
    kept: Tensor,
    needed: Sequence[bool],
    problems: int,
    stacked: Sequence[bool],
    *arguments: Any,
) -> tuple[Tensor, ...]:
    from .triton_kernels.sampled_softmax import Wanted

    p = Arguments(*arguments)
    calls, tensors, factor = _calls(problems, stacked, p)
    wanted = Wanted(tuple(needed), False, p.scale.dtype)
    found = calls.gradients(tensors, factor, (kept,), grad_losses, wanted)
    return tuple(
        nothing(p.input)
        if gradient is None
        else (gradient if stacked[place] else gradient.sum(0)).to(p.tensors[place].device)  # of scales too
        for place, gradient in zip(LEARNED, found, strict=True)
    )


for _device in ("CPU", "CUDA"):
    library.impl(_LOSSES, _forward, _device)
    library.impl(_BACKWARD, _backward, _device)


@torch.library.register_fake(f"fedss_kernels::{_LOSSES}", lib=library)
def _forward_fake(problems: int, stacked: Sequence[bool], *arguments: Any) -> tuple[Tensor, Tensor]:
    from .triton_kernels.calls import empty_results

    p = Arguments(*arguments)
    return empty_results(p.input, p.reduction, (problems,))


@torch.library.register_fake(f"fedss_kernels::{_BACKWARD}", lib=library)
def _backward_fake(
    grad_losses: Tensor, kept: Tensor, needed: Sequence[bool], *arguments: Any
) -> tuple[Tensor, ...]:
    p = Arguments(*arguments[2:])
    results = (p.input, p.weight, p.bias, p.scale)
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format)
        if need and t is not None
        else nothing(p.input)
        for t, need in zip(results, needed, strict=True)
    )


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    problems, stacked, *arguments = inputs
    p = Arguments(*arguments)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*p.tensors[:8], output[1])
    ctx.options = p.options, problems, stacked


def _differentiate(ctx: Any, grad_losses: Tensor | None, _: Any) -> tuple[Any, ...]:
    *tensors, kept = ctx.saved_tensors
    options, problems, stacked = ctx.options
    p = Arguments.of((*tensors, *[None] * 5), options)
    result: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if grad_losses is not None:
        refuse_batches(grad_losses)
        places = [2 + place for place in LEARNED]
        needed = [ctx.needs_input_grad[place] for place in places]
        gradients = sampled_softmax_losses_backward(grad_losses, kept, needed, problems, stacked, *p)
        for place, need, gradient in zip(places, needed, gradients, strict=True):
            result[place] = gradient if need else None
    return tuple(result)


def register() -> None:
    """Gives the operators their rules; once."""
    ours, backward = sampled_softmax_losses.default, sampled_softmax_losses_backward.default
    torch.library.register_autograd(ours, _differentiate, setup_context=_setup_context, lib=library)
    torch.library.register_autograd(backward, refuse_double_backward, lib=library)
    operators = (*(each.default for each in OPERATORS), ours, backward)
    rules = (_losses, _gradients, _stacks_of_losses, _gradients)
    for operator, rule in zip(operators, rules, strict=True):
        torch.library.register_vmap(operator, rule, lib=library)
