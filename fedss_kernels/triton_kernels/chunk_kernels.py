"""What a chunk of a large problem takes besides its matrix products. Equations: forward.py and backward.py.

A chunk is some rows and some entries of the class set; its dot products lie in memory, (rows, entries).

    prepare_rows      rows that products read: gathered, rounded, zeros where nothing counts; 1 / their norms
    target_terms      each row's dot product with its target's row
    chunk_terms       softmax terms of parts of the chunk's entries
    merge_terms       those of all parts, and the target's: the losses
    chunk_pulls       from dot products to pulls, and sums of what bias and scale take
    add_parts         such sums, added up
    finish_class_rows, finish_inputs, finish_targets      gradients, of the products' sums

Each number of a sum has one owner and one order: no atomics.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .backward import (
    load_upstream,
    product_or_zero,
    pulled_along,
    share_along,
    store_rows,
    store_target_rows,
    target_pulls,
    without_share,
)
from .forward import dots_with_targets
from .tiles import (
    Matrix,
    inverse_norm,
    load_bias,
    load_classes,
    load_elements,
    load_rows,
    load_scale,
    load_targets,
    logit_unit,
    rounded,
    same,
    target_cosines,
    wide,
)


class Chunk(NamedTuple):
    """Rows from `row` on, entries from `entry` on."""

    row: Any
    rows: Any
    entry: Any
    entries: Any


NOT_SPECIALIZED = ["vectors", "sizes", "chunk", "first", "count", "stride", "parts", "splits", "split"]


# ---- rows that products read -------------------------------------------------------------------------------


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def row_sources(vectors, sizes, grad_loss, sources, PER_ROW: tl.constexpr, BLOCK: tl.constexpr):
    """(B,) the row itself; -1 where it is ignored, or its upstream gradient is 0: whatever it holds."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _, counted, _ = load_targets(vectors.target, rows, sizes.B, sizes.C, sizes.ignore_index)
    if PER_ROW:
        counted &= tl.load(grad_loss + rows, mask=rows < sizes.B, other=0.0) != 0.0
    tl.store(sources + rows, tl.where(counted, rows, -1).to(tl.int64), mask=rows < sizes.B)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def class_sources(vectors, sizes, sources, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """(S,) the row of `weight` that each entry of the class set stands for; -1 where it is left out."""
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids, _, live, _ = load_classes(vectors.class_ids, vectors.counts, entries, sizes.S, sizes.C, ACC)
    tl.store(sources + entries, tl.where(live, ids, -1), mask=entries < sizes.S)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def target_sources(vectors, sizes, sources, BLOCK: tl.constexpr):
    """With every class in the set: targets take part whether or not they are in the denominator."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    targets, _, known = load_targets(vectors.target, rows, sizes.B, sizes.C, sizes.ignore_index)
    tl.store(sources + targets, targets, mask=known)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def prepare_rows(
    matrix,
    D,
    row_stride,
    column_stride,
    sources,  # the row of `matrix` of each; -1: zeros. None: row n is the n-th
    copies,  # (count, D); None: not wanted
    inverses,  # 1 / norms of all; None: not wanted
    first,
    count,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    nth = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = nth < count
    rows = (first + nth).to(tl.int64)
    if sources is not None:
        rows = tl.load(sources + rows, mask=there, other=-1)
    source = Matrix(matrix, D, row_stride, column_stride)
    squares = tl.zeros((BLOCK,), ACC)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        x = load_rows(source, rows, there & (rows >= 0), columns, OPERAND)
        if copies is not None:
            store_rows(copies, nth, there, columns, D, x)
        squares += tl.sum(x.to(ACC) * x.to(ACC), 1)
    if inverses is not None:
        tl.store(inverses + first + nth, inverse_norm(squares), mask=there)


# ---- the loss ----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def target_terms(
    input,
    weight,
    D,
    input_row,
    input_column,
    weight_row,
    weight_column,
    vectors,
    kept,
    sizes,
    COSINE: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Into `kept`: dot products with the targets' rows, 1 / |input_i|, 1 / |weight_t|."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    targets, counted, known = load_targets(vectors.target, rows, sizes.B, sizes.C, sizes.ignore_index)
    product, x_inverse, w_inverse = dots_with_targets(
        Matrix(input, D, input_row, input_column), Matrix(weight, D, weight_row, weight_column),
        rows, counted, targets, known, COSINE, OPERAND, ACC, BLOCK_D,
    )  # fmt: skip
    at = kept + wide(sizes.B) * 3 + rows
    tl.store(at, product, mask=rows < sizes.B)
    tl.store(at + sizes.B, x_inverse, mask=rows < sizes.B)
    tl.store(at + 2 * sizes.B, w_inverse, mask=rows < sizes.B)


@triton.jit
def chunk_logits(
    dots, vectors, kept, inverses, sizes, chunk, rows, entries, scale, unit,
    COSINE: tl.constexpr, NARROW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(logits in units, dot products, which rows count, hits, which entries are live, 1 / norms of both).

    (R, J) of pairs, (R,) of rows, (J,) of entries; the inverses are those of rows' norms, then of entries'.
    Logits are -inf of entries that are left out.
    """
    B, C = sizes.B, sizes.C
    row_there = rows < chunk.row + chunk.rows
    entry_there = entries < chunk.entry + chunk.entries
    at = (rows - chunk.row).to(tl.int64)[:, None] * chunk.entries + (entries - chunk.entry)[None, :]
    found = tl.load(dots + at, mask=row_there[:, None] & entry_there[None, :], other=0.0)
    if NARROW:  # products of float32 rows in float64: infinite where float32 ends
        found = tl.where(tl.abs(found) > (2 - 2**-23) * 2.0**127, found * float("inf"), found)
    targets, counted, known = load_targets(vectors.target, rows, B, C, sizes.ignore_index)
    counted &= row_there
    end = chunk.entry + chunk.entries
    ids, corrections, live, wrong = load_classes(vectors.class_ids, vectors.counts, entries, end, C, ACC)
    x_inverse = tl.zeros(rows.shape, ACC) + 1.0
    w_inverse = tl.zeros(entries.shape, ACC) + 1.0
    if COSINE:
        x_inverse = tl.load(kept + 4 * wide(B) + rows, mask=counted, other=0.0).to(ACC)
        w_inverse = tl.load(inverses + entries, mask=entry_there, other=0.0)
    offsets = tl.where(live, load_bias(vectors.bias, ids, live, ACC) - corrections, 0.0)
    offsets = tl.where(live, offsets / unit, tl.where(wrong, float("nan"), float("-inf")))
    logits = (found * w_inverse[None, :]) * ((scale / unit) * x_inverse)[:, None] + offsets[None, :]
    hits = same(ids, targets, C) & known[:, None]
    return logits, found, counted, hits, live, x_inverse, w_inverse


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def chunk_terms(
    dots,  # (chunk.rows, chunk.entries)
    vectors,
    kept,
    inverses,  # (S,) 1 / |weight_j|
    partials,  # (2, splits, B): the largest o, in units, and sum exp(o - largest) of each split
    sizes,
    chunk,
    split,  # the chunk's first
    splits,  # of all chunks
    factor: tl.float64,
    COSINE: tl.constexpr,
    NARROW: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program (b, s): a tile of rows and every so manyth tile of entries, from the s-th on."""
    rows = chunk.row + tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    scale = load_scale(factor, vectors.learned, ACC)
    unit = logit_unit(scale, COSINE)
    largest = tl.full((BLOCK_B,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_B,), ACC)
    step = tl.num_programs(1) * BLOCK_S
    for start in range(tl.program_id(1) * BLOCK_S, chunk.entries, step):
        entries = chunk.entry + start + tl.arange(0, BLOCK_S)
        logits, _, _, hits, _, _, _ = chunk_logits(
            dots, vectors, kept, inverses, sizes, chunk, rows, entries, scale, unit, COSINE, NARROW, ACC
        )
        logits = tl.where(hits, float("-inf"), logits)
        larger = tl.maximum(largest, tl.max(logits, 1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp((largest - shift) * unit)
        total += tl.sum(tl.exp((logits - shift[:, None]) * unit), 1)
        largest = larger
    at = partials + (split + tl.program_id(1)).to(tl.int64) * sizes.B + rows
    there = rows < chunk.row + chunk.rows
    tl.store(at, largest, mask=there)
    tl.store(at + wide(splits) * sizes.B, total, mask=there)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def merge_terms(
    vectors,
    partials,  # (2, splits, B)
    kept,  # (KEPT, B), then 1
    losses,  # (B,)
    sizes,
    chunk,
    splits,
    factor: tl.float64,
    COSINE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """The rows of the chunk, a tile each program."""
    B = sizes.B
    rows = chunk.row + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = rows < chunk.row + chunk.rows
    scale = load_scale(factor, vectors.learned, tl.float64)
    unit = logit_unit(scale.to(ACC), COSINE).to(tl.float64)
    targets, counted, known = load_targets(vectors.target, rows, B, sizes.C, sizes.ignore_index)
    own = (scale / unit) * target_cosines(kept, rows, known, B, tl.float64)
    own += load_bias(vectors.bias, targets, known, tl.float64) / unit
    if vectors.target_counts is not None:
        correction = tl.load(vectors.target_counts + rows, mask=known, other=0.0).to(tl.float64)
        own -= tl.where(tl.abs(correction) < float("inf"), correction / unit, float("nan"))
    own = tl.where(known, own.to(ACC).to(tl.float64), float("nan"))  # as others': what is equal stays so

    largest_other = tl.full((BLOCK,), float("-inf"), tl.float64)
    others = tl.zeros((BLOCK,), tl.float64)
    largest = own
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        at = partials + split.to(tl.int64)[:, None] * B + rows[None, :]
        among = (split < splits)[:, None] & (counted & there)[None, :]
        largest_of = tl.load(at, mask=among, other=float("-inf")).to(tl.float64)
        total_of = tl.load(at + wide(splits) * B, mask=among, other=0.0).to(tl.float64)
        largest_other = tl.maximum(largest_other, tl.max(largest_of, 0))
        larger = tl.maximum(largest, largest_other)
        terms = tl.where(total_of == 0.0, 0.0, total_of * tl.exp((largest_of - larger[None, :]) * unit))
        others = tl.where(others == 0.0, 0.0, others * tl.exp((largest - larger) * unit)) + tl.sum(terms, 0)
        largest = larger
    others += largest - largest  # NaN where it is infinite, and all that is made of it
    # loss = log(sum of terms) - own; where the target leads, log(1 + others) without the 1's rounding.
    target_leads = own >= largest_other
    lead = tl.where(target_leads, 1.0, tl.exp((own - largest) * unit))
    total = others + lead
    log = tl.log(total)
    log_of_lead = tl.where(total == 1.0, others, log * (others / (total - 1.0)))
    found = tl.where(target_leads, log_of_lead, (largest - own) * unit + log)
    tl.store(losses + rows, tl.where(counted, found, 0.0), mask=there)
    tl.store(kept + rows, tl.where(counted, largest, 0.0), mask=there)
    tl.store(kept + wide(B) + rows, tl.where(counted, 1.0 / total, 0.0), mask=there)
    tl.store(kept + wide(B) * 2 + rows, tl.where(counted, -(others / total), 0.0), mask=there)
    tl.store(kept + wide(B) * 6, tl.full((), 1.0, tl.float64))


# ---- pulls -------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def pull_range(learned, largest, upstream, found, factor: tl.float64, COSINE: tl.constexpr):
    """A power of two that brings pulls to just below float16's largest number.

    largest: of 1 / |input_i| and of 1 / |weight_j|; upstream: of the rows' upstream gradients, or None.
    """
    bound = tl.abs(load_scale(factor, learned, tl.float32))
    if COSINE:
        bound *= tl.load(largest) * tl.load(largest + 1)
    if upstream is not None:
        bound *= tl.load(upstream).to(tl.float32)
    exponent = ((bound.to(tl.uint32, bitcast=True) >> 23) & 0xFF).to(tl.int32)
    usual = (exponent > 30) & (exponent < 240)
    exponent = tl.where(usual, 127 + 14 - (exponent + 1 - 127), 127)
    tl.store(found, (exponent.to(tl.uint32) << 23).to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def chunk_pulls(
    dots,  # (chunk.rows, chunk.entries)
    vectors,
    grad_loss,
    kept,
    inverses,
    range_of_pulls,  # (), see `pull_range`; None: 1
    pulls,  # (chunk.rows, chunk.entries)
    bias_parts,  # (tiles of rows, chunk.entries); None: not wanted
    scale_parts,  # (tiles of entries, chunk.rows); None: not wanted
    sizes,
    chunk,
    factor: tl.float64,
    FOLD: tl.constexpr,  # every class is in the set: a target is a column of the tile like any other
    COSINE: tl.constexpr,
    NARROW: tl.constexpr,
    PER_ROW: tl.constexpr,  # else made for an upstream gradient of 1
    ACC: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program (b, t): pulls of a tile of rows and a tile of the chunk's entries, and their sums."""
    B = sizes.B
    rows = chunk.row + tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    entries = chunk.entry + tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    row_there, entry_there = rows < chunk.row + chunk.rows, entries < chunk.entry + chunk.entries
    scale = load_scale(factor, vectors.learned, ACC)
    unit = logit_unit(scale, COSINE)
    logits, found, counted, hits, live, x_inverse, w_inverse = chunk_logits(
        dots, vectors, kept, inverses, sizes, chunk, rows, entries, scale, unit, COSINE, NARROW, ACC
    )
    upstream = tl.where(counted, 1.0, 0.0).to(ACC)
    if PER_ROW:
        upstream = load_upstream(grad_loss, kept, rows, counted, B, ACC, True)
    largest = tl.load(kept + rows, mask=counted, other=0.0).to(ACC)
    largest = tl.where(largest == float("-inf"), 0.0, largest)  # -inf less it is to stay
    inverse_total = tl.load(kept + wide(B) + rows, mask=counted, other=0.0).to(ACC)
    # Of nearly equal logits that are rounded otherwise than in the merging, one can be above the largest.
    probs = tl.exp(tl.minimum(logits - largest[:, None], 0.0) * unit) * inverse_total[:, None]
    own = tl.zeros(rows.shape, ACC)
    if FOLD:
        own = tl.load(kept + 2 * wide(B) + rows, mask=counted, other=0.0).to(ACC)
    probs = tl.where(hits, own[:, None], probs)
    dlogits = product_or_zero(probs, upstream[:, None])
    factors = product_or_zero(scale * x_inverse, upstream)
    if range_of_pulls is not None:
        factors *= tl.load(range_of_pulls)
    # A zero row has inverse norm 0: nothing passes through it, even of an infinite upstream.
    made = product_or_zero(probs, factors[:, None])
    if COSINE:
        made = product_or_zero(w_inverse[None, :], made)
    at = (rows - chunk.row).to(tl.int64)[:, None] * chunk.entries + (entries - chunk.entry)[None, :]
    tl.store(
        pulls + at, rounded(made, pulls.dtype.element_ty), mask=row_there[:, None] & entry_there[None, :]
    )
    if bias_parts is not None:
        at_entries = tl.program_id(0).to(tl.int64) * chunk.entries + (entries - chunk.entry)
        tl.store(bias_parts + at_entries, tl.sum(dlogits, 0), mask=entry_there)
    if scale_parts is not None:
        beyond = found * w_inverse[None, :] * x_inverse[:, None]
        beyond -= target_cosines(kept, rows, counted, B, ACC)[:, None]
        # Of what takes part, a dlogit of 0 too: of a logit of -inf it makes NaN.
        sloping = live[None, :] & (upstream != 0.0)[:, None] & (beyond != 0.0)
        slopes = tl.where(sloping, dlogits * beyond, 0.0)
        at_rows = tl.program_id(1).to(tl.int64) * chunk.rows + (rows - chunk.row)
        tl.store(scale_parts + at_rows, tl.sum(slopes, 1), mask=row_there)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def add_parts(parts_of, sums, parts, stride, first, count, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    """sums[first + n] = sum over parts of parts_of[part, n], in order; ADDS: += ."""
    nth = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), sums.dtype.element_ty)
    for part in range(0, parts):
        total += tl.load(parts_of + wide(part) * stride + nth, mask=nth < count, other=0.0)
    if ADDS:
        total += tl.load(sums + first + nth, mask=nth < count, other=0.0)
    tl.store(sums + first + nth, total, mask=nth < count)


# ---- gradients ---------------------------------------------------------------------------------------------


@triton.jit
def load_factor(grad_loss, kept, range_of_pulls, B, ACC: tl.constexpr, PER_ROW: tl.constexpr):
    """(1,) what sums of pulls are still to be multiplied by."""
    found = tl.full((1,), 1.0, ACC)
    if not PER_ROW:
        found *= tl.load(grad_loss).to(ACC) * tl.load(kept + wide(B) * 6).to(ACC)
    if range_of_pulls is not None:
        found /= tl.load(range_of_pulls).to(ACC)
    return found


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def finish_class_rows(
    sums,  # (count, D) pulls^T @ input
    matrix,  # what these entries' rows are: (count, D), or all of `weight`
    D,
    row_stride,
    column_stride,
    from_matrix,  # its first row
    inverses,
    grad_loss,
    kept,
    range_of_pulls,
    grad_rows,  # of all entries
    sizes,
    first,
    count,
    COSINE: tl.constexpr,
    PER_ROW: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradients of the rows of entries from `first` on, a few each program."""
    nth = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    there = nth < count
    factor = load_factor(grad_loss, kept, range_of_pulls, sizes.B, ACC, PER_ROW)
    of_rows = Matrix(matrix, D, row_stride, column_stride)
    share = tl.zeros((BLOCK,), ACC)
    if COSINE:
        for start in range(0, D, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            values = load_elements(Matrix(sums, D, D, 1), nth, there, columns)
            w = load_elements(of_rows, from_matrix + nth, there, columns)
            share += tl.sum(product_or_zero(values, w.to(ACC)), 1)
        share = share_along(share, tl.load(inverses + first + nth, mask=there, other=0.0))
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        values = load_elements(Matrix(sums, D, D, 1), nth, there, columns)
        if COSINE:
            w = load_elements(of_rows, from_matrix + nth, there, columns)
            values = without_share(values, share, w)
        store_rows(grad_rows, first + nth, there, columns, D, product_or_zero(values, factor[:, None]))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def finish_inputs(
    sums,  # (B, D) pulls @ rows
    copies,  # (B, D) of input, as products read it
    weight,
    D,
    weight_row,
    weight_column,
    vectors,
    grad_loss,
    kept,
    range_of_pulls,
    grad_input,  # (B, D)
    sizes,
    factor: tl.float64,
    FOLD: tl.constexpr,
    COSINE: tl.constexpr,
    PER_ROW: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradients of rows of input, a few each program; with what a target adds that is not in the set."""
    B = sizes.B
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    of_sums = load_factor(grad_loss, kept, range_of_pulls, B, ACC, PER_ROW)
    targets, counted, known, _, pulls, _, x_inverse, _ = target_pulls(
        vectors.target, grad_loss, kept, row, B, sizes.C, sizes.ignore_index,
        load_scale(factor, vectors.learned, ACC), ACC, PER_ROW,
    )  # fmt: skip
    share = tl.zeros((BLOCK,), ACC)
    for finishing in tl.static_range(2):
        for start in range(0, D, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            values = load_elements(Matrix(sums, D, D, 1), row, counted, columns)
            values = product_or_zero(values, of_sums[:, None])
            if not FOLD:
                w = load_rows(Matrix(weight, D, weight_row, weight_column), targets, known, columns, OPERAND)
                values += pulled_along(w.to(ACC), pulls)
            x = load_elements(Matrix(copies, D, D, 1), row, counted, columns)
            if finishing == 0:
                share += tl.sum(product_or_zero(values, x.to(ACC)), 1)
            else:
                if COSINE:
                    values = without_share(values, share, x)
                values = tl.where(counted[:, None], values, 0.0)
                store_rows(grad_input, row, row < B, columns, D, values)
        share = share_along(share, x_inverse)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def finish_targets(
    input,
    weight,
    D,
    input_row,
    input_column,
    weight_row,
    weight_column,
    vectors,
    grad_loss,
    kept,
    grad_rows,  # (S + B, D); None: not wanted
    grad_bias,  # (S + B,); None: not wanted
    sizes,
    factor: tl.float64,
    COSINE: tl.constexpr,
    PER_ROW: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (b, d): columns d of what rows add to their targets' rows, entries S + i."""
    store_target_rows(
        Matrix(input, D, input_row, input_column), Matrix(weight, D, weight_row, weight_column),
        vectors.target, grad_loss, kept, grad_rows, grad_bias,
        tl.program_id(0) * BLOCK + tl.arange(0, BLOCK),
        tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D),
        sizes.B, sizes.C, sizes.S, sizes.ignore_index,
        load_scale(factor, vectors.learned, ACC), COSINE, PER_ROW, OPERAND, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def finish_sums(
    sums,  # (count,) of bias, or (B,) of slopes
    grad_loss,
    kept,
    found,  # (count,) or ()
    sizes,
    count,
    TOTAL: tl.constexpr,  # the sum of all
    PER_ROW: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of bias entries, or with TOTAL that of the scale: NaN beside a loss that is."""
    factor = load_factor(grad_loss, kept, None, sizes.B, ACC, PER_ROW)
    if TOTAL:
        total = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, count, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            own = tl.load(kept + 2 * wide(sizes.B) + rows, mask=rows < count, other=0.0)
            upstream = load_upstream(grad_loss, kept, rows, rows < count, sizes.B, tl.float64, PER_ROW)
            total += product_or_zero(own - own, upstream)
            values = tl.load(sums + rows, mask=rows < count, other=0.0)
            total += product_or_zero(values, factor).to(tl.float64)
        tl.store(found, rounded(tl.sum(total, 0), found.dtype.element_ty))
    else:
        nth = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(sums + nth, mask=nth < count, other=0.0)
        values = product_or_zero(values, factor)
        tl.store(found + nth, rounded(values, found.dtype.element_ty), mask=nth < count)
