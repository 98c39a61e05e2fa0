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
    shifted_vectors,
    sums_of,
    target_cosines,
    wide,
)


@triton.jit
def dots_with_targets(
    input, weight, rows, counted, targets, known,
    COSINE: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(input_i . weight_t, 1 / |input_i|, 1 / |weight_t|) (R,) each, t being the target; 0 without one."""
    products = tl.zeros((rows.shape[0], BLOCK_D), ACC)
    input_squares = tl.zeros(products.shape, ACC)
    weight_squares = tl.zeros(products.shape, ACC)
    for start in range(0, input.D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        x = load_rows(input, rows, counted, columns, OPERAND).to(ACC)
        w = load_rows(weight, targets, known, columns, OPERAND).to(ACC)
        products += x * w
        if COSINE:
            input_squares += x * x
            weight_squares += w * w
    products = tl.sum(products, 1)
    input_squares, weight_squares = tl.sum(input_squares, 1), tl.sum(weight_squares, 1)
    if COSINE:
        return products, inverse_norm(input_squares), inverse_norm(weight_squares)
    else:
        return in_range(products, input), input_squares + 1.0, weight_squares + 1.0


@triton.jit(do_not_specialize=UNSPECIALIZED)
def partial_terms(
    input, weight, target, class_ids, counts, bias, learned, entry_labels, target_labels, partials, kept,
    steps, B, C, S, ignore_index, factor: tl.float64, COSINE: tl.constexpr, OPERAND: tl.constexpr,
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
    input, weight, v, kept = of_problem(input, weight, v, kept, steps, B)
    partials = shifted(partials, steps, 2 * wide(splits) * B)
    targets, counted, known = load_targets(v.target, rows, B, C, ignore_index)
    if split < 0:
        product, x_inverse, w_inverse = dots_with_targets(
            input, weight, rows, counted, targets, known, COSINE, OPERAND, SUMS, BLOCK_PAIRED
        )
        at = kept + wide(B) * 3 + rows
        tl.store(at, product, mask=rows < B)
        tl.store(at + B, x_inverse, mask=rows < B)
        tl.store(at + 2 * B, w_inverse, mask=rows < B)
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
            larger = tl.maximum(largest, tl.max(logits, 1))
            shift = tl.where(larger == float("-inf"), 0.0, larger)
            total = total * tl.exp((largest - shift) * unit)
            total += tl.sum(tl.exp((logits - shift[:, None]) * unit), 1)
            largest = larger
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
    target, target_counts, bias, learned, target_logit, partials, kept, loss, steps, B, C, splits,
    ignore_index, factor: tl.float64, COSINE: tl.constexpr, ACC: tl.constexpr, REDUCTION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """A tile of rows each program; for "mean" and "sum" a single program takes them all, in order.

    loss: (B,), or () where the rows are reduced.
    """
    v = Vectors(target, None, None, target_counts, bias, learned, None, None, target_logit)
    if steps is not None:
        v = shifted_vectors(v, steps)
    kept = shifted(kept, steps, wide(B) * KEPT + 1)
    partials = shifted(partials, steps, 2 * wide(splits) * B)
    loss = shifted(loss, steps, B if REDUCTION == "none" else 1)
    scale = load_scale(factor, v.learned, ACC)
    unit = logit_unit(scale, COSINE)
    sum_of_losses = tl.zeros((), tl.float64)
    rows_counted = tl.zeros((), tl.int32)
    step = tl.num_programs(0) * BLOCK_B
    for start in range(tl.program_id(0) * BLOCK_B, B, step):
        rows = start + tl.arange(0, BLOCK_B)
        targets, counted, known = load_targets(v.target, rows, B, C, ignore_index)
        of_targets = target_logits(
            v.target_logit, v.target_counts, v.bias, kept, rows, targets, counted, known, B, scale, unit
        )
        split = tl.arange(0, BLOCK_SPLITS)
        at = partials + split.to(tl.int64)[:, None] * B + rows[None, :]
        there = (split < splits)[:, None] & counted[None, :]
        largest_of = tl.load(at, mask=there, other=float("-inf"))
        total_of = tl.load(at + wide(splits) * B, mask=there, other=0.0)
        largest_other = tl.max(largest_of, 0)
        largest = tl.maximum(largest_other, of_targets)
        terms = total_of * tl.exp((largest_of - largest[None, :]) * unit)
        others = tl.sum(tl.where(total_of == 0.0, 0.0, terms), 0)
        losses = store_losses_terms(
            kept, rows, counted, rows < B, of_targets, largest_other, largest, others, unit, B
        )
        if REDUCTION == "none":
            tl.store(loss + rows, losses, mask=rows < B)
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
    BLOCK_B: tl.constexpr,
):
    """One program: the rows' losses summed in order, as many sums as there are lanes, then those."""
    sums = tl.zeros((BLOCK_B,), tl.float64)
    rows_counted = tl.zeros((BLOCK_B,), tl.int32)
    for start in range(0, B, BLOCK_B):
        rows = start + tl.arange(0, BLOCK_B)
        _, counted, _ = load_targets(target, rows, B, 0, ignore_index)
        sums += tl.load(row_losses + rows, mask=rows < B, other=0.0)
        rows_counted += counted.to(tl.int32)
    inverse = tl.full((), 1.0, tl.float64)
    if REDUCTION == "mean":
        inverse = 1.0 / tl.maximum(tl.sum(rows_counted, 0), 1).to(tl.float64)
    tl.store(loss, tl.sum(sums, 0) * inverse)
    tl.store(kept + wide(B) * KEPT, inverse)
