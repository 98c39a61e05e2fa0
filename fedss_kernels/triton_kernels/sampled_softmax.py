"""The loss on GPUs: which kernels are launched, on what. Equations: forward.py and backward.py.

No host synchronisation, so a call can be captured in a CUDA graph. Ids are not checked on the host: a class
out of range is never read; it makes losses NaN.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from . import backward, configurations, forward, tuning
from .configurations import Blocks, Configuration, configure
from .scatter_add import scatter_add

_OPERANDS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


LARGEST_FACTOR = {"cosine": 1e20, "dot": 1e30}  # of the scale, for it and scale / |input| in float32
PRECISE_WORK = 2**16  # B * S * D of float32 problems computed in float64: launches take longer than these


class Problem(NamedTuple):
    """What the kernels are given. Tensors on one device; those of one dimension contiguous."""

    input: Tensor  # (B, D)
    weight: Tensor  # (C, D)
    target: Tensor  # (B,)
    class_ids: Tensor | None  # (S,)
    log_expected_count: Tensor | None  # (S,)
    target_log_expected_count: Tensor | None  # (B,)
    bias: Tensor | None  # (C,)
    factor: float  # the scale is this times ...
    learned: Tensor | None  # () ... this
    cosine: bool
    ignore_index: int
    reduction: str
    operand: torch.dtype  # of products

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
        scale: Tensor,
        similarity: str,
        ignore_index: int,
        reduction: str,
        rounding: torch.dtype | None,
    ) -> "Problem":
        on_host = scale.device != input.device or scale.device.type == "cpu"
        factor = scale.item() if on_host else 1.0
        operand = torch.promote_types(input.dtype, weight.dtype)
        work = target.numel() * (weight if class_ids is None else class_ids).shape[0] * input.shape[1]
        if rounding is not None and operand != torch.float64:
            operand = rounding
        small = operand == torch.float32 and work <= PRECISE_WORK and _exact()
        if small or abs(factor) > LARGEST_FACTOR[similarity]:
            operand = torch.float64
        return cls(
            input,
            weight,
            target.contiguous(),
            _contiguous(class_ids),
            _contiguous(log_expected_count),
            _contiguous(target_log_expected_count),
            _contiguous(bias),
            factor,
            None if on_host else scale,
            similarity == "cosine",
            ignore_index,
            reduction,
            operand,
        )

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, C, S, D"""
        (B, D), C = self.input.shape, len(self.weight)
        return B, C, C if self.class_ids is None else len(self.class_ids), D

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.operand == torch.float64 else torch.float32

    @property
    def wide(self) -> torch.dtype:
        """Of what there is one of for each row or class: float64 if float32 products keep their digits."""
        exact = self.operand == torch.float32 and _exact()
        return torch.float64 if exact else self.accumulator

    @property
    def strides(self) -> tuple[int, int, int, int]:
        (input_row, input_column), (weight_row, weight_column) = self.input.stride(), self.weight.stride()
        return input_row, input_column, weight_row, weight_column

    @property
    def constants(self) -> dict[str, Any]:
        return {
            "COSINE": self.cosine,
            "OPERAND": _OPERANDS[self.operand],
            "ACC": _OPERANDS[self.accumulator],
            "enable_fp_fusion": True,
        }

    @property
    def wide_constants(self) -> dict[str, Any]:
        """Of kernels that do not multiply, and accumulate in `wide`."""
        return {**self.constants, "ACC": _OPERANDS[self.wide]}

    @property
    def precision(self) -> dict[str, Any]:
        exact = self.operand != torch.float32 or _exact()
        return {"PRECISION": "ieee" if exact else "tf32", "WIDE": _OPERANDS[self.wide]}

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.input.new_empty(shape, dtype=dtype or self.accumulator)

    def blocks(self, blocks: Blocks) -> dict[str, int]:
        """Of a kernel that multiplies."""
        return {
            "BLOCK_B": blocks.rows,
            "BLOCK_S": blocks.classes,
            "BLOCK_D": blocks.columns,
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
            **configurations.TABLE.matrices[self.operand.itemsize],
        }

    def configuration(self, stage: str, run: Callable[[Configuration], object]) -> Configuration:
        """The table's, or with FEDSS_AUTOTUNE=1 that with which `run` ("forward", "backward") is fastest."""
        B, C, S, D = self.sizes
        inputs = self.input.numel() * self.input.itemsize + self.weight.numel() * self.weight.itemsize
        table = configure(B, S, D, self.operand.itemsize, 2 * inputs)
        if not tuning.wanted(self.input.device):
            return table
        given = tuple(part is None for part in self)
        key = (stage, self.sizes, self.operand, self.cosine, self.reduction, given, self.input.device)
        return tuning.fastest(key, table, stage, run)


