"""The rows that a sparse gradient lists, those of one class summed; on a GPU without a wait for it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .inplace import sorted_ids


class Runs(NamedTuple):
    """M ids in ascending order, equal ones side by side as a run. Sizes are M, however many runs."""

    ids: Tensor  # (M,) ascending
    order: Tensor  # (M,) the position of each in the list, ascending where ids are equal
    run: Tensor  # (M,) which run each is in: 0, 1, ...
    starts: Tensor  # (M + 1,) where each run starts; M for those that are not there

    def sums(self, rows: Tensor) -> Tensor:
        """(M, D): the sum of each run's rows, in the order of the list; zeros for runs that are not there."""
        return torch.segment_reduce(
            widened(rows)[self.order], "sum", offsets=self.starts, unsafe=True, initial=0
        )


def runs_of(ids: Tensor, C: int) -> Runs:
    ids, order = sorted_ids(ids, C, check=False)
    run = torch.zeros_like(order)
    torch.cumsum(ids[1:] != ids[:-1], 0, out=run[1:])
    starts = torch.searchsorted(run, torch.arange(len(ids) + 1, device=ids.device))
    return Runs(ids.long(), order, run, starts)


def has_16_bits(values: Tensor) -> bool:
    return values.dtype in (torch.float16, torch.bfloat16)


def widened(values: Tensor) -> Tensor:
    """16-bit numbers in float32; others as they are."""
    return values.float() if has_16_bits(values) else values


def is_listed_once(grad: Tensor) -> bool:
    """Whether each entry of a sparse gradient is surely there once; on a GPU to look would be to wait.

    Rows that ascend, as those of `sparse_grad` do on the CPU, may have lost the flag that says so.
    """
    if grad.is_coalesced():
        return True
    ids = grad._indices()
    return ids.is_cpu and len(ids) == 1 and bool((ids[0, 1:] > ids[0, :-1]).all())


def unique_rows(grad: Tensor) -> tuple[Tensor, Tensor]:
    """(class_ids (M,), rows (M, ...)) of a sparse gradient, each class once. On a GPU it may wait."""
    if not is_listed_once(grad):
        grad = grad.coalesce()
    return grad._indices()[0], grad._values()


def runs_of_entries(grad: Tensor) -> Runs:
    """Of any sparse gradient: the entries by their place among the first sparse_dim() dimensions."""
    place, places = grad._indices()[0], grad.shape[0]
    for ids, size in zip(grad._indices()[1:], grad.shape[1 : grad.sparse_dim()], strict=True):
        place, places = place * size + ids, places * size
    return runs_of(place, places)


def summed_values(grad: Tensor) -> Tensor:
    """The values of a sparse gradient, repeats summed: (nnz, ...), with zeros after those if there were any.

    In float32 or better. Norms and maxima of these are those of the dense gradient.
    """
    values = grad._values()
    if len(values) == 0 or is_listed_once(grad):
        return widened(values)
    return runs_of_entries(grad).sums(values)


# Operations of torch's that make a class matrix of others (parts, joins, shapes, products, casts, norms,
# masks), and whose backward passes take dense gradients alone.
_DENSE_ALONE = tuple(
    f"{name}Backward"
    for name in (
        *("Slice", "Select", "Split", "SplitWithSizes", "Unbind", "Index", "IndexSelect", "Embedding"),
        *("Cat", "Stack", "View", "UnsafeView", "Squeeze", "Unsqueeze", "T", "Transpose", "Permute"),
        *("Mm", "Addmm", "ToCopy", "WeightNormInterface", "Where", "MaskedFill", "ConstantPadNd"),
        *("Clamp", "Relu", "Sigmoid", "Tanh"),
    )
)


def check_takes_sparse(weight: Tensor) -> None:
    """Raises RuntimeError for a weight made by an operation of torch's that takes dense gradients alone.

    The backward pass would end in an error that names neither the cause nor a way.
    """
    maker: Any = weight.grad_fn
    if maker is None:
        return
    name = maker.name()
    by_matrix = name == "DivBackward0" and maker._saved_other is not None and maker._saved_other.dim() > 0
    if by_matrix or name.startswith(_DENSE_ALONE):
        raise RuntimeError(
            "sparse_grad: expected False for a weight that is computed, as by weight_norm or a slice, "
            f"got one by {name}, whose backward pass in torch takes dense gradients only; take "
            "sparse_grad=False, or make the weight itself the parameter"
        )
