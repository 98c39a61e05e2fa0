"""What the loss' kernels share: tiles of rows, their products, and the softmax' terms made of them.

    dots(i, j)   = input_i . weight_j                      float32 (float64 for float64 rows) sums
    logits(i, j) = scale * dots(i, j) * input_inverse_i * weight_inverse_j + bias_j    (dot: inverses are 1)

Rows are gathered through their ids; the squares that the norms need are summed in the same pass.

Where float32 products keep all their digits, WIDE is float64 (elsewhere ACC): the dtype of what there is one
of for each row or class. What there is one of for each pair of them, from dot products to exponents, is two
float32 numbers there, a high part and a low part: a logit of 100 in a single one is off by 4e-6, and its
probability with it; and of nearly parallel rows it is the differences that count, of nearly the same cosines.
"""

import triton
import triton.language as tl

ZERO_NORM: tl.constexpr = tl.constexpr(1e-12)  # shorter rows have cosine 0 and pass no gradient
LARGEST_FLOAT32: tl.constexpr = tl.constexpr((2 - 2**-23) * 2.0**127)


# What a kernel is not compiled anew for: sizes that become 1 or a multiple of 16, and vectors at an address
# that is none. (For AMD a specialized pointer is a descriptor too, of four scalar registers.)
SIZES = ["B", "C", "S", "splits", "tiles", "parts", "first", "size", "row_tiles", "class_tiles"]
SIZES += ["column_tiles", "ignore_index"]
GIVEN = ["inverses", "target", "target_counts", "class_ids", "counts", "bias", "learned", "grad_loss"]
KEPT = ["kept", "partials", "partial_along", "partial_scale", "share_classes", "scale_rows"]
RESULTS = [
    "loss",
    "row_losses",
    "sources",
    "found",
    "bias_classes",
    "sums_along",
    "sums_scale",
    "grad_bias",
    "grad_class_bias",
    "grad_scale",
]
UNSPECIALIZED = [*SIZES, *GIVEN, *KEPT, *RESULTS]

# The interpreter multiplies bfloat16 wrongly and truncates where it should round. There, and only there,
# operands are widened, which is exact, and rounding is done by hand.
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """`values` in another dtype, to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16 and values.dtype != tl.bfloat16:
        bits = values.to(tl.float32).to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        values = tl.where(values == values, nearest.to(tl.float32, bitcast=True), values.to(tl.float32))
    return values.to(dtype)


@triton.jit
def wide(n):
    """A size as int64."""
    return tl.full((), n, tl.int64)


@triton.jit
def load_elements(
    matrix,
    rows,  # (R,) row numbers
    wanted,  # (R,) others read as 0, whatever they hold
    columns,  # (BLOCK_D,)
    D,
    row_stride,
    column_stride,
):
    """(R, BLOCK_D) elements of a (N, D) matrix."""
    at = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    inside = wanted[:, None] & (columns < D)[None, :]
    return tl.load(matrix + at, mask=inside, other=0.0)


@triton.jit
def load_rows(matrix, rows, wanted, columns, D, row_stride, column_stride, OPERAND: tl.constexpr):
    """The same, rounded to the dtype of products."""
    return rounded(load_elements(matrix, rows, wanted, columns, D, row_stride, column_stride), OPERAND)


@triton.jit
def add_product(sums, a, b, PRECISION: tl.constexpr):
    """sums + a @ b; PRECISION: of float32 operands."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION, out_dtype=sums.dtype)


@triton.jit
def add_exactly(high, low, addend):
    """high + low + addend as two parts (Knuth's TwoSum: all but the low parts' sum is exact)."""
    total = high + addend
    added = total - high
    return total, low + ((high - (total - added)) + (addend - added))


@triton.jit
def times_exactly(high, low, factor, factor_low):
    """(high + low) * (factor + factor_low) as two parts.

    The product is an fma: of a multiplication and an addition that follows a compiler makes an fma, and then
    the rounding of the product, found here, is in the sum twice.
    """
    product = tl.fma(high, factor, 0.0)
    return product, tl.fma(high, factor, -product) + (high * factor_low + low * factor)