def _exact() -> bool:
    """Whether float32 products keep all their digits: unless torch is told otherwise."""
    return torch.get_float32_matmul_precision() == "highest"


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def empty_results(input: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """(loss, kept), uninitialised."""
    B = input.shape[0]
    result_dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return (
        input.new_empty((B,) if reduction == "none" else (), dtype=result_dtype),
        input.new_empty((forward.KEPT * B + 1,), dtype=torch.float64),
    )


def loss(p: Problem) -> tuple[Tensor, Tensor]:
    """(loss () or (B,), kept), in two launches."""
    return _loss(p, p.configuration("forward", partial(_loss, p)))


def _loss(p: Problem, c: Configuration) -> tuple[Tensor, Tensor]:
    B, C, S, D = p.sizes
    blocks = c.forward
    losses, kept = empty_results(p.input, p.reduction)
    partials = p.empty(2, c.splits, B)
    with device_of(p.input):
        if B > 0:
            forward.partial_terms[(triton.cdiv(B, blocks.rows), c.splits)](
                *(p.input, p.weight, p.target, p.class_ids, p.log_expected_count, p.bias, p.learned),
                *(partials, kept, B, C, S, D, p.ignore_index, *p.strides, p.factor),
                **p.constants,
                **p.precision,
                **p.blocks(blocks),
                **configurations.TABLE.all_registers,
            )
        rows = min(128, triton.next_power_of_2(max(B, 16)))
        splits = triton.next_power_of_2(c.splits)
        rows = max(min(rows, 4096 // splits), 16)
        reduced = p.reduction != "none"
        forward.merge_splits[(1 if reduced else max(triton.cdiv(B, rows), 1),)](
            *(p.target, p.target_log_expected_count, p.bias, p.learned, partials, kept, losses),
            *(B, C, c.splits, p.ignore_index, p.factor),
            COSINE=p.cosine,
            ACC=p.wide_constants["ACC"],
            REDUCTION=p.reduction,
            BLOCK_B=rows,
            BLOCK_SPLITS=splits,
            num_warps=c.merge_warps,
            **configurations.TABLE.all_registers,
            enable_fp_fusion=True,
        )
    return losses, kept


class Gradients(NamedTuple):
    """None: not wanted."""

    input: Tensor | None  # (B, D)
    weight: Tensor | None  # (C, D), dense or sparse
    bias: Tensor | None  # (C,)
    scale: Tensor | None  # ()


def gradients(
    p: Problem, kept: Tensor, grad_loss: Tensor, needed: list[bool], sparse_grad: bool, scale: Tensor
) -> Gradients:
    """Of input, weight, bias and scale, those that are needed."""
    run = partial(_gradients, p, kept, grad_loss, needed, sparse_grad, scale)
    return run(p.configuration("backward", run))


def _gradients(
    p: Problem,
    kept: Tensor,
    grad_loss: Tensor,
    needed: list[bool],
    sparse_grad: bool,
    scale: Tensor,
    c: Configuration,
) -> Gradients:
    B, C, S, D = p.sizes
    fold = p.class_ids is None
    entries = C if fold else S + B
    spread = not fold and ((needed[1] and not sparse_grad) or needed[2])
    compact_dtype = p.weight.dtype if fold or sparse_grad else p.accumulator
    grad_rows = p.empty(entries, D, dtype=compact_dtype) if needed[1] else None
    grad_bias = p.empty(entries, dtype=p.weight.dtype if fold else p.accumulator) if needed[2] else None
    results = Gradients(
        p.empty(B, D, dtype=p.input.dtype) if needed[0] else None,
        p.weight.new_zeros(p.weight.shape) if needed[1] and not (fold or sparse_grad) else None,
        p.weight.new_zeros(C) if needed[2] and not fold else None,
        torch.zeros((), dtype=scale.dtype, device=p.input.device) if needed[3] else None,
    )
    upstream = grad_loss.contiguous()
    with device_of(p.input):
        if B > 0 and c.small:
            _small(p, c, kept, upstream, grad_rows, grad_bias, results, needed)
        elif B > 0:
            _large(p, c, kept, upstream, grad_rows, grad_bias, results, needed)
            if spread:
                _spread(p, None if sparse_grad else grad_rows, grad_bias, results)
    if B == 0:
        for found in (grad_rows, grad_bias):
            if found is not None:
                found.zero_()
    weight = results.weight
    if needed[1] and sparse_grad:
        assert grad_rows is not None
        weight = _sparse(p, grad_rows)
    elif needed[1] and fold:
        weight = grad_rows
    return results._replace(weight=weight, bias=grad_bias if fold else results.bias)


def _sparse(p: Problem, grad_rows: Tensor) -> Tensor:
    """nnz = S + B, the class set's entries and then the targets'; those without a class go to class 0.

    What they hold is 0, or NaN beside losses that are NaN too.
    """
    C = len(p.weight)
    if p.class_ids is None:
        ids = torch.arange(C, device=p.weight.device)
    else:
        ids = torch.cat([p.class_ids, p.target])
        ids = torch.where((ids >= 0) & (ids < C), ids, 0)
    return torch.sparse_coo_tensor(ids[None], grad_rows, p.weight.shape, check_invariants=False)


def _small(
    p: Problem,
    c: Configuration,
    kept: Tensor,
    upstream: Tensor,
    grad_rows: Tensor | None,
    grad_bias: Tensor | None,
    results: Gradients,
    needed: list[bool],
) -> None:
    """Two launches."""
    B, C, S, D = p.sizes
    fold, blocks = p.class_ids is None, c.tiles
    tiles = triton.cdiv(S, blocks.classes)
    partial_input = p.empty(tiles, B, D) if needed[0] else None
    partial_share = p.empty(tiles, B, dtype=p.wide) if needed[0] and p.cosine else None
    partial_scale = p.empty(tiles, B, dtype=p.wide) if needed[3] else None
    options = {"FOLD": fold, "PER_ROW": p.reduction == "none"}
    if tiles + (not fold) > 0:
        backward.small_tiles[(tiles + (not fold),)](
            *(p.input, p.weight, p.target, p.class_ids, p.log_expected_count, p.bias, p.learned, upstream),
            *(kept, grad_rows, grad_bias, partial_input, partial_share, partial_scale),
            *(B, C, S, D, p.ignore_index, *p.strides, p.factor),
            **options,
            **p.constants,
            **p.precision,
            **p.blocks(blocks),
            **configurations.TABLE.all_registers,
        )
    spread = 0 if results.weight is None and results.bias is None else S + B
    backward.small_results[(B + 1 + spread, triton.cdiv(max(D, 1), c.result_columns))](
        *(p.input, p.weight, p.target, p.class_ids, p.learned, upstream, kept),
        *(None if results.weight is None else grad_rows, None if results.bias is None else grad_bias),
        *(partial_input, partial_share, partial_scale, *results),
        *(B, C, S, D, tiles, p.ignore_index, *p.strides, p.factor),
        **options,
        **p.wide_constants,
        BLOCK_D=c.result_columns,
        BLOCK_TILES=16,
        BLOCK_ENTRIES=c.result_entries,
        num_warps=c.result_warps,
        **configurations.TABLE.all_registers,
    )


def _large(
    p: Problem,
    c: Configuration,
    kept: Tensor,
    upstream: Tensor,
    grad_rows: Tensor | None,
    grad_bias: Tensor | None,
    results: Gradients,
    needed: list[bool],
) -> None:
    """Three launches for each chunk of classes, two in the end."""
    B, C, S, D = p.sizes
    fold, tile = p.class_ids is None, c.tiles
    chunk = min(c.chunk, triton.cdiv(max(S, 1), tile.classes) * tile.classes)
    row_tiles, class_tiles = triton.cdiv(B, tile.rows), chunk // tile.classes
    # float16 is too narrow for small gradients.
    pulls = p.empty(B, chunk, dtype=p.accumulator if p.operand == torch.float16 else p.operand)
    share_rows, share_classes = (p.empty(*s, dtype=p.wide) for s in ((class_tiles, B), (row_tiles, chunk)))
    bias_classes = p.empty(row_tiles, chunk) if needed[2] else None
    scale_rows = p.empty(class_tiles, B, dtype=p.wide) if needed[3] else None
    sums_input = p.empty(1, B, D, dtype=p.wide).zero_() if needed[0] else None
    sums_share = p.empty(1, B, dtype=p.wide).zero_() if needed[0] and p.cosine else None
    sums_scale = p.empty(1, B, dtype=p.wide).zero_() if needed[3] else None
    options = {"FOLD": fold, "PER_ROW": p.reduction == "none"}
    for first in range(0, S, chunk):
        size = min(chunk, S - first)
        tiles = triton.cdiv(size, tile.classes)
        backward.pull_chunk[(row_tiles, tiles)](
            *(p.input, p.weight, p.target, p.class_ids, p.log_expected_count, p.bias, p.learned),
            *(upstream, kept, pulls, share_rows, share_classes, bias_classes, scale_rows),
            *(first, size, B, C, S, D, p.ignore_index, *p.strides, p.factor),
            **options,
            **p.constants,
            **p.precision,
            **p.blocks(tile),
            **configurations.TABLE.all_registers,
        )
        if needed[1] or needed[2]:
            grid = (triton.cdiv(size, c.grad_rows.classes), triton.cdiv(max(D, 1), c.grad_rows.columns))
            backward.chunk_grad_rows[grid](
                *(p.input, p.weight, p.target, p.class_ids, p.log_expected_count),
                *(pulls, share_classes, bias_classes, grad_rows, grad_bias, first, size),
                *(B, C, S, D, row_tiles, p.ignore_index, *p.strides),
                **p.constants,
                **p.precision,
                **p.blocks(c.grad_rows),
            )
        if needed[0] or needed[3]:
            columns = triton.cdiv(D, c.grad_input.columns) if needed[0] else 1
            backward.chunk_grad_input[(triton.cdiv(B, c.grad_input.rows), max(columns, 1))](
                *(p.weight, p.class_ids, p.log_expected_count, pulls, share_rows, scale_rows),
                *(sums_input, sums_share, sums_scale, first, size, B, C, S, D, tiles, *p.weight.stride()),
                FOLD=fold,
                **{name: value for name, value in p.constants.items() if name != "COSINE"},
                **p.precision,
                **p.blocks(c.grad_input),
            )
    if not fold and (needed[1] or needed[2]):
        backward.target_rows[(triton.cdiv(B, 16), triton.cdiv(max(D, 1), c.result_columns))](
            *(p.input, p.weight, p.target, p.learned, upstream, kept, grad_rows, grad_bias),
            *(B, C, S, D, p.ignore_index, *p.strides, p.factor),
            PER_ROW=options["PER_ROW"],
            **p.wide_constants,
            BLOCK_B=16,
            BLOCK_D=c.result_columns,
            num_warps=c.result_warps,
            **configurations.TABLE.all_registers,
        )
    backward.small_results[(B + 1, triton.cdiv(max(D, 1), c.result_columns))](
        *(p.input, p.weight, p.target, p.class_ids, p.learned, upstream, kept, None, None),
        *(sums_input, sums_share, sums_scale, results.input, None, None, results.scale),
        *(B, C, S, D, 1, p.ignore_index, *p.strides, p.factor),
        **options,
        **p.wide_constants,
        BLOCK_D=c.result_columns,
        BLOCK_TILES=1,
        BLOCK_ENTRIES=c.result_entries,
        num_warps=c.result_warps,
        **configurations.TABLE.all_registers,
    )


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
