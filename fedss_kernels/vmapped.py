"""torch.vmap over the loss: many problems of one size, a federation's clients say, one call a problem.

    torch.vmap(loss)(inputs (K, B, D), weights (K, C, D), targets (K, B))        (K,) losses

The same bits as K calls, with autograd through them; smaller problems are padded, rows with `ignore_index`
and entries of the class set with a correction of +inf.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .loss_operator import MADE, OPERATORS, library


def each_problem(arguments: Sequence[Any], in_dims: Sequence[Any], K: int) -> list[tuple[Any, ...]]:
    """The arguments of each problem; those that are not batched are all problems'."""
    apart = [
        argument.unbind(dim) if isinstance(argument, Tensor) and dim is not None else (argument,) * K
        for argument, dim in zip(arguments, in_dims, strict=True)
    ]
    return list(zip(*apart, strict=True))


def _losses(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    if not info.batch_size:
        raise ValueError("sampled_softmax_loss: torch.vmap expected at least 1 problem, got 0")
    each = each_problem(arguments, in_dims, info.batch_size)
    losses = torch.stack([OPERATORS.sampled_softmax_loss(*one)[0] for one in each])
    # Autograd is below: it has what gradients are made of, of each call.
    return (losses, *(losses.new_empty((info.batch_size, 0)) for _ in range(MADE))), (0,) * (1 + MADE)


def _gradients(info: Any, in_dims: Sequence[Any], *arguments: Any) -> Any:
    raise RuntimeError(
        "sampled_softmax_loss: expected torch.vmap around the loss alone and gradients of what comes out "
        'of it, got gradients inside of torch.vmap; take them outside, or impl="reference"'
    )


def register() -> None:
    """Gives the operator and its backward pass their rules; once."""
    for operator, rule in zip(OPERATORS, (_losses, _gradients), strict=True):
        torch.library.register_vmap(operator.default, rule, lib=library)
