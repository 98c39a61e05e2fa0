"""What label smoothing needs of the class set: an estimate of the mean logit, never B x S.

    mean_i = (o_i + sum_j z(i, j) / count_j) / C        over the entries with entry_label_j != target_label_i

The sum is linear in the classes' unit rows: one vector for each label among the rows, of all the others.
"""

import torch
from torch import Tensor

from .class_table import ClassTable, added, first_place
from .target_logits import in_range, inverse_lengths, rounded

_LARGEST = 2**63 - 1  # that a label can be


def mean_logits(
    input: Tensor,  # (B, D)
    weight: ClassTable,  # (C, D)
    target_logit: Tensor,  # (B,)
    class_ids: Tensor | None,  # (S,)
    log_expected_count: Tensor | None,  # (S,)
    bias: ClassTable | None,  # (C,)
    scale: float | Tensor,
    similarity: str,
    entry_labels: Tensor | None,  # (S,)
    target_labels: Tensor,  # (B,)
    counted: Tensor,  # (B,) bool
    rounding: torch.dtype | None,
) -> Tensor:
    """(B,), in float32 or better; O((B + S) * D) numbers beside the gradients."""
    dtype = torch.promote_types(torch.promote_types(input.dtype, weight.values.dtype), torch.float32)
    C = weight.values.shape[0]
    ids = torch.arange(C, device=input.device) if class_ids is None else class_ids
    share, listed = torch.ones((), dtype=dtype, device=input.device).expand(ids.shape[0]), None
    read = ids
    if log_expected_count is not None:
        share, listed = (-log_expected_count.to(dtype)).exp(), log_expected_count < torch.inf
        if ids.shape[0] > 0:  # of what is left out that of one that is not: sparse gradients list no other
            read = ids.where(listed, ids.gather(0, first_place(listed)))
    rows = rounded(weight.rows(read, dtype, listed), rounding, weight.values.dtype)
    x = rounded(input, rounding).to(dtype).where(counted[:, None], 0.0)
    if listed is not None:
        rows = rows.where(listed[:, None], 0.0)
    factor = share
    if similarity == "cosine":
        if dtype == torch.float64:
            x, rows = in_range(x), in_range(rows)
        x, factor = x * inverse_lengths(x)[:, None], share * inverse_lengths(rows)
    terms, x = rows * factor[:, None], x * scale
    if bias is not None:
        of_entries = bias.rows(read, dtype, listed)
        of_entries = of_entries if listed is None else of_entries.where(listed, 0.0)
        terms = torch.cat([terms, (share * of_entries)[:, None]], 1)
        x = torch.cat([x, x.new_ones(x.shape[0], 1)], 1)
    others = _sums_of_others(terms, ids if entry_labels is None else entry_labels, target_labels)
    return (target_logit + (x * others).sum(1)) / C


def _sums_of_others(terms: Tensor, entry_labels: Tensor, target_labels: Tensor) -> Tensor:
    """(B, ...) for each row the sum of the terms (S, ...) of labels that are not its own."""
    B = target_labels.shape[0]
    target_labels = target_labels.contiguous()  # searchsorted warns else
    labels = torch.cat([target_labels.sort().values, target_labels.new_full((1,), _LARGEST)])
    entry_labels = entry_labels + 0 * labels[0]  # under vmap of each problem's own: searchsorted warns else
    nearest = torch.searchsorted(labels, entry_labels)
    group = nearest.where(labels[nearest] == entry_labels, B)  # B: of labels that no row has
    sums, own = added(B + 1, group, terms), torch.searchsorted(labels, target_labels)
    return (_sums_before(sums) + _sums_before(sums.flip(0)).flip(0))[own]


def _sums_before(values: Tensor) -> Tensor:
    """(n, D) before each the sum of those before it.

    All less a row's own would have no digits left where that is the largest, as that of a rare class is.
    """
    shifted = torch.cat([torch.zeros_like(values[:1]), values[:-1]])
    if values.is_cuda and torch.are_deterministic_algorithms_enabled():  # torch refuses to cumulate floats
        return _sums_up_to(shifted)
    return shifted.T.contiguous().cumsum(1).T  # along memory, as fast on a GPU


def _sums_up_to(values: Tensor) -> Tensor:
    """(n, D), in one order always: log2(n) passes, after each of which a row has the sum of twice as many."""
    reach = 1
    while reach < values.shape[0]:
        values = torch.cat([values[:reach], values[reach:] + values[:-reach]])
        reach *= 2
    return values