@triton.jit
def two_parts(values):
    """float64 values as two float32 parts."""
    high = values.to(tl.float32)
    return high, tl.where(tl.abs(high) < float("inf"), values - high, 0.0).to(tl.float32)


@triton.jit
def one_part(high, low, WIDE: tl.constexpr):
    """The sum of two parts in WIDE; the high part alone where it is of that dtype."""
    if WIDE != high.dtype:
        return high.to(WIDE) + low
    else:
        return high


@triton.jit
def add_block(high, low, a, b, PRECISION: tl.constexpr, EXACTLY: tl.constexpr):
    """high + low + a @ b; EXACTLY: the product summed by itself, without the long sum's roundings."""
    if EXACTLY:
        return add_exactly(high, low, add_product(tl.zeros(high.shape, high.dtype), a, b, PRECISION))
    else:
        return add_product(high, a, b, PRECISION), low


@triton.jit
def add_squares(sums, rows, EXACTLY: tl.constexpr):
    """sums (R,) + those of squares (R, BLOCK_D); EXACTLY: (R, BLOCK_D), to be summed in the end."""
    values = rows.to(sums.dtype)
    if EXACTLY:
        return sums + values * values
    else:
        return sums + tl.sum(values * values, 1)


@triton.jit
def inverse_norm(squares):
    """1 / sqrt(squares); 0 for a zero row; NaN where the sum of squares has overflown: no silent cosine 0."""
    norm = tl.sqrt(squares)
    inverse = tl.where(norm < ZERO_NORM, 0.0, 1.0 / norm)
    return tl.where(squares == float("inf"), float("nan"), inverse)


@triton.jit
def load_scale(factor, learned, ACC: tl.constexpr):
    """The scale, a number times what a 0-d tensor holds, if there is one."""
    scale = tl.full((), factor, ACC)
    if learned is not None:
        scale = scale * tl.load(learned).to(ACC)
    return scale


@triton.jit
def logit_unit(scale, COSINE: tl.constexpr):
    """The power of two, at least 1, in units of which logits are held.

    So float32 logits are finite wherever the products are, whatever the scale; exact, as a power of two is.
    A cosine's logits need no unit; those of float64 have room enough.
    """
    if COSINE or scale.dtype == tl.float64:
        return tl.full((), 1.0, scale.dtype)
    else:
        exponent = (scale.to(tl.uint32, bitcast=True) >> 23) & 0xFF
        exponent = tl.minimum(tl.maximum(exponent + 1, 127), 253)  # 1 to 2^126: the inverse is normal too
        return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_targets(target, rows, B, C, ignore_index):
    """(classes, which rows count, which have a class that exists); no row outside [0, B) counts."""
    inside = (rows >= 0) & (rows < B)
    classes = tl.load(target + rows, mask=inside, other=0)
    counted = inside & (classes != ignore_index)
    return classes, counted, counted & (classes >= 0) & (classes < C)


@triton.jit
def load_classes(class_ids, counts, entries, S, C, ACC: tl.constexpr):
    """(ids, corrections, which are in the denominator, which are wrong) of entries of the class set.

    Wrong ones have the id -1, so that they are no row's target: they are to be seen.
    """
    inside = entries < S
    if class_ids is not None:
        ids = tl.load(class_ids + entries, mask=inside, other=0)
        exists = inside & (ids >= 0) & (ids < C)
    else:
        ids = entries.to(tl.int64)
        exists = inside
    corrections = tl.zeros(entries.shape, ACC)
    live = exists
    if counts is not None:
        corrections = tl.load(counts + entries, mask=inside, other=0.0).to(ACC)
        live = exists & (corrections < float("inf"))
        exists &= corrections > float("-inf")  # not NaN either
    wrong = inside & ~exists
    return tl.where(wrong, -1, ids), corrections, live & exists, wrong


