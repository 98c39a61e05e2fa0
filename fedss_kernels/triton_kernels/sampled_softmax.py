"""The loss on GPUs: small problems in two launches each way (small.py), others in chunks (chunked.py)."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from . import tuning
from .calls import Gradients, Wanted, empty_results
from .chunked import ChunkedCalls, empty_sums
from .chunks import chunks_of
from .configurations import Configuration, configure, in_force, in_one_chunk, table_of
from .problem import LARGEST_FACTOR, Problem, bytes_of, dtype_of_products
from .small import SmallCalls

_calls: dict[Hashable, SmallCalls | ChunkedCalls] = {}
_MOST_CALLS = 4096


def loss(p: Problem, wanted: Wanted | None = None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """(loss () or (B,), what the gradients are made of); wanted: gradients that may be begun with it.

    They are where `empty_loss` says so, which does not know the scale, nor what was timed.
    """
    B, _, S, D = p.sizes
    whole = in_one_chunk(B, S, D, p.traits.rows, bytes_of(p.input, p.weight))
    return calls_like(p).loss(p.tensors, p.factor, wanted if whole else None)


def gradients(p: Problem, made: Sequence[Tensor | None], grad_loss: Tensor, wanted: Wanted) -> Gradients:
    return calls_like(p).gradients(p.tensors, p.factor, tuple(made), grad_loss, wanted)


def circumstances(input: Tensor, weight: Tensor, similarity: str, factor: float) -> tuple[Hashable, ...]:
    """What a call's signature depends on, besides its arguments' dtypes, shapes, strides and options."""
    aligned = input.data_ptr() % 16 == 0, weight.data_ptr() % 16 == 0
    return (
        *aligned,
        abs(factor) > LARGEST_FACTOR.get(similarity, 0.0),
        torch.get_float32_matmul_precision(),
        in_force(),
    )


def calls_like(p: Problem) -> SmallCalls | ChunkedCalls:
    signature = p.signature
    found = _calls.get(signature)
    if found is None:
        if len(_calls) >= _MOST_CALLS:
            _calls.clear()
        found = _calls[signature] = _calls_for(p)
    return found


def empty_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    class_ids: Tensor | None,
    reduction: str,
    rounding: torch.dtype | None,
    needed: Sequence[bool],
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """As `loss`, uninitialised; of tensors without values."""
    losses, kept = empty_results(input, reduction)
    (B, D), C = input.shape, weight.shape[0]
    S = C if class_ids is None else class_ids.shape[0]
    rows = dtype_of_products(input, weight, rounding)
    whole = in_one_chunk(B, S, D, rows, bytes_of(input, weight))
    return losses, (kept, *empty_sums(input, C, S, rows, whole, reduction, needed))


def _calls_for(p: Problem) -> SmallCalls | ChunkedCalls:
    B, _, S, D = p.sizes
    traits, problem_bytes = p.traits, bytes_of(p.input, p.weight)
    labels = p.target_labels is not None
    way = configure(table_of(p.input.device), B, S, D, traits.operand, traits.rows, problem_bytes, labels)
    if not isinstance(way, Configuration):
        return ChunkedCalls(p, way)
    if p.input.stride(1) != 1 or p.weight.stride(1) != 1:  # rows are copied first, once
        return ChunkedCalls(p, chunks_of(B, S, D, traits.rows.itemsize, problem_bytes))
    small = SmallCalls(p, way)
    if not tuning.wanted(p.input.device):
        return small
    chunked = ChunkedCalls(p, chunks_of(B, S, D, traits.rows.itemsize, problem_bytes))
    return small if tuning.first_is_faster(p, small, chunked) else chunked
