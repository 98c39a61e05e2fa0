"""The loss of a small problem, a client's say: two launches each way. Equations: forward.py, backward.py."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import backward, forward
from .backward import Parts, Results
from .calls import KEPT, LOSS, Calls, Gradients, Outputs, Tensors, Wanted
from .configurations import Configuration, Table, table_of
from .launch import TORCH_TYPES, TYPES, Variant
from .plan import FACTOR, Given, Plan
from .problem import Problem, Traits
from .tiles import Matrix, Steps, sums_of

PREPARED = 2**22  # bytes that may wait for the backward pass


class Kernels(NamedTuple):
    """Each with the constants and options of a configuration."""

    partial_terms: Variant
    merge_splits: Variant
    small_tiles: Variant
    small_results: Variant


def kernels_of(traits: Traits, c: Configuration, table: Table) -> Kernels:
    operand, accumulator = TYPES[traits.operand], TYPES[traits.accumulator]
    sums = sums_of(operand, traits.precision)
    rows, classes, columns, warps, stages = c.blocks
    options: dict[str, Any] = {"COSINE": traits.cosine, "enable_fp_fusion": True, **table.all_registers}
    products = options | table.products | {"num_warps": warps, "num_stages": stages}
    products |= {"OPERAND": operand, "PRECISION": traits.precision}
    products |= {"BLOCK_B": rows, "BLOCK_S": classes, "BLOCK_D": columns}
    paired = max(32 * warps * table.paired // rows, 16)
    merging = options | {"REDUCTION": traits.reduction, "ACC": accumulator, "num_warps": c.merge_warps}
    merging |= {"BLOCK_B": c.merged_rows, "BLOCK_SPLITS": c.merged_splits}
    per_row = {"PER_ROW": traits.reduction == "none"}
    adding = options | {"OPERAND": operand, "ACC": sums, "num_warps": c.result_warps}
    adding |= {"BLOCK_D": c.result_columns, "BLOCK_TILES": c.result_tiles, "BLOCK_ENTRIES": c.result_entries}
    return Kernels(
        Variant(forward.partial_terms, BLOCK_PAIRED=paired, **products),
        Variant(forward.merge_splits, **merging),
        Variant(backward.small_tiles, **per_row, **products),
        Variant(backward.small_results, **per_row, **adding),
    )


class Prepared(NamedTuple):
    """What the backward pass needs, allocated before it."""

    wanted: Wanted
    plan: Plan
    outputs: Outputs
    memory: Tensor  # of both passes, one after the other


class SmallCalls(Calls):
    """Or of as many problems of one size, one launch a kernel; results have them as first dimension."""

    def __init__(self, p: Problem, configuration: Configuration, *problems: int, steps: Steps | None = None):
        """p: the problem, or the first of the problems"""
        super().__init__(p)
        input, weight, strides = p.operands
        self.copies = input is not p.input or weight is not p.weight
        self.leading, self.steps = problems, steps
        self.matrices: tuple[Any, ...] = (
            Matrix(self.input, self.sizes[3], *strides[:2]),
            Matrix(self.weight, self.sizes[3], *strides[2:]),
        )
        self.configuration = configuration
        self.kernels = kernels_of(self.traits, configuration, table_of(self.device))
        self.plans: dict[Hashable, Plan] = {}
        self.prepared: dict[Wanted, tuple[Plan, int]] = {}  # and the bytes that the loss' plan needs

    def _launch(self, plan: Plan, kernel: Variant, grid: tuple[int, int], *arguments: Any) -> None:
        plan.launch(kernel, (*grid, *self.leading), *arguments)

    # ---- the loss ----

    def loss(
        self, tensors: Tensors, factor: float, wanted: Wanted | None, prepared: "Prepared | None" = None
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """prepared: its memory waits for the backward pass, and may be used until then."""
        losses, kept = self.empty_results(tensors[0])
        if "loss" not in self.plans:
            self.plans["loss"] = self._plan_loss()
        given = (*self._given(tensors), kept, losses)
        self.plans["loss"].run(given, factor, None if prepared is None else prepared.memory)
        return losses, (kept,)

    def _plan_loss(self) -> Plan:
        B, C, S, _ = self.sizes
        plan, c = Plan(self.device), self.configuration
        kept, losses = Given(KEPT), Given(LOSS)
        partials = plan.empty(*self.leading, 2, c.splits, B, dtype=self.traits.accumulator)
        self._launch(
            plan,
            self.kernels.partial_terms,
            (c.splits + 1, 1),
            *(*self.matrices, self.target, self.class_ids, self.counts, self.bias, self.learned),
            *(self.entry_labels, self.target_labels, partials, kept),
            *(self.steps, B, C, S, self.ignore_index, FACTOR),
        )
        self._launch(
            plan,
            self.kernels.merge_splits,
            (max(triton.cdiv(B, c.merged_rows), 1) if self.traits.reduction == "none" else 1, 1),
            *(self.target, self.target_counts, self.bias, self.learned, self.target_logit),
            *(partials, kept, losses),
            *(self.steps, B, C, c.splits, self.ignore_index, FACTOR),
        )
        return plan

    # ---- the gradients ----

    def gradients(
        self,
        tensors: Tensors,
        factor: float,
        made: tuple[Tensor | None, ...],
        grad_loss: Tensor,
        wanted: Wanted,
    ) -> Gradients:
        outputs = self.outputs(tensors, wanted, spreads=True)
        upstream = grad_loss.contiguous()
        stage = (wanted, upstream.dtype)
        if stage not in self.plans:
            self.plans[stage] = self._plan_gradients(wanted)
        plan = self.plans[stage]
        plan.run((*self._given(tensors), made[0], upstream, *outputs), factor)
        self._may_prepare(plan, wanted, upstream.dtype)
        return self.results(tensors, wanted, outputs)

    def prepare(self, tensors: Tensors, wanted: Wanted) -> Prepared | None:
        """Allocates for the backward pass, where that is little: it runs in a thread that has slept, slowly.

        None, too, before the first backward pass.
        """
        found = self.prepared.get(wanted)
        if found is None:
            return None
        plan, bytes_of_both = found
        return Prepared(wanted, plan, self.outputs(tensors, wanted, spreads=True), plan.memory(bytes_of_both))

    def _may_prepare(self, plan: Plan, wanted: Wanted, upstream: torch.dtype) -> None:
        B, C, S, D = self.sizes
        dense = (wanted.needed[1] or wanted.needed[2]) and not (wanted.sparse or self.fold)
        little = plan.bytes + 8 * (S + B) * D <= PREPARED
        alike = upstream == (torch.float64 if self.input_dtype == torch.float64 else torch.float32)
        loss = self.plans.get("loss")
        if plan.again and little and alike and not (self.merges or dense) and loss is not None:
            self.prepared[wanted] = plan, loss.bytes

    def finish(
        self,
        tensors: Tensors,
        factor: float,
        made: tuple[Tensor | None, ...],
        grad_loss: Tensor,
        prepared: Prepared,
    ) -> Gradients:
        """As `gradients`."""
        outputs = prepared.outputs
        given = (*self._given(tensors), made[0], grad_loss.contiguous(), *outputs)
        prepared.plan.run(given, factor, prepared.memory)
        return self.results(tensors, prepared.wanted, outputs)

    def _plan_gradients(self, wanted: Wanted) -> Plan:
        plan, (B, C, S, D) = Plan(self.device), self.sizes
        c, accumulator = self.configuration, self.traits.accumulator
        tiles, entries = triton.cdiv(S, c.blocks.classes), self.entries
        sums = TORCH_TYPES[sums_of(TYPES[self.traits.operand], self.traits.precision)]
        to = self.places(wanted, spreads=True)

        def part(is_wanted: bool, *shape: int, dtype: torch.dtype = accumulator) -> Any:
            return plan.empty(*self.leading, *shape, dtype=dtype) if is_wanted else None

        parts = Parts(
            to.rows or part(wanted.needed[1], entries, D),
            to.row_bias or part(wanted.needed[2], entries),
            part(wanted.needed[0], tiles, B, D),
            part(wanted.needed[0] and self.cosine, tiles, c.column_groups, B, dtype=sums),
            part(wanted.needed[3], tiles, dtype=torch.float64),
        )
        results = Results(to.input, to.weight, to.bias, to.scale, to.ids)
        kept, upstream = Given(KEPT), Given(LOSS)
        self._launch(
            plan,
            self.kernels.small_tiles,
            (tiles + self.targets_apart, c.column_groups),
            *(*self.matrices, self.target, self.class_ids, self.counts, self.bias, self.learned),
            *(self.entry_labels, self.target_labels, upstream, kept, parts),
            *(self.steps, B, C, S, self.ignore_index, FACTOR),
        )
        spread = 0 if to.weight is None and to.bias is None and to.ids is None else entries
        self._launch(
            plan,
            self.kernels.small_results,
            (B + 1 + spread, triton.cdiv(max(D, 1), c.result_columns)),
            *(*self.matrices, self.target, self.class_ids, self.counts, self.learned),
            *(upstream, kept, parts, results),
            *(self.steps, B, C, S, self.ignore_index, tiles, c.column_groups, FACTOR),
        )
        return plan

    def _given(self, tensors: Tensors) -> Tensors:
        return self.operands(tensors) if self.copies else tensors
