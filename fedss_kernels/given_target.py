"""The loss of rows whose targets' logits are given: margins, lse and sharded classes build on it.

    loss_i = log(1 + sum_j exp(o(i, j) - o_i))        over the entries with entry_labels_j != target_labels_i

A row's target is a label then, to tell accidental hits by, and no row of `weight`.
"""

import torch
from torch import Tensor

from .direct_route import NO_LABELS, direct_loss
from .loss_operator import autocast_dtype, call_operator


def loss_given_target(
    input: Tensor,  # (B, D)
    weight: Tensor,  # (C, D)
    target_labels: Tensor,  # (B,) int64, or ignore_index
    target_logit: Tensor,  # (B,) float32 or float64, may require grad
    class_ids: Tensor | None = None,  # (S,) int64
    log_expected_count: Tensor | None = None,  # (S,)
    *,
    bias: Tensor | None = None,  # (C,)
    scale: float | Tensor = 20.0,
    similarity: str = "cosine",
    entry_labels: Tensor | None = None,  # (S,) int64; None: class_ids
    ignore_index: int = -100,
    sparse_grad: bool = False,
    impl: str,  # "cpp" | "triton"
) -> Tensor:
    """(B,) losses; d loss_i / d o_i = expm1(-loss_i). Shapes and dtypes are the caller's to check."""
    return row_losses(
        *(input, weight, target_labels, class_ids, log_expected_count, None, bias, scale),
        *(similarity, ignore_index, sparse_grad, impl, autocast_dtype(input.device.type)),
        (entry_labels, None, target_logit),
    )


def row_losses(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    class_ids: Tensor | None,
    log_expected_count: Tensor | None,
    target_log_expected_count: Tensor | None,
    bias: Tensor | None,
    scale: float | Tensor,
    similarity: str,
    ignore_index: int,
    sparse_grad: bool,
    impl: str,
    rounding: torch.dtype | None,  # of rows as they are read, whatever autocast says
    labels: tuple[Tensor | None, Tensor | None, Tensor | None],  # of entries, of targets; targets' logits
) -> Tensor:
    """(B,) losses, by the shortest route to the kernel."""
    tensors = (input, weight, target, class_ids, log_expected_count, target_log_expected_count, bias)
    options = (similarity, ignore_index, "none", sparse_grad, impl)
    if all(given is None for given in labels):
        labels = NO_LABELS
    if rounding is None:
        loss = direct_loss(*tensors, scale, *options, labels)
        if loss is not None:
            return loss
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=torch.float64, device="cpu")
    return call_operator(*tensors, scale, *options, [False] * 4, rounding, *labels)
