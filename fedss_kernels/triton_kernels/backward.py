"""The gradients, from tiles computed again. With p = exp(o - largest) / sum and g_i the upstream of row i:

    dlogits(i, j) = g_i * p(i, j)                     0 for accidental hits; the target's own: g_i * (p_t - 1)
    pulls(i, j)   = scale * dlogits(i, j) * input_inverse_i * weight_inverse_j
    grad_input_i  = sum_j pulls(i, j) * weight_j - share_i * input_i
    grad_weight_j = sum_i pulls(i, j) * input_i  - share_j * weight_j
    share_i       = input_inverse_i^2  * sum_d (sum_j pulls(i, j) * weight_j)_d * input_id
    share_j       = weight_inverse_j^2 * sum_i pulls(i, j) * dots(i, j)
    grad_scale    = sum of dlogits(i, j) * (cosine(i, j) - cosine(i, t))      as dlogits add up to 0 in a row

For the dot product inverses are 1, and the second terms, which take out what lies along the row, are not
there. They are made of what was rounded: share_j of the pulls as they were multiplied, share_i of the sum as
it came out. So all that a pull adds is at right angles to the row, and what the sum lost along it goes too.

A small problem takes two launches: `small_tiles`, a tile of classes for each program with all the rows (of
long ones a group of columns, each with the tile's logits), then `small_results`, which adds up what the
programs found. A large one goes over the classes in chunks: `pull_chunk` stores a chunk of pulls,
`chunk_grad_rows` and `chunk_grad_input` are products with it, of rows that `class_sources` and
`target_sources` have listed, and `small_results` ends it too. No atomics: each sum has one owner and one
order.
"""

import triton
import triton.language as tl

from .tiles import (
    UNSPECIALIZED,
    add_block,
    add_product,
    along_inputs,
    dots_and_inverses,
    exponentials,
    load_classes,
    load_elements,
    load_rows,
    load_scale,
    load_targets,
    logit_unit,
    logits_of,
    product_or_zero,
    rounded,
    same,
    target_cosines,
    two_parts,
    unit_of_low_parts,
    wide,
)


@triton.jit
def load_upstream(grad_loss, kept, rows, counted, B, ACC: tl.constexpr, PER_ROW: tl.constexpr):
    """(R,) upstream gradient of each row's loss: its own, or one for all by the factor of "mean"."""
    if PER_ROW:
        upstream = tl.load(grad_loss + rows, mask=rows < B, other=0.0).to(ACC)
    else:
        upstream = tl.load(grad_loss).to(ACC) * tl.load(kept + wide(B) * 6).to(ACC)
    return tl.where(counted, upstream, 0.0)


