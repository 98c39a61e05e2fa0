"""The loss of many small problems of one size, torch.vmap's: small.py's launches, each over all of them."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .calls import Tensors
from .chunks import BUDGET, Chunks
from .configurations import Configuration, configure, table_of
from .problem import Problem, bytes_of, dtype_of_products, widened
from .small import SmallCalls

MOST = 65_535  # programs of a grid's third axis
_calls: dict[Hashable, SmallCalls] = {}
_MOST_CALLS = 1024


def at_once(B: int, S: int, D: int, input: Tensor, weight: Tensor, rounding: torch.dtype | None) -> int:
    """How many problems of these sizes a launch may go over; 0 where they are no small ones for any scale."""
    rows = dtype_of_products(input, weight, rounding)
    table, problem_bytes = table_of(input.device), bytes_of(input, weight)
    way = configure(table, B, S, D, rows, rows, problem_bytes, more=True)
    by_large_scale = configure(table, B, S, D, torch.float64, rows, problem_bytes)
    if isinstance(way, Chunks) or isinstance(by_large_scale, Chunks):
        return 0
    parts = -(-S // way.blocks.classes) * B * D  # of the gradient of input, as found by tiles
    return max(min(BUDGET // (max(rows.itemsize, 4) * max(parts, 1)), MOST), 1)


def stacked_calls(
    problems: int,
    stacked: Sequence[bool],  # of the tensors, which are each problem's own
    given: Sequence[Any],  # tensors and None, as a `Problem`'s first, and the scale
    similarity: str,
    ignore_index: int,
    reduction: str,
    rounding: torch.dtype | None,
) -> tuple[SmallCalls, Tensors, float]:
    """(calls, what they are given, the scale's factor)"""
    own = [is_own and t is not None for is_own, t in zip(stacked, given, strict=True)]
    *firsts, scale = _firsts(own, given)
    x, w, target, *others = firsts
    options = (1.0 if own[7] else scale, similarity, ignore_index, reduction, rounding)
    p = Problem.of(x, w, target, others[0], others[1], others[2], others[3], *options)
    tensors = [*_as_read(own[:7], given[:7], p), p.learned]
    if own[7]:
        scales = widened(given[7]) if p.traits.operand == torch.float64 else given[7]
        tensors[7] = scales.to(p.input.device).contiguous()
    steps = [t.stride(0) if is_own else 0 for is_own, t in zip(own, tensors, strict=True)]
    firsts = _firsts(own, tensors)
    p = p._replace(**dict(zip(Problem._fields, firsts, strict=False)))
    aligned = (t is None or t.data_ptr() % 16 == 0 for t in tensors)
    signature = (problems, *steps, *aligned, p.signature)
    if signature not in _calls:
        if len(_calls) >= _MOST_CALLS:
            _calls.clear()
        _calls[signature] = _calls_for(p, problems, steps)
    return _calls[signature], (*tensors, None, None, None), p.factor


def _firsts(own: Sequence[bool], tensors: Sequence[Any]) -> list[Any]:
    """Those of the first problem."""
    return [t[0] if is_own else t for is_own, t in zip(own, tensors, strict=True)]


def _as_read(own: Sequence[bool], tensors: Sequence[Any], first: Any) -> list[Any]:
    """Matrices with columns that lie together, and vectors as those of the first problem are."""
    found = [
        first_of if t is None or not is_own else t.to(first_of.dtype).contiguous()
        for is_own, t, first_of in zip(own[2:], tensors[2:], first.tensors[2:7], strict=True)
    ]
    as_they_are = first.traits.operand != torch.float64  # else they are copied, stacks as a whole
    matrices = [t if as_they_are and t.stride(-1) == 1 else t.contiguous() for t in tensors[:2]]
    return [*matrices, *found]


def _calls_for(p: Problem, problems: int, steps: Sequence[int]) -> SmallCalls:
    B, _, S, D = p.sizes
    traits, problem_bytes = p.traits, bytes_of(p.input, p.weight)
    way = configure(table_of(p.input.device), B, S, D, traits.operand, traits.rows, problem_bytes)
    assert isinstance(way, Configuration)
    return SmallCalls(p, way, (problems,), steps)
