"""What every comparison of a kernel with the truth goes through."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def excess(kernel: Tensor, truth: Tensor, plain: Tensor, dtype: torch.dtype) -> float:
    """err(kernel) / (2 err(plain) + floor max|truth|), at most 1 for a good kernel.

    Where plain PyTorch isn't finite, truth and floor alone. A truth past the largest number of the kernel's
    dtype is that dtype's infinity.
    """
    if truth.numel() == 0:
        return 0.0
    truth = truth.to(kernel.dtype).double() if truth.abs().max() > torch.finfo(kernel.dtype).max else truth
    kernel, plain = kernel.double(), plain.double()
    same = kernel == truth  # infinities too
    if same.all():
        return 0.0
    error = (kernel - truth)[~same].abs().max().item()
    plain_error = (plain - truth).abs().max().item() if plain.isfinite().all() else 0.0
    allowed = 2 * plain_error + FLOOR[dtype] * truth.abs().max().item()
    return error / allowed if allowed > 0 and error == error else float("inf")


def with_features_reversed(loss_function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same loss, its products added in another order."""

    def loss(input: Tensor, weight: Tensor, **options: object) -> Tensor:
        return loss_function(input.flip(-1), weight.flip(-1), **options)

    return loss


def with_features_shuffled(loss_function: Callable[..., Tensor], seed: int) -> Callable[..., Tensor]:
    """Likewise, in one of many orders."""

    def loss(input: Tensor, weight: Tensor, **options: object) -> Tensor:
        order = torch.randperm(input.shape[-1], generator=torch.Generator().manual_seed(seed))
        return loss_function(input[..., order], weight[..., order], **options)

    return loss


def with_rows_longer(loss_function: Callable[..., Tensor], factor: float) -> Callable[..., Tensor]:
    """The same loss of cosines, of rows that are rounded in another way: plain PyTorch's luck drawn again."""

    def loss(input: Tensor, weight: Tensor, **options: object) -> Tensor:
        if options.get("similarity", "cosine") != "cosine":
            return loss_function(input, weight, **options)
        return loss_function(input * factor, weight * factor, **options)

    return loss


def eager_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    class_ids: Tensor | None = None,
    log_expected_count: Tensor | None = None,
    *,
    target_log_expected_count: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | Tensor = 20.0,
    similarity: str = "cosine",
    ignore_index: int = -100,
    reduction: str = "mean",
    angular_margin: float | Tensor = 0.0,
    cosine_margin: float | Tensor = 0.0,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    return_lse: bool = False,
    entry_labels: Tensor | None = None,
    target_labels: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The loss as a user of plain PyTorch writes it, in the dtype of `input` throughout."""
    dtype = input.dtype
    x, t = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    counted = t != ignore_index
    t = torch.where(counted, t, 0)
    ids = torch.arange(len(weight)) if class_ids is None else class_ids
    rows, target_rows = weight[ids].to(dtype), weight[t].to(dtype)
    if similarity == "cosine":
        x, rows, target_rows = (F.normalize(r, dim=1, eps=1e-12) for r in (x, rows, target_rows))
    similarities = (x * target_rows).sum(1)
    if isinstance(angular_margin, Tensor) or angular_margin != 0:
        m = torch.as_tensor(angular_margin, dtype=dtype)
        theta = similarities.clamp(-1 + 1e-7, 1 - 1e-7).acos()
        turned = torch.where(theta + m > torch.pi, similarities - m * m.sin(), (theta + m).cos())
        similarities = turned.to(dtype)
    o, o_target = scale * (x @ rows.T), scale * (similarities - cosine_margin)
    if bias is not None:
        o, o_target = o + bias[ids], o_target + bias[t]
    z = o
    if log_expected_count is not None:
        o = o - log_expected_count
    if target_log_expected_count is not None:
        o_target = o_target - target_log_expected_count.reshape(-1)
    labels = t if target_labels is None else target_labels.reshape(-1)
    hits = (ids if entry_labels is None else entry_labels) == labels[:, None]
    logits = torch.cat([o_target[:, None], o.masked_fill(hits, -torch.inf)], 1).to(dtype)
    first = torch.where(counted, 0, -100)
    if label_smoothing or class_weight is not None or return_lse:
        loss, lse = F.cross_entropy(logits, first, reduction="none"), logits.logsumexp(1).where(counted, 0.0)
        shares = torch.ones(()) if log_expected_count is None else (-log_expected_count).exp()
        mean = (o_target + (z * shares).masked_fill(hits, 0).sum(1)) / len(weight)
        smooth = (lse - mean).where(counted, 0.0)
        share = (torch.ones(len(weight)) if class_weight is None else class_weight)[t].where(counted, 0.0)
        loss = share * ((1 - label_smoothing) * loss + label_smoothing * smooth)
        if reduction != "none":
            loss = loss.sum() / (share.sum().where(share.sum() != 0, 1.0) if reduction == "mean" else 1)
        loss = loss.reshape(target.shape) if reduction == "none" else loss
        return (loss, lse.reshape(target.shape)) if return_lse else loss
    if reduction == "mean":
        return F.cross_entropy(logits, first, reduction="sum") / counted.sum().clamp(min=1)
    loss = F.cross_entropy(logits, first, reduction=reduction)
    return loss.reshape(target.shape) if reduction == "none" else loss
