"""The kernels of chunks, each with its constants and the compiler's options."""

import functools
from typing import Any, NamedTuple

from . import backward, chunk_kernels, forward
from .chunks import Chunks
from .configurations import Table
from .launch import TYPES, Variant
from .problem import Traits

ENTRIES = 1024  # of one program that goes over a vector
MOST_COLUMNS = 1024  # of a tile of kernels that go over rows of `input` and `weight`
TARGET_COLUMNS = 64
PARTS_AT_ONCE = 64

Either = tuple[Variant, Variant]  # without something, and with it


class ChunkVariants(NamedTuple):
    rows_at_once: int  # of one program that goes over rows
    target_columns: int
    most_parts: int  # of the class set, that are merged
    row_sources: Either  # with upstream gradients of rows
    class_sources: Variant
    target_sources: Variant
    prepare_rows: Variant
    target_terms: Variant
    chunk_terms: Variant
    merge_terms: Variant
    reduce_losses: Variant
    pull_range: Variant
    chunk_pulls: Variant
    add_parts: Either  # to what is there
    finish_class_rows: Either  # with upstream gradients of rows
    finish_inputs: Either
    finish_targets: Variant
    finish_bias: Either
    finish_scale: Either
    sparse_ids: Variant


@functools.lru_cache(maxsize=1024)
def variants_of(traits: Traits, chunks: Chunks, D: int, narrow: bool, table: Table) -> ChunkVariants:
    acc, operand = TYPES[traits.accumulator], TYPES[traits.operand]
    cosine, fold, per_row = traits.cosine, traits.fold, traits.reduction == "none"
    options: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True, **table.all_registers}
    columns = max(min(1 << max(D - 1, 0).bit_length(), chunks.block_columns), 16)
    at_once = max(MOST_COLUMNS // columns, 1)
    over_rows = {"BLOCK": at_once, "BLOCK_D": columns}
    tile = {"BLOCK_B": chunks.block_rows, "BLOCK_S": chunks.block_classes}

    def made(kernel: Any, **constants: Any) -> Variant:
        return Variant(kernel, **constants, **options)

    def either(kernel: Any, name: str, **constants: Any) -> Either:
        return made(kernel, **{name: False}, **constants), made(kernel, **{name: True}, **constants)

    k = chunk_kernels
    return ChunkVariants(
        at_once,
        TARGET_COLUMNS,
        4 * PARTS_AT_ONCE,
        either(k.row_sources, "PER_ROW", BLOCK=ENTRIES),
        made(k.class_sources, ACC=acc, BLOCK=ENTRIES),
        made(k.target_sources, BLOCK=ENTRIES),
        made(k.prepare_rows, OPERAND=operand, ACC=acc, **over_rows),
        made(k.target_terms, COSINE=cosine, OPERAND=operand, ACC=acc, BLOCK=16, BLOCK_D=TARGET_COLUMNS),
        made(k.chunk_terms, COSINE=cosine, NARROW=narrow, ACC=acc, **tile),
        made(k.merge_terms, COSINE=cosine, ACC=acc, BLOCK=16, BLOCK_SPLITS=PARTS_AT_ONCE),
        made(forward.reduce_losses, REDUCTION=traits.reduction, BLOCK_B=ENTRIES),
        made(k.pull_range, COSINE=cosine),
        made(k.chunk_pulls, FOLD=fold, COSINE=cosine, NARROW=narrow, PER_ROW=per_row, ACC=acc, **tile),
        either(k.add_parts, "ADDS", BLOCK=ENTRIES),
        either(k.finish_class_rows, "PER_ROW", COSINE=cosine, ACC=acc, **over_rows),
        either(k.finish_inputs, "PER_ROW", FOLD=fold, COSINE=cosine, OPERAND=operand, ACC=acc, **over_rows),
        made(
            k.finish_targets,
            **{"COSINE": cosine, "PER_ROW": per_row, "OPERAND": operand, "ACC": acc},
            **{"BLOCK": 16, "BLOCK_D": TARGET_COLUMNS},
        ),
        either(k.finish_sums, "PER_ROW", TOTAL=False, ACC=acc, BLOCK=ENTRIES),
        either(k.finish_sums, "PER_ROW", TOTAL=True, ACC=acc, BLOCK=ENTRIES),
        made(backward.sparse_ids, BLOCK_S=ENTRIES),
    )
