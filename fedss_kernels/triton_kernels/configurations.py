"""Launch configurations of the loss' kernels: a small table, looked up by size and dtype."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SMALL_BATCH = 128  # rows that one tile holds
SMALL_ENTRIES = 4096  # of the compact gradient, S + B, that every program may look through
SMALL_PARTIALS = 2**22  # elements of the tiles' parts of the gradient of input
FEWEST_PULLS = 2**23  # elements of a chunk of pulls, unless 3% of the inputs and gradients are more
MOST_TILES = 2**15  # of classes in a chunk: a grid's second axis has 65,535 programs
PROGRAMS = 264  # that keep a large device busy: two for each of its multiprocessors


@dataclass(frozen=True)
class Blocks:
    """Tile sizes of a kernel, each a power of two >= 16, and its warps and pipeline stages."""

    rows: int
    classes: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Configuration:
    """What one call uses. `small`: the backward pass in two launches, a tile of classes for each program."""

    small: bool
    forward: Blocks
    tiles: Blocks  # of the backward pass' logits
    products: Blocks  # of the large backward pass' two products
    result_columns: int  # of the last kernel of the backward pass
    chunk: int  # classes at a time in the large backward pass, a multiple of tiles.classes
    splits: int  # of the class set in the forward pass


def configure(B: int, S: int, D: int, operand_bytes: int, problem_bytes: int) -> Configuration:
    """The configuration for B rows, S entries and D columns.

    operand_bytes: 2, 4 or 8, of the dtype of products. problem_bytes: of the inputs and gradients, which a chunk
    of pulls must stay far below.
    """
    if _override is not None:
        return _override(B, S, D)
    columns = min(_power_of_two(D, 16), {2: 64, 4: 32, 8: 16}[operand_bytes])
    few_rows = _power_of_two(min(B, SMALL_BATCH), 16)
    if B <= SMALL_BATCH:
        classes = 32 if operand_bytes < 8 and few_rows <= 64 else 16
        small_tile = Blocks(few_rows, classes, columns, 4, 2)
        tiles = -(-S // classes)
        if S + B <= SMALL_ENTRIES and tiles * B * D <= SMALL_PARTIALS:
            splits = max(1, min(tiles, 128))
            return Configuration(
                True, small_tile, small_tile, small_tile, min(_power_of_two(D, 16), 64), classes, splits
            )
    tile = {
        2: Blocks(128, 128, columns, 8, 3),
        4: Blocks(64, 64, columns, 4, 2),
        8: Blocks(32, 32, columns, 4, 2),
    }[operand_bytes]
    forward = Blocks(min(tile.rows, few_rows), tile.classes, columns, tile.warps, tile.stages)
    products = Blocks(
        tile.rows // 2, tile.classes // 2, min(_power_of_two(D, 16), tile.classes), tile.warps, tile.stages
    )
    row_tiles, class_tiles = -(-B // forward.rows), -(-S // forward.classes)
    splits = max(1, min(-(-PROGRAMS // max(row_tiles, 1)), class_tiles, 256))
    pulls = max(FEWEST_PULLS, problem_bytes * 3 // 100 // operand_bytes)
    chunk = min(max(pulls // max(B, 1) // tile.classes, 1), MOST_TILES) * tile.classes
    return Configuration(False, forward, forward, products, min(_power_of_two(D, 16), 256), chunk, splits)


_override: Callable[[int, int, int], Configuration] | None = None


@contextmanager
def forced(choose: Callable[[int, int, int], Configuration]) -> Iterator[None]:
    """Every call inside uses choose(B, S, D) in place of the table: for tests, and to search better ones."""
    global _override
    before, _override = _override, choose
    try:
        yield
    finally:
        _override = before


def _power_of_two(n: int, least: int) -> int:
    return max(least, 1 << max(n - 1, 0).bit_length())
