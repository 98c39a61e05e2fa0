"""How a large problem is cut: into blocks of rows, of classes, or both. One chunk is in memory at a time."""

from typing import NamedTuple

BUDGET = 64 * 2**20  # bytes of a chunk's logits and pulls (of some classes: and of their rows), or ...
SHARE = 3  # ... so many percent of the bytes of inputs and gradients, where that is more
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

    def tiles(self, rows: int, classes: int) -> tuple[int, int]:
        return -(-rows // self.block_rows), -(-classes // self.block_classes)


def has_all_classes(B: int, S: int, D: int, operand_bytes: int, problem_bytes: int) -> bool:
    """Whether chunks have all classes: else they have all rows, or many.

    A chunk of all classes has the whole denominator of its rows: with the loss come the gradients, by three
    products. But each block of rows adds S rows of D numbers to the sums of the class rows' gradient, read
    and written in float32, and reads S rows twice; for a chunk of all rows there is a fourth product
    instead, of all the dot products once more, which are written and read once more too:

        blocks * S * D * (8 + 2 * operand_bytes) bytes   or   2 * B * S * D operations and 8 * B * S bytes

    At 200 operations in the time of a byte (A100 125, H100 209, H200 146, B200 225) blocks of at least
    D * (8 + 2 * operand_bytes) / (D / 100 + 8) rows are the cheaper way: 470 for D = 512 in 16 bits, 1,000
    for D = 4096. A single block has nothing to add up. (In integers, for the compiler's symbols.)
    """
    rows = _elements(operand_bytes, problem_bytes) // max(S, 1)
    if B <= rows:
        return True
    return rows > 0 and (B // -(-B // rows)) * (D + 800) >= 100 * D * (8 + 2 * operand_bytes)


def chunks_of(B: int, S: int, D: int, operand_bytes: int, problem_bytes: int) -> Chunks:
    """For B rows, S entries and D columns; problem_bytes: of inputs and gradients."""
    elements = _elements(operand_bytes, problem_bytes)
    if has_all_classes(B, S, D, operand_bytes, problem_bytes):
        rows, classes = _even(B, elements // max(S, 1)), S
    else:
        rows = _even(B, MOST_ROWS)
        # beside logits and pulls a class has a row as products read it, and the float32 sums of its gradient
        classes = _even(S, max(elements // (rows + D), 1))
    return Chunks(rows, max(classes, 1), block_rows=16, block_classes=128, block_columns=512)


def _elements(operand_bytes: int, problem_bytes: int) -> int:
    """Of a chunk: a logit and a pull each."""
    return max(BUDGET, problem_bytes * SHARE // 100) // (max(operand_bytes, 4) + operand_bytes)


def _even(n: int, most: int, multiple: int = 16) -> int:
    """The size of blocks of at most `most`, all about as large; a multiple of 16 where `most` allows."""
    if n <= most:
        return max(n, 1)
    size = -(-n // -(-n // most))
    return min(-(-size // multiple) * multiple, max(most // multiple * multiple, size))
