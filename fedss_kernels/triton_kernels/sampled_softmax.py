"""The loss on GPUs: which kernels are launched, on what. Equations: forward.py and backward.py.

No host synchronisation, so a call can be captured in a CUDA graph. Ids are not checked on the host: a class
out of range is never read; it makes losses NaN.
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from . import backward, forward, tuning
from .configurations import Blocks, Configuration, Table, Tiling, configure, table_of
from .launch import Variant
from .scatter_add import scatter_add

_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


LARGEST_FACTOR = {"cosine": 1e20, "dot": 1e30}  # of the scale, for it and scale / |input| in float32
MANY_ROWS = 128  # more than one program merges, where their losses are reduced
ENTRIES = 1024  # of one program that lists classes


class Traits(NamedTuple):
    """What the kernels are compiled for, besides the arguments' dtypes."""

    operand: torch.dtype  # of products
    wide: torch.dtype  # of what there is one of for each row or class; see tiles.py
    cosine: bool
    reduction: str
    fold: bool  # every class is in the set

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.operand == torch.float64 else torch.float32


class Problem(NamedTuple):
    """What the kernels are given. Tensors on one device; those of one dimension contiguous."""

    input: Tensor  # (B, D)
    weight: Tensor  # (C, D)
    target: Tensor  # (B,)
    class_ids: Tensor | None  # (S,)
    log_expected_count: Tensor | None  # (S,)
    target_log_expected_count: Tensor | None  # (B,)
    bias: Tensor | None  # (C,)
    learned: Tensor | None  # (): the scale is this, or 1, times ...
    factor: float  # ... this
    ignore_index: int
    traits: Traits

    @classmethod
    def of(
        cls,
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        class_ids: Tensor | None,
        log_expected_count: Tensor | None,
        target_log_expected_count: Tensor | None,
        bias: Tensor | None,
        scale: float | Tensor,
        similarity: str,
        ignore_index: int,
        reduction: str,
        rounding: torch.dtype | None,
    ) -> "Problem":
        learned = None
        if not isinstance(scale, Tensor):
            factor = scale
        elif scale.is_cpu or scale.device != input.device:
            factor = scale.item()
        else:
            learned, factor = scale, 1.0
        alike = input.dtype == weight.dtype
        operand = input.dtype if alike else torch.promote_types(input.dtype, weight.dtype)
        if rounding is not None and operand != torch.float64:
            operand = rounding
        exact = operand == torch.float32 and _exact()
        if abs(factor) > LARGEST_FACTOR[similarity]:
            operand = torch.float64
        elif exact and alike:
            B, D = input.shape
            work = B * (weight if class_ids is None else class_ids).shape[0] * D
            if work <= table_of(input.device).precise_work:
                operand = torch.float64
        wide = torch.float64 if exact or operand == torch.float64 else torch.float32
        float32 = operand == torch.float64
        return cls(
            input,
            weight,
            target.contiguous(),
            _contiguous(class_ids),
            _contiguous(log_expected_count, float32),
            _contiguous(target_log_expected_count, float32),
            _contiguous(bias, float32),
            _contiguous(learned, float32),
            factor,
            ignore_index,
            Traits(operand, wide, similarity == "cosine", reduction, class_ids is None),
        )

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those of the fields that are, in order."""
        return self[:8]

    @property
    def others(self) -> tuple[Any, ...]:
        return self[8:]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, C, S, D"""
        (B, D), C = self.input.shape, self.weight.shape[0]
        return B, C, C if self.class_ids is None else self.class_ids.shape[0], D

    @property
    def operands(self) -> tuple[Tensor, Tensor, tuple[int, int, int, int]]:
        """(input, weight, their strides) for kernels to read."""
        input, weight = self.input, self.weight
        if self.traits.operand == torch.float64:
            input, weight = _not_of_16_bits(input), _not_of_16_bits(weight)
        (input_row, input_column), (weight_row, weight_column) = input.stride(), weight.stride()
        return input, weight, (input_row, input_column, weight_row, weight_column)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.input.new_empty(shape, dtype=dtype or self.traits.accumulator)

    @property
    def room(self) -> str:
        """See `configure`."""
        operand = self.traits.operand
        if self.input.shape[1] % 16 != 0 or self.input.stride(1) != 1 or self.weight.stride(1) != 1:
            return ""
        alike = operand == self.input.dtype == self.weight.dtype and operand != torch.float16
        if self.bias is not None or self.learned is not None or not alike:
            return "vectors"
        whole = self.traits.fold and self.log_expected_count is None
        return "cosine" if self.traits.cosine else "linear" if whole else "dot"

    def configuration(self, stage: str, run: Callable[[Configuration], object]) -> Configuration:
        """The table's, or with FEDSS_AUTOTUNE=1 that with which `run` ("forward", "backward") is fastest."""
        B, C, S, D = self.sizes
        inputs = self.input.numel() * self.input.itemsize + self.weight.numel() * self.weight.itemsize
        device, traits = self.input.device, self.traits
        table = configure(table_of(device), B, S, D, traits.operand.itemsize, self.room, 2 * inputs)
        if not tuning.wanted(device):
            return table
        given = tuple(part is None for part in self)
        key = (stage, self.sizes, traits, given, device)
        return tuning.fastest(key, table, stage, run)


