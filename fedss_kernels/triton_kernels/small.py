"""The loss of a small problem, a client's say: two launches each way."""

from collections.abc import Hashable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .calls import KEPT, LOSS, Calls, Gradients, Outputs, Tensors, Wanted
from .configurations import Configuration, table_of
from .plan import FACTOR, Given, Plan
from .problem import Problem
from .variants import ENTRIES, Kernels, kernels_of

PREPARED = 2**22  # bytes that may wait for the backward pass


class Prepared(NamedTuple):
    """What the backward pass needs, allocated before it."""

    wanted: Wanted
    plan: Plan
    outputs: Outputs
    memory: Tensor  # of both passes, one after the other


class SmallCalls(Calls):
    def __init__(self, p: Problem, configuration: Configuration):
        super().__init__(p)
        input, weight, self.strides = p.operands
        self.copies = input is not p.input or weight is not p.weight
        self.configuration, self.table = configuration, table_of(self.device)
        self.plans: dict[Hashable, Plan] = {}
        self.prepared: dict[Wanted, tuple[Plan, int]] = {}  # and the bytes that the loss' plan needs

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
        B, C, S, D = self.sizes
        c = self.configuration
        plan, k, t = Plan(self.device), self._kernels, c.tiling
        kept, losses = Given(KEPT), Given(LOSS)
        partials = plan.empty(2, c.splits, B, dtype=self.traits.accumulator)
        if B > 0:
            plan.launch(
                k.partial_terms,
                (triton.cdiv(B, t.forward.rows), c.splits + 1),
                *(self.input, self.weight, self.target, self.class_ids, self.counts, self.bias, self.learned),
                *(None, partials, kept),
                *(B, C, S, D, self.ignore_index, *self.strides, FACTOR),
            )
        plan.launch(
            k.merge_splits,
            (1 if self.traits.reduction != "none" else max(triton.cdiv(B, t.merged_rows), 1),),
            *(self.target, self.target_counts, self.bias, self.learned, partials, kept, losses),
            *(B, C, c.splits, self.ignore_index, FACTOR),
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
        if self.sizes[0] > 0 or (outputs.ids is not None and not self.fold):
            plan.run((*self._given(tensors), made[0], upstream, *outputs), factor)
        if self.sizes[0] > 0:
            self._may_prepare(plan, wanted, upstream.dtype)
        else:
            for found in (outputs.rows, outputs.row_bias):
                if found is not None:
                    found.zero_()
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
        accumulator = self.traits.accumulator
        entries = C if self.fold else S + B
        to = self.places(wanted, spreads=True)
        if wanted.needed[1] and to.rows is None:
            to = to._replace(rows=plan.empty(entries, D, dtype=accumulator))
        if wanted.needed[2] and to.row_bias is None:
            to = to._replace(row_bias=plan.empty(entries, dtype=accumulator))
        if B > 0:
            self._plan_rows(plan, to)
        elif to.ids is not None:
            listed = (self.class_ids, self.counts, self.target, to.ids, B, C, S, self.ignore_index)
            plan.launch(self._kernels.sparse_ids, (triton.cdiv(entries, ENTRIES),), *listed)
        return plan

    def _plan_rows(self, plan: Plan, to: Outputs) -> None:
        """Two launches."""
        B, C, S, D = self.sizes
        c, k, t, traits = self.configuration, self._kernels, self.configuration.tiling, self.traits
        kept, upstream = Given(KEPT), Given(LOSS)
        tiles = triton.cdiv(S, t.tiles.classes)
        partial_input = partial_along = partial_scale = None
        if to.input is not None:
            partial_input = plan.empty(tiles, B, D, dtype=traits.accumulator)
            if self.cosine:
                partial_along = plan.empty(tiles, c.column_groups, B, dtype=traits.wide)
        if to.scale is not None:
            partial_scale = plan.empty(tiles, B, dtype=traits.wide)
        if tiles + (not self.fold) > 0:
            plan.launch(
                k.small_tiles,
                (tiles + (not self.fold), c.column_groups),
                *(self.input, self.weight, self.target, self.class_ids, self.counts, self.bias, self.learned),
                *(upstream, kept, to.rows, to.row_bias, partial_input, partial_along, partial_scale),
                *(B, C, S, D, self.ignore_index, *self.strides, FACTOR),
            )
        spread = 0 if to.weight is None and to.bias is None and to.ids is None else S + B
        plan.launch(
            k.small_results,
            (B + 1 + spread, triton.cdiv(max(D, 1), t.result_columns)),
            *(self.input, self.weight, self.target, self.class_ids, self.counts, self.learned),
            *(upstream, kept),
            *(None if to.weight is None else to.rows, None if to.bias is None else to.row_bias),
            *(partial_input, partial_along, partial_scale, to.input, to.weight, to.bias, to.scale, to.ids),
            *(B, C, S, D, tiles, tiles * c.column_groups, self.ignore_index, *self.strides, FACTOR),
        )

    def _given(self, tensors: Tensors) -> Tensors:
        return self.operands(tensors) if self.copies else tensors

    @property
    def _kernels(self) -> Kernels:
        return kernels_of(self.traits, self.configuration.tiling, self.table)
