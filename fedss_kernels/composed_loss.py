"""The loss with margins, label smoothing, class weights or its logsumexp: composed of the rows' plain losses.

o_i    = the target's logit, with its margins                           target_logits.py
L_i    = log(1 + sum_j exp(o(i, j) - o_i)),  lse_i = L_i + o_i          given_target.py: the kernel
loss_i = class_weight_t * ((1 - e) * L_i + e * (lse_i - mean_i))        smoothing.py: mean_i
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .class_table import class_tables, first_place
from .given_target import row_losses
from .loss_extras import Extras
from .smoothing import mean_logits
from .target_logits import target_logits, widened_rows
from .traced_checks import checked_numbers


def composed_loss(
    input: Tensor,  # (B, D)
    weight: Tensor,  # (C, D)
    target: Tensor,  # (B,)
    corrections: tuple[Tensor | None, Tensor | None, Tensor | None],
    bias: Tensor | None,
    scale: float | Tensor,
    similarity: str,
    ignore_index: int,
    reduction: str,
    sparse_grad: bool,
    impl: str,
    rounding: torch.dtype | None,  # autocast's
    labels: tuple[Tensor | None, Tensor | None],  # of entries and of targets
    extras: Extras,
) -> tuple[Tensor, Tensor]:
    """(loss, lse where the targets' logits are wanted), of the reduction's shape and (B,)."""
    class_ids, counts, target_counts = corrections
    input, rounding = widened_rows(input, weight, rounding)
    if isinstance(scale, Tensor):  # and scale's, of the losses and of targets' logits, in float64
        scale = scale.double()
    counted = target != ignore_index
    classes, known = _classes(target, counted, weight.shape[0], class_ids, counts)
    entries = None if class_ids is None else class_ids.shape[0] + target.shape[0]
    table, biases = class_tables(weight, bias, sparse_grad, entries)
    shared = (biases, scale, similarity)
    rows = (input, table, classes, counted, target_counts, *shared)

    given = None
    if extras.of_targets and weight.shape[0] > 0:
        given = target_logits(*rows, extras.margins, rounding)
        given = given if known is None else given.where(known, torch.nan)
    changed = given if extras.has_margins else None
    if sparse_grad and impl == "triton" and extras.of_targets and len(target):
        if class_ids is not None and counts is not None:
            # Beside margins the kernels list no targets, and smoothing lists entries alone: where all are
            # left out they stand for one, which takes part.
            class_ids = class_ids.where((counts != torch.inf).any(), classes[:1])
            corrections = (class_ids, counts, target_counts)
    losses = row_losses(
        *(input, table, target, corrections, *shared, ignore_index, impl, rounding, (*labels, changed))
    )
    lse, mean = losses, None  # where there are no classes: all rows are ignored
    if given is not None:
        lse = (losses + given).to(losses.dtype)
        if extras.label_smoothing:
            mean = mean_logits(
                *(input, table, given, class_ids, counts, *shared),
                *(labels[0], target if labels[1] is None else labels[1], counted, rounding),
            )
    return reduced_loss(losses, lse, mean, classes, counted, extras, reduction), lse


def _sums(losses: Tensor, shares: Tensor) -> Sequence[Tensor]:
    return losses.sum(), shares.sum()


def reduced_loss(
    losses: Tensor,  # (B,) L_i
    lse: Tensor,  # (B,)
    mean: Tensor | None,  # (B,), for label smoothing
    classes: Tensor,  # (B,) in [0, C)
    counted: Tensor,  # (B,) bool
    extras: Extras,
    reduction: str,
    sums: Callable[[Tensor, Tensor], Sequence[Tensor]] = _sums,  # of the losses and of the shares in "mean"
) -> Tensor:
    """class_weight_t * ((1 - e) * L_i + e * (lse_i - mean_i)), reduced."""
    if mean is not None:
        smooth = (lse - mean).where(counted, 0.0)
        losses = torch.lerp(losses, smooth.to(losses.dtype), extras.label_smoothing)
    share = counted.to(losses.dtype)
    if extras.class_weight is not None and extras.class_weight.shape[0] > 0:
        share = extras.class_weight.index_select(0, classes).where(counted, 0.0)
        share = checked_numbers("class_weight", share, classes).to(losses.dtype)
        losses = losses * share
    if reduction == "none":
        return losses
    total, shares = sums(losses, share)
    return total if reduction == "sum" else total / shares.where(shares != 0, 1.0)


def _classes(
    target: Tensor, counted: Tensor, C: int, class_ids: Tensor | None, counts: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(targets that are rows of weight, on a GPU which of them are).

    An ignored row has the class of one that is not, or where all are ignored that of an entry that takes
    part: sparse gradients list no others.
    """
    compiling = torch.compiler.is_compiling()  # for any number of rows, none of them too
    if C == 0 or (target.shape[0] == 0 and not compiling):
        return torch.zeros_like(target), None
    rows = (pad(target, (0, 1)), pad(counted, (0, 1))) if compiling else (target, counted)
    some = rows[0].gather(0, first_place(rows[1]))
    if class_ids is None or class_ids.shape[0] > 0:
        entry = torch.zeros_like(some) if counts is None else first_place(counts < torch.inf)
        some = some.where(counted.any(), entry if class_ids is None else class_ids.gather(0, entry))
    classes = target.where(counted, some.clamp(0, C - 1))
    if target.is_cpu:
        return classes, None
    return classes.clamp(0, C - 1), (target >= 0) & (target < C) | ~counted
