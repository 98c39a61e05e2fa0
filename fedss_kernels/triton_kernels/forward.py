"""The loss: softmax terms over splits of the class set, then the splits merged.

What the backward pass needs is kept, O(B): see tiles.py.

Bytes: `partial_terms` reads each gathered row of `weight` once (D elements, an id and a correction), each row
of `input` once for each tile of classes (from the caches: a tile of rows is small), the B rows and those of
their targets once more, and writes 8 B bytes for each split, 24 B besides; `merge_splits` reads them and
writes 24 B and the losses.
"""

import triton
import triton.language as tl

from .tiles import (
    KEPT,
    UNSPECIALIZED,
    Vectors,
    dots,
    in_range,
    inverse_norm,
    load_bias,
    load_classes,
    load_hits,
    load_rows,
    load_scale,
    load_targets,
    logit_unit,
    logits_of,
    of_problem,
    shifted,
    store_rows,
    sums_of,
    target_cosines,
    vectors_of_problem,
    wide,
)


@triton.jit
def keep_dots_with_targets(
    input, weight, rows, counted, targets, known, copies, kept, B,
    COSINE: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of each row input_i . weight_t, 1 / |input_i| and 1 / |weight_t|, t being its target; 0 without one.

    copies: (B, D) rows of input as products read them; None: not wanted.
    """
    products = tl.zeros((rows.shape[0], BLOCK_D), ACC)
    input_squares = tl.zeros(products.shape, ACC)
    weight_squares = tl.zeros(products.shape, ACC)
    for start in range(0, input.D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        x = load_rows(input, rows, counted, columns, OPERAND)
        if copies is not None:
            store_rows(copies, rows, rows < B, columns, input.D, x)
        x = x.to(ACC)
        w = load_rows(weight, targets, known, columns, OPERAND).to(ACC)
        products += x * w
        if COSINE:
            input_squares += x * x
            weight_squares += w * w
    found = tl.sum(products, 1)
    x_inverse, w_inverse = tl.sum(input_squares, 1), tl.sum(weight_squares, 1)
    if COSINE:
        x_inverse, w_inverse = inverse_norm(x_inverse), inverse_norm(w_inverse)
    else:
        found, x_inverse, w_inverse = in_range(found, input), x_inverse + 1.0, w_inverse + 1.0
    at = kept + wide(B) * 3 + rows
    tl.store(at, found, mask=rows < B)
    tl.store(at + B, x_inverse, mask=rows < B)
    tl.store(at + 2 * B, w_inverse, mask=rows < B)


@triton.jit
def add_terms(largest, total, logits, unit):
    """(R,) the largest o and sum exp(o - largest), with those of more logits (R, J), in units."""
    larger = tl.maximum(largest, tl.max(logits, 1))
    shift = tl.where(larger == float("-inf"), 0.0, larger)
    total = total * tl.exp((largest - shift) * unit)
    return larger, total + tl.sum(tl.exp((logits - shift[:, None]) * unit), 1)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def partial_terms(
    input, weight, target, class_ids, counts, bias, learned, entry_labels, target_labels, partials, kept,
    B, C, S, ignore_index, factor: tl.float64, COSINE: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_PAIRED: tl.constexpr,
):  # fmt: skip
    """Program s: all rows and every splits-th tile of classes, from the s - 1st on.

    Program 0: the rows and their own targets, see `sums_of`, BLOCK_PAIRED columns of both at a time.
    partials: (2, splits, B) the largest o, in units, and sum exp(o - largest) of each split.
    """
    ACC: tl.constexpr = partials.dtype.element_ty
    SUMS: tl.constexpr = sums_of(OPERAND, PRECISION)
    split, splits = tl.program_id(0) - 1, tl.num_programs(0) - 1
    rows = tl.arange(0, BLOCK_B)
    v = Vectors(target, class_ids, counts, None, bias, learned, entry_labels, target_labels, None)
    input, weight, v, kept = of_problem(input, weight, v, kept, B)
    partials = shifted(partials, input.step is not None, 2 * wide(splits) * B)
    targets, counted, known = load_targets(v.target, rows, B, C, ignore_index)
    if split < 0:
        keep_dots_with_targets(
            input, weight, rows, counted, targets, known, None, kept, B, COSINE, OPERAND, SUMS, BLOCK_PAIRED
        )
    else:
        scale = load_scale(factor, v.learned, ACC)
        unit = logit_unit(scale, COSINE)
        largest = tl.full((BLOCK_B,), float("-inf"), ACC)
        total = tl.zeros((BLOCK_B,), ACC)
        for start in tl.range(split * BLOCK_S, S, splits * BLOCK_S, disable_licm=True):
            entries = start + tl.arange(0, BLOCK_S)
            ids, corrections, live, wrong = load_classes(v.class_ids, v.counts, entries, S, C, ACC)
            sums, x_inverse, w_inverse = dots(
                input, weight, rows, counted, ids, live, COSINE, OPERAND, ACC, PRECISION, BLOCK_D
            )
            logits = logits_of(sums, x_inverse, w_inverse, scale, unit, v.bias, ids, live, wrong, corrections)
            hits = load_hits(v.entry_labels, v.target_labels, ids, targets, entries, S, rows, counted, C)
            logits = tl.where(hits, float("-inf"), logits)
            largest, total = add_terms(largest, total, logits, unit)
        found = partials + split.to(tl.int64) * B + rows
        tl.store(found, largest, mask=rows < B)
        tl.store(found + wide(splits) * B, total, mask=rows < B)


@triton.jit
def target_logits(target_logit, target_counts, bias, kept, rows, targets, counted, known, B, scale, unit):
    """(R,) in units; NaN without a class that exists, or of a correction that is not finite."""
    if target_logit is not None:
        own = tl.load(target_logit + rows, mask=counted, other=0.0).to(tl.float64)
        return (own / unit.to(tl.float64)).to(scale.dtype)
    else:
        own = (scale / unit) * target_cosines(kept, rows, known, B, scale.dtype)
        own += load_bias(bias, targets, known, scale.dtype) / unit
        if target_counts is not None:
            correction = tl.load(target_counts + rows, mask=known, other=0.0).to(scale.dtype)
            own -= tl.where(tl.abs(correction) < float("inf"), correction / unit, float("nan"))
        return tl.where(known, own, float("nan"))


@triton.jit
def store_losses_terms(kept, rows, counted, there, own, largest_other, largest, others, unit, B):
    """(R,) losses, of the target's logit and the others' sum; keeps what gradients need of them."""
    others += largest - largest  # NaN where it is infinite, and all that is made of it
    # loss = log(sum of terms) - own; where the target leads, log(1 + others) without the 1's rounding.
    target_leads = own >= largest_other
    lead = tl.where(target_leads, 1.0, tl.exp((own - largest) * unit))
    total = others + lead
    log = tl.log(total)
    log_of_lead = tl.where(total == 1.0, others, log * (others / (total - 1.0)))
    losses = tl.where(target_leads, log_of_lead, (largest - own) * unit + log)
    tl.store(kept + rows, tl.where(counted, largest, 0.0), mask=there)
    tl.store(kept + wide(B) + rows, tl.where(counted, 1.0 / total, 0.0), mask=there)
    tl.store(kept + wide(B) * 2 + rows, tl.where(counted, -(others / total), 0.0), mask=there)
    return tl.where(counted, losses, 0.0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def merge_splits(
    target, target_counts, bias, learned, target_logit, partials, kept, loss, B, C, splits,
    ignore_index, first, count, factor: tl.float64, COSINE: tl.constexpr, ACC: tl.constexpr,
    REDUCTION: tl.constexpr, STACKED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Of `count` rows from `first` on, a tile for each program; one that reduces takes all, in order.

    loss: (B,), or () where the rows are reduced. ACC: what is merged in.
    """
    PART: tl.constexpr = partials.dtype.element_ty
    v = Vectors(target, None, None, target_counts, bias, learned, None, None, target_logit)
    if STACKED:
        v = vectors_of_problem(v)
    kept = shifted(kept, STACKED, wide(B) * KEPT + 1)
    partials = shifted(partials, STACKED, 2 * wide(splits) * B)
    loss = shifted(loss, STACKED, B if REDUCTION == "none" else 1)
    scale = load_scale(factor, v.learned, ACC)
    unit = logit_unit(scale.to(PART), COSINE).to(ACC)
    sum_of_losses = tl.zeros((), tl.float64)
    rows_counted = tl.zeros((), tl.int32)
    for start in range(tl.program_id(0) * BLOCK_B, count, tl.num_programs(0) * BLOCK_B):
        rows = first + start + tl.arange(0, BLOCK_B)
        inside = rows < first + count
        targets, counted, known = load_targets(v.target, rows, first + count, C, ignore_index)
        own = target_logits(
            v.target_logit, v.target_counts, v.bias, kept, rows, targets, counted, known, B, scale, unit
        )
        own = own.to(PART).to(ACC)  # as the others: what is equal stays so
        largest = own
        largest_other = tl.full((BLOCK_B,), float("-inf"), ACC)
        others = tl.zeros((BLOCK_B,), ACC)
        for nth in range(0, splits, BLOCK_SPLITS):
            split = nth + tl.arange(0, BLOCK_SPLITS)
            at = partials + split.to(tl.int64)[:, None] * B + rows[None, :]
            there = (split < splits)[:, None] & counted[None, :]
            largest_of = tl.load(at, mask=there, other=float("-inf")).to(ACC)
            total_of = tl.load(at + wide(splits) * B, mask=there, other=0.0).to(ACC)
            largest_other = tl.maximum(largest_other, tl.max(largest_of, 0))
            larger = tl.maximum(largest, largest_other)
            terms = tl.where(total_of == 0.0, 0.0, total_of * tl.exp((largest_of - larger[None, :]) * unit))
            others = tl.where(others == 0.0, 0.0, others * tl.exp((largest - larger) * unit))
            others += tl.sum(terms, 0)
            largest = larger
        losses = store_losses_terms(kept, rows, counted, inside, own, largest_other, largest, others, unit, B)
        if REDUCTION == "none":
            tl.store(loss + rows, losses, mask=inside)
        else:
            sum_of_losses += tl.sum(losses.to(tl.float64), 0)
            rows_counted += tl.sum(counted.to(tl.int32), 0)
    inverse = tl.full((), 1.0, tl.float64)
    if REDUCTION == "mean":
        inverse = 1.0 / tl.maximum(rows_counted, 1).to(tl.float64)
    if REDUCTION != "none":
        tl.store(loss, sum_of_losses * inverse)
    tl.store(kept + wide(B) * KEPT, inverse)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def reduce_losses(
    target,
    row_losses,  # (B,)
    kept,  # its last number
    loss,  # ()
    B,
    ignore_index,
    REDUCTION: tl.constexpr,  # "mean" | "sum"
    BLOCK: tl.constexpr,
):
    """One program: the rows' losses summed in order, as many sums as there are lanes, then those."""
    sums = tl.zeros((BLOCK,), tl.float64)
    rows_counted = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, B, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        _, counted, _ = load_targets(target, rows, B, 0, ignore_index)
        sums += tl.load(row_losses + rows, mask=rows < B, other=0.0)
        rows_counted += counted.to(tl.int32)
    inverse = tl.full((), 1.0, tl.float64)
    if REDUCTION == "mean":
        inverse = 1.0 / tl.maximum(tl.sum(rows_counted, 0), 1).to(tl.float64)
    tl.store(loss, tl.sum(sums, 0) * inverse)
    tl.store(kept + wide(B) * KEPT, inverse)
