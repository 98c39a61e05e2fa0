"""The small kernels over many problems of one size: a grid's third axis goes over the problems.

What differs from one problem to another is `Stacked`; what kernels write lies contiguous, problem by problem.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .backward import Parts, Results, small_results, small_tiles
from .forward import KEPT, merge_splits, partial_terms
from .tiles import Matrix, wide

_KEPT: tl.constexpr = tl.constexpr(KEPT)


class Stacked(NamedTuple):
    """A vector of each problem."""

    at: Any  # the first's
    step: Any  # elements from one problem's to the next's; 0: they share it


class StackedMatrix(NamedTuple):
    """A `Matrix` of each problem."""

    at: Any
    step: Any
    D: Any
    row: Any
    column: Any


@triton.jit
def shifted(at, step):
    """Where this problem's is; None of None."""
    if at is None:
        return None
    else:
        return at + tl.program_id(2).to(tl.int64) * step


@triton.jit
def vector(of):
    if of is None:
        return None
    else:
        return shifted(of.at, of.step)


@triton.jit
def matrix(of):
    return Matrix(shifted(of.at, of.step), of.D, of.row, of.column)


@triton.jit
def kept_of(kept, B):
    return shifted(kept, wide(B) * _KEPT + 1)


@triton.jit
def parts_of(found, class_ids, B, C, S, D, tiles, groups):
    entries = wide(C)
    if class_ids is not None:
        entries = wide(S) + B
    return Parts(
        shifted(found.rows, entries * D),
        shifted(found.bias, entries),
        shifted(found.input, wide(tiles) * B * D),
        shifted(found.along, wide(tiles) * groups * B),
        shifted(found.scale, tiles),
    )


# As the kernels that they call; only these are launched.
NOT_SPECIALIZED = ["kept", "partials", "loss", "grad_loss", "B", "C", "S", "ignore_index", "splits", "tiles"]
NOT_SPECIALIZED += ["groups"]


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def stacked_terms(
    input, weight, target, class_ids, counts, bias, learned, entry_labels, target_labels, partials, kept,
    B, C, S, ignore_index, factor: tl.float64, COSINE: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_PAIRED: tl.constexpr,
):  # fmt: skip
    partial_terms(
        matrix(input), matrix(weight), vector(target), vector(class_ids), vector(counts), vector(bias),
        vector(learned), entry_labels, target_labels,
        shifted(partials, 2 * wide(tl.num_programs(0) - 1) * B), kept_of(kept, B), B, C, S, ignore_index,
        factor, COSINE, OPERAND, PRECISION, BLOCK_B, BLOCK_S, BLOCK_D, BLOCK_PAIRED,
    )  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def stacked_merging(
    target, target_counts, bias, learned, target_logit, partials, kept, loss, B, C, splits, ignore_index,
    factor: tl.float64, COSINE: tl.constexpr, ACC: tl.constexpr, REDUCTION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    merge_splits(
        vector(target), vector(target_counts), vector(bias), vector(learned), target_logit,
        shifted(partials, 2 * wide(splits) * B), kept_of(kept, B),
        shifted(loss, B if REDUCTION == "none" else 1), B, C, splits, ignore_index, factor,
        COSINE, ACC, REDUCTION, BLOCK_B, BLOCK_SPLITS,
    )  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def stacked_tiles(
    input, weight, target, class_ids, counts, bias, learned, entry_labels, target_labels, grad_loss, kept,
    found, B, C, S, ignore_index, factor: tl.float64, COSINE: tl.constexpr, PER_ROW: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    small_tiles(
        matrix(input), matrix(weight), vector(target), vector(class_ids), vector(counts), vector(bias),
        vector(learned), entry_labels, target_labels, shifted(grad_loss, B if PER_ROW else 1),
        kept_of(kept, B),
        parts_of(found, class_ids, B, C, S, input.D, tl.cdiv(S, BLOCK_S), tl.num_programs(1)),
        B, C, S, ignore_index, factor, COSINE, PER_ROW, OPERAND, PRECISION, BLOCK_B, BLOCK_S, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def stacked_results(
    input, weight, target, class_ids, counts, learned, grad_loss, kept, found, results,
    B, C, S, ignore_index, tiles, groups, factor: tl.float64, COSINE: tl.constexpr, PER_ROW: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TILES: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
):  # fmt: skip
    of_problem = Results(
        shifted(results.input, wide(B) * input.D),
        shifted(results.weight, wide(C) * input.D),
        shifted(results.bias, C),
        shifted(results.scale, 1),
        None,
    )
    small_results(
        matrix(input), matrix(weight), vector(target), vector(class_ids), vector(counts), vector(learned),
        shifted(grad_loss, B if PER_ROW else 1), kept_of(kept, B),
        parts_of(found, class_ids, B, C, S, input.D, tiles, groups), of_problem,
        B, C, S, ignore_index, tiles, groups, factor, COSINE, PER_ROW, OPERAND, ACC, BLOCK_D, BLOCK_TILES,
        BLOCK_ENTRIES,
    )  # fmt: skip
