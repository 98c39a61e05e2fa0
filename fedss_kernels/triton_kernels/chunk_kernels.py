"""What a chunk of a large problem takes besides its matrix products. Equations: forward.py and backward.py.

A chunk is some rows and some entries of the class set; its dot products lie in memory, (rows, entries).

    prepare_rows      input as products read it, and what there is one of for each row
    prepare_classes   rows of the class set as products read them, and the inverses of their norms
    chunk_terms       softmax terms of parts of the chunk's entries, for forward.py to merge
    chunk_pulls       from dot products to pulls, and parts of the sums that bias and scale take
    add_parts         such parts, added up
    finish_classes, finish_rows, finish_scale      gradients, of the products' sums

Each number of a sum has one owner and one order: no atomics.
"""

import triton
import triton.language as tl

from .backward import (
    listed_ids,
    load_upstream,
    probabilities,
    pulled_along,
    share_along,
    store_grad_scale,
    target_pulls,
    without_share,
)
from .forward import add_terms, keep_dots_with_targets
from .tiles import (
    KEPT,
    UNSPECIALIZED,
    Matrix,
    Sizes,
    inverse_norm,
    load_classes,
    load_elements,
    load_hits,
    load_rows,
    load_scale,
    load_targets,
    logit_unit,
    logits_of,
    narrowed,
    product_or_zero,
    rounded,
    same,
    store_rows,
    target_cosines,
    wide,
)

# ---- rows that products read -------------------------------------------------------------------------------


