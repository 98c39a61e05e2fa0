"""What a chunk of a large problem takes besides its matrix products. Equations: forward.py and backward.py.

A chunk is some rows and some entries of the class set; its dot products lie in memory, (rows, entries).

    prepare_rows      input as products read it, and what there is one of for each row
    prepare_classes   rows of the class set as products read them, and the inverses of their norms
    chunk_terms       softmax terms of parts of the chunk's entries
    merge_terms       those of all parts, and the target's: the losses
    chunk_pulls       from dot products to pulls, and parts of the sums that bias and scale take
    add_parts         such parts, added up
    finish_classes, finish_rows, finish_vector, finish_scale      gradients, of the products' sums

Each number of a sum has one owner and one order: no atomics.
"""

import triton
import triton.language as tl

from .backward import (
    listed_ids,
    load_upstream,
    pulled_along,
    share_along,
    store_rows,
    target_pulls,
    without_share,
)
from .forward import store_losses_terms, target_logits
from .tiles import (
    KEPT,
    UNSPECIALIZED,
    Matrix,
    Sizes,
    in_range,
    inverse_norm,
    left_out,
    load_bias,
    load_classes,
    load_elements,
    load_hits,
    load_rows,
    load_scale,
    load_targets,
    logit_unit,
    product_or_zero,
    rounded,
    same,
    target_cosines,
    wide,
)

# A chunk has `rows` from `row` on and `entries` from `entry` on; a list has `count` from `first` on.
NOT_SPECIALIZED = [*UNSPECIALIZED, "row", "rows", "entry", "entries", "first", "count", "parts", "split"]