def _exact() -> bool:
    """Whether float32 products keep all their digits: unless torch is told otherwise."""
    return torch.get_float32_matmul_precision() == "highest"


def _not_of_16_bits(tensor: Tensor) -> Tensor:
    """The same in float32: Triton 3.6 cannot compile float64 products of what comes from 16 bits."""
    return tensor.float() if tensor.itemsize == 2 else tensor


def _contiguous(tensor: Tensor | None, float32: bool = False) -> Tensor | None:
    """float32: not of 16 bits"""
    if tensor is None:
        return None
    return (_not_of_16_bits(tensor) if float32 else tensor).contiguous()


class Kernels(NamedTuple):
    """Each kernel with the constants and options of a configuration."""

    inverse_norms: Variant
    partial_terms: Variant
    merge_splits: Variant
    merge_rows: Variant  # the same, where what it finds is reduced by the next
    reduce_losses: Variant
    small_tiles: Variant
    small_results: Variant
    sparse_ids: Variant
    class_sources: Variant
    target_sources: Variant
    pull_chunk: Variant
    chunk_grad_rows: Variant
    chunk_grad_input: Variant
    target_rows: Variant
    large_results: Variant


def kernels(c: Configuration, p: Problem) -> Kernels:
    found = c.kernels.get(p.traits)
    if found is None:
        found = c.kernels[p.traits] = _kernels(p.traits, c.tiling, table_of(p.input.device))
    return found


@functools.lru_cache(maxsize=1024)
def _kernels(traits: Traits, t: Tiling, table: Table) -> Kernels:
    acc, wide = _TYPES[traits.accumulator], _TYPES[traits.wide]
    operand, cosine, fold = _TYPES[traits.operand], traits.cosine, traits.fold
    registers = {**table.all_registers, "enable_fp_fusion": True}
    exact = traits.operand != torch.float32 or traits.wide == torch.float64
    products = {"OPERAND": operand, "ACC": acc, "WIDE": wide, "PRECISION": "ieee" if exact else "tf32"}
    gradients = {"FOLD": fold, "COSINE": cosine, "PER_ROW": traits.reduction == "none"}

    def multiplying(blocks: Blocks) -> dict[str, Any]:
        return {
            "BLOCK_B": blocks.rows,
            "BLOCK_S": blocks.classes,
            "BLOCK_D": blocks.columns,
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
            "enable_fp_fusion": True,
            **table.matrices[traits.operand.itemsize],
        }

    def merging(reduction: str) -> Variant:
        blocks = {"BLOCK_B": t.merged_rows, "BLOCK_SPLITS": t.merged_splits, "num_warps": t.merge_warps}
        return Variant(
            forward.merge_splits, COSINE=cosine, ACC=wide, REDUCTION=reduction, **blocks, **registers
        )

    def results(columns: int, tiles: int) -> Variant:
        blocks = {"BLOCK_D": columns, "BLOCK_TILES": tiles, "BLOCK_ENTRIES": t.result_entries}
        types = {"OPERAND": operand, "ACC": wide}
        options = {"num_warps": t.result_warps, **registers}
        return Variant(backward.small_results, **gradients, **types, **blocks, **options)

    return Kernels(
        Variant(
            forward.inverse_norms,
            **{"OPERAND": operand, "ACC": acc, "BLOCK_S": 16, "BLOCK_D": 64, "num_warps": 4},
            **registers,
        ),
        Variant(
            forward.partial_terms,
            **{"COSINE": cosine, **products, **multiplying(t.forward), **registers},
        ),
        merging(traits.reduction),
        merging("none"),
        Variant(forward.reduce_losses, REDUCTION=traits.reduction, BLOCK_B=1024, num_warps=4, **registers),
        Variant(
            backward.small_tiles,
            **{**gradients, **products, **multiplying(t.tiles), **registers},
        ),
        results(t.result_columns, 16),
        Variant(backward.sparse_ids, BLOCK_S=ENTRIES, num_warps=4, **registers),
        Variant(backward.class_sources, BLOCK_S=ENTRIES, num_warps=4, **registers),
        Variant(backward.target_sources, BLOCK_B=ENTRIES, num_warps=4, **registers),
        Variant(
            backward.pull_chunk,
            **{**gradients, **products, **multiplying(t.tiles), **registers},
        ),
        Variant(
            backward.chunk_grad_rows,
            **{"LOOKS_AHEAD": t.looks_ahead, "COSINE": cosine},
            **{**products, **multiplying(t.grad_rows), **registers},
        ),
        Variant(backward.chunk_grad_input, **{**products, **multiplying(t.grad_input), **registers}),
        Variant(
            backward.target_rows,
            **{"COSINE": cosine, "PER_ROW": gradients["PER_ROW"], "OPERAND": operand, "ACC": wide},
            **{"BLOCK_B": 16, "BLOCK_D": t.result_columns, "num_warps": t.result_warps},
            **registers,
        ),
        results(t.large_columns, 1),
    )


