"""What a server of private retrieval answers: the XOR of the rows that each bit vector names."""

import torch
from torch import Tensor

from . import _C
from .checks import FLOATING, check_tensor


def xor_rows(
    table: Tensor,  # (C, D) floating, on the CPU
    bits: Tensor,  # (Q, ceil(C / 8)) uint8: bit c % 8, from the lowest, of byte c / 8 is for row c
) -> Tensor:  # (Q, D) table's dtype
    """answers[q] = the XOR of the rows c of `table` with bit c of bits[q] set: of their bits, not of numbers.

    Exact, so the same for any number of threads and any instruction set. Bits behind those of the last row
    count for nothing; no row at all gives zeros. The table is read once for 256 queries.

    Raises TypeError or ValueError for a wrong dtype, shape or device.

    >>> table = torch.tensor([[1.0], [2.0], [3.0]])
    >>> one, other = torch.tensor([[0b110]]), torch.tensor([[0b100]])  # they differ in the bit of row 1
    >>> answers = [xor_rows(table, bits.to(torch.uint8)).view(torch.int32) for bits in (one, other)]
    >>> (answers[0] ^ answers[1]).view(torch.float32)
    tensor([[2.]])
    """
    check_tensor("table", table, FLOATING)
    check_tensor("bits", bits, (torch.uint8,))
    if table.dim() != 2:
        raise ValueError(f"table: expected shape (C, D), got {tuple(table.shape)}")
    C, D = table.shape
    if bits.dim() != 2 or bits.shape[1] != -(-C // 8):
        expected = f"expected shape (Q, {-(-C // 8)}), a bit for each of {C} rows"
        raise ValueError(f"bits: {expected}, got {tuple(bits.shape)}")
    for name, tensor in (("table", table), ("bits", bits)):
        if tensor.device.type != "cpu":
            raise ValueError(f"{name}: expected a CPU tensor, got one on {tensor.device}")
    answers = torch.empty(len(bits), D, dtype=table.dtype)
    _C.xor_rows(_side_by_side(table), _side_by_side(bits), answers, threads=torch.get_num_threads())
    return answers


def _side_by_side(rows: Tensor) -> Tensor:
    """As they are, or a copy where the elements of a row are apart."""
    rows = rows.detach().resolve_neg()
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()
