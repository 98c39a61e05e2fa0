"""The loss of a large problem: chunk by chunk, torch's matrix products and, between them, chunk_kernels.py.

    for each block of classes:  rows, gathered and rounded, where they are not read as they lie
        for each block of rows:  dots  = input @ rows^T         (float32 sums)
                                 terms of the softmax; or pulls; or both, one after the other
                                 grad_rows  += pulls^T @ input
                                 grad_input += pulls @ rows

Where a chunk has all classes (chunks.py says when), pulls follow terms on the same dot products: for "mean"
and "sum" the gradients' sums are made with the loss, by three products. They are kept in float32, for an
upstream gradient of 1, and finished in the backward pass. Else, and for "none", the backward pass makes the
dot products again: four.

Bytes: a logit is written once and read twice in float32, a pull written once and read twice in the dtype of
products.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv

from .calls import KEPT, LOSS, OUTPUTS, Calls, Gradients, Outputs, Tensors, Wanted
from .chunk_variants import ENTRIES, variants_of
from .chunks import Chunks
from .configurations import table_of
from .launch import Variant
from .plan import FACTOR, Given, Plan, Rows, Scratch
from .problem import Problem
from .tiles import Matrix, Vectors

SUMS = OUTPUTS + len(Outputs._fields)  # places of them, after those of the outputs
PROGRAMS = 1024  # of the kernel that makes terms, about: they keep a large device busy
MOST_PARTS = 256  # of the class set, which are merged
NO_SUMS = (False,) * 4


class Chunk(NamedTuple):
    """Rows from `row` on, entries of the class set from `entry` on."""

    row: int
    rows: int
    entry: int
    entries: int


class Sums(NamedTuple):
    """What gradients are made of: for an upstream gradient of 1, unless each row has its own."""

    input: Any  # (B, D) pulls @ rows
    rows: Any  # (S, D) pulls^T @ input; or of one chunk, where each is finished at once
    bias: Any  # (S,)
    scale: Any  # (B,)
    range_of_pulls: Any  # (), a factor of the first two: for float16


class ChunkedCalls(Calls):
    def __init__(self, p: Problem, chunks: Chunks):
        super().__init__(p)
        B, C, S, _ = p.sizes
        self.chunks, self.blocks, self.sets = chunks, chunks.blocks(B), chunks.sets(S)
        self.per_row = p.traits.reduction == "none"
        self.ranged = p.traits.rows == torch.float16
        operands = p.operands[:2]
        self.copies = (
            self.class_ids is not None or self.counts is not None or operands[1].dtype != p.traits.operand
        )
        self.matrices = [
            Matrix(given, p.sizes[3], *operand.stride())
            for given, operand in zip((self.input, self.weight), operands, strict=True)
        ]
        self.vectors = Vectors(
            *(self.target, self.class_ids, self.counts, self.target_counts, self.bias, self.learned),
            *(self.entry_labels, self.target_labels, self.target_logit),
        )
        # products of float32 rows in float64, which a scale asks for: infinite where float32 ends
        narrow = p.traits.operand == torch.float64 != p.input.dtype and not self.cosine
        self.kernels = variants_of(p.traits, chunks, p.sizes[3], narrow, table_of(self.device))
        self.plans: dict[Hashable, Plan] = {}

    def prepare(self, tensors: Tensors, wanted: Wanted) -> None:
        """Nothing: what the backward pass needs is not little."""

    def loss(
        self, tensors: Tensors, factor: float, wanted: Wanted | None, prepared: None = None
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        losses, kept = self.empty_results(tensors[0])
        needed = NO_SUMS if wanted is None else wanted.needed
        begun = begun_with_loss(len(self.sets) == 1, self.traits.reduction, self.sizes[:3], needed)
        sums = empty_sums(tensors[0], self.sizes[2], self.traits.rows, begun)
        stage = (begun, _aligned(tensors))
        if stage not in self.plans:
            self.plans[stage] = ChunkedPlan(self).for_loss(self._given_sums(begun))
        outputs = (None,) * len(Outputs._fields)
        self.plans[stage].run((*self.operands(tensors), kept, losses, *outputs, *sums), factor)
        return losses, (kept, *sums)

    def gradients(
        self,
        tensors: Tensors,
        factor: float,
        made: tuple[Tensor | None, ...],
        grad_loss: Tensor,
        wanted: Wanted,
    ) -> Gradients:
        kept, *sums = made
        begun = tuple(found is not None for found in sums[:4])
        if any(need and not was for need, was in zip(wanted.needed, begun, strict=True)):
            begun = NO_SUMS
        outputs, upstream = self.outputs(tensors, wanted, spreads=False), grad_loss.contiguous()
        stage = (begun, wanted, upstream.dtype, _aligned(tensors))
        if stage not in self.plans:
            plan = ChunkedPlan(self)
            given = self._given_sums(begun) if any(begun) else None
            self.plans[stage] = plan.for_gradients(self.places(wanted, spreads=False), given)
        self.plans[stage].run((*self.operands(tensors), kept, upstream, *outputs, *sums), factor)
        if self.sizes[0] == 0:
            for found in (outputs.rows, outputs.row_bias):
                if found is not None:
                    found.zero_()
        elif not self.fold:
            self.spread(tensors, outputs)
        return self.results(tensors, wanted, outputs)

    def _given_sums(self, begun: tuple[bool, ...]) -> Sums:
        there = (*begun, self.ranged and any(begun))
        return Sums(*(Given(SUMS + nth) if is_there else None for nth, is_there in enumerate(there)))


def _aligned(tensors: Tensors) -> tuple[bool, ...]:
    """Of each vector; kernels are compiled for it, see launch.py. Matrices' are in a call's signature."""
    return tuple(vector is None or vector.data_ptr() % 16 == 0 for vector in tensors[2:])


def begun_with_loss(
    whole: bool, reduction: str, sizes: Sequence[int], needed: Sequence[bool]
) -> tuple[bool, ...]:
    """The gradients whose sums are made with the loss; whole: chunks have all classes; sizes: B, C, S."""
    return tuple(needed) if whole and reduction != "none" and 0 not in sizes else NO_SUMS


def empty_sums(input: Tensor, S: int, rows: torch.dtype, begun: tuple[bool, ...]) -> list[Tensor | None]:
    """`Sums`, None for those not begun."""
    B, D = input.shape
    dtype = torch.float64 if rows == torch.float64 else torch.float32
    there = (*begun, rows == torch.float16 and any(begun))
    return [
        input.new_empty(shape, dtype=dtype) if is_there else None
        for shape, is_there in zip(((B, D), (S, D), (S,), (B,), ()), there, strict=True)
    ]


class ChunkedPlan(Plan):
    def __init__(self, calls: ChunkedCalls):
        super().__init__(calls.device)
        self.calls, self.kernels, self.traits = calls, calls.kernels, calls.traits
        self.marks = self._marks()
        self.x: Any = None
        self.inverses: Any = None

    # ---- the loss ----

    def for_loss(self, sums: Sums) -> "ChunkedPlan":
        """Sums that are not None are made with it."""
        calls, B = self.calls, self.calls.sizes[0]
        reduced = not calls.per_row
        losses = self.empty(B, dtype=torch.float64) if reduced else Given(LOSS)
        self._over_chunks(losses, sums, None)
        if reduced:
            of_rows = (calls.target, losses, Given(KEPT), Given(LOSS))
            self.launch(self.kernels.reduce_losses, (1,), *of_rows, B, calls.ignore_index)
        return self

    # ---- gradients ----

    def for_gradients(self, to: Outputs, begun: Sums | None) -> "ChunkedPlan":
        """begun: what was made with the loss."""
        calls, k, (B, C, S, _) = self.calls, self.kernels, self.calls.sizes
        if B > 0:
            sums = begun or self._own_sums(to)
            if begun is None:
                self._over_chunks(None, sums, to)
            elif to.rows is not None:
                self._finish_classes(sums, to, 0, S)
            self._finish(sums, to)
        if to.ids is not None:
            targets = B if calls.targets_apart else 0
            given = (calls.vectors, to.ids, targets, C, S, calls.ignore_index)
            self._by_entries(k.sparse_ids, calls.entries, *given)
        return self

    def _own_sums(self, to: Outputs) -> Sums:
        B, _, S, D = self.calls.sizes
        wanted = (to.input, to.rows, to.row_bias, to.scale, self.calls.ranged or None)
        shapes = ((B, D), (self.calls.chunks.classes, D), (S,), (B,), ())
        return Sums(
            *(
                None if output is None else self.empty(*shape, dtype=self.traits.accumulator)
                for output, shape in zip(wanted, shapes, strict=True)
            )
        )

    def _finish_classes(self, sums: Sums, to: Outputs, first: int, count: int) -> None:
        calls, (B, C, _, _) = self.calls, self.calls.sizes
        self._by_rows(
            self.kernels.finish_classes,
            count,
            *(sums.rows, calls.matrices[1], calls.vectors, self.marks, Given(LOSS), Given(KEPT)),
            *(sums.range_of_pulls, to.rows, B, C, first, count),
        )

    def _finish(self, sums: Sums, to: Outputs) -> None:
        """What is finished once for all chunks."""
        calls, k, (B, C, S, _) = self.calls, self.kernels, self.calls.sizes
        given = (Given(LOSS), Given(KEPT))
        of_targets = (to.rows, to.row_bias) if calls.targets_apart else (None, None)
        if to.input is not None or of_targets != (None, None):
            self._by_rows(
                k.finish_rows,
                B,
                *(sums.input, *calls.matrices, calls.vectors, *given, sums.range_of_pulls),
                *(to.input, *of_targets, B, C, S, calls.ignore_index, FACTOR),
            )
        if to.row_bias is not None:
            self._by_entries(k.finish_vector, S, sums.bias, *given, to.row_bias, B, S)
        if to.scale is not None:
            self.launch(k.finish_scale, (1,), sums.scale, *given, to.scale, B)

    # ---- chunks ----

    def _over_chunks(self, losses: Any, sums: Sums, to: Outputs | None) -> None:
        """losses: (B,), of each row; None: they are known. to: gradients of class rows are finished too."""
        calls, accumulator = self.calls, self.traits.accumulator
        chunks, (_, _, S, D) = calls.chunks, calls.sizes
        pulled = any(found is not None for found in sums[:4])
        self._prepare_rows(losses is not None)
        self.inverses = self.empty(S, dtype=accumulator) if calls.cosine else None
        at_once = len(calls.sets) == 1 and calls.copies
        if not at_once and calls.cosine:
            self._prepare_classes(None, self.inverses, 0, S)
        copies = self.empty(chunks.classes, D, dtype=self.traits.operand) if calls.copies else None
        dots = self.empty(chunks.rows * chunks.classes, dtype=accumulator)
        pulls = _Pulls(self, sums, to) if pulled else None
        terms = None if losses is None else _Terms(self, losses)
        for nth, (entry, entries) in enumerate(calls.sets):
            rows: Any = Rows(calls.matrices[1].at, entry, entries)
            if copies is not None:
                rows = copies.rows(0, entries)
                self._prepare_classes(rows, self.inverses if at_once else None, entry, entries)
            if pulls is not None and nth == 0:
                pulls.find_range()
            for row, count in calls.blocks:
                chunk = Chunk(row, count, entry, entries)
                found = dots._replace(shape=(count, entries))
                self.product(found, self.x.rows(row, count), rows, (False, True))
                if terms is not None:
                    terms.make(found, chunk, nth)
                if pulls is not None:
                    pulls.make(found, rows, chunk, nth)
            if to is not None and to.rows is not None:
                self._finish_classes(sums, to, entry, entries)
        if terms is not None:
            terms.finish()
        if not calls.sets:
            for found in (sums.input, sums.scale):
                if found is not None:
                    self.zero(found)

    def _marks(self) -> Scratch | None:
        """(S,) where classes take part as targets, which may be left out of denominators."""
        calls, (B, C, S, _) = self.calls, self.calls.sizes
        if not calls.fold or calls.counts is None:
            return None
        marks = self.empty(S, dtype=torch.int8)
        self.zero(marks)
        self._by_entries(self.kernels.mark_targets, B, calls.vectors, marks, B, C, calls.ignore_index)
        return marks

    def _prepare_rows(self, kept: bool) -> None:
        calls, (B, C, _, D) = self.calls, self.calls.sizes
        self.x = self.empty(B, D, dtype=self.traits.operand)
        upstream = Given(LOSS) if calls.per_row and not kept else None
        self._by_rows(
            self.kernels.prepare_rows,
            B,
            *(*calls.matrices, calls.vectors, upstream, self.x, Given(KEPT) if kept else None),
            *(B, C, calls.ignore_index),
        )

    def _prepare_classes(self, copies: Any, inverses: Any, first: int, count: int) -> None:
        calls, C = self.calls, self.calls.sizes[1]
        given = (calls.matrices[1], calls.vectors, self.marks)
        self._by_rows(self.kernels.prepare_classes, count, *given, copies, inverses, first, count, C)

    def _by_entries(self, variant: Variant, count: int, *arguments: Any) -> None:
        self.launch(variant, (cdiv(count, ENTRIES),), *arguments)

    def _by_rows(self, variant: Variant, count: int, *arguments: Any) -> None:
        self.launch(variant, (cdiv(count, self.kernels.rows_at_once),), *arguments)


class _Pulls:
    """Pulls, and what is multiplied with them."""

    def __init__(self, plan: ChunkedPlan, sums: Sums, to: Outputs | None):
        """to: the sums of class rows' gradients are those of one chunk."""
        chunks, dtype = plan.calls.chunks, plan.traits.accumulator
        self.plan, self.sums, self.to = plan, sums, to
        self.upstream = Given(LOSS) if plan.calls.per_row else None
        self.pulls = plan.empty(chunks.rows * chunks.classes, dtype=plan.traits.operand)
        self.bias_parts = self.scale_parts = None
        if sums.bias is not None:
            self.bias_parts = plan.empty(cdiv(chunks.rows, chunks.block_rows) * chunks.classes, dtype=dtype)
        if sums.scale is not None:
            tiles = cdiv(chunks.classes, chunks.block_classes)
            self.scale_parts = plan.empty(tiles * chunks.rows, dtype=dtype)

    def find_range(self) -> None:
        plan, calls, B = self.plan, self.plan.calls, self.plan.calls.sizes[0]
        if not calls.ranged:
            return
        largest = upstream = None
        if calls.cosine:
            largest = plan.empty(2, dtype=torch.float64)
            for nth, inverses in enumerate((Given(KEPT).rows(4 * B, B), plan.inverses)):
                plan.largest(largest.rows(nth, 1), inverses)
        if self.upstream is not None:
            upstream = plan.empty(1, dtype=plan.traits.accumulator)
            plan.largest(upstream, self.upstream)
        found = (calls.learned, largest, upstream, self.sums.range_of_pulls, FACTOR)
        plan.launch(plan.kernels.pull_range, (1,), *found)

    def make(self, dots: Scratch, rows: Any, chunk: Chunk, nth: int) -> None:
        """rows: of the chunk's classes; nth: of the blocks of classes."""
        plan, calls, sums = self.plan, self.plan.calls, self.sums
        chunks, (B, C, _, D) = calls.chunks, calls.sizes
        row_tiles, class_tiles = (
            cdiv(chunk.rows, chunks.block_rows),
            cdiv(chunk.entries, chunks.block_classes),
        )
        pulls = self.pulls._replace(shape=(chunk.rows, chunk.entries))
        plan.launch(
            plan.kernels.chunk_pulls,
            (row_tiles * class_tiles,),
            *(dots, calls.vectors, self.upstream, Given(KEPT), plan.inverses, sums.range_of_pulls, pulls),
            *(self.bias_parts, self.scale_parts, B, C, calls.ignore_index, *chunk, FACTOR),
        )
        self._add(self.bias_parts, sums.bias, row_tiles, chunk.entry, chunk.entries, chunk.row > 0)
        self._add(self.scale_parts, sums.scale, class_tiles, chunk.row, chunk.rows, nth > 0)
        x = plan.x.rows(chunk.row, chunk.rows)
        if sums.rows is not None:
            out = sums.rows if self.to is None else sums.rows._replace(shape=(chunk.entries, D))
            plan.product(out, pulls, x, (True, False), adds=chunk.row > 0)
        if sums.input is not None:
            plan.product(sums.input.rows(chunk.row, chunk.rows), pulls, rows, adds=nth > 0)

    def _add(self, found: Any, sums: Any, parts: int, first: int, count: int, adds: bool) -> None:
        if found is not None:
            plan = self.plan
            plan._by_entries(plan.kernels.add_parts[adds], count, found, sums, parts, first, count)


