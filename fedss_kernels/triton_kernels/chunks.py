"""How a large problem is cut: into blocks of rows, of classes, or both, of which one is in memory at a time."""

import math
from typing import NamedTuple

BUDGET = 64 * 2**20  # bytes of a chunk's logits and pulls, or ...
SHARE = 0.03  # ... this part of the bytes of inputs and gradients, where that is more
MOST_ROWS = 8192  # of a chunk that does not hold all classes


class Chunks(NamedTuple):
    """Sizes of a chunk, and of the tiles of the kernels that go over it."""

    rows: int
    classes: int
    block_rows: int
    block_classes: int
    block_columns: int  # of kernels that go over rows of `input` and `weight`

    def blocks(self, B: int) -> list[tuple[int, int]]:
        """(first, size) of each block of rows."""
        return [(first, min(self.rows, B - first)) for first in range(0, B, self.rows)]

    def sets(self, S: int) -> list[tuple[int, int]]:
        """(first, size) of each block of classes."""
        return [(first, min(self.classes, S - first)) for first in range(0, S, self.classes)]


def chunks_of(B: int, S: int, D: int, operand_bytes: int, problem_bytes: int) -> Chunks:
    """Chunks of all classes, or of all rows.

    A chunk of all classes has the whole denominator of its rows: with the loss come the gradients, by three
    products. But each block of rows adds S rows of D numbers to the sums of the class rows' gradient, read
    and written in float32, and reads S rows twice; for a chunk of all rows there is a fourth product
    instead, of all the dot products once more, which are written and read once more too:

        blocks * S * D * (8 + 2 * operand_bytes) bytes   or   2 * B * S * D operations and 8 * B * S bytes

    At 200 operations in the time of a byte (A100 125, H100 209, H200 146, B200 225) blocks of at least
    D * (8 + 2 * operand_bytes) / (D / 100 + 8) rows are the cheaper way: 470 for D = 512 in 16 bits, 1,000
    for D = 4096. A single block has nothing to add up.
    """
    accumulator = max(operand_bytes, 4)
    elements = int(max(BUDGET, SHARE * problem_bytes)) // (accumulator + operand_bytes)
    rows = even(B, max(elements // max(S, 1), 1))
    if rows >= B or rows >= D * (8 + 2 * operand_bytes) / (D / 100 + 8):
        classes = S
    else:
        rows = even(B, MOST_ROWS)
        classes = even(S, max(elements // rows, 1), 128)
    return Chunks(rows, max(classes, 1), 16, 256, 512)


def even(n: int, most: int, multiple: int = 16) -> int:
    """The size of blocks of at most `most`, all about as large, a multiple of 16 where there are several."""
    blocks = math.ceil(n / most)
    if blocks <= 1:
        return max(n, 1)
    return max(min(math.ceil(n / blocks / multiple) * multiple, most // multiple * multiple), 1)
