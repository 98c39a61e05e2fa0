"""The sampled-softmax loss, Eq. 6 of the FedSS paper, about one line of PyTorch per line of the
definition."""

import torch
from torch import Tensor


def sampled_softmax_loss(
    input: Tensor,  # (..., D)
    weight: Tensor,  # (C, D)
    target: Tensor,  # (...,) int64
    class_ids: Tensor | None = None,  # (S,) int64
    log_expected_count: Tensor | None = None,  # (S,)
    *,
    target_log_expected_count: Tensor | None = None,  # (...,)
    bias: Tensor | None = None,  # (C,)
    scale: float | Tensor = 20.0,
    similarity: str = "cosine",
    ignore_index: int = -100,
    reduction: str = "mean",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """loss_i = -o(i, t) + logsumexp(o(i, t), every o(i, j) with class_ids_j != t), computed in `dtype`
    throughout.

        z(i, j) = scale * cos(input_i, weight_j) + bias_j
        o(i, t) = z(i, t) - target_log_expected_count_i
        o(i, j) = z(i, class_ids_j) - log_expected_count_j

    It is computed as log(1 + sum_j exp(o(i, j) - o(i, t))), as Eq. 6 has it: the same number, but right to
    the last digits where the target's probability is nearly 1 and the difference of two large numbers would
    have none left. `dtype` defaults to input's. Stores the B x S logits. Worked example: one row, unit
    vectors, scale 1, target 0, class 1 orthogonal to the row: o = (1, 0), so the loss is log(1 + exp(0 - 1))
    = 0.3133.

    >>> eye = torch.eye(2)
    >>> sampled_softmax_loss(eye[:1], eye, torch.tensor([0]), scale=1.0)
    tensor(0.3133)
    """
    dtype = dtype or input.dtype
    shape = target.shape
    x, w, target = input.reshape(-1, input.shape[-1]).to(dtype), weight.to(dtype), target.reshape(-1)
    B, C = len(target), len(weight)
    class_ids = torch.arange(C) if class_ids is None else class_ids
    b = torch.zeros(C, dtype=dtype) if bias is None else bias.to(dtype)
    scale = scale.to(dtype) if isinstance(scale, Tensor) else scale
    count = torch.zeros(len(class_ids)) if log_expected_count is None else log_expected_count
    target_count = (
        torch.zeros(B) if target_log_expected_count is None else target_log_expected_count.reshape(-1)
    )

    counted = target != ignore_index
    t = torch.where(counted, target, 0)
    if C == 0:  # then no row can be counted
        return (
            _reduce(x.sum(dim=1) * 0 + w.sum() * 0, counted, reduction)
            .to(dtype)
            .reshape(_shape(shape, reduction))
        )
    if similarity == "cosine":
        x, w = _unit(x), _unit(w)
    z = scale * (x @ w[class_ids].T) + b[class_ids]
    z_target = scale * (x * w[t]).sum(dim=1) + b[t]
    o = (z - count.to(dtype)).masked_fill(class_ids == t[:, None], -torch.inf)
    o_target = z_target - target_count.to(dtype)
    loss = _log1p_sum_exp(o - o_target[:, None])
    return _reduce(loss, counted, reduction).reshape(_shape(shape, reduction))


def _log1p_sum_exp(x: Tensor) -> Tensor:
    """log(1 + sum_j exp(x_j)) of each row = m + log(exp(-m) + sum_j exp(x_j - m)), m the largest of 0 and the
    x_j."""
    m = torch.cat([x.new_zeros(len(x), 1), x.detach()], dim=1).amax(dim=1)
    return m + torch.log1p(torch.expm1(-m) + torch.exp(x - m[:, None]).sum(dim=1))


def _unit(rows: Tensor) -> Tensor:
    """rows / |rows|; a row of norm below 1e-12 becomes zero and passes no gradient."""
    norm = rows.norm(dim=1, keepdim=True)
    zero = norm < 1e-12
    return torch.where(zero, 0.0, rows / torch.where(zero, 1.0, norm))


def _reduce(loss: Tensor, counted: Tensor, reduction: str) -> Tensor:
    loss = torch.where(counted, loss, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum().clamp(min=1)


def _shape(shape: torch.Size, reduction: str) -> torch.Size:
    return shape if reduction == "none" else torch.Size([])