class _Terms:
    """The softmax' terms, in parts of the class set; merged where a chunk has all classes, or in the end."""

    def __init__(self, plan: ChunkedPlan, losses: Any):
        calls, chunks = plan.calls, plan.calls.chunks
        row_tiles = cdiv(chunks.rows, chunks.block_rows)
        most = max(MOST_PARTS // max(len(calls.sets), 1), 1)
        self.parts = max(min(cdiv(PROGRAMS, row_tiles), cdiv(chunks.classes, chunks.block_classes), most), 1)
        self.splits = self.parts * len(calls.sets)
        self.plan, self.losses = plan, losses
        self.partials = plan.empty(2, self.splits, calls.sizes[0], dtype=plan.traits.accumulator)

    def make(self, dots: Scratch, chunk: Chunk, nth: int) -> None:
        plan, calls = self.plan, self.plan.calls
        plan.launch(
            plan.kernels.chunk_terms,
            (cdiv(chunk.rows, calls.chunks.block_rows), self.parts),
            *(dots, calls.vectors, Given(KEPT), plan.inverses, self.partials),
            *(*calls.sizes[:2], calls.ignore_index, *chunk, nth * self.parts, self.splits, FACTOR),
        )
        if len(calls.sets) == 1:
            self._merge(chunk)

    def finish(self) -> None:
        if len(self.plan.calls.sets) != 1:
            B, _, S, _ = self.plan.calls.sizes
            self._merge(Chunk(0, B, 0, S))

    def _merge(self, chunk: Chunk) -> None:
        calls = self.plan.calls
        self.plan.launch(
            self.plan.kernels.merge_terms,
            (cdiv(chunk.rows, 16),),
            *(calls.vectors, self.partials, Given(KEPT), self.losses, *calls.sizes[:2], calls.ignore_index),
            *(chunk.row, chunk.rows, self.splits, FACTOR),
        )
