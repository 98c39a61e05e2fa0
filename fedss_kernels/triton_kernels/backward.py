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

Two launches: `small_tiles`, a tile of classes for each program with all the rows (of long ones a group of
columns, each with the tile's logits), then `small_results`, which adds up what the programs found. No
atomics: each sum has one owner and one order.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tiles import (
    KEPT,
    UNSPECIALIZED,
    Sizes,
    Vectors,
    add_product,
    dots,
    left_out,
    load_classes,
    load_hits,
    load_rows,
    load_scale,
    load_targets,
    logit_unit,
    logits_of,
    of_problem,
    product_or_zero,
    rounded,
    same,
    shifted,
    store_rows,
    sums_of,
    wide,
)


class Parts(NamedTuple):
    """What `small_tiles` finds for `small_results`; None: not wanted."""

    rows: Any  # (S + B, D), of the class set's entries and of the targets; (C, D) where all are in the set
    bias: Any  # (S + B,), or (C,)
    input: Any  # (tiles of classes, B, D)
    along: Any  # (tiles of classes, groups of columns, B), that times input; None without cosines too
    scale: Any  # (tiles of classes,) float64


class Results(NamedTuple):
    """Of `small_results`; None: not wanted."""

    input: Any  # (B, D)
    weight: Any  # (C, D) zeros
    bias: Any  # (C,) zeros
    scale: Any  # ()
    ids: Any  # (S + B,) classes of a sparse gradient's rows, see `listed_ids`


@triton.jit
def parts_of_problem(found, class_ids, stacked: tl.constexpr, B, C, S, D, tiles, groups):
    entries = wide(C)
    if class_ids is not None:
        entries = wide(S) + B
    return Parts(
        shifted(found.rows, stacked, entries * D),
        shifted(found.bias, stacked, entries),
        shifted(found.input, stacked, wide(tiles) * B * D),
        shifted(found.along, stacked, wide(tiles) * groups * B),
        shifted(found.scale, stacked, tiles),
    )


@triton.jit
def load_upstream(grad_loss, kept, rows, counted, B, ACC: tl.constexpr, PER_ROW: tl.constexpr):
    """(R,) upstream gradient of each row's loss: its own, or one for all by the factor of "mean"."""
    if PER_ROW:
        upstream = tl.load(grad_loss + rows, mask=rows < B, other=0.0).to(ACC)
    else:
        upstream = tl.load(grad_loss).to(ACC) * tl.load(kept + wide(B) * KEPT).to(ACC)
    return tl.where(counted, upstream, 0.0)


@triton.jit
def pulled(pulls, rows, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """pulls @ rows"""
    sums = tl.zeros((pulls.shape[0], rows.shape[1]), ACC)
    return add_product(sums, pulls, rows.to(pulls.dtype), PRECISION)


@triton.jit
def probabilities(logits, unit, kept, rows, counted, known, hits, is_own, vectors, B):
    """(R, J) p, in targets' columns p - 1; 0 of hits and rows that do not count, NaN beside a wrong class."""
    largest = tl.load(kept + rows, mask=counted, other=0.0).to(logits.dtype)
    largest = tl.where(largest == float("-inf"), 0.0, largest)  # -inf less it is to stay
    inverse_total = tl.load(kept + wide(B) + rows, mask=counted, other=0.0).to(logits.dtype)
    # The forward pass may have rounded otherwise: at large scales a logit can come out above the largest.
    probs = tl.exp(tl.minimum(logits - largest[:, None], 0.0) * unit) * inverse_total[:, None]
    own = tl.zeros(rows.shape, logits.dtype)
    if vectors.class_ids is None:  # a target is a column like any other
        own = tl.load(kept + 2 * wide(B) + rows, mask=known & counted, other=0.0).to(logits.dtype)
    return left_out(probs, hits, is_own, own, vectors)


@triton.jit
def pulls_tile(
    input, weight, vectors, sizes, grad_loss, kept, rows, entries, scale,
    COSINE: tl.constexpr, PER_ROW: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(dlogits, pulls, along, slopes (R, J); which rows are read (R,); ids, which are, 1 / |weight_j| (J,))

    along: pulls * dots; slopes: what adds up to the scale's gradient
    """
    targets, counted, known = load_targets(vectors.target, rows, sizes.B, sizes.C, sizes.ignore_index)
    upstream = load_upstream(grad_loss, kept, rows, counted, sizes.B, ACC, PER_ROW)
    # Of a row with an upstream of 0 nothing is read here: it pulls nothing, and nothing pulls it.
    counted &= upstream != 0.0
    ids, corrections, live, _ = load_classes(
        vectors.class_ids, vectors.counts, entries, sizes.S, sizes.C, ACC
    )
    is_own = same(ids, targets, sizes.C)
    read = live
    if vectors.class_ids is None:  # a target is a column of the tile like any other
        read = live | ((entries < sizes.S) & (tl.max((is_own & known[:, None]).to(tl.int32), 0) > 0))
    sums, x_inverse, w_inverse = dots(
        input, weight, rows, counted, ids, read, COSINE, OPERAND, ACC, PRECISION, BLOCK_D
    )
    unit = logit_unit(scale, COSINE)
    logits = logits_of(
        sums, x_inverse, w_inverse, scale, unit, vectors.bias, ids, live, entries < 0, corrections
    )
    hits = load_hits(
        vectors.entry_labels, vectors.target_labels, ids, targets, entries, sizes.S, rows, counted, sizes.C
    )
    probs = probabilities(logits, unit, kept, rows, counted, known, hits, is_own, vectors, sizes.B)
    dlogits = product_or_zero(probs, upstream[:, None])
    # A zero row has inverse norm 0: nothing passes through it, even of an infinite upstream.
    pulls = product_or_zero(probs, product_or_zero(scale * x_inverse, upstream)[:, None])
    if COSINE:
        pulls = product_or_zero(w_inverse[None, :], pulls)
    if OPERAND != tl.float16:  # which is too narrow for small ones
        pulls = rounded(pulls, OPERAND)
    # Nearly the same cosines are subtracted, and a row's own enters all its differences: in two parts.
    at = kept + 3 * wide(sizes.B) + rows
    of_target = tl.load(at, mask=known, other=0.0) * tl.load(at + 2 * wide(sizes.B), mask=known, other=0.0)
    nearest = of_target.to(ACC)
    beyond = sums * w_inverse[None, :] - nearest[:, None]
    if COSINE and ACC != tl.float64:
        beyond -= (of_target - nearest).to(ACC)[:, None]
    beyond *= x_inverse[:, None]
    if vectors.class_ids is None:  # a target's dlogit is as large as all others'
        beyond = tl.where(is_own, 0.0, beyond)
    # Of what takes part, a dlogit of 0 too: of a logit of -inf it makes NaN.
    sloping = live[None, :] & (upstream != 0.0)[:, None] & (beyond != 0.0)
    slopes = tl.where(sloping, dlogits * beyond, 0.0)
    along = product_or_zero(pulls.to(ACC), sums)
    return dlogits, pulls, along, slopes, counted, ids, read, w_inverse


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
    own = tl.where(known, own, tl.where(counted, own - own, 0.0))  # NaN beside a loss that is
    w_inverse = tl.where(known, w_inverse, 0.0)
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
def store_target_rows(
    input, weight, target, grad_loss, kept, grad_rows, grad_bias, rows, columns, B, C, S, ignore_index, scale,
    COSINE: tl.constexpr, PER_ROW: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What row i adds to the gradient of its target's row and bias: entry S + i of the compact gradient."""
    targets, _, known, dlogits, pulls, dot, _, w_inverse = target_pulls(
        target, grad_loss, kept, rows, B, C, ignore_index, scale, ACC, PER_ROW
    )
    if grad_rows is not None:
        x = load_rows(input, rows, known, columns, OPERAND).to(ACC)
        values = pulled_along(x, pulls)
        if COSINE:
            w = load_rows(weight, targets, known, columns, OPERAND)
            values = without_share(values, share_along(product_or_zero(pulls, dot), w_inverse), w)
        store_rows(grad_rows, S + rows, rows < B, columns, input.D, values)
    if grad_bias is not None:
        tl.store(grad_bias + S + rows, dlogits, mask=rows < B)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def small_tiles(
    input, weight, target, class_ids, counts, bias, learned, entry_labels, target_labels, grad_loss, kept,
    found, B, C, S, ignore_index, factor: tl.float64, COSINE: tl.constexpr, PER_ROW: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (t, g): all rows, the t-th tile of classes, every groups-th block of columns from the g-th on.

    The last t, where targets are not among all classes: the rows' own.
    """
    ACC: tl.constexpr = tl.float64 if OPERAND == tl.float64 else tl.float32
    SUMS: tl.constexpr = sums_of(OPERAND, PRECISION)
    tile, group, D = tl.program_id(0), tl.program_id(1), input.D
    step = tl.num_programs(1) * BLOCK_D
    sizes = Sizes(B, C, S, ignore_index)
    vectors = Vectors(target, class_ids, counts, None, bias, learned, entry_labels, target_labels, None)
    input, weight, vectors, kept = of_problem(input, weight, vectors, kept, B)
    stacked: tl.constexpr = input.step is not None
    grad_loss = shifted(grad_loss, stacked, B if PER_ROW else 1)
    found = parts_of_problem(found, class_ids, stacked, B, C, S, D, tl.cdiv(S, BLOCK_S), tl.num_programs(1))
    scale = load_scale(factor, vectors.learned, ACC)
    rows = tl.arange(0, BLOCK_B)
    if tile < tl.cdiv(S, BLOCK_S):
        entries = tile * BLOCK_S + tl.arange(0, BLOCK_S)
        dlogits, pulls, along, slopes, counted, ids, read, w_inverse = pulls_tile(
            input, weight, vectors, sizes, grad_loss, kept, rows, entries, scale,
            COSINE, PER_ROW, OPERAND, ACC, PRECISION, BLOCK_D,
        )  # fmt: skip
        share_classes = share_along(tl.sum(along, 0), w_inverse)
        if group == 0:
            if found.scale is not None:
                tl.store(found.scale + tile, tl.sum(tl.sum(slopes, 1).to(tl.float64), 0))
            if found.bias is not None:
                of_bias = rounded(tl.sum(dlogits, 0), found.bias.dtype.element_ty)
                tl.store(found.bias + entries, of_bias, mask=entries < S)
        along_rows = tl.zeros((BLOCK_B,), SUMS)
        for start in range(group * BLOCK_D, D, step):
            columns = start + tl.arange(0, BLOCK_D)
            w = load_rows(weight, ids, read, columns, OPERAND)
            if found.rows is not None:
                x = load_rows(input, rows, counted, columns, OPERAND)
                values = pulled(tl.trans(pulls), x, ACC, PRECISION)
                if COSINE:
                    values = without_share(values, share_classes, w)
                store_rows(found.rows, entries, entries < S, columns, D, values)
            if found.input is not None:
                values = pulled(pulls, w, ACC, PRECISION)
                if found.along is not None:  # loaded again: it is not held in registers meanwhile
                    x = load_rows(input, rows, counted, columns, OPERAND)
                    along_rows += tl.sum(values.to(SUMS) * x.to(SUMS), 1)
                store_rows(found.input + tile.to(tl.int64) * B * D, rows, rows < B, columns, D, values)
        if found.along is not None:
            at = (tile.to(tl.int64) * tl.num_programs(1) + group) * B + rows
            tl.store(found.along + at, along_rows, mask=rows < B)
    else:
        for start in range(group * BLOCK_D, tl.maximum(D, 1), step):  # the bias is there without columns too
            columns = start + tl.arange(0, BLOCK_D)
            store_target_rows(
                input, weight, vectors.target, grad_loss, kept, found.rows, found.bias, rows, columns, B, C,
                S, ignore_index, load_scale(factor, vectors.learned, SUMS), COSINE, PER_ROW, OPERAND, SUMS,
            )  # fmt: skip


@triton.jit
def finish_input_row(
    input, weight, vectors, sizes, grad_loss, kept, found, grad_input, row, columns, tiles, groups, scale,
    COSINE: tl.constexpr, PER_ROW: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """The gradient of a row of input, some columns: the tiles' sums and the target's, less what is along."""
    rows, tile, D = row + tl.zeros((1,), tl.int32), tl.arange(0, BLOCK_TILES), input.D
    targets, counted, known, _, pulls, dot, x_inverse, _ = target_pulls(
        vectors.target, grad_loss, kept, rows, sizes.B, sizes.C, sizes.ignore_index, scale, ACC, PER_ROW
    )
    x = load_rows(input, rows, counted, columns, OPERAND)  # on its way beside the tiles' sums
    values = tl.zeros((1, columns.shape[0]), ACC)
    for start in range(0, tiles, BLOCK_TILES):
        at = (start + tile).to(tl.int64) * sizes.B + row
        inside = (start + tile < tiles)[:, None] & (columns < D)[None, :]
        sums = tl.load(found.input + at[:, None] * D + columns[None, :], mask=inside, other=0.0)
        values += tl.sum(sums, 0)[None, :]
    if vectors.class_ids is not None:
        values += pulled_along(load_rows(weight, targets, known, columns, OPERAND).to(ACC), pulls)
    if COSINE:
        along = tl.zeros((1,), ACC)
        for start in range(0, tiles * groups, BLOCK_TILES):
            at = found.along + (start + tile).to(tl.int64) * sizes.B + row
            along += tl.sum(tl.load(at, mask=start + tile < tiles * groups, other=0.0), 0)
        if vectors.class_ids is not None:
            along += product_or_zero(pulls, dot)
        values = without_share(values, share_along(along, x_inverse), x)
    values = tl.where(counted[:, None], values, 0.0)  # 0 times what a class holds, NaN too
    store_rows(grad_input, rows, rows < sizes.B, columns, D, values)


@triton.jit
def entry_ids(vectors, sizes, entries):
    """(classes of the compact gradient's rows, the set's and then the targets'; which take part)

    -1 for what has none.
    """
    ids = tl.load(vectors.class_ids + entries, mask=entries < sizes.S, other=-1)
    ids = tl.where((ids >= 0) & (ids < sizes.C), ids, -1)
    targets, _, known = load_targets(vectors.target, entries - sizes.S, sizes.B, sizes.C, sizes.ignore_index)
    ids = tl.where(entries >= sizes.S, tl.where(known, targets, -1), ids)
    takes_part = ids >= 0
    if vectors.counts is not None:
        corrections = tl.load(vectors.counts + entries, mask=entries < sizes.S, other=0.0)
        takes_part &= (entries >= sizes.S) | (corrections.to(tl.float32) < float("inf"))
    return ids, takes_part


@triton.jit
def listed_ids(vectors, sizes, entries, BLOCK: tl.constexpr):
    """The classes that a sparse gradient lists: an entry that takes no part repeats the first that does.

    Where none does, the first that exists; class 0 if none does.
    """
    ids, take_part = entry_ids(vectors, sizes, entries)
    if tl.min(take_part.to(tl.int32), 0) == 0:
        end = sizes.S + sizes.B
        first = 2 * end  # that takes part; past `end`, that exists
        for start in range(0, end, BLOCK):
            among = start + tl.arange(0, BLOCK)
            classes, able = entry_ids(vectors, sizes, among)
            places = tl.where(able, among, tl.where(classes >= 0, end + among, 2 * end))
            first = tl.minimum(first, tl.min(places, 0))
        repeated, _ = entry_ids(vectors, sizes, first % end + tl.zeros((1,), tl.int32))
        ids = tl.where(take_part, ids, tl.where(first < 2 * end, tl.max(repeated, 0), 0))
    return ids


@triton.jit
def spread_entry(
    vectors, sizes, found, results, entry, columns, D, first_columns,
    ACC: tl.constexpr, BLOCK_ENTRIES: tl.constexpr,
):  # fmt: skip
    """The first entry of a class adds up all of them, in order, and stores the class' dense row."""
    own = tl.max(entry_ids(vectors, sizes, entry + tl.zeros((1,), tl.int32))[0], 0)
    first = entry
    last = entry
    for start in range(0, sizes.S + sizes.B, 16 * BLOCK_ENTRIES):
        among = start + tl.arange(0, 16 * BLOCK_ENTRIES)
        alike = entry_ids(vectors, sizes, among)[0] == own
        first = tl.minimum(first, tl.min(tl.where(alike, among, entry), 0))
        last = tl.maximum(last, tl.max(tl.where(alike, among, entry), 0))
    if (first == entry) & (own >= 0):
        values = tl.zeros((1, columns.shape[0]), ACC)
        of_bias = tl.zeros((1,), ACC)
        for start in range(entry, last + 1, BLOCK_ENTRIES):
            entries = start + tl.arange(0, BLOCK_ENTRIES)
            alike = entry_ids(vectors, sizes, entries)[0] == own
            if tl.max(alike.to(tl.int32), 0) > 0:
                if results.weight is not None:
                    at = found.rows + entries.to(tl.int64)[:, None] * D + columns[None, :]
                    rows = tl.load(at, mask=alike[:, None] & (columns < D)[None, :], other=0.0)
                    values += tl.sum(rows, 0)[None, :]
                if results.bias is not None:
                    of_bias += tl.sum(tl.load(found.bias + entries, mask=alike, other=0.0), 0)
        at_class = own + tl.zeros((1,), tl.int64)
        if results.weight is not None:
            store_rows(results.weight, at_class, at_class >= 0, columns, D, values)
        if results.bias is not None:
            if first_columns:
                tl.store(results.bias + at_class, rounded(of_bias, results.bias.dtype.element_ty))


@triton.jit
def store_grad_scale(
    grad_loss, kept, slopes, count, factor, grad_scale, B, PER_ROW: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum of `count` slopes, times factor; NaN beside a loss that is, in no slope too."""
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, B, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        own = tl.load(kept + 2 * wide(B) + rows, mask=rows < B, other=0.0)
        upstream = load_upstream(grad_loss, kept, rows, rows < B, B, tl.float64, PER_ROW)
        total += product_or_zero(own - own, upstream)
    for first in range(0, count, BLOCK):
        nth = first + tl.arange(0, BLOCK)
        total += product_or_zero(tl.load(slopes + nth, mask=nth < count, other=0.0).to(tl.float64), factor)
    tl.store(grad_scale, rounded(tl.sum(total, 0), grad_scale.dtype.element_ty))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def small_results(
    input, weight, target, class_ids, counts, learned, grad_loss, kept, found, results, B, C, S,
    ignore_index, tiles, groups, factor: tl.float64, COSINE: tl.constexpr, PER_ROW: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TILES: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
):  # fmt: skip
    """Program (n, d): columns d of row n of input, then the scale's, then those of the compact entries."""
    at = tl.program_id(0)
    first_columns = tl.program_id(1) == 0
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    vectors = Vectors(target, class_ids, counts, None, None, learned, None, None, None)
    sizes = Sizes(B, C, S, ignore_index)
    input, weight, vectors, kept = of_problem(input, weight, vectors, kept, B)
    stacked: tl.constexpr = input.step is not None
    grad_loss = shifted(grad_loss, stacked, B if PER_ROW else 1)
    found = parts_of_problem(found, class_ids, stacked, B, C, S, input.D, tiles, groups)
    results = Results(
        shifted(results.input, stacked, wide(B) * input.D),
        shifted(results.weight, stacked, wide(C) * input.D),
        shifted(results.bias, stacked, C),
        shifted(results.scale, stacked, 1),
        results.ids,
    )
    if at < B:
        if results.input is not None:
            finish_input_row(
                input, weight, vectors, sizes, grad_loss, kept, found, results.input, at, columns,
                tiles, groups, load_scale(factor, vectors.learned, ACC), COSINE, PER_ROW, OPERAND, ACC,
                BLOCK_TILES,
            )  # fmt: skip
    elif at == B:
        if results.scale is not None:
            if first_columns:
                one = tl.full((1,), 1.0, tl.float64)
                store_grad_scale(
                    grad_loss, kept, found.scale, tiles, one, results.scale, B, PER_ROW, BLOCK_TILES
                )
    else:
        entry = at - B - 1
        if results.ids is not None:
            if first_columns:
                ids = listed_ids(vectors, sizes, entry + tl.zeros((1,), tl.int32), 16 * BLOCK_ENTRIES)
                tl.store(results.ids + entry + tl.zeros((1,), tl.int32), ids)
        if results.weight is not None or results.bias is not None:
            spread_entry(
                vectors, sizes, found, results, entry, columns, input.D, first_columns, ACC, BLOCK_ENTRIES
            )
