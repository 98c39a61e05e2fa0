"""The loss on GPUs: which kernels are launched, on what. Equations: forward.py and backward.py.

No host synchronisation, so a call can be captured in a CUDA graph. Ids are not checked on the host: a class
out of range is never read; it makes losses NaN.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.cuda import device_of

from . import forward, tuning
from .configurations import Configuration, configure, in_force, table_of
from .plan import FACTOR, Given, Plan, Scratch
from .problem import LARGEST_FACTOR, Problem, operand_of
from .scatter_add import scatter_add
from .variants import ENTRIES, Kernels, kernels_of

Tensors = Sequence[Any]  # those of a problem, None for those not given, in the order of its fields
MANY_ROWS = 128  # more than one program merges, where their losses are reduced
PREPARED = 2**22  # bytes that may wait for the backward pass


def loss(p: Problem) -> tuple[Tensor, Tensor]:
    """(loss () or (B,), kept), in two launches; of many rows that are reduced in three."""
    return calls_like(p).loss(p.tensors, p.factor)


def gradients(
    p: Problem,
    kept: Tensor,
    grad_loss: Tensor,
    needed: Sequence[bool],  # of input, weight, bias and scale
    sparse_grad: bool,
    scale_dtype: torch.dtype | None,  # None: not needed
) -> "Gradients":
    return calls_like(p).gradients(
        p.tensors, p.factor, kept, grad_loss, Wanted(tuple(needed), sparse_grad, scale_dtype)
    )


def empty_results(input: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """(loss, kept), uninitialised."""
    B = input.shape[0]
    result_dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return (
        input.new_empty((B,) if reduction == "none" else (), dtype=result_dtype),
        input.new_empty((forward.KEPT * B + 1,), dtype=torch.float64),
    )


def circumstances(input: Tensor, weight: Tensor, similarity: str, factor: float) -> tuple[Hashable, ...]:
    """What a call's signature depends on, besides its arguments' dtypes, shapes, strides and options."""
    aligned = input.data_ptr() % 16 == 0, weight.data_ptr() % 16 == 0
    return (
        *aligned,
        abs(factor) > LARGEST_FACTOR.get(similarity, 0.0),
        torch.get_float32_matmul_precision(),
        in_force(),
    )


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
    """What the backward pass writes. None: not wanted."""

    input: Tensor | None  # (B, D)
    weight: Tensor | None  # (C, D) zeros: dense, where class_ids are given
    bias: Tensor | None  # (C,) zeros: likewise
    scale: Tensor | None  # ()
    rows: Tensor | None  # (S + B, D): of the class set's entries and of the targets; all C with no class_ids
    row_bias: Tensor | None  # (S + B,), or (C,)
    ids: Tensor | None  # (1, S + B): the rows' classes where gradients are sparse; or (1, C)


class Prepared(NamedTuple):
    """What the backward pass needs, allocated before it."""

    wanted: Wanted
    plan: Plan
    outputs: Outputs
    memory: Tensor  # of both passes, one after the other


class Written(NamedTuple):
    """The outputs in a plan."""

    input: Given | None
    weight: Given | None
    bias: Given | None
    scale: Given | None
    rows: Given | Scratch | None
    row_bias: Given | Scratch | None
    ids: Given | None


_KEPT, _LOSS, _OUTPUTS = 8, 9, 10  # places of what a plan is given, after the problem's tensors
_calls: dict[Hashable, "Calls"] = {}
_MOST_CALLS = 4096


def calls_like(p: Problem) -> "Calls":
    signature = p.signature
    found = _calls.get(signature)
    if found is None:
        if len(_calls) >= _MOST_CALLS:
            _calls.clear()
        found = _calls[signature] = Calls(p)
    return found


class Calls:
    """Calls alike: of one signature. What they launch is planned once."""

    def __init__(self, p: Problem):
        self.traits, self.device, self.ignore_index = p.traits, p.input.device, p.ignore_index
        input, weight, self.strides = p.operands
        self.sizes, self.signature = p.sizes, p.signature
        self.input_dtype = p.input.dtype
        given = [None if tensor is None else Given(place) for place, tensor in enumerate(p.tensors)]
        self.input, self.weight, self.target, self.class_ids = given[:4]
        self.counts, self.target_counts, self.bias, self.learned = given[4:]
        self.cosine, self.fold = p.traits.cosine, p.traits.fold
        self.copies = input is not p.input or weight is not p.weight
        B, C, S, D = p.sizes
        self.table = table_of(self.device)
        inputs = p.input.numel() * p.input.itemsize + p.weight.numel() * p.weight.itemsize
        self.configuration = configure(self.table, B, S, D, p.traits.operand.itemsize, p.room, 2 * inputs)
        # Each class' sum is rounded once, where many round away what plain PyTorch keeps.
        self.merges = not self.fold and p.weight.itemsize == 2 and p.input.dtype != p.weight.dtype
        self.plans: dict[tuple[Hashable, int], tuple[Configuration, Plan]] = {}
        self.prepared: dict[Wanted, tuple[Plan, int]] = {}  # and the bytes that the loss' plan needs

    # ---- the loss ----

    def loss(
        self, tensors: Tensors, factor: float, prepared: "Prepared | None" = None
    ) -> tuple[Tensor, Tensor]:
        run = partial(self._loss, tensors, factor)
        if prepared is not None:  # its memory waits for the backward pass: it may be used until then
            return run(self.configuration, prepared.memory)
        return run(self._fastest("forward", run))

    def _loss(
        self,
        tensors: Tensors,
        factor: float,
        c: Configuration,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        losses, kept = empty_results(tensors[0], self.traits.reduction)
        plan = self._plan("loss", c, self._plan_loss)
        plan.run((*self._operands(tensors), kept, losses), factor, memory)
        return losses, kept

    def _plan_loss(self, c: Configuration) -> Plan:
        B, C, S, D = self.sizes
        plan, k, t = Plan(self.device), self._kernels(c), c.tiling
        kept, losses = Given(_KEPT), Given(_LOSS)
        partials = plan.empty(2, c.splits, B, dtype=self.traits.accumulator)
        reduced = self.traits.reduction != "none"
        apart = reduced and B > MANY_ROWS
        row_losses = plan.empty(B, dtype=torch.float64) if apart else losses
        if B > 0:
            plan.launch(
                k.partial_terms,
                (triton.cdiv(B, t.forward.rows), c.splits + 1),
                *(self.input, self.weight, self.target, self.class_ids, self.counts, self.bias, self.learned),
                *(self._inverses(plan, c, k), partials, kept),
                *(B, C, S, D, self.ignore_index, *self.strides, FACTOR),
            )
        plan.launch(
            k.merge_rows if apart else k.merge_splits,
            (1 if reduced and not apart else max(triton.cdiv(B, t.merged_rows), 1),),
            *(self.target, self.target_counts, self.bias, self.learned, partials, kept, row_losses),
            *(B, C, c.splits, self.ignore_index, FACTOR),
        )
        if apart:
            plan.launch(k.reduce_losses, (1,), self.target, row_losses, kept, losses, B, self.ignore_index)
        return plan

    # ---- the gradients ----

    def gradients(
        self,
        tensors: Tensors,
        factor: float,
        kept: Tensor,
        grad_loss: Tensor,
        wanted: Wanted,
    ) -> Gradients:
        run = partial(self._gradients, tensors, factor, kept, grad_loss.contiguous(), wanted)
        return run(self._fastest("backward", run))

    def prepare(self, tensors: Tensors, wanted: Wanted) -> Prepared | None:
        """Allocates for the backward pass, where that is little: it runs in a thread that has slept, slowly.

        None, too, before the first backward pass, and where configurations are searched for.
        """
        found = self.prepared.get(wanted)
        if found is None or tuning.wanted(self.device):
            return None
        plan, bytes_of_both = found
        outputs = self._outputs(tensors, wanted, self.configuration)
        return Prepared(wanted, plan, outputs, plan.memory(bytes_of_both))

    def _may_prepare(self, plan: Plan, wanted: Wanted, c: Configuration, upstream: torch.dtype) -> None:
        B, C, S, D = self.sizes
        dense = (wanted.needed[1] or wanted.needed[2]) and not (wanted.sparse or self.fold)
        little = plan.bytes + 8 * (S + B) * D <= PREPARED
        alike = upstream == (torch.float64 if self.input_dtype == torch.float64 else torch.float32)
        loss = self.plans.get(("loss", id(c)))
        alike &= c is self.configuration and not self.merges
        if plan.again and little and alike and not dense and loss is not None:
            self.prepared[wanted] = plan, loss[1].bytes

    def finish(
        self,
        tensors: Tensors,
        factor: float,
        kept: Tensor,
        grad_loss: Tensor,
        prepared: Prepared,
    ) -> Gradients:
        """As `gradients`."""
        outputs = prepared.outputs
        given = (*self._operands(tensors), kept, grad_loss.contiguous(), *outputs)
        prepared.plan.run(given, factor, prepared.memory)
        return self._results(tensors, prepared.wanted, outputs)

    def _gradients(
        self,
        tensors: Tensors,
        factor: float,
        kept: Tensor,
        upstream: Tensor,
        wanted: Wanted,
        c: Configuration,
    ) -> Gradients:
        outputs = self._outputs(tensors, wanted, c)
        some_rows = self.sizes[0] > 0
        if some_rows or (outputs.ids is not None and not self.fold):
            stage = ("gradients", wanted, upstream.dtype)
            plan = self._plan(stage, c, partial(self._plan_gradients, wanted))
            plan.run((*self._operands(tensors), kept, upstream, *outputs), factor)
        if some_rows:
            self._may_prepare(plan, wanted, c, upstream.dtype)
            if not (c.small or self.fold):
                with device_of(upstream):
                    self._spread(tensors, outputs)
        else:
            for found in (outputs.rows, outputs.row_bias):
                if found is not None:
                    found.zero_()
        if self.merges and outputs.ids is not None:
            with device_of(upstream):
                outputs = self._merged(tensors, outputs)
        return self._results(tensors, wanted, outputs)

    def _results(self, tensors: Tensors, wanted: Wanted, outputs: Outputs) -> Gradients:
        weight, bias = outputs.weight, outputs.bias
        if self.fold or wanted.sparse:
            weight, bias = outputs.rows, outputs.row_bias
        if outputs.ids is not None:
            # nnz = S + B, the class set's entries and then the targets'; those that take no part are zeros,
            # or NaN beside losses that are NaN too.
            weight, bias = (
                None if rows is None else _sparse(outputs.ids, rows, len(tensors[1]))
                for rows in (weight, bias)
            )
        return Gradients(outputs.input, weight, bias, outputs.scale)

    def _outputs(self, tensors: Tensors, wanted: Wanted, c: Configuration) -> Outputs:
        input, weight = tensors[:2]
        B, C, S, D = self.sizes
        to_input, to_weight, to_bias, to_scale = wanted.needed
        accumulator, fold = self.traits.accumulator, self.fold
        entries = C if fold else S + B
        rows = row_bias = ids = None
        # Compact gradients that small_results spreads are a plan's own.
        if to_weight and (fold or wanted.sparse or not c.small):
            dtype = weight.dtype if fold or (wanted.sparse and not self.merges) else accumulator
            rows = input.new_empty((entries, D), dtype=dtype)
        if to_bias and (fold or wanted.sparse or not c.small):
            dtype = weight.dtype if fold or (wanted.sparse and not self.merges) else accumulator
            row_bias = input.new_empty((entries,), dtype=dtype)
        if wanted.sparse and (to_weight or to_bias):
            ids = self._all_classes(tensors) if fold else input.new_empty((1, entries), dtype=torch.int64)
        scale = input.new_empty((), dtype=wanted.scale_dtype) if to_scale else None
        return Outputs(
            input.new_empty((B, D)) if to_input else None,
            weight.new_zeros((C, D)) if to_weight and not (fold or wanted.sparse) else None,
            weight.new_zeros((C,)) if to_bias and not (fold or wanted.sparse) else None,
            scale if B > 0 or scale is None else scale.zero_(),
            rows,
            row_bias,
            ids,
        )

    def _plan_gradients(self, wanted: Wanted, c: Configuration) -> Plan:
        plan, (_, C, S, D) = Plan(self.device), self.sizes
        to_input, to_weight, to_bias, to_scale = wanted.needed
        entries, accumulator = C if self.fold else S + self.sizes[0], self.traits.accumulator
        dense = not (self.fold or wanted.sparse)
        kinds = [
            to_input,
            to_weight and dense,
            to_bias and dense,
            to_scale,
            to_weight and not (dense and c.small),
            to_bias and not (dense and c.small),
            (to_weight or to_bias) and wanted.sparse and not self.fold,
        ]
        places = [Given(_OUTPUTS + nth) if there else None for nth, there in enumerate(kinds)]
        to = Written(*places)
        if to_weight and to.rows is None:
            to = to._replace(rows=plan.empty(entries, D, dtype=accumulator))
        if to_bias and to.row_bias is None:
            to = to._replace(row_bias=plan.empty(entries, dtype=accumulator))
        if self.sizes[0] > 0:
            (self._plan_small if c.small else self._plan_large)(plan, c, to)
        if to.ids is not None and not (c.small and self.sizes[0] > 0):
            grid = (triton.cdiv(entries, ENTRIES),)
            listed = (self.class_ids, self.counts, self.target, to.ids, *self.sizes[:3], self.ignore_index)
            plan.launch(self._kernels(c).sparse_ids, grid, *listed)
        return plan

    def _plan_small(self, plan: Plan, c: Configuration, to: Written) -> None:
        """Two launches."""
        B, C, S, D = self.sizes
        k, t, traits = self._kernels(c), c.tiling, self.traits
        kept, upstream = Given(_KEPT), Given(_LOSS)
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
            *(
                self.input,
                self.weight,
                self.target,
                self.class_ids,
                self.counts,
                self.learned,
                upstream,
                kept,
            ),
            *(None if to.weight is None else to.rows, None if to.bias is None else to.row_bias),
            *(partial_input, partial_along, partial_scale, to.input, to.weight, to.bias, to.scale, to.ids),
            *(B, C, S, D, tiles, tiles * c.column_groups, self.ignore_index, *self.strides, FACTOR),
        )

    def _plan_large(self, plan: Plan, c: Configuration, to: Written) -> None:
        """Three launches for each chunk of classes, and up to three before and three after them."""
        B, C, S, D = self.sizes
        k, t, traits = self._kernels(c), c.tiling, self.traits
        kept, upstream = Given(_KEPT), Given(_LOSS)
        tile, of_rows, of_input = t.tiles, t.grad_rows, t.grad_input
        chunk = min(c.chunk, triton.cdiv(max(S, 1), tile.classes) * tile.classes)
        row_tiles, class_tiles = triton.cdiv(B, tile.rows), chunk // tile.classes
        # float16 is too narrow for small gradients.
        of_pulls = traits.accumulator if traits.operand == torch.float16 else traits.operand
        pulls = plan.empty(B, chunk, dtype=of_pulls)
        share_classes = None
        if self.cosine:
            share_classes = plan.empty(row_tiles, chunk, dtype=traits.wide)
        bias_classes = scale_rows = sums_input = sums_along = sums_scale = None
        if to.row_bias is not None:
            bias_classes = plan.empty(row_tiles, chunk, dtype=traits.accumulator)
        if to.scale is not None:
            scale_rows = plan.empty(class_tiles, B, dtype=traits.wide)
            sums_scale = plan.empty(1, B, dtype=traits.wide)
        input_columns = 1
        if to.input is not None:
            input_columns = max(triton.cdiv(D, of_input.columns), 1)
            sums_input = plan.empty(1, B, D, dtype=traits.wide)
            sums_along = plan.empty(input_columns, B, dtype=traits.wide) if self.cosine else None
        sources, inverses = self._sources(plan, k), self._inverses(plan, c, k)
        for first in range(0, S, chunk):
            size = min(chunk, S - first)
            tiles = triton.cdiv(size, tile.classes)
            stored = tiles * tile.classes
            plan.launch(
                k.pull_chunk,
                (row_tiles, tiles),
                *(self.input, self.weight, self.target, self.class_ids, self.counts, self.bias, self.learned),
                *(inverses, upstream, kept, pulls, share_classes, bias_classes, scale_rows),
                *(first, size, chunk, B, C, S, D, self.ignore_index, *self.strides, FACTOR),
            )
            if to.rows is not None or to.row_bias is not None:
                columns = max(triton.cdiv(D, of_rows.columns), 1)
                plan.launch(
                    k.chunk_grad_rows,
                    (triton.cdiv(size, of_rows.classes) * columns,),
                    *(self.input, self.weight, self.target, sources, pulls, share_classes, bias_classes),
                    *(to.rows, to.row_bias, first, size, stored, chunk, B, C, D, columns, row_tiles),
                    *(self.ignore_index, *self.strides),
                )
            if to.input is not None or to.scale is not None:
                plan.launch(
                    k.chunk_grad_input,
                    (triton.cdiv(B, of_input.rows), input_columns),
                    *(self.input, self.weight, sources, pulls, scale_rows),
                    *(sums_input, sums_along, sums_scale),
                    *(first, size, stored, chunk, B, S, D, tiles, *self.strides),
                )
        if not self.fold and (to.rows is not None or to.row_bias is not None):
            plan.launch(
                k.target_rows,
                (triton.cdiv(B, 16), triton.cdiv(max(D, 1), t.result_columns)),
                *(self.input, self.weight, self.target, self.learned, upstream, kept, to.rows, to.row_bias),
                *(B, C, S, D, self.ignore_index, *self.strides, FACTOR),
            )
        plan.launch(
            k.large_results,
            (B + 1, triton.cdiv(max(D, 1), t.large_columns)),
            *(self.input, self.weight, self.target, self.class_ids, None, self.learned, upstream, kept),
            *(None, None),
            *(sums_input, sums_along, sums_scale, to.input, None, None, to.scale, None),
            *(B, C, S, D, int(S > 0), input_columns * int(S > 0), self.ignore_index, *self.strides, FACTOR),
        )

    def _inverses(self, plan: Plan, c: Configuration, k: Kernels) -> Scratch | None:
        """(B + S,) inverse norms of the rows and then of the entries'; None: kernels find them on the way."""
        B, C, S, D = self.sizes
        if c.small or not self.cosine or self.traits.wide == torch.float64:
            return None
        inverses = plan.empty(B + S, dtype=self.traits.accumulator)
        grid = (triton.cdiv(B + S, k.inverse_norms.named["BLOCK_S"]),)
        plan.launch(
            k.inverse_norms,
            grid,
            self.input,
            self.weight,
            self.class_ids,
            inverses,
            B,
            C,
            S,
            D,
            *self.strides,
        )
        return inverses

    def _sources(self, plan: Plan, k: Kernels) -> Scratch | None:
        """(S,) the row of `weight` of each entry, -1 for those left out; None: row j is entry j's."""
        B, C, S, _ = self.sizes
        if self.fold and self.counts is None:
            return None
        sources = plan.empty(S, dtype=torch.int64)
        grid = (triton.cdiv(max(S, 1), ENTRIES),)
        plan.launch(k.class_sources, grid, self.class_ids, self.counts, sources, S, C)
        if self.fold:
            grid = (triton.cdiv(B, ENTRIES),)
            plan.launch(k.target_sources, grid, self.target, sources, B, C, self.ignore_index)
        return sources

    def _spread(self, tensors: Tensors, outputs: Outputs) -> None:
        """Adds up the entries of each class: sorted, as comparing all with all would be quadratic."""
        if outputs.weight is None and outputs.bias is None:
            return
        ids, order = self._sorted(tensors)
        if outputs.weight is not None:
            assert outputs.rows is not None
            scatter_add(outputs.weight, ids, order, outputs.rows, None)
        if outputs.bias is not None:
            assert outputs.row_bias is not None
            scatter_add(outputs.bias[:, None], ids, order, outputs.row_bias[:, None], None)

    def _merged(self, tensors: Tensors, outputs: Outputs) -> Outputs:
        """A sparse gradient in weight's dtype: of each class one entry holds the sum, the others are 0."""
        assert outputs.ids is not None
        ids, order = outputs.ids[0].sort(stable=True)
        first = torch.searchsorted(ids, ids)

        def sums(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            found = torch.zeros_like(values, dtype=tensors[1].dtype)
            scatter_add(found.view(len(found), -1), first, order, values.view(len(found), -1), None)
            return found

        return outputs._replace(rows=sums(outputs.rows), row_bias=sums(outputs.row_bias), ids=ids[None])

    def _sorted(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """The compact gradient's classes ascending, -1 or C where there is none, and the entry of each."""
        _, C, _, _ = self.sizes
        target, class_ids = tensors[2:4]
        ids = torch.cat([class_ids, target.where(target != self.ignore_index, -1)])
        return ids.clamp(-1, C).sort(stable=True)

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

    # ---- both ----

    def _plan(self, stage: Hashable, c: Configuration, make: Callable[[Configuration], Plan]) -> Plan:
        found = self.plans.get((stage, id(c)))
        if found is None:  # the configuration is kept too: no other gets its id
            found = self.plans[stage, id(c)] = c, make(c)
        return found[1]

    def _operands(self, tensors: Tensors) -> Tensors:
        """`tensors`, the first two as kernels read them."""
        if not self.copies:
            return tensors
        return [*(operand_of(tensor, self.traits) for tensor in tensors[:2]), *tensors[2:]]

    def _kernels(self, c: Configuration) -> Kernels:
        return kernels_of(self.traits, c.tiling, self.table)

    def _fastest(self, stage: str, run: Callable[[Configuration], object]) -> Configuration:
        """The table's, or with FEDSS_AUTOTUNE=1 that with which `run` ("forward", "backward") is fastest."""
        if not tuning.wanted(self.device):
            return self.configuration
        return tuning.fastest((stage, self.signature), self.configuration, stage, run)


def _sparse(ids: Tensor, rows: Tensor, C: int) -> Tensor:
    return torch.sparse_coo_tensor(ids, rows, (C, *rows.shape[1:]), check_invariants=False)
