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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv

from . import chunk_kernels as kernels
from . import forward
from .calls import KEPT, LOSS, NONE, SUMS, Calls, Outputs, Tensors, Wanted
from .chunks import Chunks
from .configurations import table_of
from .launch import TYPES, variant
from .plan import FACTOR, Given, Plan, Scratch
from .problem import Problem

PROGRAMS = 1024  # of the kernel that makes terms, about: they keep a large device busy
MOST_PARTS = 256  # of the class set, which are merged ...
PARTS_AT_ONCE = 64  # ... so many at a time
ENTRIES = 1024  # of one program that goes over a vector
ELEMENTS = 1024  # of one that goes over rows of `input` and `weight`


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
    most_sums = len(Sums._fields)

    def __init__(self, p: Problem, chunks: Chunks):
        super().__init__(p)
        B, _, S, D = p.sizes
        traits, table = p.traits, table_of(p.input.device)
        self.chunks, self.blocks, self.sets = chunks, chunks.blocks(B), chunks.sets(S)
        self.per_row, self.ranged = traits.reduction == "none", traits.rows == torch.float16
        as_they_lie = self.fold and p.log_expected_count is None and p.operands[1].dtype == traits.operand
        self.gathers = not as_they_lie
        columns = max(min(1 << max(D - 1, 0).bit_length(), chunks.block_columns), 16)
        self.rows_at_once = max(ELEMENTS // columns, 1)
        self.constants = {
            "COSINE": self.cosine,
            "PER_ROW": self.per_row,
            "OPERAND": TYPES[traits.operand],
            "ACC": TYPES[traits.accumulator],
            # products of float32 rows in float64, which a scale asks for: infinite where float32 ends
            "NARROW": traits.operand == torch.float64 != p.input.dtype and not self.cosine,
            "BLOCK": ENTRIES,
            "BLOCK_ROWS": self.rows_at_once,
            "BLOCK_D": columns,
            "BLOCK_B": chunks.block_rows,
            "BLOCK_S": chunks.block_classes,
            "BLOCK_SPLITS": PARTS_AT_ONCE,
            **{"num_warps": 4, "enable_fp_fusion": True},
            **table.all_registers,
        }
        self.warps_of_tiles = table.merge_warps  # AMD's compiler holds a mask for each element of a thread

    def sums(self, input: Tensor, wanted: Wanted | None) -> Sequence[Tensor | None]:
        needed, (_, C, S, _) = NONE if wanted is None else wanted.needed, self.sizes
        whole, traits = len(self.sets) == 1, self.traits
        return empty_sums(input, C, S, traits.rows, whole, traits.reduction, needed)

    def given_so(self, tensors: Tensors, sums: Sequence[Tensor | None], needed: Sequence[bool] = NONE) -> Any:
        """(begun, which vectors are aligned): kernels are compiled for it, see launch.py."""
        there = tuple(found is not None for found in sums[:4])
        missing = any(need and not was for need, was in zip(needed, there, strict=True))
        aligned = tuple(vector is None or vector.data_ptr() % 16 == 0 for vector in tensors[2:])
        return NONE if missing else there, aligned

    def plan_loss(self, given_so: Any) -> Plan:
        return ChunkedPlan(self).for_loss(self._given_sums(given_so[0]))

    def plan_gradients(self, wanted: Wanted, to: Outputs, given_so: Any) -> Plan:
        begun = given_so[0]
        return ChunkedPlan(self).for_gradients(to, self._given_sums(begun) if any(begun) else None)

    def _given_sums(self, begun: tuple[bool, ...]) -> Sums:
        there = (*begun, self.ranged and any(begun))
        return Sums(*(Given(SUMS + nth) if is_there else None for nth, is_there in enumerate(there)))


def empty_sums(
    input: Tensor, C: int, S: int, rows: torch.dtype, whole: bool, reduction: str, needed: Sequence[bool]
) -> list[Tensor | None]:
    """`Sums` that are made with the loss, None for the others; whole: chunks have all classes."""
    B, D = input.shape
    begins = whole and reduction != "none" and 0 not in (B, C, S)
    there = [begins and need for need in needed]
    there.append(rows == torch.float16 and any(there))
    dtype = torch.float64 if rows == torch.float64 else torch.float32
    return [
        input.new_empty(shape, dtype=dtype) if is_there else None
        for shape, is_there in zip(((B, D), (S, D), (S,), (B,), ()), there, strict=True)
    ]


class ChunkedPlan(Plan):
    def __init__(self, calls: ChunkedCalls):
        super().__init__(calls.device)
        self.calls, self.chunks = calls, calls.chunks
        self.operand, self.accumulator = calls.traits.operand, calls.traits.accumulator
        self.upstream = Given(LOSS) if calls.per_row else None
        self.marks = self._marks()

    # ---- the loss ----

    def for_loss(self, sums: Sums) -> "ChunkedPlan":
        """Sums that are not None are made with it."""
        calls, B = self.calls, self.calls.sizes[0]
        losses = Given(LOSS) if calls.per_row else self.empty(B, dtype=torch.float64)
        self._over_chunks(losses, sums, None)
        if not calls.per_row:
            of_rows = (calls.vectors.target, losses, Given(KEPT), Given(LOSS), B, calls.ignore_index)
            self.over((1,), forward.reduce_losses, *of_rows, REDUCTION=calls.traits.reduction)
        return self

    # ---- gradients ----

    def for_gradients(self, to: Outputs, begun: Sums | None) -> "ChunkedPlan":
        """begun: what was made with the loss."""
        calls, (B, C, S, _) = self.calls, self.calls.sizes
        if B == 0:
            self._zero(to.rows, to.row_bias, to.scale)
        elif begun is None:
            sums = self._own_sums(to)
            self._over_chunks(None, sums, to)
            self._finish(sums, to)
        else:
            self._finish_classes(begun, to, 0, S)
            self._finish(begun, to)
        if to.ids is not None:
            targets = B if calls.targets_apart else 0
            given = (calls.vectors, to.ids, targets, C, S, calls.ignore_index)
            self._by_entries(kernels.sparse_ids, calls.entries, *given)
        return self

    def _own_sums(self, to: Outputs) -> Sums:
        B, _, S, D = self.calls.sizes
        wanted = (to.input, to.rows, to.row_bias, to.scale, self.calls.ranged or None)
        shapes = ((B, D), (self.chunks.classes, D), (S,), (B,), ())
        return Sums(
            *(
                None if output is None else self.empty(*shape, dtype=self.accumulator)
                for output, shape in zip(wanted, shapes, strict=True)
            )
        )

    def _finish_classes(self, sums: Sums, to: Outputs, first: int, count: int) -> None:
        if to.rows is not None or to.row_bias is not None:
            calls, (B, C, _, _) = self.calls, self.calls.sizes
            given = (
                sums.rows,
                sums.bias,
                calls.matrices[1],
                calls.vectors,
                self.marks,
                Given(LOSS),
                Given(KEPT),
            )
            written = (sums.range_of_pulls, to.rows, to.row_bias)
            self._by_rows(kernels.finish_classes, count, *given, *written, B, C, first, count)

    def _finish(self, sums: Sums, to: Outputs) -> None:
        """What is finished once for all chunks."""
        calls, (B, C, S, _), given = self.calls, self.calls.sizes, (Given(LOSS), Given(KEPT))
        of_targets = (to.rows, to.row_bias) if calls.targets_apart else (None, None)
        if to.input is not None or of_targets != (None, None):
            self._by_rows(
                kernels.finish_rows,
                B,
                *(sums.input, *calls.matrices, calls.vectors, *given, sums.range_of_pulls),
                *(to.input, *of_targets, B, C, S, calls.ignore_index, FACTOR),
            )
        if to.scale is not None:
            self.over((1,), kernels.finish_scale, sums.scale, *given, to.scale, B)

    # ---- chunks ----

    def _over_chunks(self, losses: Any, sums: Sums, to: Outputs | None) -> None:
        """losses: (B,), of each row; None: they are known. to: gradients of class rows are finished too."""
        calls, chunks, (B, _, S, D) = self.calls, self.chunks, self.calls.sizes
        self.x = self._prepared_rows(losses is not None)
        self.inverses = self.empty(S, dtype=self.accumulator) if calls.cosine else None
        at_once = len(calls.sets) == 1 and calls.gathers
        if not at_once and calls.cosine:
            self._prepare_classes(None, self.inverses, 0, S)
        copies = self.empty(chunks.classes, D, dtype=self.operand) if calls.gathers else None
        dots = self.empty(chunks.rows * chunks.classes, dtype=self.accumulator)
        terms = None if losses is None else _Terms(self, losses)
        pulls = _Pulls(self, sums, to) if any(found is not None for found in sums[:4]) else None
        for nth, (entry, entries) in enumerate(calls.sets):
            rows: Any = calls.matrices[1].at.rows(entry, entries)
            if copies is not None:
                rows = copies.rows(0, entries)
                self._prepare_classes(rows, self.inverses if at_once else None, entry, entries)
            if pulls is not None and calls.ranged and nth == 0:
                self._find_range(sums.range_of_pulls)
            for row, count in calls.blocks:
                chunk = Chunk(row, count, entry, entries)
                found = dots._replace(shape=(count, entries))
                self.product(found, self.x.rows(row, count), rows, (False, True))
                if terms is not None:
                    terms.make(found, chunk, nth)
                if pulls is not None:
                    pulls.make(found, rows, chunk, nth)
            if to is not None:
                self._finish_classes(sums, to, entry, entries)
        if terms is not None and len(calls.sets) != 1:
            terms.merge(Chunk(0, B, 0, S))
        if not calls.sets:
            self._zero(sums.input, sums.scale)

    def _marks(self) -> Scratch | None:
        """(S,) where classes take part as targets, which may be left out of denominators."""
        calls, (B, C, S, _) = self.calls, self.calls.sizes
        if not calls.fold or calls.vectors.counts is None:
            return None
        marks = self.empty(S, dtype=torch.int8)
        self._zero(marks)
        self._by_entries(kernels.mark_targets, B, calls.vectors, marks, B, C, calls.ignore_index)
        return marks

    def _prepared_rows(self, kept: bool) -> Scratch:
        calls, (B, C, _, D) = self.calls, self.calls.sizes
        x = self.empty(B, D, dtype=self.operand)
        written = (x, Given(KEPT)) if kept else (x, None)
        given = (*calls.matrices, calls.vectors, None if kept else self.upstream)
        self._by_rows(kernels.prepare_rows, B, *given, *written, B, C, calls.ignore_index)
        return x

    def _prepare_classes(self, copies: Any, inverses: Any, first: int, count: int) -> None:
        given = (self.calls.matrices[1], self.calls.vectors, self.marks, copies, inverses)
        self._by_rows(kernels.prepare_classes, count, *given, first, count, self.calls.sizes[1])

    def _find_range(self, found: Any) -> None:
        B, largest, upstream = self.calls.sizes[0], None, None
        if self.inverses is not None:
            largest = self.empty(2, dtype=torch.float64)
            self.other(_largest, largest.rows(0, 1), Given(KEPT).rows(4 * B, B))
            self.other(_largest, largest.rows(1, 1), self.inverses)
        if self.upstream is not None:
            upstream = self.empty(1, dtype=self.accumulator)
            self.other(_largest, upstream, self.upstream)
        self.over((1,), kernels.pull_range, self.calls.vectors.learned, largest, upstream, found, FACTOR)

    # ---- steps ----

    def over(self, grid: tuple[int, ...], kernel: Any, *arguments: Any, **special: Any) -> None:
        self.launch(variant(kernel, **self.calls.constants | special), grid, *arguments)

    def over_tiles(self, grid: tuple[int, ...], kernel: Any, *arguments: Any) -> None:
        self.over(grid, kernel, *arguments, num_warps=self.calls.warps_of_tiles)

    def _by_entries(self, kernel: Any, count: int, *arguments: Any) -> None:
        self.over((cdiv(count, ENTRIES),), kernel, *arguments)

    def _by_rows(self, kernel: Any, count: int, *arguments: Any) -> None:
        self.over((cdiv(count, self.calls.rows_at_once),), kernel, *arguments)

    def add_parts(self, found: Any, sums: Any, parts: int, first: int, count: int, adds: bool) -> None:
        if found is not None:
            self.over((cdiv(count, ENTRIES),), kernels.add_parts, found, sums, parts, first, count, ADDS=adds)

    def _zero(self, *matrices: Any) -> None:
        for matrix in matrices:
            if matrix is not None:
                self.other(torch.Tensor.zero_, matrix)


class _Pulls:
    """Pulls, and what is multiplied with them."""

    def __init__(self, plan: ChunkedPlan, sums: Sums, to: Outputs | None):
        """to: the sums of class rows' gradients are those of one chunk."""
        chunks, dtype = plan.chunks, plan.accumulator
        self.plan, self.sums, self.to = plan, sums, to
        self.pulls = plan.empty(chunks.rows * chunks.classes, dtype=plan.operand)
        row_tiles, class_tiles = chunks.tiles(chunks.rows, chunks.classes)
        self.bias_parts = sums.bias and plan.empty(row_tiles * chunks.classes, dtype=dtype)
        self.scale_parts = sums.scale and plan.empty(class_tiles * chunks.rows, dtype=dtype)

    def make(self, dots: Scratch, rows: Any, chunk: Chunk, nth: int) -> None:
        """rows: of the chunk's classes; nth: of the blocks of classes."""
        plan, calls, sums, (B, C, _, D) = self.plan, self.plan.calls, self.sums, self.plan.calls.sizes
        row_tiles, class_tiles = plan.chunks.tiles(chunk.rows, chunk.entries)
        pulls = self.pulls._replace(shape=(chunk.rows, chunk.entries))
        plan.over_tiles(
            (row_tiles * class_tiles,),
            kernels.chunk_pulls,
            *(dots, calls.vectors, plan.upstream, Given(KEPT), plan.inverses, sums.range_of_pulls, pulls),
            *(self.bias_parts, self.scale_parts, B, C, calls.ignore_index, *chunk, FACTOR),
        )
        plan.add_parts(self.bias_parts, sums.bias, row_tiles, chunk.entry, chunk.entries, chunk.row > 0)
        plan.add_parts(self.scale_parts, sums.scale, class_tiles, chunk.row, chunk.rows, nth > 0)
        if sums.rows is not None:
            out = sums.rows if self.to is None else sums.rows._replace(shape=(chunk.entries, D))
            x = plan.x.rows(chunk.row, chunk.rows)
            plan.product(out, pulls, x, (True, False), adds=chunk.row > 0)
        if sums.input is not None:
            plan.product(sums.input.rows(chunk.row, chunk.rows), pulls, rows, adds=nth > 0)


class _Terms:
    """The softmax' terms, in parts of the class set; merged where a chunk has all classes, or in the end."""

    def __init__(self, plan: ChunkedPlan, losses: Any):
        sets = len(plan.calls.sets)
        row_tiles, class_tiles = plan.chunks.tiles(plan.chunks.rows, plan.chunks.classes)
        most = max(MOST_PARTS // max(sets, 1), 1)
        self.parts = max(min(cdiv(PROGRAMS, row_tiles), class_tiles, most), 1)
        self.splits = self.parts * sets
        self.plan, self.losses = plan, losses
        self.partials = plan.empty(2, self.splits, plan.calls.sizes[0], dtype=plan.accumulator)

    def make(self, dots: Scratch, chunk: Chunk, nth: int) -> None:
        plan, calls = self.plan, self.plan.calls
        plan.over_tiles(
            (cdiv(chunk.rows, plan.chunks.block_rows), self.parts),
            kernels.chunk_terms,
            *(dots, calls.vectors, Given(KEPT), plan.inverses, self.partials),
            *(*calls.sizes[:2], calls.ignore_index, *chunk, nth * self.parts, self.splits, FACTOR),
        )
        if len(calls.sets) == 1:
            self.merge(chunk)

    def merge(self, chunk: Chunk) -> None:
        plan, calls, (B, C, _, _) = self.plan, self.plan.calls, self.plan.calls.sizes
        plan.over(
            (cdiv(chunk.rows, plan.chunks.block_rows),),
            forward.merge_splits,
            *(
                calls.vectors.target,
                calls.vectors.target_counts,
                calls.vectors.bias,
                calls.vectors.learned,
                calls.vectors.target_logit,
            ),
            *(self.partials, Given(KEPT), self.losses),
            *(B, C, self.splits, calls.ignore_index, chunk.row, chunk.rows, FACTOR),
            ACC=TYPES[torch.float64],
            STACKED=False,
            REDUCTION="none",  # rows are reduced in the end
        )


def _largest(out: Tensor, of: Tensor) -> None:
    """out = the largest magnitude"""
    torch.linalg.vector_norm(of, torch.inf, dtype=out.dtype, out=out.view(()))
