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
from .chunk_kernels import Chunk
from .chunk_variants import ENTRIES, variants_of
from .chunks import Chunks
from .configurations import table_of
from .plan import FACTOR, Given, Matrix, Plan, Scratch
from .problem import Problem
from .tiles import Sizes, Vectors

SUMS = OUTPUTS + len(Outputs._fields)  # places of them, after those of the outputs
PROGRAMS = 1024  # of the kernel that makes terms, about: they keep a large device busy
NO_SUMS = (False,) * 4


class Sums(NamedTuple):
    """What gradients are made of: for an upstream gradient of 1, unless each row has its own."""

    input: Any  # (B, D) pulls @ rows
    rows: Any  # (S, D) pulls^T @ input; or of one chunk, where each is finished at once
    bias: Any  # (S,)
    scale: Any  # (B,)
    range_of_pulls: Any  # (), a factor of the first two: for float16


class ClassRows(NamedTuple):
    """The rows of a block of classes, as products read them."""

    matrix: Matrix
    argument: Any  # the same, or the matrix that it is part of, ...
    strides: tuple[int, ...]
    first: int  # ... from this row on


class ChunkedCalls(Calls):
    def __init__(self, p: Problem, chunks: Chunks):
        super().__init__(p)
        B, C, S, _ = p.sizes
        self.chunks, self.blocks, self.sets = chunks, chunks.blocks(B), chunks.sets(S)
        self.per_row = p.traits.reduction == "none"
        self.ranged = p.traits.rows == torch.float16
        self.gathers = self.class_ids is not None or self.counts is not None
        self.copies = self.gathers or p.operands[1].dtype != p.traits.operand
        self.strides = [matrix.stride() for matrix in p.operands[:2]]
        self.numbers = Sizes(B, C, S, p.ignore_index)
        self.vectors = Vectors(
            self.target, self.class_ids, self.counts, self.target_counts, self.bias, self.learned
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
        if begun not in self.plans:
            self.plans[begun] = ChunkedPlan(self, per_row=False).for_loss(self._given_sums(begun))
        outputs = (None,) * len(Outputs._fields)
        self.plans[begun].run((*self.operands(tensors), kept, losses, *outputs, *sums), factor)
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
        stage = (begun, wanted, upstream.dtype)
        if stage not in self.plans:
            plan = ChunkedPlan(self, per_row=self.per_row)
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
    def __init__(self, calls: ChunkedCalls, per_row: bool):
        """per_row: each row's upstream gradient is given."""
        super().__init__(calls.device)
        self.calls, self.kernels, self.traits = calls, calls.kernels, calls.traits
        self.per_row = per_row
        self.upstream = Given(LOSS) if per_row else None
        self.of_all = calls.vectors, calls.numbers
        B, _, S, D = calls.sizes
        self.sources = self._sources_of_classes()
        self.x = self.empty(B, D, dtype=self.traits.operand)
        self.x_inverses, self.inverses = (
            self.empty(n, dtype=self.traits.accumulator) if wanted else None
            for n, wanted in ((B, calls.cosine and calls.ranged), (S, calls.cosine))
        )
        self.rows = self.empty(calls.chunks.classes, D, dtype=self.traits.operand) if calls.copies else None
        of_rows = self.empty(B, dtype=torch.int64)
        self._by_entries(self.kernels.row_sources[per_row], B, *self.of_all, self.upstream, of_rows)
        self._prepare(calls.input, calls.strides[0], of_rows, self.x, self.x_inverses, 0, B)
        self._prepare(calls.weight, calls.strides[1], self.sources, None, self.inverses, 0, S)

    # ---- the loss ----

    def for_loss(self, sums: Sums) -> "ChunkedPlan":
        """Sums that are not None are made with it."""
        calls, B = self.calls, self.calls.sizes[0]
        reduced = not calls.per_row
        losses = self.empty(B, dtype=torch.float64) if reduced else Given(LOSS)
        self.launch(
            self.kernels.target_terms,
            (cdiv(B, 16),),
            *(calls.input, calls.weight, calls.sizes[3], *calls.strides[0], *calls.strides[1]),
            *(calls.vectors, Given(KEPT), calls.numbers),
        )
        self._over_chunks(losses, sums)
        if reduced:
            of_rows = (calls.target, losses, Given(KEPT), Given(LOSS))
            self.launch(self.kernels.reduce_losses, (1,), *of_rows, B, calls.ignore_index)
        return self

    # ---- gradients ----

    def for_gradients(self, to: Outputs, begun: Sums | None) -> "ChunkedPlan":
        """begun: what was made with the loss."""
        calls, (B, C, S, _) = self.calls, self.calls.sizes
        if B > 0:
            sums = begun or self._own_sums(to)
            if begun is None:
                self._over_chunks(None, sums, to)
            elif to.rows is not None:
                self._finish_class_rows(sums, to, 0, S, self._class_rows(0, S))
            self._finish(sums, to)
        if to.ids is not None:
            listed = (calls.class_ids, calls.counts, calls.target, to.ids, B, C, S, calls.ignore_index)
            self.launch(self.kernels.sparse_ids, (cdiv(S + B, ENTRIES),), *listed)
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

    def _finish_class_rows(self, sums: Sums, to: Outputs, entry: int, entries: int, rows: ClassRows) -> None:
        k = self.kernels
        self.launch(
            k.finish_class_rows[self.per_row],
            (cdiv(entries, k.rows_at_once),),
            *(sums.rows, rows.argument, self.calls.sizes[3], *rows.strides, rows.first, self.inverses),
            *(Given(LOSS), Given(KEPT), sums.range_of_pulls, to.rows, self.calls.numbers, entry, entries),
        )

    def _finish(self, sums: Sums, to: Outputs) -> None:
        """What is finished once for all chunks."""
        calls, k, (B, _, S, D) = self.calls, self.kernels, self.calls.sizes
        of_rows = (calls.vectors, Given(LOSS), Given(KEPT))
        if to.input is not None:
            self.launch(
                k.finish_inputs[self.per_row],
                (cdiv(B, k.rows_at_once),),
                *(sums.input, self.x, calls.weight, D, *calls.strides[1], *of_rows, sums.range_of_pulls),
                *(to.input, calls.numbers, FACTOR),
            )
        if not calls.fold and (to.rows is not None or to.row_bias is not None):
            self.launch(
                k.finish_targets,
                (cdiv(B, 16), cdiv(max(D, 1), k.target_columns)),
                *(calls.input, calls.weight, D, *calls.strides[0], *calls.strides[1], *of_rows),
                *(to.rows, to.row_bias, calls.numbers, FACTOR),
            )
        if to.row_bias is not None:
            of_bias = (sums.bias, Given(LOSS), Given(KEPT), to.row_bias, calls.numbers, S)
            self._by_entries(k.finish_bias[self.per_row], S, *of_bias)
        if to.scale is not None:
            of_scale = (sums.scale, Given(LOSS), Given(KEPT), to.scale, calls.numbers, B)
            self.launch(k.finish_scale[self.per_row], (1,), *of_scale)

    # ---- chunks ----

    def _over_chunks(self, losses: Any, sums: Sums, to: Outputs | None = None) -> None:
        """losses: (B,), of each row; None: they are known. to: gradients of class rows are finished too."""
        calls, accumulator = self.calls, self.traits.accumulator
        chunks, D = calls.chunks, calls.sizes[3]
        pulled = any(found is not None for found in sums[:4])
        if pulled and calls.ranged:
            self._find_range(sums)
        elements = chunks.rows * chunks.classes
        dots = self.empty(elements, dtype=accumulator)
        pulls = self.empty(elements, dtype=self.traits.operand) if pulled else None
        bias_parts = scale_parts = None
        if sums.bias is not None:
            tiles = cdiv(chunks.rows, chunks.block_rows)
            bias_parts = self.empty(tiles * chunks.classes, dtype=accumulator)
        if sums.scale is not None:
            tiles = cdiv(chunks.classes, chunks.block_classes)
            scale_parts = self.empty(tiles * chunks.rows, dtype=accumulator)
        terms = None if losses is None else _Terms(self, losses)
        for nth, (entry, entries) in enumerate(calls.sets):
            rows = self._class_rows(entry, entries)
            for row, count in calls.blocks:
                chunk = Chunk(row, count, entry, entries)
                found = dots._replace(shape=(count, entries))
                self.product(found, self.x.rows(row, count), rows.matrix, (False, True))
                if terms is not None:
                    terms.make(found, chunk, nth)
                if pulls is None:
                    continue
                made = pulls._replace(shape=(count, entries))
                self._pull(found, made, bias_parts, scale_parts, sums, chunk, nth)
                if sums.rows is not None:
                    out = sums.rows if to is None else sums.rows._replace(shape=(entries, D))
                    self.product(out, made, self.x.rows(row, count), (True, False), adds=row > 0)
                if sums.input is not None:
                    self.product(sums.input.rows(row, count), made, rows.matrix, adds=nth > 0)
            if to is not None and to.rows is not None:
                self._finish_class_rows(sums, to, entry, entries, rows)
        if terms is not None:
            terms.finish()
        if not calls.sets:
            self._nothing_pulled(sums)

    def _pull(
        self, dots: Scratch, pulls: Scratch, bias_parts: Any, scale_parts: Any, sums: Sums, chunk: Chunk,
        nth: int,
    ) -> None:  # fmt: skip
        """nth: of the blocks of classes"""
        calls, k, chunks = self.calls, self.kernels, self.calls.chunks
        row_tiles, class_tiles = (
            cdiv(chunk.rows, chunks.block_rows),
            cdiv(chunk.entries, chunks.block_classes),
        )
        self.launch(
            k.chunk_pulls,
            (row_tiles, class_tiles),
            *(dots, calls.vectors, self.upstream, Given(KEPT), self.inverses, sums.range_of_pulls),
            *(pulls, bias_parts, scale_parts, calls.numbers, chunk, FACTOR),
        )
        if bias_parts is not None:
            of_parts = (bias_parts, sums.bias, row_tiles, chunk.entries, chunk.entry, chunk.entries)
            self._by_entries(k.add_parts[chunk.row > 0], chunk.entries, *of_parts)
        if scale_parts is not None:
            of_parts = (scale_parts, sums.scale, class_tiles, chunk.rows, chunk.row, chunk.rows)
            self._by_entries(k.add_parts[nth > 0], chunk.rows, *of_parts)

    def _find_range(self, sums: Sums) -> None:
        largest = self.empty(2, dtype=self.traits.accumulator)
        for nth, inverses in enumerate((self.x_inverses, self.inverses)):
            if inverses is not None:
                self.largest(largest.rows(nth, 1), inverses)
        upstream = None
        if self.per_row:
            upstream = self.empty(1, dtype=self.traits.accumulator)
            self.largest(upstream, Given(LOSS))
        found = (self.calls.learned, largest, upstream, sums.range_of_pulls, FACTOR)
        self.launch(self.kernels.pull_range, (1,), *found)

    def _nothing_pulled(self, sums: Sums) -> None:
        for found in (sums.input, sums.scale):
            if found is not None:
                self.zero(found)

    # ---- rows ----

    def _class_rows(self, entry: int, entries: int) -> ClassRows:
        calls, D = self.calls, self.calls.sizes[3]
        if self.rows is None:
            assert calls.weight is not None
            return ClassRows(calls.weight.rows(entry, entries), calls.weight, calls.strides[1], entry)
        rows = self.rows.rows(0, entries)
        if self.sources is None:
            self._prepare(calls.weight, calls.strides[1], None, rows, None, entry, entries)
        else:
            sources = self.sources.rows(entry, entries)
            self._prepare(calls.weight, calls.strides[1], sources, rows, None, 0, entries)
        return ClassRows(rows, rows, (D, 1), 0)

    def _sources_of_classes(self) -> Scratch | None:
        """(S,) the row of `weight` of each entry, -1 for those left out; None: row j is entry j's."""
        B, _, S, _ = self.calls.sizes
        if not self.calls.gathers:
            return None
        sources = self.empty(S, dtype=torch.int64)
        self._by_entries(self.kernels.class_sources, S, *self.of_all, sources)
        if self.calls.fold:
            self._by_entries(self.kernels.target_sources, B, *self.of_all, sources)
        return sources

    def _prepare(
        self, matrix: Any, strides: Any, sources: Any, copies: Any, inverses: Any, first: int, count: int
    ) -> None:
        if copies is not None or inverses is not None:
            self.launch(
                self.kernels.prepare_rows,
                (cdiv(count, self.kernels.rows_at_once),),
                *(matrix, self.calls.sizes[3], *strides, sources, copies, inverses, first, count),
            )

    def _by_entries(self, variant: Any, count: int, *arguments: Any) -> None:
        self.launch(variant, (cdiv(count, ENTRIES),), *arguments)


class _Terms:
    """The softmax' terms, in parts of the class set; merged where a chunk has all classes, or in the end."""

    def __init__(self, plan: ChunkedPlan, losses: Any):
        calls, k = plan.calls, plan.kernels
        chunks = calls.chunks
        row_tiles = cdiv(chunks.rows, chunks.block_rows)
        most = max(k.most_parts // max(len(calls.sets), 1), 1)
        self.parts = max(min(cdiv(PROGRAMS, row_tiles), cdiv(chunks.classes, chunks.block_classes), most), 1)
        self.splits = self.parts * len(calls.sets)
        self.plan, self.losses = plan, losses
        self.partials = plan.empty(2, self.splits, calls.sizes[0], dtype=plan.traits.accumulator)

    def make(self, dots: Scratch, chunk: Chunk, nth: int) -> None:
        plan, calls = self.plan, self.plan.calls
        plan.launch(
            plan.kernels.chunk_terms,
            (cdiv(chunk.rows, calls.chunks.block_rows), self.parts),
            *(dots, calls.vectors, Given(KEPT), plan.inverses, self.partials, calls.numbers, chunk),
            *(nth * self.parts, self.splits, FACTOR),
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
            *(calls.vectors, self.partials, Given(KEPT), self.losses, calls.numbers, chunk),
            *(self.splits, FACTOR),
        )
