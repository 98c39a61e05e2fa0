"""What calls of the loss have in common on GPUs: where results go, and which of the two ways a problem takes.

No host synchronisation, so a call can be captured in a CUDA graph. Ids are not checked on the host: a class
out of range is never read; it makes losses NaN.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tiles
from .plan import Given
from .problem import Problem, operand_of
from .scatter_add import scatter_add

Tensors = Sequence[Any]  # those of a problem, None for those not given, in the order of its fields
KEPT, LOSS, OUTPUTS = 11, 12, 13  # places of what a plan is given, after the problem's tensors


class Wanted(NamedTuple):
    """Which gradients."""

    needed: tuple[bool, ...]  # of input, weight, bias and scale
    sparse: bool  # those of weight and bias
    scale_dtype: torch.dtype | None  # None: not needed


class Gradients(NamedTuple):
    """None: not wanted."""

    input: Tensor | None  # (B, D)
    weight: Tensor | None  # (C, D), dense or sparse
    bias: Tensor | None  # (C,), as weight's
    scale: Tensor | None  # ()


class Outputs(NamedTuple):
    """What the backward pass writes. None: not wanted, or in a plan's own memory."""

    input: Any  # (B, D)
    weight: Any  # (C, D) zeros: dense, where class_ids are given
    bias: Any  # (C,) zeros: likewise
    scale: Any  # ()
    rows: Any  # (entries, D): the compact gradient, see `Calls`
    row_bias: Any  # (entries,)
    ids: Any  # (1, entries): their classes, where gradients are sparse


