"""The row optimiser's other rule: a step of AdamW on some rows of a matrix."""

import torch
from torch import Tensor


def row_adam_step_(
    weight: Tensor,  # (C, D)
    exp_avg: Tensor,  # (C, D)
    exp_avg_sq: Tensor,  # (C, D)
    row_steps: Tensor,  # (C,) int64: the steps that each row has taken
    class_ids: Tensor,  # (M,) int64, each once
    rows: Tensor,  # (M, D) gradient
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> Tensor:
    """n <- n + 1;  m <- m + (1 - beta1) * (g - m);  v <- beta2 * v + (1 - beta2) * g^2;  and then

    w <- (1 - lr * weight_decay) * w - lr / (1 - beta1^n) * m / (sqrt(v) / sqrt(1 - beta2^n) + eps).

    In float32 or better; each is rounded to its dtype once. A row's numbers are computed in float64.

    >>> (weight, m, v), n = torch.zeros(3, 2, 1), torch.tensor([0, 0])
    >>> ids, rows, numbers = torch.tensor([1]), torch.full((1, 1), 7.0), {"lr": 0.25, "weight_decay": 0.0}
    >>> for _ in range(3):  # a constant gradient moves by lr, whatever its size
    ...     step = row_adam_step_(weight, m, v, n, ids, rows, **numbers)
    >>> weight.flatten(), n
    (tensor([ 0.0000, -0.7500]), tensor([0, 3]))
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    beta1, beta2 = betas
    n = row_steps[class_ids] + 1
    rate, root = (
        each[:, None].to(dtype) for each in (lr / (1 - beta1 ** n.double()), (1 - beta2 ** n.double()).sqrt())
    )
    w, m, v, g = (t.to(dtype) for t in (weight[class_ids], exp_avg[class_ids], exp_avg_sq[class_ids], rows))
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * (g * g)
    w = (1 - lr * weight_decay) * w - rate * (m / (v.sqrt() / root + eps))
    for state, value in ((weight, w), (exp_avg, m), (exp_avg_sq, v), (row_steps, n)):
        state[class_ids] = value.to(state.dtype)
    return weight
