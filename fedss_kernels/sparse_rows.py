"""The rows that a sparse gradient lists, those of one class summed; on a GPU without a wait for it."""

import re
from collections.abc import Callable, Iterable, Iterator
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


# Operations of torch's whose backward passes take sparse gradients and pass them on; those of a quotient do
# if it is by one number.
_TAKE_SPARSE = (
    *("Add", "Sub", "Rsub", "Mul", "Neg", "Clone", "Lerp", "Addcmul", "Addcdiv", "Pow", "Abs", "Sign"),
    *("Exp", "Exp2", "Expm1", "Log1P", "Reciprocal", "Rsqrt", "Cos", "Sin", "Sinh", "Cosh", "Erf", "Silu"),
    *("Mish", "Round", "Floor", "Ceil", "Trunc", "NanToNum", "Expand"),
)
_OF_TORCH = re.compile(r"(\w+)Backward\d+")


def check_takes_sparse(**parameters: Tensor | None) -> None:
    """Raises RuntimeError for what is made by an operation of torch's that takes dense gradients alone.

    The backward pass would end in an error that names neither the cause nor a way. Looks at all operations on
    the way to what a parameter is made of, up to one that is not torch's.
    """
    for name, parameter in parameters.items():
        if isinstance(parameter, Tensor) and parameter.grad_fn is not None:
            _check_takes_sparse(name, parameter)


def _check_takes_sparse(name: str, parameter: Tensor) -> None:
    def goes_on(maker: Any) -> list[Any]:
        """Where classes were summed over the gradient is dense by then."""
        found = maker.next_functions if _OF_TORCH.fullmatch(maker.name()) else ()
        return [
            node
            for node, which in found
            if node is not None and list(node._input_metadata[which].shape[:1]) == [len(parameter)]
        ]

    for maker in makers(parameter, goes_on):
        if _takes_dense_alone(maker):
            raise RuntimeError(
                f"sparse_grad: expected False for a {name} that is computed, as by weight_norm, a slice or "
                f"FullyShardedDataParallel, got one by {maker.name()}, whose backward pass in torch takes "
                f"dense gradients only; take sparse_grad=False, or make the {name} itself the parameter"
            )


def makers(tensor: Tensor, goes_on: Callable[[Any], Iterable[Any]]) -> Iterator[Any]:
    """The operations, each once, that a tensor is made by; from each it `goes_on` to some of those before."""
    seen, waiting = set[Any](), [tensor.grad_fn]
    while waiting:
        maker: Any = waiting.pop()
        if maker is not None and maker not in seen:
            seen.add(maker)
            yield maker
            waiting += goes_on(maker)


def _takes_dense_alone(maker: Any) -> bool:
    name = maker.name()
    if name == "DivBackward0":
        return maker._saved_other is not None and maker._saved_other.dim() > 0
    if name == "PowBackward1":  # to the power of a tensor
        return True
    found = _OF_TORCH.fullmatch(name)
    return found[1] not in _TAKE_SPARSE if found else name.startswith("torch::autograd::Copy")