class Calls:
    """Calls alike: of one signature. What they launch is planned once.

    The compact gradient of class rows has S + B entries: the class set's and the targets'. S where these have
    no class, and all C where every class is in the set.
    """

    def __init__(self, p: Problem):
        self.traits, self.device, self.ignore_index = p.traits, p.input.device, p.ignore_index
        self.sizes, self.signature = p.sizes, p.signature
        self.input_dtype = p.input.dtype
        given = [None if tensor is None else Given(place) for place, tensor in enumerate(p.tensors)]
        self.input, self.weight, self.target, self.class_ids = given[:4]
        self.counts, self.target_counts, self.bias, self.learned = given[4:8]
        self.entry_labels, self.target_labels, self.target_logit = given[8:]
        self.cosine, self.fold = p.traits.cosine, p.traits.fold
        self.targets_apart = not self.fold and p.target_logit is None
        self.entries = p.sizes[2] + self.targets_apart * p.sizes[0]
        self.leading: tuple[int, ...] = ()  # dimensions of results, before their own
        # Each class' sum is rounded once, where many round away what plain PyTorch keeps.
        self.merges = not self.fold and p.weight.itemsize == 2 and p.input.dtype != p.weight.dtype

    def empty_results(self, input: Tensor) -> tuple[Tensor, Tensor]:
        return empty_results(input, self.traits.reduction, self.leading)

    def outputs(self, tensors: Tensors, wanted: Wanted, spreads: bool) -> Outputs:
        """spreads: the plan adds compact gradients up to dense ones, which it then holds itself."""
        input, weight = tensors[:2]
        (B, C, _, D), entries, K = self.sizes, self.entries, self.leading
        to_input, to_weight, to_bias, to_scale = wanted.needed
        dense = not (self.fold or wanted.sparse)
        dtype = self.traits.accumulator if dense or (wanted.sparse and self.merges) else weight.dtype
        rows = row_bias = ids = None
        if to_weight and not (dense and spreads):
            rows = input.new_empty((*K, entries, D), dtype=dtype)
        if to_bias and not (dense and spreads):
            row_bias = input.new_empty((*K, entries), dtype=dtype)
        if wanted.sparse and (to_weight or to_bias):
            ids = (
                self._all_classes(tensors) if self.fold else input.new_empty((1, entries), dtype=torch.int64)
            )
        scale = input.new_empty(K, dtype=wanted.scale_dtype) if to_scale else None
        return Outputs(
            input.new_empty((*K, B, D)) if to_input else None,
            weight.new_zeros((*K, C, D)) if to_weight and dense else None,
            weight.new_zeros((*K, C)) if to_bias and dense else None,
            scale if B > 0 or scale is None else scale.zero_(),
            rows,
            row_bias,
            ids,
        )

    def places(self, wanted: Wanted, spreads: bool) -> Outputs:
        """Of the outputs in a plan."""
        to_input, to_weight, to_bias, to_scale = wanted.needed
        dense = not (self.fold or wanted.sparse)
        there = [
            to_input,
            to_weight and dense,
            to_bias and dense,
            to_scale,
            to_weight and not (dense and spreads),
            to_bias and not (dense and spreads),
            (to_weight or to_bias) and wanted.sparse and not self.fold,
        ]
        return Outputs(*(Given(OUTPUTS + nth) if is_there else None for nth, is_there in enumerate(there)))

    def results(self, tensors: Tensors, wanted: Wanted, outputs: Outputs) -> Gradients:
        if self.merges and outputs.ids is not None:
            outputs = self._merged(tensors, outputs)
        weight, bias = outputs.weight, outputs.bias
        if self.fold or wanted.sparse:
            weight, bias = outputs.rows, outputs.row_bias
        if outputs.ids is not None:
            # Always as many; those that take no part are zeros, or NaN beside losses that are NaN too. Where
            # there is no class at all none could stand for them.
            ids, C = outputs.ids, len(tensors[1])
            if C == 0:
                ids = ids[:, :0]
                weight, bias = (None if rows is None else rows[:0] for rows in (weight, bias))
            weight, bias = (None if rows is None else _sparse(ids, rows, C) for rows in (weight, bias))
        return Gradients(outputs.input, weight, bias, outputs.scale)

    def operands(self, tensors: Tensors) -> Tensors:
        """`tensors`, the first two as kernels read them."""
        return [*(operand_of(tensor, self.traits) for tensor in tensors[:2]), *tensors[2:]]

    def spread(self, tensors: Tensors, outputs: Outputs) -> None:
        """Adds up the entries of each class: sorted, as comparing all with all would be quadratic."""
        if outputs.weight is None and outputs.bias is None:
            return
        _, C, _, _ = self.sizes
        target, class_ids = tensors[2:4]
        ids = class_ids
        if self.targets_apart:
            ids = torch.cat([class_ids, target.where(target != self.ignore_index, -1)])
        ids, order = ids.clamp(-1, C).sort(stable=True)  # -1 or C where there is none
        if outputs.weight is not None:
            scatter_add(outputs.weight, ids, order, outputs.rows, None)
        if outputs.bias is not None:
            scatter_add(outputs.bias[:, None], ids, order, outputs.row_bias[:, None], None)

    def _merged(self, tensors: Tensors, outputs: Outputs) -> Outputs:
        """A sparse gradient in weight's dtype: of each class one entry holds the sum, the others are 0."""
        ids, order = outputs.ids[0].sort(stable=True)
        first = torch.searchsorted(ids, ids)

        def sums(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            found = torch.zeros_like(values, dtype=tensors[1].dtype)
            columns = (-1, 1) if values.dim() == 1 else values.shape
            scatter_add(found.view(columns), first, order, values.view(columns), None)
            return found

        return outputs._replace(rows=sums(outputs.rows), row_bias=sums(outputs.row_bias), ids=ids[None])

    def _all_classes(self, tensors: Tensors) -> Tensor:
        """(1, C) every class; one that is left out, and nobody's target, repeats the first that is not."""
        C, target, counts = self.sizes[1], tensors[2], tensors[4]
        ids = torch.arange(C, device=self.device)
        if counts is not None:
            left_out = torch.cat([counts == torch.inf, ids.new_zeros(1, dtype=torch.bool)])
            known = (target != self.ignore_index) & (target >= 0) & (target < C)
            left_out.index_fill_(0, target.where(known, C), False)
            ids = ids.where(~left_out[:C], left_out[:C].int().argmin())
        return ids[None]


def empty_results(input: Tensor, reduction: str, leading: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """(loss, kept), uninitialised; leading: dimensions before their own."""
    B = input.shape[-2]
    result_dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return (
        input.new_empty((*leading, B) if reduction == "none" else leading, dtype=result_dtype),
        input.new_empty((*leading, tiles.KEPT.value * B + 1), dtype=torch.float64),
    )


def _sparse(ids: Tensor, rows: Tensor, C: int) -> Tensor:
    return torch.sparse_coo_tensor(ids, rows, (C, *rows.shape[1:]), check_invariants=False)
