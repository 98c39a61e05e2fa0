"""Launch configurations of the loss' kernels: a small table, looked up by size and dtype."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

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

    operand_bytes: 2, 4 or 8, of the dtype of products. problem_bytes: of the inputs and gradients, which a
    chunk of pulls must stay far below.
    """
    if _override is not None:
        return _override(B, S, D)
    vectors = D % 16 == 0  # else rows are read an element at a time, with a pointer to each
    columns = min(_power_of_two(D, 16), 32) if operand_bytes == 2 and vectors else 16
    few_rows = _power_of_two(min(B, SMALL_BATCH), 16)
    if B <= SMALL_BATCH:
        classes = 32 if operand_bytes == 2 else 16
        small_tile = Blocks(
            few_rows, classes, columns, 8 if few_rows > 32 else 4, 2 if operand_bytes == 2 else 3
        )
        tiles = -(-S // classes)
        if S + B <= SMALL_ENTRIES and tiles * B * D <= SMALL_PARTIALS:
            splits = max(1, min(tiles, 128))
            return Configuration(
                True,
                replace(small_tile, stages=2),
                small_tile,
                small_tile,
                min(_power_of_two(D, 16), 64),
                classes,
                splits,
            )
    # Tile of logits, tile of the products: as large as every target's registers hold.
    tile, products = {
        2: (Blocks(128, 64, columns, 8, 3 if vectors else 2), Blocks(64, 64, 64, 8, 3)),
        4: (Blocks(32, 64, columns, 8, 3), Blocks(32, 32, 64, 8, 3)),
        8: (Blocks(32, 32, columns, 4, 2), Blocks(16, 16, 32, 4, 3)),
    }[operand_bytes]
    forward = replace(tile, rows=min(tile.rows, few_rows))
    products = replace(products, columns=min(_power_of_two(D, 16), products.columns))
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