# ---- rows that products read -------------------------------------------------------------------------------


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def prepare_rows(
    input,
    weight,
    vectors,
    grad_loss,  # (B,), of each row; None: not given
    copies,  # (B, D)
    kept,  # None: not wanted
    B,
    C,
    ignore_index,
    COSINE: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Input, zeros where a row is ignored or its upstream gradient is 0: whatever it holds.

    Into `kept`: the dot product with the target's row, 1 / |input_i|, 1 / |weight_t|.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    targets, counted, known = load_targets(vectors.target, rows, B, C, ignore_index)
    if grad_loss is not None:
        counted &= tl.load(grad_loss + rows, mask=rows < B, other=0.0) != 0.0
    products = tl.zeros((BLOCK,), ACC)
    squares = tl.zeros((BLOCK,), ACC)
    target_squares = tl.zeros((BLOCK,), ACC)
    for start in range(0, input.D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        x = load_rows(input, rows, counted, columns, OPERAND)
        store_rows(copies, rows, rows < B, columns, input.D, x)
        if kept is not None:
            x = x.to(ACC)
            w = load_rows(weight, targets, known, columns, OPERAND).to(ACC)
            products += tl.sum(x * w, 1)
            squares += tl.sum(x * x, 1)
            target_squares += tl.sum(w * w, 1)
    if kept is not None:
        at = kept + wide(B) * 3 + rows
        if COSINE:
            tl.store(at, products, mask=rows < B)
            tl.store(at + B, inverse_norm(squares), mask=rows < B)
            tl.store(at + 2 * B, inverse_norm(target_squares), mask=rows < B)
        else:
            tl.store(at, in_range(products, input), mask=rows < B)
            one = tl.full((BLOCK,), 1.0, ACC)
            tl.store(at + B, one, mask=rows < B)
            tl.store(at + 2 * B, one, mask=rows < B)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def mark_targets(vectors, marks, B, C, ignore_index, BLOCK: tl.constexpr):
    """marks[target] = 1, of classes that take part though they may be left out of denominators."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    targets, _, known = load_targets(vectors.target, rows, B, C, ignore_index)
    tl.store(marks + targets, tl.full((BLOCK,), 1, tl.int8), mask=known)


@triton.jit
def class_rows(vectors, marks, entries, S, C, ACC: tl.constexpr):
    """(the row of `weight` of each entry, which take part); others are not read, whatever they hold."""
    ids, _, live, _ = load_classes(vectors.class_ids, vectors.counts, entries, S, C, ACC)
    if marks is not None:
        live |= tl.load(marks + entries, mask=entries < S, other=0) != 0
    return ids, live


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def prepare_classes(
    weight,
    vectors,
    marks,  # (S,), see `mark_targets`; None: only what is in denominators takes part
    copies,  # (count, D) rows of entries from `first` on; None: not wanted
    inverses,  # (S,) 1 / their norms; None: not wanted
    first,
    count,
    C,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    nth = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids, read = class_rows(vectors, marks, first + nth, first + count, C, ACC)
    squares = tl.zeros((BLOCK,), ACC)
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
    dots, vectors, kept, inverses, rows, entries, last_row, last_entry, at, B, C, ignore_index, scale, unit,
    COSINE: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """(logits in units, dot products, which rows count, hits, own targets, live entries, 1 / norms of both).

    (R, J) of pairs, (R,) of rows, (J,) of entries. Logits are -inf of entries that are left out.
    """
    ACC: tl.constexpr = dots.dtype.element_ty
    row_there, entry_there = rows < last_row, entries < last_entry
    found = tl.load(dots + at, mask=row_there[:, None] & entry_there[None, :], other=0.0)
    if NARROW:  # products of float32 rows in float64: infinite where float32 ends
        found = tl.where(tl.abs(found) > (2 - 2**-23) * 2.0**127, found * float("inf"), found)
    targets, counted, known = load_targets(vectors.target, rows, B, C, ignore_index)
    counted &= row_there
    ids, corrections, live, wrong = load_classes(
        vectors.class_ids, vectors.counts, entries, last_entry, C, ACC
    )
    x_inverse = tl.zeros(rows.shape, ACC) + 1.0
    w_inverse = tl.zeros(entries.shape, ACC) + 1.0
    if COSINE:
        x_inverse = tl.load(kept + 4 * wide(B) + rows, mask=counted, other=0.0).to(ACC)
        w_inverse = tl.load(inverses + entries, mask=entry_there, other=0.0)
    offsets = (load_bias(vectors.bias, ids, live, ACC) - corrections) / unit
    offsets = tl.where(live, offsets, tl.where(wrong, float("nan"), float("-inf")))
    logits = (found * w_inverse[None, :]) * ((scale / unit) * x_inverse)[:, None] + offsets[None, :]
    hits = load_hits(
        vectors.entry_labels, vectors.target_labels, ids, targets, entries, last_entry, rows, counted, C
    )
    is_own = same(ids, targets, C) & known[:, None]
    return logits, found, counted, hits, is_own, live, x_inverse, w_inverse


@triton.jit
def places(rows, entries, row, entry, width):
    """(R, J) where pairs are in a chunk."""
    return (rows - row).to(tl.int64)[:, None] * width + (entries - entry)[None, :]


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def chunk_terms(
    dots,  # (rows, entries)
    vectors,
    kept,
    inverses,  # (S,) 1 / |weight_j|
    partials,  # (2, splits, B): the largest o, in units, and sum exp(o - largest) of each split
    B,
    C,
    ignore_index,
    row,
    rows,
    entry,
    entries,
    split,  # the chunk's first
    splits,  # of all chunks
    factor: tl.float64,
    COSINE: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program (b, s): a tile of rows and every so manyth tile of entries, from the s-th on."""
    ACC: tl.constexpr = dots.dtype.element_ty
    nth = row + tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    scale = load_scale(factor, vectors.learned, ACC)
    unit = logit_unit(scale, COSINE)
    largest = tl.full((BLOCK_B,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_B,), ACC)
    for start in range(tl.program_id(1) * BLOCK_S, entries, tl.num_programs(1) * BLOCK_S):
        among = entry + start + tl.arange(0, BLOCK_S)
        logits, _, _, hits, _, _, _, _ = chunk_logits(
            dots, vectors, kept, inverses, nth, among, row + rows, entry + entries,
            places(nth, among, row, entry, entries), B, C, ignore_index, scale, unit, COSINE, NARROW,
        )  # fmt: skip
        logits = tl.where(hits, float("-inf"), logits)
        larger = tl.maximum(largest, tl.max(logits, 1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp((largest - shift) * unit)
        total += tl.sum(tl.exp((logits - shift[:, None]) * unit), 1)
        largest = larger
    at = partials + (split + tl.program_id(1)).to(tl.int64) * B + nth
    tl.store(at, largest, mask=nth < row + rows)
    tl.store(at + wide(splits) * B, total, mask=nth < row + rows)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def merge_terms(
    vectors,
    partials,  # (2, splits, B)
    kept,  # (KEPT, B)
    losses,  # (B,)
    B,
    C,
    ignore_index,
    row,
    rows,
    splits,
    factor: tl.float64,
    COSINE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Of rows from `row` on."""
    nth = row + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale = load_scale(factor, vectors.learned, tl.float64)
    unit = logit_unit(scale.to(ACC), COSINE).to(tl.float64)
    targets, counted, known = load_targets(vectors.target, nth, row + rows, C, ignore_index)
    own = target_logits(
        vectors.target_logit, vectors.target_counts, vectors.bias, kept, nth, targets, counted, known,
        B, scale, unit,
    )  # fmt: skip
    own = own.to(ACC).to(tl.float64)  # as the others: what is equal stays so
    largest_other = tl.full((BLOCK,), float("-inf"), tl.float64)
    others = tl.zeros((BLOCK,), tl.float64)
    largest = own
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        at = partials + split.to(tl.int64)[:, None] * B + nth[None, :]
        there = (split < splits)[:, None] & counted[None, :]
        largest_of = tl.load(at, mask=there, other=float("-inf")).to(tl.float64)
        total_of = tl.load(at + wide(splits) * B, mask=there, other=0.0).to(tl.float64)
        largest_other = tl.maximum(largest_other, tl.max(largest_of, 0))
        larger = tl.maximum(largest, largest_other)
        terms = tl.where(total_of == 0.0, 0.0, total_of * tl.exp((largest_of - larger[None, :]) * unit))
        others = tl.where(others == 0.0, 0.0, others * tl.exp((largest - larger) * unit)) + tl.sum(terms, 0)
        largest = larger
    there = nth < row + rows
    found = store_losses_terms(kept, nth, counted, there, own, largest_other, largest, others, unit, B)
    tl.store(losses + nth, found, mask=there)
    tl.store(kept + wide(B) * KEPT, tl.full((), 1.0, tl.float64))  # what is reduced writes its own


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


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def chunk_pulls(
    dots,  # (rows, entries)
    vectors,
    grad_loss,  # (B,), of each row; None: pulls are made for an upstream gradient of 1
    kept,
    inverses,
    range_of_pulls,  # (), see `pull_range`; None: 1
    pulls,  # (rows, entries)
    bias_parts,  # (tiles of rows, entries); None: not wanted
    scale_parts,  # (tiles of entries, rows); None: not wanted
    B,
    C,
    ignore_index,
    row,
    rows,
    entry,
    entries,
    factor: tl.float64,
    COSINE: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program b * tiles of entries + t: pulls of a tile of rows and a tile of entries, and their sums.

    Either has more tiles, in one chunk or another, than a grid's second axis has programs.
    """
    ACC: tl.constexpr = dots.dtype.element_ty
    class_tiles = tl.cdiv(entries, BLOCK_S)
    row_tile, class_tile = tl.program_id(0) // class_tiles, tl.program_id(0) % class_tiles
    nth = row + row_tile * BLOCK_B + tl.arange(0, BLOCK_B)
    among = entry + class_tile * BLOCK_S + tl.arange(0, BLOCK_S)
    at = places(nth, among, row, entry, entries)
    scale = load_scale(factor, vectors.learned, ACC)
    unit = logit_unit(scale, COSINE)
    logits, found, counted, hits, is_own, live, x_inverse, w_inverse = chunk_logits(
        dots, vectors, kept, inverses, nth, among, row + rows, entry + entries, at, B, C, ignore_index,
        scale, unit, COSINE, NARROW,
    )  # fmt: skip
    upstream = tl.where(counted, 1.0, 0.0).to(ACC)
    if grad_loss is not None:
        upstream = load_upstream(grad_loss, kept, nth, counted, B, ACC, True)
    largest = tl.load(kept + nth, mask=counted, other=0.0).to(ACC)
    largest = tl.where(largest == float("-inf"), 0.0, largest)  # -inf less it is to stay
    inverse_total = tl.load(kept + wide(B) + nth, mask=counted, other=0.0).to(ACC)
    # Of nearly equal logits that are rounded otherwise than in the merging, one can be above the largest.
    probs = tl.exp(tl.minimum(logits - largest[:, None], 0.0) * unit) * inverse_total[:, None]
    own = tl.zeros(nth.shape, ACC)
    if vectors.class_ids is None:  # a target is a column like any other
        own = tl.load(kept + 2 * wide(B) + nth, mask=counted, other=0.0).to(ACC)
    probs = left_out(probs, hits, is_own, own, vectors)
    factors = product_or_zero(scale * x_inverse, upstream)
    if range_of_pulls is not None:
        factors *= tl.load(range_of_pulls)
    # A zero row has inverse norm 0: nothing passes through it, even of an infinite upstream.
    made = product_or_zero(probs, factors[:, None])
    if COSINE:
        made = product_or_zero(w_inverse[None, :], made)
    row_there, entry_there = nth < row + rows, among < entry + entries
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


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
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


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def finish_classes(
    sums,  # (count, D) pulls^T @ input, of entries from `first` on
    weight,
    vectors,
    marks,
    grad_loss,
    kept,
    range_of_pulls,
    grad_rows,  # of all entries
    B,
    C,
    first,
    count,
    COSINE: tl.constexpr,
    PER_ROW: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradients of class rows: what is at right angles to them, of cosines."""
    ACC: tl.constexpr = sums.dtype.element_ty
    nth = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids, read = class_rows(vectors, marks, first + nth, first + count, C, ACC)
    factor = load_factor(grad_loss, kept, range_of_pulls, B, ACC, PER_ROW)
    of_sums = Matrix(sums, weight.D, weight.D, 1)
    along = tl.zeros((BLOCK,), ACC)
    squares = tl.zeros((BLOCK,), ACC)
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


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def finish_rows(
    sums,  # (B, D) pulls @ rows of the class set
    input,
    weight,
    vectors,
    grad_loss,
    kept,
    range_of_pulls,
    grad_input,  # (B, D); None: not wanted
    grad_rows,  # (S + B, D): of targets, S on; None: not wanted, or targets are among all classes
    grad_bias,  # (S + B,), likewise
    B,
    C,
    S,
    ignore_index,
    factor: tl.float64,
    COSINE: tl.constexpr,
    PER_ROW: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradients of rows of input; and what each adds to that of its target's row, entry S + i."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    of_sums = load_factor(grad_loss, kept, range_of_pulls, B, ACC, PER_ROW)
    targets, counted, known, dlogits, pulls, dot, x_inverse, w_inverse = target_pulls(
        vectors.target, grad_loss, kept, rows, B, C, ignore_index,
        load_scale(factor, vectors.learned, ACC), ACC, PER_ROW,
    )  # fmt: skip
    if grad_bias is not None:
        tl.store(grad_bias + S + rows, dlogits, mask=rows < B)
    share = tl.zeros((BLOCK,), ACC)
    target_share = share_along(product_or_zero(pulls, dot), w_inverse)
    for finishing in tl.static_range(0 if COSINE else 1, 2):
        for start in range(0, input.D, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            x = load_rows(input, rows, counted, columns, OPERAND).to(ACC)
            values = tl.zeros(x.shape, ACC)
            if sums is not None:
                values = load_elements(Matrix(sums, input.D, input.D, 1), rows, counted, columns)
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


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def finish_vector(sums, grad_loss, kept, found, B, count, PER_ROW: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of the entries' bias."""
    nth = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    factor = load_factor(grad_loss, kept, None, B, sums.dtype.element_ty, PER_ROW)
    values = product_or_zero(tl.load(sums + nth, mask=nth < count, other=0.0), factor)
    tl.store(found + nth, rounded(values, found.dtype.element_ty), mask=nth < count)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def finish_scale(sums, grad_loss, kept, found, B, PER_ROW: tl.constexpr, BLOCK: tl.constexpr):
    """The scale's gradient, one program: the sum of the rows' slopes; NaN beside a loss that is."""
    factor = load_factor(grad_loss, kept, None, B, tl.float64, PER_ROW)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, B, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        own = tl.load(kept + 2 * wide(B) + rows, mask=rows < B, other=0.0)
        upstream = load_upstream(grad_loss, kept, rows, rows < B, B, tl.float64, PER_ROW)
        total += product_or_zero(own - own, upstream)
        slopes = tl.load(sums + rows, mask=rows < B, other=0.0).to(tl.float64)
        total += product_or_zero(slopes, factor)
    one = tl.zeros((1,), tl.int64)
    tl.store(found + one, rounded(tl.sum(total, 0) + tl.zeros((1,), tl.float64), found.dtype.element_ty))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def sparse_ids(vectors, found, B, C, S, ignore_index, BLOCK: tl.constexpr):
    """The class of each row of the compact gradient, see `listed_ids`."""
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = listed_ids(vectors, Sizes(B, C, S, ignore_index), entries, BLOCK)
    tl.store(found + entries, ids, mask=entries < S + B)