@triton.jit
def same(ids, targets, C):
    """(R, J) whether an entry's class is a row's target; compared in 32 bits where these hold all classes."""
    return ids.to(C.dtype)[None, :] == targets.to(C.dtype)[:, None]


@triton.jit
def load_bias(bias, ids, wanted, ACC: tl.constexpr):
    if bias is not None:
        return tl.load(bias + ids, mask=wanted, other=0.0).to(ACC)
    else:
        return tl.zeros(ids.shape, ACC)


@triton.jit
def dots(
    input, weight, rows, counted, ids, wanted, D, input_row, input_column, weight_row, weight_column,
    INPUT_NORMS: tl.constexpr, WEIGHT_NORMS: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """(dots (R, J), their low part, 1 / |input_i| (R,), 1 / |weight_j| (J,)); 1 for norms not wanted.

    The low part is 0 unless WIDE is wider than ACC.
    """
    sums = tl.zeros((rows.shape[0], ids.shape[0]), ACC)
    low = tl.zeros(sums.shape, ACC)
    # Where tiles are small, squares are kept as they come, and summed once.
    if WIDE == tl.float64:
        input_squares = tl.zeros((rows.shape[0], BLOCK_D), WIDE)
        weight_squares = tl.zeros((ids.shape[0], BLOCK_D), WIDE)
    else:
        input_squares = tl.zeros(rows.shape, WIDE)
        weight_squares = tl.zeros(ids.shape, WIDE)
    columns = tl.arange(0, BLOCK_D)
    if PREFETCH:
        next_x = load_elements(input, rows, counted, columns, D, input_row, input_column)
        next_w = load_elements(weight, ids, wanted, columns, D, weight_row, weight_column)
    for start in range(0, D, BLOCK_D):
        if PREFETCH:
            x, w = next_x, next_w
            after = start + BLOCK_D + columns
            next_x = load_elements(input, rows, counted, after, D, input_row, input_column)
            next_w = load_elements(weight, ids, wanted, after, D, weight_row, weight_column)
        else:
            x = load_elements(input, rows, counted, start + columns, D, input_row, input_column)
            w = load_elements(weight, ids, wanted, start + columns, D, weight_row, weight_column)
        x, w = rounded(x, OPERAND), rounded(w, OPERAND)
        if WIDE != ACC:
            sums, low = add_block(sums, low, x, tl.trans(w), PRECISION, True)
        else:  # no low part is carried through the loop
            sums = add_product(sums, x, tl.trans(w), PRECISION)
        if INPUT_NORMS:
            input_squares = add_squares(input_squares, x, WIDE == tl.float64)
        if WEIGHT_NORMS:
            weight_squares = add_squares(weight_squares, w, WIDE == tl.float64)
    if WIDE == tl.float64:
        input_squares = tl.sum(input_squares, 1)
        weight_squares = tl.sum(weight_squares, 1)
    x_inverse = inverse_norm(input_squares) if INPUT_NORMS else input_squares + 1.0
    w_inverse = inverse_norm(weight_squares) if WEIGHT_NORMS else weight_squares + 1.0
    return sums, low, x_inverse, w_inverse


@triton.jit
def in_range(products, input, COSINE: tl.constexpr):
    """Dot products of rows of `input`: infinite past the range of the results, whatever they are held in."""
    if COSINE or products.dtype != tl.float64 or input.dtype.element_ty == tl.float64:
        return products
    else:
        return tl.where(tl.abs(products) > LARGEST_FLOAT32, products * float("inf"), products)


@triton.jit
def dots_and_inverses(
    input, weight, inverses, kept, rows, counted, entries, ids, wanted, B, D,
    input_row, input_column, weight_row, weight_column,
    COSINE: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """As `dots`. inverses: what `inverse_norms` found; kept: those of input among it; None: found here."""
    sums, low, x_inverse, w_inverse = dots(
        input, weight, rows, counted, ids, wanted, D, input_row, input_column, weight_row, weight_column,
        COSINE and inverses is None and kept is None, COSINE and inverses is None,
        OPERAND, ACC, WIDE, PRECISION, BLOCK_D, PREFETCH,
    )  # fmt: skip
    if COSINE and inverses is None and kept is not None:
        x_inverse = tl.load(kept + 4 * wide(B) + rows, mask=counted, other=0.0).to(WIDE)
    if inverses is not None:
        x_inverse = tl.load(inverses + rows, mask=counted, other=0.0)
        w_inverse = tl.load(inverses + wide(B) + entries, mask=wanted, other=0.0)
    return in_range(sums, input, COSINE), low, x_inverse, w_inverse


@triton.jit
def along_inputs(dots, low, w_inverse, COSINE: tl.constexpr):
    """|input_i| * cosine(i, j) as two parts; the dot products themselves without COSINE."""
    if COSINE:
        factor, factor_low = two_parts(w_inverse)
        return times_exactly(dots, low, factor[None, :], factor_low[None, :])
    else:
        return dots, low


@triton.jit
def logits_of(
    dots, low, x_inverse, w_inverse, scale, unit, bias, ids, live, wrong, corrections,
    COSINE: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(R, J) logits in units, to nearest, and their low part; -inf of classes not live, NaN of wrong ones."""
    offsets = tl.where(live, load_bias(bias, ids, live, WIDE) - corrections, 0.0)
    if WIDE != ACC:
        high, low = along_inputs(dots, low, w_inverse, COSINE)
        factor, factor_low = two_parts((scale / unit) * x_inverse)
        high, low = times_exactly(high, low, factor[:, None], factor_low[:, None])
        offset, offset_low = two_parts(offsets / unit)
        high, low = add_exactly(high, low + offset_low[None, :], offset[None, :])
        # Of an infinite one nothing is left over: on the way to it the low part has become NaN.
        nearest = tl.where(tl.abs(high) < float("inf"), high + low, high)
        nearest = tl.where(live[None, :], nearest, tl.where(wrong, float("nan"), float("-inf"))[None, :])
        return nearest, tl.where(tl.abs(nearest) < float("inf"), low - (nearest - high), 0.0)
    else:
        # Two operations for each logit: all else is done for each row or class.
        offsets = tl.where(live, offsets / unit, tl.where(wrong, float("nan"), float("-inf")))
        factors = (scale / unit) * x_inverse
        return (dots * w_inverse[None, :]) * factors[:, None] + offsets[None, :], low


@triton.jit
def unit_of_low_parts(largest, unit):
    """`unit`; 0 in rows with logits past 2^24, whose low parts could pass the range of exp: left out."""
    return tl.where(tl.abs(largest * unit) < 16777216.0, unit, 0.0)


@triton.jit
def exponentials(high, low, EXACTLY: tl.constexpr):
    """exp(high + low) with EXACTLY, else exp(high)"""
    if EXACTLY:
        exponents = high + low
        found = tl.exp(exponents)  # short of what the sum has lost; -inf has nothing to lose
        return tl.where(found == 0.0, 0.0, found + found * (low - (exponents - high)))
    else:
        return tl.exp(high)


@triton.jit
def target_cosines(kept, rows, known, B, ACC: tl.constexpr):
    """(R,) of each row and its target's row, from what the forward pass keeps."""
    at = kept + 3 * wide(B) + rows
    product = tl.load(at, mask=known, other=0.0) * tl.load(at + B, mask=known, other=0.0)
    return (product * tl.load(at + 2 * B, mask=known, other=0.0)).to(ACC)


@triton.jit
def product_or_zero(a, b):
    """a * b, but 0 where either is, even if the other is infinite or NaN.

    So an overflowed upstream leaves zeros alone, and an upstream of 0 whatever is wrong with a row.
    """
    return tl.where((a == 0.0) | (b == 0.0), 0.0, a * b)
