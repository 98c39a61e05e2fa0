"""How small problems are cut up: a small table of tiles, by size and dtype. Large ones: chunks.py."""

import functools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .chunks import Chunks, chunks_of, has_all_classes

SMALL_BATCH = 128  # rows that one tile holds
SMALL_ENTRIES = 4096  # of the compact gradient, S + B, that every program may look through
SMALL_PARTIALS = 2**22  # elements of the tiles' parts of the gradient of input
PROGRAMS = 132  # of 8 warps, of whose registers a multiprocessor holds one: an H100's
COLUMNS_OF_GROUP = 128  # at least
MOST_RESULT_TILES = 64  # at a time, of the tiles' parts of a gradient


class Blocks(NamedTuple):
    """Sizes of the tiles that are multiplied, each a power of two >= 16; warps and pipeline stages."""

    rows: int  # all
    classes: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Configuration:
    """What a small problem's kernels are compiled for, and how many programs share it."""

    blocks: Blocks
    splits: int  # of the class set in the forward pass
    column_groups: int  # in the backward pass; each computes the tile's logits
    merged_rows: int  # of the forward pass' last kernel
    merged_splits: int  # at least as many as there are
    merge_warps: int
    result_columns: int  # of the backward pass' last kernel
    result_tiles: int  # of classes at a time in it
    result_entries: int  # of the compact gradient at a time in it; their ids, 16 times as many
    result_warps: int


@dataclass(frozen=True, eq=False)
class Table:
    """Tiles by bytes of a pull, float32 beside float16 rows; as large as registers hold at the most."""

    few: dict[int, Blocks]  # for up to so many rows
    many: dict[int, Blocks]  # for up to SMALL_BATCH
    many_of_odd_length: bool  # whether registers hold them where rows are read an element at a time
    most_with_more: (
        int  # bytes of a pull, at the most, that registers hold labels or a problem's place beside
    )
    result_columns: int
    result_entries: int
    result_warps: int
    merge_warps: int
    paired: int  # elements of rows for a thread, of a warp's 32, beside as many of their targets' rows
    all_registers: dict[str, int]  # options of every kernel
    products: dict[str, int]  # and of those that multiply

    def entry(self, B: int, pull_bytes: int) -> tuple[str, int]:
        """Which of the tiles serve B rows: ("few" or "many", bytes of a pull)."""
        return "few" if B <= self.few[pull_bytes].rows else "many", pull_bytes


# maxnreg, a thread's registers: told so, the assembler does not spill a few to leave room for more warps.
NVIDIA = Table(
    few={2: Blocks(32, 32, 32, 4, 2), 4: Blocks(32, 16, 16, 4, 2), 8: Blocks(128, 16, 16, 8, 2)},
    # One stage: Hopper's matrix instructions run by themselves, and the compiler (Triton 3.6 to 3.9) lets the
    # next tiles be copied to where they still read, if threads read the tiles too, as for norms.
    many={2: Blocks(128, 16, 32, 8, 1), 4: Blocks(128, 16, 16, 8, 1), 8: Blocks(128, 16, 16, 8, 2)},
    many_of_odd_length=True,
    most_with_more=8,
    result_columns=64,
    result_entries=64,
    result_warps=4,
    merge_warps=8,
    paired=8,
    all_registers={"maxnreg": 255},
    products={},
)
# AMD's compiler keeps masks of each element that a thread holds in its 102 scalar registers: fewer elements,
# and matrix instructions of 16 x 16 results, of which a thread holds 4 (of 32 x 32 ones 16). Constants of
# float64 functions are there too; it holds fewer at a time where it need not make room for many waves.
AMD = Table(
    few={2: Blocks(32, 16, 32, 8, 2), 4: Blocks(32, 16, 16, 8, 1), 8: Blocks(16, 16, 16, 4, 1)},
    many={2: Blocks(128, 16, 16, 8, 1), 4: Blocks(128, 16, 16, 8, 1), 8: Blocks(128, 16, 16, 8, 1)},
    many_of_odd_length=False,
    most_with_more=4,
    result_columns=64,
    result_entries=32,
    result_warps=16,
    merge_warps=16,
    paired=4,
    all_registers={},
    products={"matrix_instr_nonkdim": 16, "waves_per_eu": 2},
)
TABLE: Table | None = None  # for every device, in place of its own: for tests


def in_force() -> Hashable:
    """What is set by hand, in place of the device's table."""
    return TABLE, _override


def table_of(device: torch.device) -> Table:
    return TABLE or (AMD if torch.version.hip else NVIDIA)


def configure(
    table: Table,
    B: int,
    S: int,
    D: int,
    operand: torch.dtype,
    rows: torch.dtype,
    problem_bytes: int,
    more: bool = False,
) -> Configuration | Chunks:
    """How B rows, S entries and D columns are gone about: a small problem in tiles, a large one in chunks.

    operand: the dtype of products; rows: the same, but for what the scale asks for. problem_bytes: of the
    inputs and gradients. more: labels tell hits, or the problem is one of many.
    """
    if _override is not None:
        return _override(B, S, D)
    pull_bytes = 4 if operand == torch.float16 else operand.itemsize
    fits = is_small(B, S, D) and not (more and pull_bytes > table.most_with_more)
    small = _small(table, B, S, D, pull_bytes) if fits else None
    return small or chunks_of(B, S, D, rows.itemsize, problem_bytes)


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
def _small(table: Table, B: int, S: int, D: int, pull_bytes: int) -> Configuration | None:
    which, _ = table.entry(B, pull_bytes)
    blocks: Blocks = getattr(table, which)[pull_bytes]
    if D % 16 != 0:  # rows are read an element at a time, with a pointer to each
        if not (which == "few" or table.many_of_odd_length):
            return None
        blocks = blocks._replace(columns=16)
    tiles = -(-S // blocks.classes)
    programs = PROGRAMS * 8 // blocks.warps
    splits = max(1, min(programs, tiles, 256))
    idle = programs // (tiles + 1)
    merged_splits = _power_of_two(splits)
    return Configuration(
        blocks,
        splits,
        column_groups=max(1, min(idle, -(-D // max(blocks.columns, COLUMNS_OF_GROUP)))),
        merged_rows=max(min(_power_of_two(B), 128, 4096 // merged_splits), 16),
        merged_splits=merged_splits,
        merge_warps=table.merge_warps,
        result_columns=table.result_columns,
        result_tiles=min(max(_power_of_two(tiles), 16), MOST_RESULT_TILES),
        result_entries=table.result_entries,
        result_warps=table.result_warps,
    )


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