def empty_results(input: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """(loss, kept), uninitialised."""
    B = input.shape[0]
    result_dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return (
        input.new_empty((B,) if reduction == "none" else (), dtype=result_dtype),
        input.new_empty((forward.KEPT * B + 1,), dtype=torch.float64),
    )


def loss(p: Problem) -> tuple[Tensor, Tensor]:
    """(loss () or (B,), kept), in two launches; of many rows that are reduced in three."""
    return _loss(p, p.configuration("forward", partial(_loss, p)))


def _loss(p: Problem, c: Configuration) -> tuple[Tensor, Tensor]:
    B, C, S, D = p.sizes
    k, t = kernels(c, p), c.tiling
    losses, kept = empty_results(p.input, p.traits.reduction)
    partials = p.empty(2, c.splits, B)
    input, weight, strides = p.operands
    reduced = p.traits.reduction != "none"
    apart = reduced and B > MANY_ROWS
    row_losses = p.empty(B, dtype=torch.float64) if apart else losses
    with device_of(p.input):
        if B > 0:
            k.partial_terms(
                (triton.cdiv(B, t.forward.rows), c.splits),
                *(input, weight, p.target, p.class_ids, p.log_expected_count, p.bias, p.learned),
                *(_inverses(p, c, k), partials, kept, B, C, S, D, p.ignore_index, *strides, p.factor),
            )
        (k.merge_rows if apart else k.merge_splits)(
            (1 if reduced and not apart else max(triton.cdiv(B, t.merged_rows), 1),),
            *(p.target, p.target_log_expected_count, p.bias, p.learned, partials, kept, row_losses),
            *(B, C, c.splits, p.ignore_index, p.factor),
        )
        if apart:
            k.reduce_losses((1,), p.target, row_losses, kept, losses, B, p.ignore_index)
    return losses, kept


class Gradients(NamedTuple):
    """None: not wanted."""

    input: Tensor | None  # (B, D)
    weight: Tensor | None  # (C, D), dense or sparse
    bias: Tensor | None  # (C,)
    scale: Tensor | None  # ()


def gradients(
    p: Problem,
    kept: Tensor,
    grad_loss: Tensor,
    needed: Sequence[bool],  # of input, weight, bias and scale
    sparse_grad: bool,
    scale_dtype: torch.dtype | None,  # None: not needed
) -> Gradients:
    run = partial(_gradients, p, kept, grad_loss, needed, sparse_grad, scale_dtype)
    return run(p.configuration("backward", run))


def _gradients(
    p: Problem,
    kept: Tensor,
    grad_loss: Tensor,
    needed: Sequence[bool],
    sparse_grad: bool,
    scale_dtype: torch.dtype | None,
    c: Configuration,
) -> Gradients:
    B, C, S, D = p.sizes
    fold = p.class_ids is None
    entries = C if fold else S + B
    spread = not fold and ((needed[1] and not sparse_grad) or needed[2])
    input_dtype, weight_dtype = p.input.dtype, p.weight.dtype
    compact_dtype = weight_dtype if fold or sparse_grad else p.traits.accumulator
    grad_rows = p.empty(entries, D, dtype=compact_dtype) if needed[1] else None
    grad_bias = p.empty(entries, dtype=weight_dtype if fold else p.traits.accumulator) if needed[2] else None
    dense = needed[1] and not (fold or sparse_grad)
    results = Gradients(
        p.empty(B, D, dtype=input_dtype) if needed[0] else None,
        p.weight.new_zeros(p.weight.shape) if dense else None,
        p.weight.new_zeros(C) if needed[2] and not fold else None,
        p.input.new_zeros((), dtype=scale_dtype) if needed[3] else None,
    )
    ids = None
    if needed[1] and sparse_grad:
        ids = (
            torch.arange(C, device=p.weight.device)[None] if fold else p.empty(1, entries, dtype=torch.int64)
        )
    upstream = grad_loss.contiguous()
    with device_of(p.input):
        if B > 0 and c.small:
            _small(p, c, kept, upstream, grad_rows, grad_bias, results, None if fold else ids)
        elif B > 0:
            _large(p, c, kept, upstream, grad_rows, grad_bias, results)
            if ids is not None and not fold:
                grid = (triton.cdiv(entries, ENTRIES),)
                kernels(c, p).sparse_ids(grid, p.class_ids, p.target, ids, B, C, S, p.ignore_index)
            if spread:
                _spread(p, None if sparse_grad else grad_rows, grad_bias, results)
    if B == 0:
        for found in (grad_rows, grad_bias, ids if not fold else None):
            if found is not None:
                found.zero_()
    weight = results.weight
    if ids is not None and grad_rows is not None:
        # nnz = S + B, the class set's entries and then the targets'; those without a class go to class 0, and
        # are 0, or NaN beside losses that are NaN too.
        weight = torch.sparse_coo_tensor(ids, grad_rows, p.weight.shape, check_invariants=False)
    elif needed[1] and fold:
        weight = grad_rows
    return results._replace(weight=weight, bias=grad_bias if fold else results.bias)


def _small(
    p: Problem,
    c: Configuration,
    kept: Tensor,
    upstream: Tensor,
    grad_rows: Tensor | None,
    grad_bias: Tensor | None,
    results: Gradients,
    ids: Tensor | None,  # (1, S + B) to be filled: the classes of a sparse gradient's rows
) -> None:
    """Two launches."""
    B, C, S, D = p.sizes
    k, t, wide = kernels(c, p), c.tiling, p.traits.wide
    input, weight, strides = p.operands
    tiles = triton.cdiv(S, t.tiles.classes)
    partial_input = partial_share = partial_scale = None
    if results.input is not None:
        partial_input = p.empty(tiles, B, D)
        partial_share = p.empty(tiles, B, dtype=wide) if p.traits.cosine else None
    if results.scale is not None:
        partial_scale = p.empty(tiles, B, dtype=wide)
    if tiles + (not p.traits.fold) > 0:
        k.small_tiles(
            (tiles + (not p.traits.fold),),
            *(input, weight, p.target, p.class_ids, p.log_expected_count, p.bias, p.learned, upstream),
            *(kept, grad_rows, grad_bias, partial_input, partial_share, partial_scale),
            *(B, C, S, D, p.ignore_index, *strides, p.factor),
        )
    spread = 0 if results.weight is None and results.bias is None and ids is None else S + B
    k.small_results(
        (B + 1 + spread, triton.cdiv(max(D, 1), t.result_columns)),
        *(input, weight, p.target, p.class_ids, p.learned, upstream, kept),
        *(None if results.weight is None else grad_rows, None if results.bias is None else grad_bias),
        *(partial_input, partial_share, partial_scale, *results, ids),
        *(B, C, S, D, tiles, p.ignore_index, *strides, p.factor),
    )


def _large(
    p: Problem,
    c: Configuration,
    kept: Tensor,
    upstream: Tensor,
    grad_rows: Tensor | None,
    grad_bias: Tensor | None,
    results: Gradients,
) -> None:
    """Three launches for each chunk of classes, and up to two before and two after them."""
    B, C, S, D = p.sizes
    k, t, traits = kernels(c, p), c.tiling, p.traits
    input, weight, strides = p.operands
    tile, of_rows, of_input = t.tiles, t.grad_rows, t.grad_input
    chunk = min(c.chunk, triton.cdiv(max(S, 1), tile.classes) * tile.classes)
    row_tiles, class_tiles = triton.cdiv(B, tile.rows), chunk // tile.classes
    # float16 is too narrow for small gradients.
    pulls = p.empty(B, chunk, dtype=traits.accumulator if traits.operand == torch.float16 else traits.operand)
    share_rows, share_classes = (
        p.empty(*shape, dtype=traits.wide) for shape in ((class_tiles, B), (row_tiles, chunk))
    )
    bias_classes = scale_rows = sums_input = sums_share = sums_scale = None
    if grad_bias is not None:
        bias_classes = p.empty(row_tiles, chunk)
    if results.scale is not None:
        scale_rows = p.empty(class_tiles, B, dtype=traits.wide)
        sums_scale = p.empty(1, B, dtype=traits.wide).zero_()
    if results.input is not None:
        sums_input = p.empty(1, B, D, dtype=traits.wide).zero_()
        sums_share = p.empty(1, B, dtype=traits.wide).zero_() if traits.cosine else None
    sources, inverses = _sources(p, k), _inverses(p, c, k)
    for first in range(0, S, chunk):
        size = min(chunk, S - first)
        tiles = triton.cdiv(size, tile.classes)
        stored = tiles * tile.classes
        k.pull_chunk(
            (row_tiles, tiles),
            *(input, weight, p.target, p.class_ids, p.log_expected_count, p.bias, p.learned),
            *(inverses, upstream, kept, pulls, share_rows, share_classes, bias_classes, scale_rows),
            *(first, size, chunk, B, C, S, D, p.ignore_index, *strides, p.factor),
        )
        if grad_rows is not None or grad_bias is not None:
            columns = max(triton.cdiv(D, of_rows.columns), 1)
            k.chunk_grad_rows(
                (triton.cdiv(size, of_rows.classes) * columns,),
                *(input, weight, p.target, sources, pulls, share_classes, bias_classes),
                *(grad_rows, grad_bias, first, size, stored, chunk, B, C, D, columns, row_tiles),
                *(p.ignore_index, *strides),
            )
        if results.input is not None or results.scale is not None:
            columns = max(triton.cdiv(D, of_input.columns), 1) if results.input is not None else 1
            k.chunk_grad_input(
                (triton.cdiv(B, of_input.rows), columns),
                *(weight, sources, pulls, share_rows, scale_rows, sums_input, sums_share, sums_scale),
                *(first, size, stored, chunk, B, D, tiles, *strides[2:]),
            )
    if not traits.fold and (grad_rows is not None or grad_bias is not None):
        k.target_rows(
            (triton.cdiv(B, 16), triton.cdiv(max(D, 1), t.result_columns)),
            *(input, weight, p.target, p.learned, upstream, kept, grad_rows, grad_bias),
            *(B, C, S, D, p.ignore_index, *strides, p.factor),
        )
    k.large_results(
        (B + 1, triton.cdiv(max(D, 1), t.large_columns)),
        *(input, weight, p.target, p.class_ids, p.learned, upstream, kept, None, None),
        *(sums_input, sums_share, sums_scale, results.input, None, None, results.scale, None),
        *(B, C, S, D, 1, p.ignore_index, *strides, p.factor),
    )


def _inverses(p: Problem, c: Configuration, k: Kernels) -> Tensor | None:
    """(B + S,) inverse norms of the rows and then of the entries'; None: the kernels find them on the way."""
    B, C, S, D = p.sizes
    if c.small or not p.traits.cosine or p.traits.wide == torch.float64:
        return None
    input, weight, strides = p.operands
    inverses = p.empty(B + S)
    grid = (triton.cdiv(B + S, k.inverse_norms.named["BLOCK_S"]),)
    k.inverse_norms(grid, input, weight, p.class_ids, inverses, B, C, S, D, *strides)
    return inverses


def _sources(p: Problem, k: Kernels) -> Tensor | None:
    """(S,) the row of `weight` of each entry, -1 for those that take no part; None: row j is entry j's."""
    B, C, S, _ = p.sizes
    if p.traits.fold and p.log_expected_count is None:
        return None
    sources = p.empty(S, dtype=torch.int64)
    k.class_sources((triton.cdiv(max(S, 1), ENTRIES),), p.class_ids, p.log_expected_count, sources, S, C)
    if p.traits.fold:
        k.target_sources((triton.cdiv(B, ENTRIES),), p.target, sources, B, C, p.ignore_index)
    return sources


def _spread(p: Problem, grad_rows: Tensor | None, grad_bias: Tensor | None, results: Gradients) -> None:
    """Adds up the entries of each class: sorted, as comparing all with all would be quadratic."""
    C = len(p.weight)
    assert p.class_ids is not None
    ids = torch.cat([p.class_ids, torch.where(p.target == p.ignore_index, -1, p.target)])
    ids, order = ids.clamp(-1, C).sort(stable=True)  # -1 and C: passed over
    if grad_rows is not None and results.weight is not None:
        scatter_add(results.weight, ids, order, grad_rows, None)
    if grad_bias is not None and results.bias is not None:
        scatter_add(results.bias[:, None], ids, order, grad_bias[:, None], None)
