"""The aggregator: a scatter-add of rows, in the order of the rows."""

from torch import Tensor


def scatter_add_(
    out: Tensor,  # (C, D)
    class_ids: Tensor,  # (M,) int64
    rows: Tensor,  # (M, D)
    scale: Tensor | None = None,  # (M,)
) -> Tensor:
    """out[class_ids[i]] += scale[i] * rows[i], i = 0, ..., M - 1: multiply, round, add, round in out's dtype.

    >>> import torch
    >>> rows = torch.tensor([[1.0], [2.0], [3.0]])
    >>> scatter_add_(torch.zeros(3, 1), torch.tensor([2, 0, 2]), rows).flatten()
    tensor([2., 0., 4.])
    """
    for i, class_id in enumerate(class_ids.tolist()):
        row = rows[i].to(out.dtype)
        out[class_id] += row if scale is None else scale[i].to(out.dtype) * row
    return out
