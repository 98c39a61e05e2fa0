"""What the loss' kernels share: tiles of rows, their products, and the softmax' terms made of them.

    dots(i, j)   = input_i . weight_j                      float32 (float64 for float64 rows) sums
    logits(i, j) = scale * dots(i, j) * input_inverse_i * weight_inverse_j + bias_j    (dot: inverses are 1)

Rows are gathered through their ids; the squares that the norms need are summed in the same pass.

ACC is the dtype of sums: float32, or float64 for float64 rows.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

ZERO_NORM: tl.constexpr = tl.constexpr(1e-12)  # shorter rows have cosine 0 and pass no gradient
LARGEST_FLOAT32: tl.constexpr = tl.constexpr((2 - 2**-23) * 2.0**127)


class Matrix(NamedTuple):
    """Rows in memory, an argument of kernels. What is in a tuple Triton specializes for, whatever it is told.

    So rows are read the faster: it knows addresses and sizes that are multiples of 16, and a stride of 1.
    """

    at: Any  # the first
    D: Any
    row: Any  # elements from one to the next
    column: Any
    step: Any = None  # of many problems, from one's matrix to the next one's; 0: they share it


class Vectors(NamedTuple):
    """Contiguous; None: not given. Small kernels make this of arguments that they are not specialized for."""

    target: Any  # (B,)
    class_ids: Any  # (S,); None: every class is in the set
    counts: Any  # (S,)
    target_counts: Any  # (B,)
    bias: Any  # (C,)
    learned: Any  # (), a factor of the scale
    entry_labels: Any  # (S,), what hits are told by; None: the entries' numbers
    target_labels: Any  # (B,), likewise; None: there are no labels, classes tell
    target_logit: Any  # (B,), where they are given; no row's target is a class then


class Sizes(NamedTuple):
    """Likewise."""

    B: Any
    C: Any
    S: Any
    ignore_index: Any


class Stacked(NamedTuple):
    """A vector of each of many problems of one size, over which a grid's third axis goes.

    What kernels write lies contiguous, problem by problem.
    """

    at: Any  # the first's
    step: Any  # elements from one problem's to the next one's; 0: they share it


# Of each row (KEPT, B) float64 numbers wait for the backward pass, then 1 / (rows that "mean" counts):
#   the largest logit o, the target's too, in logit units; 1 / sum exp(o - largest); p_t - 1; the dot product
#   with the target's row; 1 / |input|; 1 / |weight_t|
KEPT = tl.constexpr(6)

# What a kernel is not compiled anew for: sizes that become 1 or a multiple of 16, and vectors at an address
# that is none. (For AMD a specialized pointer is a descriptor too, of four scalar registers.)
UNSPECIALIZED = [*Vectors._fields, *Sizes._fields, "splits", "tiles", "groups"]
UNSPECIALIZED += ["grad_loss", "kept", "partials", "loss", "row_losses"]
# A chunk has `rows` from `row` on and `entries` from `entry` on; a list has `count` from `first` on.
UNSPECIALIZED += ["row", "rows", "entry", "entries", "first", "count", "parts", "split"]

# The interpreter multiplies bfloat16 wrongly and truncates where it should round. There, and only there,
# operands are widened, which is exact, and rounding is done by hand.
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.constexpr_function
def sums_of(operand, precision):
    """The dtype of what there is once for a row: what its target adds, and the sum of the tiles' parts.

    What lies along a row may be most of all that is pulled to it, and is taken out again: of float32 rows
    that have one large feature in common plain PyTorch leaves less than float32 sums would.
    """
    exact = operand == tl.float64 or (operand == tl.float32 and precision == "ieee")
    return tl.float64 if exact else tl.float32


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
def shifted(at, stacked: tl.constexpr, step):
    """Where what is at `at` for the first problem is for this program's; None of None."""
    if at is None:
        return None
    else:
        if stacked:
            return at + tl.program_id(2).to(tl.int64) * step
        else:
            return at


@triton.jit
def of_problem(input, weight, vectors, kept, B):
    """These of this program's problem."""
    if input.step is None:
        return input, weight, vectors, kept
    else:
        x, w = shifted(input.at, True, input.step), shifted(weight.at, True, weight.step)
        return (
            Matrix(x, input.D, input.row, input.column, input.step),
            Matrix(w, weight.D, weight.row, weight.column, weight.step),
            vectors_of_problem(vectors),
            shifted(kept, True, wide(B) * KEPT + 1),
        )


@triton.jit
def vectors_of_problem(stacked):
    """No problem of many has labels, or is given its targets' logits."""
    return Vectors(
        vector_of_problem(stacked.target),
        vector_of_problem(stacked.class_ids),
        vector_of_problem(stacked.counts),
        vector_of_problem(stacked.target_counts),
        vector_of_problem(stacked.bias),
        vector_of_problem(stacked.learned),
        None,
        None,
        None,
    )


