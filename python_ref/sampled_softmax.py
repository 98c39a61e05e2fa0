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
    angular_margin: float | Tensor = 0.0,  # (...,)
    cosine_margin: float | Tensor = 0.0,  # (...,)
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,  # (C,)
    entry_labels: Tensor | None = None,  # (S,) int64
    target_labels: Tensor | None = None,  # (...,) int64
    target_logit: Tensor | None = None,  # (...,): o(i, t); target is only a label then
    ignore_index: int = -100,
    reduction: str = "mean",
    return_lse: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """loss_i = -o(i, t) + logsumexp(o(i, t), every o(i, j) with class_ids_j != t), all in `dtype`.

        z(i, j) = scale * cos(input_i, weight_j) + bias_j
        o(i, t) = z(i, t) - target_log_expected_count_i                   cos: with its margins
        o(i, j) = z(i, class_ids_j) - log_expected_count_j

    Instead of class_ids_j and t entry_labels_j and target_labels_i are compared where they are given. With
    `label_smoothing` and `class_weight` it is

        loss_i = class_weight_t * ((1 - e) * loss_i + e * (lse_i - (o(i, t) + sum_j z(i, j) / count_j) / C))

    and "mean" divides by the sum of the class weights; `return_lse` returns lse_i, the logsumexp, too.

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
    labels = t if target_labels is None else target_labels.reshape(-1)
    listed = (count < torch.inf) & counted.any()
    t = torch.where(counted, t, 0) if target_logit is None else torch.zeros_like(t)
    x, w_target = (torch.where(counted[:, None], rows, 0.0) for rows in (x, w[t]))
    w, b_target = torch.where(listed[:, None], w[ids], 0.0), torch.where(counted, b[t], 0.0)
    x, w, w_target = (
        _unit(rows, dtype) if similarity == "cosine" else rows.to(dtype) for rows in (x, w, w_target)
    )
    z = scale * (x @ w.T) + torch.where(listed, b[ids], 0.0)
    cosine = _with_margins((x * w_target).sum(dim=1), angular_margin, cosine_margin)
    o_target = scale * cosine + b_target - target_count
    if target_logit is not None:
        o_target = target_logit.reshape(-1).to(dtype)
    is_term = listed & counted[:, None] & ((ids if entry_labels is None else entry_labels) != labels[:, None])
    o = torch.where(is_term, z - count, -torch.inf)
    o_target = torch.where(counted, o_target, 0.0)
    loss = _log1p_sum_exp(o, o_target).to(dtype)
    lse = loss + o_target
    if label_smoothing:
        estimated = torch.where(is_term, z * torch.exp(-count), 0.0).sum(dim=1)
        smooth = torch.where(counted, lse - (o_target + estimated) / C, 0.0)
        loss = (1 - label_smoothing) * loss + label_smoothing * smooth
    share = counted.to(dtype)
    if class_weight is not None and C > 0:
        share = torch.where(counted, class_weight.to(dtype)[t], 0.0)
        loss = loss * share
    if reduction == "none":
        loss = loss.reshape(target.shape)
    elif reduction == "sum":
        loss = loss.sum()
    else:
        loss = loss.sum() / torch.where(share.sum() == 0, 1.0, share.sum())
    return (loss, lse.reshape(target.shape)) if return_lse else loss


def _with_margins(cosine: Tensor, angular: float | Tensor, additive: float | Tensor) -> Tensor:
    """cos(theta + m_a) - m_c, or cos(theta) - m_a * sin(m_a) - m_c where theta + m_a passes pi.

    In the derivative 1 - cosine^2 is at least 1e-6.
    """
    if isinstance(angular, Tensor) or angular != 0:
        m = (
            angular.reshape(-1).to(cosine.dtype)
            if isinstance(angular, Tensor)
            else cosine.new_tensor(angular)
        )
        square = 1 - cosine * cosine
        sine = torch.where(square > 1e-6, square.clamp(min=1e-6).sqrt(), square / (2 * 1e-6**0.5))
        sine = sine + (square.clamp(min=0).sqrt() - sine).detach()
        turned = cosine * torch.cos(m) - sine * torch.sin(m)
        past = torch.acos(cosine.detach().clamp(-1, 1)) + m > torch.pi
        cosine = torch.where(past, cosine - m * torch.sin(m), turned)
    if isinstance(additive, Tensor):
        return cosine - additive.reshape(-1).to(cosine.dtype)
    return cosine - additive if additive != 0 else cosine


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
