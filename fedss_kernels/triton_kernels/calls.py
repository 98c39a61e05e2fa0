"""What calls of the loss have in common on GPUs: where results go, and which of the two ways a problem takes.

No host synchronisation, so a call can be captured in a CUDA graph. Ids are not checked on the host: a class
out of range is never read; it makes losses NaN.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tiles
from .plan import Given, Plan
from .problem import Problem, operand_of
from .scatter_add import scatter_add

Tensors = Sequence[Any]  # those of a problem, None for those not given, in the order of its fields
KEPT, LOSS, SUMS = 11, 12, 13  # places of what a plan is given, after the problem's tensors
NONE = (False,) * 4  # of the gradients
PREPARED = 2**22  # bytes that may wait for the backward pass


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


class Prepared(NamedTuple):
    """What the backward pass needs, allocated before it."""

    plan: Plan
    outputs: Outputs
    memory: Tensor  # of both passes, one after the other


class Calls(ABC):
    """Calls alike: of one signature. What they launch is planned once.

    The compact gradient of class rows has S + B entries: the class set's and the targets'. S where these have
    no class, and all C where every class is in the set.
    """

    spreads = False  # whether plans add compact gradients up to dense ones, and hold them themselves
    most_sums = 0  # that may be made with the loss

    def __init__(self, p: Problem, problems: Sequence[int] = ()):
        """problems: as many of one size; results have them as their first dimension."""
        self.traits, self.device, self.ignore_index = p.traits, p.input.device, p.ignore_index
        self.sizes, self.signature, self.leading = p.sizes, p.signature, tuple(problems)
        self.result_dtype = result_dtype(p.input)
        given = [None if tensor is None else Given(place) for place, tensor in enumerate(p.tensors)]
        self.vectors = tiles.Vectors(*given[2:])
        self.matrices = tuple(
            tiles.Matrix(its, p.sizes[3], *operand.stride())
            for its, operand in zip(given, p.operands, strict=False)
        )
        self.copies = p.operands[0] is not p.input or p.operands[1] is not p.weight
        self.cosine, self.fold = p.traits.cosine, p.traits.fold
        self.targets_apart = not self.fold and p.target_logit is None
        self.entries = p.sizes[2] + self.targets_apart * p.sizes[0]
        # Each class' sum is rounded once, where many round away what plain PyTorch keeps.
        self.merges = not self.fold and p.weight.itemsize == 2 and p.input.dtype != p.weight.dtype
        self.plans: dict[Hashable, Plan] = {}
        self.prepared: dict[Wanted, tuple[Plan, int]] = {}  # and the bytes that the loss' plan needs

    # ---- what differs from one way to the other ----

    def sums(self, input: Tensor, wanted: Wanted | None) -> Sequence[Tensor | None]:
        """Uninitialised: what is made with the loss for the gradients; nothing where most_sums is 0."""
        return ()

    def given_so(self, tensors: Tensors, sums: Sequence[Tensor | None], needed: Sequence[bool] = NONE) -> Any:
        """What a plan depends on besides: which sums are there; none where others are needed too."""
        return ()

    @abstractmethod
    def plan_loss(self, given_so: Any) -> Plan: ...

    @abstractmethod
    def plan_gradients(self, wanted: Wanted, to: Outputs, given_so: Any) -> Plan: ...

    # ---- a call ----

    def loss(
        self, tensors: Tensors, factor: float, wanted: Wanted | None, prepared: Prepared | None = None
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """(loss, what gradients are made of); prepared: its memory is used until the backward pass."""
        losses, kept = empty_results(tensors[0], self.traits.reduction, self.leading)
        sums = self.sums(tensors[0], wanted) if self.most_sums else ()
        stage = ("loss", given_so := self.given_so(tensors, sums))
        if stage not in self.plans:
            self.plans[stage] = self.plan_loss(given_so)
        memory = None if prepared is None else prepared.memory
        self.plans[stage].run((*self._read(tensors), kept, losses, *sums), factor, memory)
        return losses, (kept, *sums)

    def gradients(
        self,
        tensors: Tensors,
        factor: float,
        made: tuple[Tensor | None, ...],
        grad_loss: Tensor,
        wanted: Wanted,
        prepared: Prepared | None = None,
    ) -> Gradients:
        upstream, kept, sums = grad_loss.contiguous(), made[0], made[1 : 1 + self.most_sums]
        if prepared is None:
            outputs, memory = self.outputs(tensors, wanted), None
            given_so = self.given_so(tensors, sums, wanted.needed)
            stage = (wanted, given_so, upstream.dtype)
            if stage not in self.plans:
                given = (Given(SUMS + self.most_sums + nth) for nth in range(len(outputs)))
                to = (None if out is None else its for out, its in zip(outputs, given, strict=True))
                self.plans[stage] = self.plan_gradients(wanted, Outputs(*to), given_so)
            plan = self.plans[stage]
        else:
            plan, outputs, memory = prepared
        plan.run((*self._read(tensors), kept, upstream, *sums, *outputs), factor, memory)
        if not self.spreads:
            self._spread(tensors, outputs)
        elif prepared is None:
            self._may_prepare(plan, wanted, upstream.dtype)
        return self._results(tensors, wanted, outputs)

    def prepare(self, tensors: Tensors, wanted: Wanted) -> Prepared | None:
        """Allocates for the backward pass, where that is little: it runs in a thread that has slept, slowly.

        None, too, before the first backward pass.
        """
        found = self.prepared.get(wanted)
        if found is None:
            return None
        plan, bytes_of_both = found
        return Prepared(plan, self.outputs(tensors, wanted), plan.memory(bytes_of_both))

    def _may_prepare(self, plan: Plan, wanted: Wanted, upstream: torch.dtype) -> None:
        B, _, S, D = self.sizes
        dense = (wanted.needed[1] or wanted.needed[2]) and not (wanted.sparse or self.fold)
        little = plan.bytes + 8 * (S + B) * D <= PREPARED
        alike = upstream == self.result_dtype
        loss = self.plans.get(("loss", ()))
        if plan.again and little and alike and not (self.merges or dense) and loss is not None:
            self.prepared[wanted] = plan, loss.bytes

    def _read(self, tensors: Tensors) -> Tensors:
        """`tensors`, the first two as kernels read them."""
        if not self.copies:
            return tensors
        return [*(operand_of(tensor, self.traits) for tensor in tensors[:2]), *tensors[2:]]

    # ---- gradients ----

    def outputs(self, tensors: Tensors, wanted: Wanted) -> Outputs:
        input, weight = tensors[:2]
        (B, C, _, D), entries, K = self.sizes, self.entries, self.leading
        to_input, to_weight, to_bias, to_scale = wanted.needed
        dense = not (self.fold or wanted.sparse)
        compact = not (dense and self.spreads)
        listed = wanted.sparse and not self.fold and (to_weight or to_bias)
        dtype = self.traits.accumulator if dense or (wanted.sparse and self.merges) else weight.dtype
        return Outputs(
            input.new_empty((*K, B, D)) if to_input else None,
            weight.new_zeros((*K, C, D)) if to_weight and dense else None,
            weight.new_zeros((*K, C)) if to_bias and dense else None,
            input.new_empty(K, dtype=wanted.scale_dtype) if to_scale else None,
            input.new_empty((*K, entries, D), dtype=dtype) if to_weight and compact else None,
            input.new_empty((*K, entries), dtype=dtype) if to_bias and compact else None,
            input.new_empty((1, entries), dtype=torch.int64) if listed else None,
        )

    def _results(self, tensors: Tensors, wanted: Wanted, outputs: Outputs) -> Gradients:
        if self.merges and outputs.ids is not None:
            outputs = self._merged(tensors, outputs)
        weight, bias, ids = outputs.weight, outputs.bias, outputs.ids
        if self.fold or wanted.sparse:
            weight, bias = outputs.rows, outputs.row_bias
        if self.fold and wanted.sparse and (weight is not None or bias is not None):
            ids = self._all_classes(tensors)
        if ids is not None:
            # Always as many; those that take no part are zeros, or NaN beside losses that are NaN too. Where
            # there is no class at all none could stand for them.
            C = len(tensors[1])
            if C == 0:
                ids = ids[:, :0]
                weight, bias = (None if rows is None else rows[:0] for rows in (weight, bias))
            weight, bias = (None if rows is None else _sparse(ids, rows, C) for rows in (weight, bias))
        return Gradients(outputs.input, weight, bias, outputs.scale)

    def _spread(self, tensors: Tensors, outputs: Outputs) -> None:
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
    return (
        input.new_empty((*leading, B) if reduction == "none" else leading, dtype=result_dtype(input)),
        input.new_empty((*leading, tiles.KEPT.value * B + 1), dtype=torch.float64),
    )


def result_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _sparse(ids: Tensor, rows: Tensor, C: int) -> Tensor:
    return torch.sparse_coo_tensor(ids, rows, (C, *rows.shape[1:]), check_invariants=False)