@triton.jit
def vector_of_problem(stacked):
    if stacked is None:
        return None
    else:
        return shifted(stacked.at, True, stacked.step)


@triton.jit
def load_elements(
    matrix,
    rows,  # (R,) row numbers
    wanted,  # (R,) others read as 0, whatever they hold
    columns,  # (BLOCK_D,)
):
    """(R, BLOCK_D) elements of a `Matrix`."""
    at = rows.to(tl.int64)[:, None] * matrix.row + columns.to(tl.int64)[None, :] * matrix.column
    inside = wanted[:, None] & (columns < matrix.D)[None, :]
    return tl.load(matrix.at + at, mask=inside, other=0.0)


@triton.jit
def load_rows(matrix, rows, wanted, columns, OPERAND: tl.constexpr):
    """The same, rounded to the dtype of products."""
    return rounded(load_elements(matrix, rows, wanted, columns), OPERAND)


@triton.jit
def store_rows(matrix, rows, inside, columns, D, values):
    """Rows of a contiguous (N, D) matrix."""
    at = matrix + rows.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(at, rounded(values, matrix.dtype.element_ty), mask=inside[:, None] & (columns < D)[None, :])


@triton.jit
def add_product(sums, a, b, PRECISION: tl.constexpr):
    """sums + a @ b; PRECISION: of float32 operands."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION, out_dtype=sums.dtype)


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
def load_hits(entry_labels, target_labels, ids, targets, entries, S, rows, counted, C):
    """(R, J) whether an entry is left out of a row: of the same class, or label where there are any."""
    if target_labels is None:
        return same(ids, targets, C)
    else:
        of_rows = tl.load(target_labels + rows, mask=counted, other=0)
        of_entries = entries.to(tl.int64)
        if entry_labels is not None:
            of_entries = tl.load(entry_labels + entries, mask=entries < S, other=0)
        return of_entries[None, :] == of_rows[:, None]


@triton.jit
def left_out(probs, hits, is_own, own, vectors):
    """probs (R, J), 0 of hits; where all classes are in the set, own (R,) more in the targets' columns."""
    if vectors.target_labels is None:  # a hit is the row's own target
        return tl.where(hits, own[:, None], probs)
    else:
        probs = tl.where(hits, 0.0, probs)
        if vectors.class_ids is None:
            probs += tl.where(is_own, own[:, None], 0.0)
        return probs


@triton.jit
def load_bias(bias, ids, wanted, ACC: tl.constexpr):
    if bias is not None:
        return tl.load(bias + ids, mask=wanted, other=0.0).to(ACC)
    else:
        return tl.zeros(ids.shape, ACC)


@triton.jit
def narrowed(products):
    """Infinite where float32 ends."""
    return tl.where(tl.abs(products) > LARGEST_FLOAT32, products * float("inf"), products)


@triton.jit
def in_range(products, input):
    """Dot products of rows of `input`: infinite past the range of the results, whatever they are held in."""
    if products.dtype != tl.float64 or input.at.dtype.element_ty == tl.float64:
        return products
    else:
        return narrowed(products)


@triton.jit
def dots(
    input, weight, rows, counted, ids, wanted,
    COSINE: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(dots (R, J), 1 / |input_i| (R,), 1 / |weight_j| (J,)); inverses are 1 without COSINE."""
    sums = tl.zeros((rows.shape[0], ids.shape[0]), ACC)
    input_squares = tl.zeros(rows.shape, ACC)
    weight_squares = tl.zeros(ids.shape, ACC)
    for start in range(0, input.D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        x = load_rows(input, rows, counted, columns, OPERAND)
        w = load_rows(weight, ids, wanted, columns, OPERAND)
        sums = add_product(sums, x, tl.trans(w), PRECISION)
        if COSINE:
            input_squares += tl.sum(x.to(ACC) * x.to(ACC), 1)
            weight_squares += tl.sum(w.to(ACC) * w.to(ACC), 1)
    if COSINE:
        return sums, inverse_norm(input_squares), inverse_norm(weight_squares)
    else:
        return in_range(sums, input), input_squares + 1.0, weight_squares + 1.0


@triton.jit
def logits_of(dots, x_inverse, w_inverse, scale, unit, bias, ids, live, wrong, corrections):
    """(R, J) logits in units; -inf of classes not live, NaN of wrong ones."""
    # Two operations for each logit: all else is done for each row or class.
    offsets = (load_bias(bias, ids, live, dots.dtype) - corrections) / unit
    offsets = tl.where(live, offsets, tl.where(wrong, float("nan"), float("-inf")))
    return (dots * w_inverse[None, :]) * ((scale / unit) * x_inverse)[:, None] + offsets[None, :]


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
