"""The loss on GPUs: small problems in two launches each way (small.py), others in chunks (chunked.py)."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .calls import Gradients, Wanted
from .chunked import ChunkedCalls
from .configurations import Configuration, configure, in_force, table_of
from .problem import LARGEST_FACTOR, Problem
from .small import SmallCalls

Calls = SmallCalls | ChunkedCalls

_calls: dict[Hashable, Calls] = {}
_MOST_CALLS = 4096


def loss(p: Problem, wanted: Wanted | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(loss () or (B,), what the gradients are made of); wanted: gradients that may be begun with it."""
    return calls_like(p).loss(p.tensors, p.factor, wanted)


def gradients(p: Problem, made: Sequence[Tensor], grad_loss: Tensor, wanted: Wanted) -> Gradients:
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


def calls_like(p: Problem) -> Calls:
    signature = p.signature
    found = _calls.get(signature)
    if found is None:
        if len(_calls) >= _MOST_CALLS:
            _calls.clear()
        found = _calls[signature] = _calls_for(p)
    return found


def _calls_for(p: Problem) -> Calls:
    B, _, S, D = p.sizes
    bytes_of_inputs = p.input.numel() * p.input.itemsize + p.weight.numel() * p.weight.itemsize
    way: Any = configure(table_of(p.input.device), B, S, D, p.traits.operand.itemsize, 2 * bytes_of_inputs)
    return SmallCalls(p, way) if isinstance(way, Configuration) else ChunkedCalls(p, way)
