"""The loss of rows whose targets' logits are given: margins, lse and sharded classes build on it.

    loss_i = log(1 + sum_j exp(o(i, j) - o_i))        over the entries with entry_labels_j != target_labels_i

A row's target is a label then, to tell accidental hits by, and no row of `weight`.
"""

import torch
from torch import Tensor

from .direct_route import NO_LABELS, direct_loss
from .loss_operator import call_operator, scale_tensor

# input, weight, target, class_ids, log_expected_count, target_log_expected_count, bias
Tensors = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def row_losses(
    tensors: Tensors,
    scale: float | Tensor,
    similarity: str,
    ignore_index: int,
    sparse_grad: bool,
    impl: str,  # "cpp" | "triton"
    rounding: torch.dtype | None,  # of rows as they are read, whatever autocast says
    labels: tuple[Tensor | None, Tensor | None, Tensor | None],  # of entries, of targets; targets' logits
) -> Tensor:
    """(B,) losses, by the shortest route to the kernel; d loss_i / d o_i = expm1(-loss_i) where o_i is given.

    Shapes and dtypes are the caller's to check.
    """
    options = (similarity, ignore_index, "none", sparse_grad, impl)
    if all(given is None for given in labels):
        labels = NO_LABELS
    if rounding is None:
        loss = direct_loss(*tensors, scale, *options, labels)
        if loss is not None:
            return loss
    return call_operator(*tensors, scale_tensor(scale), *options, [False] * 4, rounding, *labels)
