"""The loss' kernels, each with the constants and the compiler's options of a configuration."""

import functools
from typing import Any, NamedTuple

import torch
import triton.language as tl

from . import backward, forward
from .configurations import Blocks, Table, Tiling
from .launch import Variant
from .problem import Traits

TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

ENTRIES = 1024  # of one program that lists classes


class Kernels(NamedTuple):
    """Each kernel with the constants and options of a configuration."""

    partial_terms: Variant
    merge_splits: Variant
    small_tiles: Variant
    small_results: Variant
    sparse_ids: Variant


@functools.lru_cache(maxsize=1024)
def kernels_of(traits: Traits, t: Tiling, table: Table) -> Kernels:
    acc, wide = TYPES[traits.accumulator], TYPES[traits.wide]
    operand, cosine, fold = TYPES[traits.operand], traits.cosine, traits.fold
    registers = {**table.all_registers, "enable_fp_fusion": True}
    exact = traits.operand != torch.float32 or traits.wide == torch.float64
    products = {"OPERAND": operand, "ACC": acc, "WIDE": wide, "PRECISION": "ieee" if exact else "tf32"}
    gradients = {"FOLD": fold, "COSINE": cosine, "PER_ROW": traits.reduction == "none"}

    def multiplying(blocks: Blocks) -> dict[str, Any]:
        return {
            "BLOCK_B": blocks.rows,
            "BLOCK_S": blocks.classes,
            "BLOCK_D": blocks.columns,
            "PREFETCH": blocks.prefetch,
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
        blocks = {"BLOCK_D": columns, "BLOCK_TILES": tiles}
        blocks |= {"BLOCK_PARTS": t.result_parts, "BLOCK_ENTRIES": t.result_entries}
        types = {"OPERAND": operand, "ACC": wide}
        options = {"num_warps": t.result_warps, **registers}
        return Variant(backward.small_results, **gradients, **types, **blocks, **options)

    return Kernels(
        Variant(
            forward.partial_terms,
            **{"COSINE": cosine, **products, **multiplying(t.forward), **registers},
            BLOCK_PAIRED=max(32 * t.forward.warps * table.paired // t.forward.rows, 16),
        ),
        merging(traits.reduction),
        Variant(
            backward.small_tiles,
            **{**gradients, **products, **multiplying(t.tiles), **registers},
        ),
        results(t.result_columns, t.result_tiles),
        Variant(backward.sparse_ids, BLOCK_S=ENTRIES, num_warps=4, **registers),
    )
