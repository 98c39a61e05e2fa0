"""The row optimiser: a step of SGD with momentum on some rows of a matrix."""

import torch
from torch import Tensor


def row_momentum_step_(
    weight: Tensor,  # (C, D)
    velocity: Tensor | None,  # (C, D); None: momentum is 0
    class_ids: Tensor,  # (M,) int64, each once
    rows: Tensor,  # (M, D) gradient
    *,
    lr: float,
    momentum: float,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> Tensor:
    """g = rows + weight_decay * w;  v <- momentum * v + g;  w <- w - lr * v.

    With nesterov w <- w - lr * (g + momentum * v). In float32 or better; weight and
    velocity are rounded to their dtypes once.

    >>> weight, velocity, ids = torch.zeros(3, 1), torch.zeros(3, 1), torch.tensor([1])
    >>> for _ in range(2):
    ...     step = row_momentum_step_(weight, velocity, ids, torch.ones(1, 1), lr=1.0, momentum=0.5)
    >>> velocity.flatten(), weight.flatten()
    (tensor([0.0000, 1.5000, 0.0000]), tensor([ 0.0000, -2.5000,  0.0000]))
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    w, g = weight[class_ids].to(dtype), rows.to(dtype)
    if weight_decay != 0:
        g = g + weight_decay * w
    v = g
    if velocity is not None:
        v = momentum * velocity[class_ids].to(dtype) + g
        velocity[class_ids] = v.to(velocity.dtype)
    weight[class_ids] = (w - lr * (g + momentum * v if nesterov else v)).to(weight.dtype)
    return weight
