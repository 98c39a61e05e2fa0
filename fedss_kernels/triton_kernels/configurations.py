"""Launch configurations of the loss' kernels: a small table, looked up by size and dtype."""

import functools
import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from .chunks import Chunks, chunks_of, has_all_classes

SMALL_BATCH = 128  # rows that one tile holds
SMALL_ENTRIES = 4096  # of the compact gradient, S + B, that every program may look through
SMALL_PARTIALS = 2**22  # elements of the tiles' parts of the gradient of input
COLUMNS_OF_GROUP = 128  # at least
MOST_RESULT_TILES = 64  # at a time, of the tiles' parts of a gradient
MOST_RESULT_PARTS = 256


@dataclass(frozen=True)
class Blocks:
    """Tile sizes of a kernel, each a power of two >= 16, and its warps and pipeline stages."""

    rows: int
    classes: int
    columns: int
    warps: int
    stages: int
    # the kernel holds the next tile in registers while it multiplies one, in place of the compiler's pipeline
    prefetch: bool = False


@dataclass(frozen=True)
class Tiling:
    """What the kernels are compiled for."""

    forward: Blocks
    tiles: Blocks  # of the backward pass' logits
    result_columns: int  # of the last kernel of the backward pass
    result_tiles: int  # of classes at a time in it
    result_parts: int  # of the sums along a row of input at a time in it
    result_entries: int  # of the compact gradient at a time in it; their ids, 16 times as many
    result_warps: int
    merged_rows: int  # of the forward pass' last
    merged_splits: int  # of it, at least as many as there are
    merge_warps: int


@dataclass(frozen=True)
class Configuration:
    """What one call uses."""

    tiling: Tiling
    splits: int  # of the class set in the forward pass
    column_groups: int  # in the small backward pass; each computes the tile's logits


@dataclass(frozen=True, eq=False)
class Table:
    """The tiles, by bytes of an operand: as large as registers hold, whatever is asked for."""

    few: dict[int, Blocks]  # of logits, for up to so many rows
    many: dict[int, Blocks]  # for up to SMALL_BATCH
    result_columns: int
    result_entries: int
    result_warps: int
    merge_warps: int  # of the kernel that merges the splits
    paired: int  # elements of rows for a thread, of a warp's 32, beside as many of their targets' rows
    all_registers: dict[str, int]  # options of every kernel
    matrices: dict[int, dict[str, int]]  # options of those that multiply
    small_forward: dict[int, Blocks] = field(default_factory=dict)  # where it differs from both
    programs: int = 264  # of 8 warps, which keep a large device busy
    precise_work: float = 2**16  # B * S * D of float32 problems that float64 takes no longer for


# maxnreg, a thread's registers: told so, the assembler does not spill a few to leave room for more warps.
NVIDIA = Table(
    few={2: Blocks(32, 32, 32, 4, 2), 4: Blocks(32, 16, 16, 4, 2), 8: Blocks(128, 16, 16, 8, 2)},
    # one stage: products in matrix instructions that run by themselves, and norms on the way: see forward.py
    many={2: Blocks(128, 16, 32, 8, 1), 4: Blocks(128, 16, 16, 8, 1), 8: Blocks(128, 16, 16, 8, 2)},
    result_columns=64,
    result_entries=64,
    result_warps=4,
    merge_warps=8,
    paired=8,
    all_registers={"maxnreg": 255},
    matrices={2: {}, 4: {}, 8: {}},
)
# Measured on an H100. Its matrix instructions multiply 64 rows or more by up to 256 columns, of operands in
# shared memory. It multiplies float64 as fast as float32, whose products would be added as two parts; the
# compiler's pipelines of float64 take twice as long as none.
HOPPER = replace(
    NVIDIA,
    few=NVIDIA.few | {8: Blocks(32, 16, 64, 4, 1, prefetch=True)},
    small_forward={8: Blocks(16, 16, 64, 4, 1, prefetch=True)},
    precise_work=math.inf,
    programs=132,  # one on each multiprocessor, whose registers hold one: never a second round, half empty
)
# AMD's compiler keeps masks of each element that a thread holds in its 102 scalar registers: fewer elements,
# and matrix instructions of 16 x 16 results, of which a thread holds 4 (of 32 x 32 ones 16). Constants of
# float64 functions are there too; it holds fewer at a time where it need not make room for many waves.
_SMALL = {"matrix_instr_nonkdim": 16}
AMD = Table(
    few=NVIDIA.few | {2: Blocks(32, 16, 32, 8, 2), 4: Blocks(32, 16, 16, 8, 1), 8: Blocks(16, 16, 16, 4, 1)},
    many=NVIDIA.many | {8: Blocks(128, 16, 16, 8, 1)},
    result_columns=64,
    result_entries=32,
    small_forward={8: Blocks(16, 16, 16, 4, 1)},
    result_warps=8,
    merge_warps=16,
    paired=4,
    all_registers={},
    matrices={2: _SMALL, 4: _SMALL | {"waves_per_eu": 2}, 8: _SMALL | {"waves_per_eu": 2}},
)
# Other devices whose matrix units multiply float64 as fast as vector units multiply float32. Not measured.
FULL_FLOAT64 = replace(NVIDIA, precise_work=math.inf)
TABLES = {(8, 0): FULL_FLOAT64, (9, 0): HOPPER, (10, 0): FULL_FLOAT64}  # by compute capability
TABLE: Table | None = None  # for every device, in place of its own: for tests