@triton.jit(do_not_specialize=UNSPECIALIZED)
def prepare_rows(
    input, weight, vectors, grad_loss, copies, kept, B, C, ignore_index,
    COSINE: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """copies (B, D): input, zeros where a row is ignored or its upstream gradient is 0: whatever it holds.

    grad_loss: (B,), of each row; None: not given. kept: None where it is known already.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    targets, counted, known = load_targets(vectors.target, rows, B, C, ignore_index)
    if grad_loss is not None:
        counted &= tl.load(grad_loss + rows, mask=rows < B, other=0.0) != 0.0
    if kept is not None:
        keep_dots_with_targets(
            input, weight, rows, counted, targets, known, copies, kept, B, COSINE, OPERAND, ACC, BLOCK_D
        )
    else:
        for start in range(0, input.D, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            x = load_rows(input, rows, counted, columns, OPERAND)
            store_rows(copies, rows, rows < B, columns, input.D, x)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def mark_targets(vectors, marks, B, C, ignore_index, BLOCK: tl.constexpr):
    """marks[target] = 1, of classes that take part though they may be left out of denominators."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    targets, _, known = load_targets(vectors.target, rows, B, C, ignore_index)
    tl.store(marks + targets, tl.full((BLOCK,), 1, tl.int8), mask=known)


@triton.jit
def class_rows(vectors, marks, entries, S, C, ACC: tl.constexpr):
    """(the row of `weight` of each entry, which take part); others are not read, whatever they hold.

    marks: (S,), see `mark_targets`; None: only what is in denominators takes part.
    """
    ids, _, live, _ = load_classes(vectors.class_ids, vectors.counts, entries, S, C, ACC)
    if marks is not None:
        live |= tl.load(marks + entries, mask=entries < S, other=0) != 0
    return ids, live


@triton.jit(do_not_specialize=UNSPECIALIZED)
def prepare_classes(
    weight, vectors, marks, copies, inverses, first, count, C,
    OPERAND: tl.constexpr, ACC: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """copies (count, D): rows of entries from `first` on; inverses (S,): 1 / norms. None: not wanted."""
    nth = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    ids, read = class_rows(vectors, marks, first + nth, first + count, C, ACC)
    squares = tl.zeros((BLOCK_ROWS,), ACC)
    for start in range(0, weight.D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        w = load_rows(weight, ids, read, columns, OPERAND)
        if copies is not None:
            store_rows(copies, nth, nth < count, columns, weight.D, w)
        squares += tl.sum(w.to(ACC) * w.to(ACC), 1)
    if inverses is not None:
        tl.store(inverses + first + nth, inverse_norm(squares), mask=nth < count)


# ---- the loss ----------------------------------------------------------------------------------------------


@triton.jit
def chunk_logits(
    dots, vectors, kept, inverses, nth, among, row, rows, entry, entries, B, C, ignore_index, scale, unit,
    COSINE: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Of rows nth (R,) and entries among (J,); logits are in units, and -inf of entries that are left out.

    (logits, dot products, which rows count, have a known target; hits, own targets; live entries, 1 / norms)
    """
    ACC: tl.constexpr = dots.dtype.element_ty
    end, there = entry + entries, among < entry + entries
    at = places(nth, among, row, entry, entries)
    found = tl.load(dots + at, mask=(nth < row + rows)[:, None] & there[None, :], other=0.0)
    if NARROW:  # products of float32 rows in float64
        found = narrowed(found)
    targets, counted, known = load_targets(vectors.target, nth, row + rows, C, ignore_index)
    ids, corrections, live, wrong = load_classes(vectors.class_ids, vectors.counts, among, end, C, ACC)
    x_inverse = tl.zeros(nth.shape, ACC) + 1.0
    w_inverse = tl.zeros(among.shape, ACC) + 1.0
    if COSINE:
        x_inverse = tl.load(kept + 4 * wide(B) + nth, mask=counted, other=0.0).to(ACC)
        w_inverse = tl.load(inverses + among, mask=there, other=0.0)
    logits = logits_of(found, x_inverse, w_inverse, scale, unit, vectors.bias, ids, live, wrong, corrections)
    hits = load_hits(vectors.entry_labels, vectors.target_labels, ids, targets, among, end, nth, counted, C)
    is_own = same(ids, targets, C) & known[:, None]
    return logits, found, counted, known, hits, is_own, live, x_inverse, w_inverse


@triton.jit
def places(rows, entries, row, entry, width):
    """(R, J) where pairs are in a chunk."""
    return (rows - row).to(tl.int64)[:, None] * width + (entries - entry)[None, :]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def chunk_terms(
    dots, vectors, kept, inverses, partials, B, C, ignore_index, row, rows, entry, entries, split, splits,
    factor: tl.float64, COSINE: tl.constexpr, NARROW: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Program (b, s): a tile of rows and every so manyth tile of entries, from the s-th on.

    partials: (2, splits, B), see `partial_terms`, the chunk's from `split` on.
    """
    ACC: tl.constexpr = dots.dtype.element_ty
    nth = row + tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    scale = load_scale(factor, vectors.learned, ACC)
    unit = logit_unit(scale, COSINE)
    largest = tl.full((BLOCK_B,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_B,), ACC)
    for start in range(tl.program_id(1) * BLOCK_S, entries, tl.num_programs(1) * BLOCK_S):
        among = entry + start + tl.arange(0, BLOCK_S)
        logits, _, _, _, hits, _, _, _, _ = chunk_logits(
            dots, vectors, kept, inverses, nth, among, row, rows, entry, entries, B, C, ignore_index,
            scale, unit, COSINE, NARROW,
        )  # fmt: skip
        largest, total = add_terms(largest, total, tl.where(hits, float("-inf"), logits), unit)
    at = partials + (split + tl.program_id(1)).to(tl.int64) * B + nth
    tl.store(at, largest, mask=nth < row + rows)
    tl.store(at + wide(splits) * B, total, mask=nth < row + rows)


# ---- pulls -------------------------------------------------------------------------------------------------


@triton.jit
def pull_range(learned, largest, upstream, found, factor: tl.float64, COSINE: tl.constexpr):
    """A power of two that brings pulls to just below float16's largest number.

    largest: of 1 / |input_i| and of 1 / |weight_j|; upstream: of the rows' upstream gradients, or None.
    """
    bound = tl.abs(load_scale(factor, learned, tl.float32))
    if COSINE:
        bound *= (tl.load(largest) * tl.load(largest + 1)).to(tl.float32)
    if upstream is not None:
        bound *= tl.load(upstream).to(tl.float32)
    exponent = ((bound.to(tl.uint32, bitcast=True) >> 23) & 0xFF).to(tl.int32)
    usual = (exponent > 30) & (exponent < 240)
    exponent = tl.where(usual, 127 + 14 - (exponent + 1 - 127), 127)
    tl.store(found, (exponent.to(tl.uint32) << 23).to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def chunk_pulls(
    dots, vectors, grad_loss, kept, inverses, range_of_pulls, pulls, bias_parts, scale_parts, B, C,
    ignore_index, row, rows, entry, entries, factor: tl.float64, COSINE: tl.constexpr, NARROW: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Program b * tiles of entries + t: pulls of a tile of rows and a tile of entries, and their sums.

    Either has more tiles, in one chunk or another, than a grid's second axis has programs.
    grad_loss: (B,), of each row; None: pulls are made for an upstream gradient of 1. range_of_pulls: (), see
    `pull_range`; None: 1. bias_parts: (tiles of rows, entries), scale_parts: (tiles of entries, rows); None:
    not wanted.
    """
    ACC: tl.constexpr = dots.dtype.element_ty
    class_tiles = tl.cdiv(entries, BLOCK_S)
    row_tile, class_tile = tl.program_id(0) // class_tiles, tl.program_id(0) % class_tiles
    nth = row + row_tile * BLOCK_B + tl.arange(0, BLOCK_B)
    among = entry + class_tile * BLOCK_S + tl.arange(0, BLOCK_S)
    scale = load_scale(factor, vectors.learned, ACC)
    unit = logit_unit(scale, COSINE)
    logits, found, counted, known, hits, is_own, live, x_inverse, w_inverse = chunk_logits(
        dots, vectors, kept, inverses, nth, among, row, rows, entry, entries, B, C, ignore_index,
        scale, unit, COSINE, NARROW,
    )  # fmt: skip
    upstream = tl.where(counted, 1.0, 0.0).to(ACC)
    if grad_loss is not None:
        upstream = load_upstream(grad_loss, kept, nth, counted, B, ACC, True)
    probs = probabilities(logits, unit, kept, nth, counted, known, hits, is_own, vectors, B)
    factors = product_or_zero(scale * x_inverse, upstream)
    if range_of_pulls is not None:
        factors *= tl.load(range_of_pulls)
    # A zero row has inverse norm 0: nothing passes through it, even of an infinite upstream.
    made = product_or_zero(probs, factors[:, None])
    if COSINE:
        made = product_or_zero(w_inverse[None, :], made)
    row_there, entry_there = nth < row + rows, among < entry + entries
    at = places(nth, among, row, entry, entries)
    there = row_there[:, None] & entry_there[None, :]
    tl.store(pulls + at, rounded(made, pulls.dtype.element_ty), mask=there)
    dlogits = product_or_zero(probs, upstream[:, None])
    if bias_parts is not None:
        at_entries = row_tile.to(tl.int64) * entries + (among - entry)
        tl.store(bias_parts + at_entries, tl.sum(dlogits, 0), mask=entry_there)
    if scale_parts is not None:
        beyond = found * w_inverse[None, :] * x_inverse[:, None]
        beyond -= target_cosines(kept, nth, counted, B, ACC)[:, None]
        # Of what takes part, a dlogit of 0 too: of a logit of -inf it makes NaN.
        sloping = live[None, :] & (upstream != 0.0)[:, None] & (beyond != 0.0)
        slopes = tl.sum(tl.where(sloping, dlogits * beyond, 0.0), 1)
        tl.store(scale_parts + class_tile.to(tl.int64) * rows + (nth - row), slopes, mask=row_there)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def add_parts(found, sums, parts, first, count, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    """sums[first + n] = sum over parts of found[part, n], in order; ADDS: += ."""
    nth = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), sums.dtype.element_ty)
    for part in range(0, parts):
        total += tl.load(found + wide(part) * count + nth, mask=nth < count, other=0.0)
    if ADDS:
        total += tl.load(sums + first + nth, mask=nth < count, other=0.0)
    tl.store(sums + first + nth, total, mask=nth < count)


# ---- gradients ---------------------------------------------------------------------------------------------


@triton.jit
def load_factor(grad_loss, kept, range_of_pulls, B, ACC: tl.constexpr, PER_ROW: tl.constexpr):
    """(1,) what sums of pulls are still to be multiplied by."""
    found = tl.full((1,), 1.0, ACC)
    if not PER_ROW:
        found *= tl.load(grad_loss).to(ACC) * tl.load(kept + wide(B) * KEPT).to(ACC)
    if range_of_pulls is not None:
        found /= tl.load(range_of_pulls).to(ACC)
    return found


@triton.jit(do_not_specialize=UNSPECIALIZED)
def finish_classes(
    sums, bias_sums, weight, vectors, marks, grad_loss, kept, range_of_pulls, grad_rows, grad_bias,
    B, C, first, count, COSINE: tl.constexpr, PER_ROW: tl.constexpr, OPERAND: tl.constexpr,
    ACC: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of class rows, of cosines what is at right angles to them; and of their bias.

    sums: (count, D) pulls^T @ input, of entries from `first` on; bias_sums, grad_rows, grad_bias: of all.
    None: not wanted.
    """
    nth = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    if grad_bias is not None:
        of_bias = tl.load(bias_sums + first + nth, mask=nth < count, other=0.0)
        of_bias = product_or_zero(of_bias, load_factor(grad_loss, kept, None, B, ACC, PER_ROW))
        tl.store(grad_bias + first + nth, rounded(of_bias, grad_bias.dtype.element_ty), mask=nth < count)
    if grad_rows is not None:
        ids, read = class_rows(vectors, marks, first + nth, first + count, C, ACC)
        factor = load_factor(grad_loss, kept, range_of_pulls, B, ACC, PER_ROW)
        of_sums = Matrix(sums, weight.D, weight.D, 1, None)
        along = tl.zeros((BLOCK_ROWS,), ACC)
        squares = tl.zeros((BLOCK_ROWS,), ACC)
        if COSINE:
            for start in range(0, weight.D, BLOCK_D):
                columns = start + tl.arange(0, BLOCK_D)
                w = load_rows(weight, ids, read, columns, OPERAND).to(ACC)
                squares += tl.sum(w * w, 1)
                along += tl.sum(product_or_zero(load_elements(of_sums, nth, nth < count, columns), w), 1)
        share = share_along(along, inverse_norm(squares))
        for start in range(0, weight.D, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            values = load_elements(of_sums, nth, nth < count, columns)
            if COSINE:
                values = without_share(values, share, load_rows(weight, ids, read, columns, OPERAND))
            values = product_or_zero(values, factor[:, None])
            store_rows(grad_rows, first + nth, nth < count, columns, weight.D, values)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def finish_rows(
    sums, input, weight, vectors, grad_loss, kept, range_of_pulls, grad_input, grad_rows, grad_bias,
    B, C, S, ignore_index, factor: tl.float64, COSINE: tl.constexpr, PER_ROW: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of rows of input; and what each adds to that of its target's row, entry S + i.

    sums: (B, D) pulls @ rows of the class set. grad_input: (B, D), grad_rows: (S + B, D), grad_bias:
    (S + B,); None: not wanted, of the last two also where targets are among all classes.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    of_sums = load_factor(grad_loss, kept, range_of_pulls, B, ACC, PER_ROW)
    targets, counted, known, dlogits, pulls, dot, x_inverse, w_inverse = target_pulls(
        vectors.target, grad_loss, kept, rows, B, C, ignore_index,
        load_scale(factor, vectors.learned, ACC), ACC, PER_ROW,
    )  # fmt: skip
    if grad_bias is not None:
        tl.store(grad_bias + S + rows, dlogits, mask=rows < B)
    share = tl.zeros((BLOCK_ROWS,), ACC)
    target_share = share_along(product_or_zero(pulls, dot), w_inverse)
    for finishing in tl.static_range(0 if COSINE else 1, 2):
        for start in range(0, input.D, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            x = load_rows(input, rows, counted, columns, OPERAND).to(ACC)
            values = tl.zeros(x.shape, ACC)
            if sums is not None:
                values = load_elements(Matrix(sums, input.D, input.D, 1, None), rows, counted, columns)
                values = product_or_zero(values, of_sums[:, None])
            if vectors.class_ids is not None:
                w = load_rows(weight, targets, known, columns, OPERAND).to(ACC)
                values += pulled_along(w, pulls)
                if finishing == 1:
                    if grad_rows is not None:
                        of_target = pulled_along(x, pulls)
                        if COSINE:
                            of_target = without_share(of_target, target_share, w)
                        store_rows(grad_rows, S + rows, rows < B, columns, input.D, of_target)
            if finishing == 0:
                share += tl.sum(product_or_zero(values, x), 1)
            elif grad_input is not None:
                if COSINE:
                    values = without_share(values, share_along(share, x_inverse), x)
                values = tl.where(counted[:, None], values, 0.0)
                store_rows(grad_input, rows, rows < B, columns, input.D, values)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def finish_scale(slopes, grad_loss, kept, grad_scale, B, PER_ROW: tl.constexpr, BLOCK: tl.constexpr):
    """The scale's gradient, one program; slopes: (B,), each row's."""
    factor = load_factor(grad_loss, kept, None, B, tl.float64, PER_ROW)
    store_grad_scale(grad_loss, kept, slopes, B, factor, grad_scale, B, PER_ROW, BLOCK)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def sparse_ids(vectors, found, B, C, S, ignore_index, BLOCK: tl.constexpr):
    """The class of each row of the compact gradient, see `listed_ids`."""
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = listed_ids(vectors, Sizes(B, C, S, ignore_index), entries, BLOCK)
    tl.store(found + entries, ids, mask=entries < S + B)
