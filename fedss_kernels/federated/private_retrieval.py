"""Rows of a table from two servers, neither of which learns which rows: what is asked, answered and moved.

For each row c that it wants of C a client draws a vector of C bits, uniformly, and sends it to server A, and
with bit c flipped to server B. Each answers with the XOR of the rows whose bits are set (`xor_rows`), and the
XOR of the two answers is row c, bit for bit:

    (XOR of the rows of q) XOR (XOR of the rows of q + e_c) = row c

Either vector by itself is uniform, whatever c is (Chor, Goldreich, Kushilevitz and Sudan, FOCS 1995): one
server learns how many rows a client wants and no more, whatever it computes. Two that put together what they
were sent learn every row. Of S rows of D numbers move, over both servers,

    up:   the queries (2 S ceil(C / 8))
    down: the answers (2 S D numbers)

which is less than the table's C D numbers while S < C D b / (2 (ceil(C / 8) + D b)) at b bytes a number.
"""

import secrets
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .ledger import WIRE_DTYPES, Kind, Traffic, declare

declare(Kind("queries", "bit vectors that ask two servers for class rows", ("up",), by_class=True))
declare(Kind("answers", "what the two answer", ("down",), by_class=True))
FLOWS = ("up_queries", "down_answers")


def queries(
    class_ids: Tensor,  # (S,) int64 in [0, C)
    num_classes: int,
    draw: Callable[[int], bytes] = secrets.token_bytes,  # so many random bytes: the system's
) -> tuple[Tensor, Tensor]:
    """What is sent to server A and to server B: (S, ceil(C / 8)) uint8 each, as `xor_rows` takes them."""
    shape = len(class_ids), -(-num_classes // 8)
    drawn = np.frombuffer(bytearray(draw(shape[0] * shape[1])), dtype=np.uint8)
    of_a = torch.from_numpy(drawn.reshape(shape))
    of_b = of_a.clone()
    of_b[torch.arange(len(class_ids)), class_ids // 8] ^= (1 << class_ids % 8).to(torch.uint8)
    return of_a, of_b


def opened(of_a: Tensor, of_b: Tensor) -> Tensor:
    """(S, D): the rows that are asked for, of the two servers' answers (S, D)."""
    return (of_a.view(torch.uint8) ^ of_b.view(torch.uint8)).view(of_a.dtype)


def traffic(num_classes: int, num_rows: int, row_dim: int, dtype: str = "float32") -> Traffic:
    """Of a client that asks for num_rows of num_classes rows of row_dim numbers.

    >>> traffic(2028, 110, 64).bytes
    {'up_queries': 55880, 'down_answers': 56320}
    """
    number_bytes = WIRE_DTYPES[dtype].itemsize
    asked, answered = -(-num_classes // 8), number_bytes * row_dim
    return Traffic({"up_queries": 2 * num_rows * asked, "down_answers": 2 * num_rows * answered})