def in_force() -> Hashable:
    """What is set by hand, in place of the device's table."""
    return TABLE, _override


def table_of(device: torch.device) -> Table:
    return TABLE or _table_of(device.type, device.index)


@functools.cache
def _table_of(kind: str, index: int | None) -> Table:
    if torch.version.hip:
        return AMD
    if kind != "cuda":
        return NVIDIA
    return TABLES.get(torch.cuda.get_device_capability(index), NVIDIA)


def configure(
    table: Table, B: int, S: int, D: int, operand: torch.dtype, rows: torch.dtype, problem_bytes: int
) -> Configuration | Chunks:
    """How B rows, S entries and D columns are gone about: a small problem in tiles, a large one in chunks.

    operand: the dtype of products; rows: the same, but for what the scale asks for. problem_bytes: of the
    inputs and gradients.
    """
    if _override is not None:
        return _override(B, S, D)
    if is_small(B, S, D):
        return _looked_up(table, B, S, D, operand.itemsize)
    return chunks_of(B, S, D, rows.itemsize, problem_bytes)


def is_small(B: int, S: int, D: int) -> bool:
    """Whether one tile holds all rows, and few enough programs look through what they find."""
    return B <= SMALL_BATCH and S + B <= SMALL_ENTRIES and S * B * D <= SMALL_PARTIALS * 16


def in_one_chunk(B: int, S: int, D: int, rows: torch.dtype, problem_bytes: int) -> bool:
    """Whether the problem is large, and chunks have all classes; of the compiler's symbols too."""
    if _override is not None:
        way = _override(B, S, D)
        return isinstance(way, Chunks) and way.classes >= S
    return not is_small(B, S, D) and has_all_classes(B, S, D, rows.itemsize, problem_bytes)


@functools.lru_cache(maxsize=4096)  # it is asked twice for each step of a client
def _looked_up(table: Table, B: int, S: int, D: int, operand_bytes: int) -> Configuration:
    few = B <= table.few[operand_bytes].rows
    tile = (table.few if few else table.many)[operand_bytes]
    forward = table.small_forward.get(operand_bytes, tile)
    if D % 16 != 0:  # rows are read an element at a time, with a pointer to each
        forward, tile = (
            replace(b, rows=min(b.rows, tile.rows), columns=16, stages=min(b.stages, 2))
            for b in (forward, tile)
        )
    elif forward.prefetch:  # at least two tiles along the columns: one comes while the other is multiplied
        forward = replace(forward, columns=max(min(forward.columns, _power_of_two(D) // 2), 16))
    row_tiles, class_tiles = -(-B // forward.rows), -(-S // forward.classes)
    programs = table.programs * 8 // forward.warps
    splits = max(1, min(programs // max(row_tiles, 1), class_tiles, 256))
    group = max(tile.columns, COLUMNS_OF_GROUP)
    idle = table.programs * 8 // tile.warps // (-(-S // tile.classes) + 1)
    column_groups = max(1, min(idle, -(-D // group)))
    parts = -(-S // tile.classes) * column_groups
    merged_splits = _power_of_two(splits)
    tiling = Tiling(
        forward,
        tile,
        table.result_columns,
        min(max(_power_of_two(-(-S // tile.classes)), 16), MOST_RESULT_TILES),
        min(max(_power_of_two(parts), 16), MOST_RESULT_PARTS),
        table.result_entries,
        table.result_warps,
        merged_rows=max(min(_power_of_two(B), 128, 4096 // merged_splits), 16),
        merged_splits=merged_splits,
        merge_warps=table.merge_warps,
    )
    return Configuration(tiling, splits, column_groups)


def _power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


_override: Callable[[int, int, int], Configuration | Chunks] | None = None


@contextmanager
def forced(choose: Callable[[int, int, int], Configuration | Chunks]) -> Iterator[None]:
    """Every call inside uses choose(B, S, D) in place of the table: for tests, and to search better ones."""
    global _override
    before, _override = _override, choose
    try:
        yield
    finally:
        _override = before