@triton.jit
def cosines_beyond_target(
    dots, low, x_inverse, w_inverse, scale, kept, rows, known, B,
    COSINE: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """cosine(i, j) - cosine(i, t) (R, J), or that of dot products, with the digits of small differences."""
    if WIDE != ACC:
        at = kept + 3 * wide(B) + rows
        own = tl.load(at, mask=known, other=0.0) * tl.load(at + 2 * wide(B), mask=known, other=0.0)
        own_high, own_low = two_parts(own)
        high, low = along_inputs(dots, low, w_inverse, COSINE)
        factor = x_inverse.to(ACC)
        largest = tl.load(kept + rows, mask=known, other=0.0).to(ACC)
        low_unit = unit_of_low_parts(largest, logit_unit(scale.to(ACC), COSINE))
        factor_low = tl.where(low_unit == 0.0, 0.0, factor)
        return (high - own_high[:, None]) * factor[:, None] + (low - own_low[:, None]) * factor_low[:, None]
    else:  # in another order than in the logits: computed again, not held in registers
        own = target_cosines(kept, rows, known, B, ACC)
        return dots * w_inverse[None, :] * x_inverse[:, None] - own[:, None]


@triton.jit
def pulls_tile(
    input, weight, inverses, target, class_ids, counts, bias, grad_loss, kept, rows, entries,
    B, C, S, D, ignore_index, input_row, input_column, weight_row, weight_column, scale,
    FOLD: tl.constexpr,  # every class is in the set: a target is a column of the tile like any other
    COSINE: tl.constexpr, PER_ROW: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """(dlogits, pulls, along, slopes (R, J); which rows are read (R,); ids, which are, 1 / |weight_j| (J,))

    along: pulls * dots; slopes: what adds up to the scale's gradient
    """
    targets, counted, known = load_targets(target, rows, B, C, ignore_index)
    upstream = load_upstream(grad_loss, kept, rows, counted, B, ACC, PER_ROW)
    # Of a row with an upstream of 0 nothing is read here: it pulls nothing, and nothing pulls it.
    counted &= upstream != 0.0
    ids, corrections, live, _ = load_classes(class_ids, counts, entries, S, C, WIDE)
    hits = same(ids, targets, C)
    read = live
    if FOLD:
        read = live | ((entries < S) & (tl.max((hits & known[:, None]).to(tl.int32), 0) > 0))
    sums, low, x_inverse, w_inverse = dots_and_inverses(
        input, weight, inverses, kept, rows, counted, entries, ids, read, B, D,
        input_row, input_column, weight_row, weight_column,
        COSINE, OPERAND, ACC, WIDE, PRECISION, BLOCK_D, PREFETCH,
    )  # fmt: skip
    unit = logit_unit(scale.to(ACC), COSINE)
    logits, logits_low = logits_of(
        sums, low, x_inverse, w_inverse, scale, unit, bias, ids, live, entries < 0, corrections,
        COSINE, ACC, WIDE,
    )  # fmt: skip
    largest = tl.load(kept + rows, mask=counted, other=0.0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)  # -inf less it is to stay
    inverse_total = tl.load(kept + wide(B) + rows, mask=counted, other=0.0).to(ACC)
    # The forward pass may have rounded otherwise: at large scales a logit can come out above the largest.
    if WIDE != ACC:
        most, most_low = two_parts(largest)
        exponents = tl.minimum(logits - most[:, None], 0.0) * unit
        low_unit = unit_of_low_parts(most, unit)
        probs = exponentials(exponents, (logits_low - most_low[:, None]) * low_unit[:, None], True)
    else:
        probs = tl.exp(tl.minimum(logits - largest.to(ACC)[:, None], 0.0) * unit)
    probs *= inverse_total[:, None]  # 0 of rows that do not count; NaN, of all, beside a wrong class
    own = tl.zeros(rows.shape, ACC)
    if FOLD:
        own = tl.load(kept + 2 * wide(B) + rows, mask=known & counted, other=0.0).to(ACC)
    probs = tl.where(hits, own[:, None], probs)
    dlogits = product_or_zero(probs, upstream[:, None])
    # A zero row has inverse norm 0: nothing passes through it, even of an infinite upstream.
    if WIDE != ACC:  # one factor after the other: a product of both may be 0, and a NaN must not vanish in it
        pulls = product_or_zero((scale * x_inverse).to(ACC)[:, None], dlogits)
        pulls = product_or_zero(w_inverse.to(ACC)[None, :], pulls)
    else:
        pulls = product_or_zero(probs, product_or_zero(scale * x_inverse, upstream)[:, None])
        if COSINE:
            pulls = product_or_zero(w_inverse[None, :], pulls)
    if OPERAND != tl.float16:
        pulls = rounded(pulls, OPERAND)
    beyond = cosines_beyond_target(
        sums, low, x_inverse, w_inverse, scale, kept, rows, known, B, COSINE, ACC, WIDE
    )  # fmt: skip
    if FOLD and WIDE != ACC:
        beyond = tl.where(hits, 0.0, beyond)  # exactly: its dlogits are as large as all others' together
    # Of what takes part, a dlogit of 0 too: of a logit of -inf it makes NaN.
    sloping = live[None, :] & (upstream != 0.0)[:, None] & (beyond != 0.0)
    slopes = tl.where(sloping, dlogits * beyond, 0.0)
    along = product_or_zero(pulls.to(ACC), sums)
    return dlogits, pulls, along, slopes, counted, ids, read, w_inverse


@triton.jit
def to_tf32(values):
    """float32 to the nearest of tf32's numbers; what is not finite stays."""
    bits = values.to(tl.uint32, bitcast=True)
    nearest = ((bits + 0xFFF + ((bits >> 13) & 1)) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(values) < float("inf"), nearest, values)


@triton.jit
def add_pulled(high, low, pulls, rows, OPERAND: tl.constexpr, PRECISION: tl.constexpr, EXACTLY: tl.constexpr):
    """high + low + pulls @ rows as two parts.

    Beside float16 rows pulls are float32, as float16 is too narrow for small ones: multiplied as two of tf32.
    """
    if OPERAND == tl.float16:
        first, exact = to_tf32(pulls), rows.to(tl.float32)
        second = tl.where(tl.abs(pulls) < float("inf"), pulls - first, 0.0)
        return add_product(add_product(high, second, exact, "tf32"), first, exact, "tf32"), low
    else:
        return add_block(high, low, pulls, rows, PRECISION, EXACTLY)


@triton.jit
def pulled(pulls, rows, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """pulls @ rows"""
    zeros = tl.zeros((pulls.shape[0], rows.shape[1]), ACC)
    return add_pulled(zeros, zeros, pulls, rows, OPERAND, PRECISION, False)[0]


@triton.jit
def target_pulls(
    target, grad_loss, kept, rows, B, C, ignore_index, scale, ACC: tl.constexpr, PER_ROW: tl.constexpr
):
    """Of own targets: (classes, counted, known, dlogits, pulls, dots, 1 / |input|, 1 / |weight_t|)."""
    targets, counted, known = load_targets(target, rows, B, C, ignore_index)
    at, inside = kept + 2 * wide(B) + rows, rows < B  # loads that do not wait for the targets'
    own = tl.load(at, mask=inside, other=0.0).to(ACC)
    dot = tl.load(at + B, mask=inside, other=0.0).to(ACC)
    x_inverse = tl.load(at + 2 * wide(B), mask=inside, other=0.0).to(ACC)
    w_inverse = tl.load(at + 3 * wide(B), mask=inside, other=0.0).to(ACC)
    own = tl.where(known, own, tl.where(counted, float("nan"), 0.0))
    x_inverse, w_inverse = tl.where(known, x_inverse, 0.0), tl.where(known, w_inverse, 0.0)
    dlogits = product_or_zero(own, load_upstream(grad_loss, kept, rows, counted, B, ACC, PER_ROW))
    pulls = product_or_zero(scale * x_inverse * w_inverse, dlogits)
    return targets, counted, known, dlogits, pulls, dot, x_inverse, w_inverse


@triton.jit
def pulled_along(rows, pulls):
    """Rows (R, D), each times its pull: 0 where either is, but NaN where the pull is."""
    zero = tl.where(pulls == pulls, 0.0, pulls)[:, None]
    return tl.where((rows == 0.0) | (pulls == 0.0)[:, None], zero, rows * pulls[:, None])


@triton.jit
def share_along(along, inverse):
    """along * inverse^2: how much of a row's own direction is in the sum of what was pulled to it."""
    return product_or_zero(inverse * inverse, along)


@triton.jit
def without_share(values, share, rows):
    """values - share * rows, in the dtype of share"""
    return values.to(share.dtype) - product_or_zero(share[:, None], rows.to(share.dtype))


@triton.jit
def store_rows(matrix, rows, inside, columns, D, values):
    """Rows of a contiguous (N, D) matrix."""
    at = matrix + rows.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(at, rounded(values, matrix.dtype.element_ty), mask=inside[:, None] & (columns < D)[None, :])


@triton.jit
def store_target_rows(
    input, weight, target, grad_loss, kept, grad_rows, grad_bias, rows, columns, B, C, S, D, ignore_index,
    input_row, input_column, weight_row, weight_column, scale,
    COSINE: tl.constexpr, PER_ROW: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What row i adds to the gradient of its target's row and bias: entry S + i of the compact gradient."""
    targets, _, known, dlogits, pulls, dot, _, w_inverse = target_pulls(
        target, grad_loss, kept, rows, B, C, ignore_index, scale, ACC, PER_ROW
    )
    if grad_rows is not None:
        x = load_rows(input, rows, known, columns, D, input_row, input_column, OPERAND).to(ACC)
        values = pulled_along(x, pulls)
        if COSINE:
            w = load_rows(weight, targets, known, columns, D, weight_row, weight_column, OPERAND)
            values = without_share(values, share_along(product_or_zero(pulls, dot), w_inverse), w)
        store_rows(grad_rows, S + rows, rows < B, columns, D, values)
    if grad_bias is not None:
        tl.store(grad_bias + S + rows, dlogits, mask=rows < B)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def small_tiles(
    input,
    weight,
    target,
    class_ids,
    counts,
    bias,
    learned,
    grad_loss,
    kept,
    grad_rows,  # (S + B, D), or (C, D) with FOLD; None: not wanted
    grad_bias,  # (S + B,), or (C,) with FOLD; None: not wanted
    partial_input,  # (tiles of classes, B, D); None: not wanted
    partial_along,  # (tiles of classes, groups, B), that times input; None: not wanted, or no cosine
    partial_scale,  # (tiles of classes, B); None: not wanted
    B,
    C,
    S,
    D,
    ignore_index,
    input_row,
    input_column,
    weight_row,
    weight_column,
    factor: tl.float64,
    FOLD: tl.constexpr,
    COSINE: tl.constexpr,
    PER_ROW: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Program (t, g): all rows, the t-th tile of classes, every groups-th block of columns from the g-th on.

    The last t, without FOLD: the rows' own targets.
    """
    tile, group = tl.program_id(0), tl.program_id(1)
    step = tl.num_programs(1) * BLOCK_D
    scale = load_scale(factor, learned, WIDE)
    rows = tl.arange(0, BLOCK_B)
    if tile < tl.cdiv(S, BLOCK_S):
        entries = tile * BLOCK_S + tl.arange(0, BLOCK_S)
        dlogits, pulls, along, slopes, counted, ids, read, w_inverse = pulls_tile(
            input, weight, None, target, class_ids, counts, bias, grad_loss, kept, rows, entries,
            B, C, S, D, ignore_index, input_row, input_column, weight_row, weight_column, scale,
            FOLD, COSINE, PER_ROW, OPERAND, ACC, WIDE, PRECISION, BLOCK_D, PREFETCH,
        )  # fmt: skip
        share_classes = share_along(tl.sum(along, 0), w_inverse)
        if group == 0:
            if partial_scale is not None:
                tl.store(partial_scale + tile.to(tl.int64) * B + rows, tl.sum(slopes, 1), mask=rows < B)
            if grad_bias is not None:
                of_bias = rounded(tl.sum(dlogits, 0), grad_bias.dtype.element_ty)
                tl.store(grad_bias + entries, of_bias, mask=entries < S)
        along_rows = tl.zeros((BLOCK_B,), WIDE)
        columns = group * BLOCK_D + tl.arange(0, BLOCK_D)
        if PREFETCH:
            next_x = load_elements(input, rows, counted, columns, D, input_row, input_column)
            next_w = load_elements(weight, ids, read, columns, D, weight_row, weight_column)
        for start in range(group * BLOCK_D, D, step):
            columns = start + tl.arange(0, BLOCK_D)
            if PREFETCH:
                x, w = next_x, next_w
                next_x = load_elements(input, rows, counted, step + columns, D, input_row, input_column)
                next_w = load_elements(weight, ids, read, step + columns, D, weight_row, weight_column)
            else:
                w = load_elements(weight, ids, read, columns, D, weight_row, weight_column)
            w = rounded(w, OPERAND)
            if grad_rows is not None:
                if not PREFETCH:
                    x = load_elements(input, rows, counted, columns, D, input_row, input_column)
                x = rounded(x, OPERAND)
                values = pulled(tl.trans(pulls), x, OPERAND, ACC, PRECISION)
                if COSINE:
                    values = without_share(values, share_classes, w)
                store_rows(grad_rows, entries, entries < S, columns, D, values)
            if partial_input is not None:
                values = pulled(pulls, w, OPERAND, ACC, PRECISION)
                if partial_along is not None:  # loaded again: it is not held in registers meanwhile
                    x = load_rows(input, rows, counted, columns, D, input_row, input_column, OPERAND)
                    along_rows += tl.sum(values.to(WIDE) * x.to(WIDE), 1)
                store_rows(partial_input + tile.to(tl.int64) * B * D, rows, rows < B, columns, D, values)
        if partial_along is not None:
            at = (tile.to(tl.int64) * tl.num_programs(1) + group) * B + rows
            tl.store(partial_along + at, along_rows, mask=rows < B)
    else:
        for start in range(group * BLOCK_D, tl.maximum(D, 1), step):  # the bias is there without columns too
            store_target_rows(
                input, weight, target, grad_loss, kept, grad_rows, grad_bias, rows,
                start + tl.arange(0, BLOCK_D), B, C, S, D, ignore_index,
                input_row, input_column, weight_row, weight_column, scale, COSINE, PER_ROW, OPERAND, WIDE,
            )  # fmt: skip


@triton.jit
def finish_input_row(
    input, weight, target, grad_loss, kept, partial_input, partial_along, grad_input,
    row, columns, tiles, parts, B, C, D, ignore_index,
    input_row, input_column, weight_row, weight_column, scale,
    FOLD: tl.constexpr, COSINE: tl.constexpr, PER_ROW: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr,
    BLOCK_TILES: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """The gradient of a row of input, some columns: the tiles' sums and the target's, less what is along."""
    rows = row + tl.zeros((1,), tl.int32)
    targets, counted, known, _, pulls, dot, x_inverse, _ = target_pulls(
        target, grad_loss, kept, rows, B, C, ignore_index, scale, ACC, PER_ROW
    )
    values = tl.zeros((1, columns.shape[0]), ACC)
    if COSINE:  # loaded before the tiles' sums, used after them: all are on their way at once
        x = load_elements(input, rows, known, columns, D, input_row, input_column)
        part = tl.arange(0, BLOCK_PARTS)
        along_of = tl.load(partial_along + part.to(tl.int64) * B + row, mask=part < parts, other=0.0)
    if not FOLD:
        w = load_elements(weight, targets, known, columns, D, weight_row, weight_column)
    for start in range(0, tiles, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)
        at = tile.to(tl.int64) * B + row
        inside = (tile < tiles)[:, None] & (columns < D)[None, :]
        found = tl.load(partial_input + at[:, None] * D + columns[None, :], mask=inside, other=0.0)
        values += tl.sum(found.to(ACC), 0)[None, :]
    if not FOLD:
        values += pulled_along(rounded(w, OPERAND).to(ACC), pulls)
    if COSINE:
        for start in range(BLOCK_PARTS, parts, BLOCK_PARTS):
            part = start + tl.arange(0, BLOCK_PARTS)
            along_of += tl.load(partial_along + part.to(tl.int64) * B + row, mask=part < parts, other=0.0)
        along = tl.sum(along_of, 0) + tl.zeros((1,), ACC)
        if not FOLD:
            along += product_or_zero(pulls, dot)
        values = without_share(values, share_along(along, x_inverse), rounded(x, OPERAND))
    values = tl.where(counted[:, None], values, 0.0)  # 0 times what a class holds, NaN too
    store_rows(grad_input, rows, rows < B, columns, D, values)


@triton.jit
def entry_ids(class_ids, target, entries, B, C, S, ignore_index):
    """Classes of the compact gradient's rows, the set's and then the targets'; -1 for what has none."""
    ids = tl.load(class_ids + entries, mask=entries < S, other=-1)
    targets, _, known = load_targets(target, entries - S, B, C, ignore_index)
    of_target = (entries >= S) & (entries < S + B)
    return tl.where(of_target, tl.where(known, targets, -1), tl.where((ids >= 0) & (ids < C), ids, -1))


@triton.jit
def taking_part(class_ids, counts, target, entries, B, C, S, ignore_index):
    """The same, -1 for entries of the set that are left out too."""
    ids = entry_ids(class_ids, target, entries, B, C, S, ignore_index)
    if counts is not None:
        corrections = tl.load(counts + entries, mask=entries < S, other=0.0)
        ids = tl.where(corrections < float("inf"), ids, -1)
    return ids


@triton.jit
def first_class(class_ids, counts, target, B, C, S, ignore_index, BLOCK: tl.constexpr):
    """The class of the first entry that takes part, -1 where none does."""
    found = wide(-1)
    start = 0
    while (start < S + B) & (found < 0):
        among = start + tl.arange(0, BLOCK)
        ids = taking_part(class_ids, counts, target, among, B, C, S, ignore_index)
        first = tl.min(tl.where(ids >= 0, among, S + B), 0)
        found = tl.max(tl.where(among == first, ids, -1), 0)
        start += BLOCK
    return found


@triton.jit
def listed_ids(class_ids, counts, target, entries, B, C, S, ignore_index, BLOCK: tl.constexpr):
    """The classes that a sparse gradient lists: an entry that takes no part repeats the first that does.

    Where none does, the first class of the set, if there is one.
    """
    ids = taking_part(class_ids, counts, target, entries, B, C, S, ignore_index)
    if tl.min(ids, 0) < 0:
        repeated = first_class(class_ids, counts, target, B, C, S, ignore_index, BLOCK)
        if repeated < 0:
            repeated = first_class(class_ids, None, target, B, C, S, ignore_index, BLOCK)
        ids = tl.where(ids < 0, tl.maximum(repeated, 0), ids)
    return ids


@triton.jit(do_not_specialize=UNSPECIALIZED)
def sparse_ids(class_ids, counts, target, found, B, C, S, ignore_index, BLOCK_S: tl.constexpr):
    """The class of each row of the compact gradient, see `listed_ids`."""
    entries = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    ids = listed_ids(class_ids, counts, target, entries, B, C, S, ignore_index, BLOCK_S)
    tl.store(found + entries, ids, mask=entries < S + B)


@triton.jit
def spread_entry(
    class_ids, target, grad_rows, grad_bias, grad_weight, grad_class_bias, entry, columns,
    B, C, S, D, ignore_index, first_columns, ACC: tl.constexpr, BLOCK_ENTRIES: tl.constexpr,
):  # fmt: skip
    """The first entry of a class adds up all of them, in order, and stores the class' dense row."""
    own = tl.max(entry_ids(class_ids, target, entry + tl.zeros((1,), tl.int32), B, C, S, ignore_index), 0)
    first = entry
    last = entry
    for start in range(0, S + B, 16 * BLOCK_ENTRIES):
        among = start + tl.arange(0, 16 * BLOCK_ENTRIES)
        alike = entry_ids(class_ids, target, among, B, C, S, ignore_index) == own
        first = tl.minimum(first, tl.min(tl.where(alike, among, entry), 0))
        last = tl.maximum(last, tl.max(tl.where(alike, among, entry), 0))
    if (first == entry) & (own >= 0):
        values = tl.zeros((1, columns.shape[0]), ACC)
        of_bias = tl.zeros((1,), ACC)
        for start in range(entry, last + 1, BLOCK_ENTRIES):
            entries = start + tl.arange(0, BLOCK_ENTRIES)
            same = entry_ids(class_ids, target, entries, B, C, S, ignore_index) == own
            if tl.max(same.to(tl.int32), 0) > 0:
                if grad_rows is not None:
                    at = grad_rows + entries.to(tl.int64)[:, None] * D + columns[None, :]
                    found = tl.load(at, mask=same[:, None] & (columns < D)[None, :], other=0.0)
                    values += tl.sum(found.to(ACC), 0)[None, :]
                if grad_bias is not None:
                    of_bias += tl.sum(tl.load(grad_bias + entries, mask=same, other=0.0), 0)
        at_class = own + tl.zeros((1,), tl.int64)
        if grad_rows is not None:
            store_rows(grad_weight, at_class, at_class >= 0, columns, D, values)
        if grad_bias is not None:
            if first_columns:
                tl.store(grad_class_bias + at_class, rounded(of_bias, grad_class_bias.dtype.element_ty))


@triton.jit
def finish_scale(
    grad_loss, kept, partial_scale, grad_scale, tiles, B,
    PER_ROW: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of the scale: the sum of the tiles' sums; NaN beside a loss that is, in no tile too."""
    total = tl.zeros((), tl.float64)
    for first in range(0, B, BLOCK_ROWS):
        rows = first + tl.arange(0, BLOCK_ROWS)
        own = tl.load(kept + 2 * wide(B) + rows, mask=rows < B, other=0.0)
        upstream = load_upstream(grad_loss, kept, rows, rows < B, B, tl.float64, PER_ROW)
        total += tl.sum(product_or_zero(own - own, upstream), 0)
        for start in range(0, tiles, BLOCK_TILES):
            tile = start + tl.arange(0, BLOCK_TILES)
            inside = (tile < tiles)[:, None] & (rows < B)[None, :]
            at = tile.to(tl.int64)[:, None] * B + rows[None, :]
            found = tl.load(partial_scale + at, mask=inside, other=0.0).to(tl.float64)
            total += tl.sum(tl.sum(found, 0), 0)
    one = tl.zeros((1,), tl.int64)
    tl.store(grad_scale + one, rounded(total + tl.zeros((1,), tl.float64), grad_scale.dtype.element_ty))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def small_results(
    input,
    weight,
    target,
    class_ids,
    counts,
    learned,
    grad_loss,
    kept,
    grad_rows,  # (S + B, D); None: nothing to spread
    grad_bias,  # (S + B,)
    partial_input,  # (tiles, B, D)
    partial_along,  # (parts, B)
    partial_scale,  # (tiles, B)
    grad_input,  # (B, D)
    grad_weight,  # (C, D) zeros
    grad_class_bias,  # (C,) zeros
    grad_scale,  # ()
    found,  # (S + B,) classes of a sparse gradient's rows, see `sparse_ids`
    B,
    C,
    S,
    D,
    tiles,
    parts,
    ignore_index,
    input_row,
    input_column,
    weight_row,
    weight_column,
    factor: tl.float64,
    FOLD: tl.constexpr,
    COSINE: tl.constexpr,
    PER_ROW: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
):
    """Program (n, d): columns d of row n of input, then the scale's, then those of the compact entries."""
    n = tl.program_id(0)
    scale = load_scale(factor, learned, ACC)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if n < B:
        if grad_input is not None:
            finish_input_row(
                input, weight, target, grad_loss, kept, partial_input, partial_along, grad_input,
                n, columns, tiles, parts, B, C, D, ignore_index,
                input_row, input_column, weight_row, weight_column,
                scale, FOLD, COSINE, PER_ROW, OPERAND, ACC, BLOCK_TILES, BLOCK_PARTS,
            )  # fmt: skip
    elif n == B:
        if grad_scale is not None:
            if tl.program_id(1) == 0:
                finish_scale(
                    grad_loss, kept, partial_scale, grad_scale, tiles, B, PER_ROW, BLOCK_TILES, BLOCK_ENTRIES
                )
    else:
        if class_ids is not None:
            if found is not None:
                if tl.program_id(1) == 0:
                    entry = n - B - 1 + tl.zeros((1,), tl.int32)
                    ids = listed_ids(
                        class_ids, counts, target, entry, B, C, S, ignore_index, 16 * BLOCK_ENTRIES
                    )  # fmt: skip
                    tl.store(found + entry, ids)
            if grad_rows is not None or grad_bias is not None:
                spread_entry(
                    class_ids, target, grad_rows, grad_bias, grad_weight, grad_class_bias, n - B - 1, columns,
                    B, C, S, D, ignore_index, tl.program_id(1) == 0, ACC, BLOCK_ENTRIES,
                )  # fmt: skip
