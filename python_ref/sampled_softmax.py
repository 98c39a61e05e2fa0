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
    x, t = input.reshape(target.numel(), input.shape[-1]), target.reshape(-1)
    # Before rows are taken of them, so that gradients are added up in `dtype` and rounded once.
    w = weight.to(torch.promote_types(weight.dtype, dtype))
    scale = scale.to(dtype) if isinstance(scale, Tensor) else scale
    B, C = len(t), len(weight)
    ids = torch.arange(C, device=x.device) if class_ids is None else class_ids
    b = x.new_zeros(C, dtype=dtype) if bias is None else bias.to(dtype)
    count = x.new_zeros(len(ids), dtype=dtype)
    if log_expected_count is not None:
        count = log_expected_count.to(dtype)
    target_count = x.new_zeros(B, dtype=dtype)
    if target_log_expected_count is not None:
        target_count = target_log_expected_count.reshape(-1).to(dtype)

    counted = t != ignore_index
    if C == 0:  # then every row is ignored; a class of zeros gives them something to ignore
        w, b = w.new_zeros(1, x.shape[1]) + w.sum(), b.new_zeros(1) + b.sum()
    # What takes no part may hold anything: it is read as zeros, as 0 times NaN would be its gradient.
    listed, t = (count < torch.inf) & counted.any(), torch.where(counted, t, 0)
    x, w_target = (torch.where(counted[:, None], rows, 0.0) for rows in (x, w[t]))
    w, b_target = torch.where(listed[:, None], w[ids], 0.0), torch.where(counted, b[t], 0.0)
    x, w, w_target = (
        _unit(rows, dtype) if similarity == "cosine" else rows.to(dtype) for rows in (x, w, w_target)
    )
    z = scale * (x @ w.T) + torch.where(listed, b[ids], 0.0)
    z_target = scale * (x * w_target).sum(dim=1) + b_target
    is_term = listed & counted[:, None] & (ids != t[:, None])
    o = torch.where(is_term, z - count, -torch.inf)
    o_target = torch.where(counted, z_target - target_count, 0.0)
    loss = _log1p_sum_exp(o, o_target).to(dtype)
    if reduction == "none":
        return loss.reshape(target.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum().clamp(min=1)


def _log1p_sum_exp(o: Tensor, o_target: Tensor) -> Tensor:
    """log(1 + sum_j exp(x_j)) = m + log(exp(-m) + sum_j exp(x_j - m)), x_j = o_j - o_t, m = max(0, all x_j).

    NaN where o_t is not finite: then 0 * o_t, which stands for the 0, is NaN.
    """
    zero, x = 0 * o_target, o - o_target[:, None]
    m = torch.cat([zero[:, None], x], dim=1).detach().amax(dim=1)
    return m + torch.log1p(torch.expm1(zero - m) + torch.exp(x - m[:, None]).sum(dim=1))


def _unit(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """rows / |rows|, of any length; a row of norm below 1e-12 becomes zero and passes no gradient."""
    rows = rows.to(torch.promote_types(rows.dtype, dtype))
    squares_overflow = rows.detach().norm(dim=1, keepdim=True) == torch.inf
    shorter = 1e-6 * torch.finfo(rows.dtype).max ** -0.5  # of such a row's length about 1e-6 or more is left
    rows = torch.where(squares_overflow, rows * shorter, rows)
    norm = rows.norm(dim=1, keepdim=True)
    zero = norm < 1e-12
    return torch.where(zero, 0.0, rows / torch.where(zero, 1.0, norm)).to(dtype)
