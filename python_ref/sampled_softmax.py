"""The sampled-softmax loss, Eq. 6 of the FedSS paper, about a line of PyTorch for a line of it."""

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
    """loss_i = -o(i, t) + logsumexp(o(i, t), every o(i, j) with class_ids_j != t), all in `dtype`.

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
    x, w, t = input.reshape(target.numel(), input.shape[-1]).to(dtype), weight.to(dtype), target.reshape(-1)
    B, C = len(t), len(weight)
    ids = torch.arange(C, device=x.device) if class_ids is None else class_ids
    b = x.new_zeros(C) if bias is None else bias.to(dtype)
    count = x.new_zeros(len(ids)) if log_expected_count is None else log_expected_count.to(dtype)
    target_count = x.new_zeros(B)
    if target_log_expected_count is not None:
        target_count = target_log_expected_count.reshape(-1).to(dtype)

    counted = t != ignore_index
    if C == 0:  # then every row is ignored; a class of zeros gives them something to ignore
        w, b = x.new_zeros(1, x.shape[1]) + w.sum(), x.new_zeros(1) + b.sum()
    x, t = torch.where(counted[:, None], x, 0.0), torch.where(counted, t, 0)
    if similarity == "cosine":
        x, w = _unit(x), _unit(w)
    z = scale * (x @ w[ids].T) + b[ids]
    z_target = scale * (x * w[t]).sum(dim=1) + b[t]
    o = (z - count).masked_fill(ids == t[:, None], -torch.inf)
    o_target = z_target - target_count
    loss = torch.where(counted, _log1p_sum_exp(o - o_target[:, None]), 0.0).to(dtype)
    if reduction == "none":
        return loss.reshape(target.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum().clamp(min=1)


def _log1p_sum_exp(x: Tensor) -> Tensor:
    """log(1 + sum_j exp(x_j)) = m + log(exp(-m) + sum_j exp(x_j - m)), m the largest of 0 and the x_j."""
    m = torch.cat([x.new_zeros(len(x), 1), x.detach()], dim=1).amax(dim=1)
    return m + torch.log1p(torch.expm1(-m) + torch.exp(x - m[:, None]).sum(dim=1))


def _unit(rows: Tensor) -> Tensor:
    """rows / |rows|; a row of norm below 1e-12 becomes zero and passes no gradient."""
    norm = rows.norm(dim=1, keepdim=True)
    zero = norm < 1e-12
    return torch.where(zero, 0.0, rows / torch.where(zero, 1.0, norm))
