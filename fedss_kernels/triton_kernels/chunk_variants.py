"""The kernels of chunks, each with its constants and the compiler's options."""

import functools
from typing import Any, NamedTuple

from . import chunk_kernels, forward
from .chunks import Chunks
from .configurations import Table
from .launch import TYPES, Variant
from .problem import Traits

ENTRIES = 1024  # of one program that goes over a vector
ELEMENTS = 1024  # of one that goes over rows of `input` and `weight`
PARTS_AT_ONCE = 64  # of the class set, that are merged

Either = tuple[Variant, Variant]  # without something, and with it


class ChunkVariants(NamedTuple):
    rows_at_once: int  # of one program that goes over rows
    prepare_rows: Variant
    mark_targets: Variant
    prepare_classes: Variant
    chunk_terms: Variant
    merge_terms: Variant
    reduce_losses: Variant
    pull_range: Variant
    chunk_pulls: Variant
    add_parts: Either  # to what is there
    finish_classes: Variant
    finish_rows: Variant
    finish_vector: Variant
    finish_scale: Variant
    sparse_ids: Variant


@functools.lru_cache(maxsize=1024)
def variants_of(traits: Traits, chunks: Chunks, D: int, narrow: bool, table: Table) -> ChunkVariants:
    acc, operand = TYPES[traits.accumulator], TYPES[traits.operand]
    cosine, per_row = {"COSINE": traits.cosine}, {"PER_ROW": traits.reduction == "none"}
    options: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True, **table.all_registers}
    columns = max(min(1 << max(D - 1, 0).bit_length(), chunks.block_columns), 16)
    at_once = max(ELEMENTS // columns, 1)
    over_rows = {"OPERAND": operand, "BLOCK": at_once, "BLOCK_D": columns}
    tile = {"NARROW": narrow, "BLOCK_B": chunks.block_rows, "BLOCK_S": chunks.block_classes}
    tile |= {"num_warps": table.merge_warps}  # AMD's compiler holds a mask for each element of a thread

    def made(kernel: Any, **constants: Any) -> Variant:
        return Variant(kernel, **options | constants)

    k = chunk_kernels
    return ChunkVariants(
        at_once,
        made(k.prepare_rows, ACC=acc, **cosine, **over_rows),
        made(k.mark_targets, BLOCK=ENTRIES),
        made(k.prepare_classes, ACC=acc, **over_rows),
        made(k.chunk_terms, **cosine, **tile),
        made(k.merge_terms, **cosine, ACC=acc, BLOCK=16, BLOCK_SPLITS=PARTS_AT_ONCE),
        made(forward.reduce_losses, REDUCTION=traits.reduction, BLOCK_B=ENTRIES),
        made(k.pull_range, **cosine),
        made(k.chunk_pulls, **cosine, **tile),
        (made(k.add_parts, ADDS=False, BLOCK=ENTRIES), made(k.add_parts, ADDS=True, BLOCK=ENTRIES)),
        made(k.finish_classes, **cosine, **per_row, **over_rows),
        made(k.finish_rows, **cosine, **per_row, ACC=acc, **over_rows),
        made(k.finish_vector, **per_row, BLOCK=ENTRIES),
        made(k.finish_scale, **per_row, BLOCK=ENTRIES),
        made(k.sparse_ids, BLOCK=ENTRIES),
    )
