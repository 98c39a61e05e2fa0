"""How a matrix of many rows lies in memory or in a file: one record for each row."""

import mmap
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Rows:
    """What is stored: a row as it was after its own last step, zeros where it had none.

    All of a row lies side by side, as it is read together, and rows come in no order.
    """

    numbers: Tensor  # (C, 2 D + 2) float32: a row's weight, its state, and 8 bytes that hold an integer

    def __post_init__(self) -> None:
        dim = self.numbers.shape[1] // 2 - 1
        self.weight = self.numbers[:, :dim]  # (C, D) float32
        self.state = self.numbers[:, dim : 2 * dim]  # (C, D) float32, the optimiser's
        # (C,) int64: steps of the matrix that were done then, its own among them
        self.stepped = self.numbers.view(torch.int64)[:, dim]

    @staticmethod
    def zeros(num_rows: int, dim: int) -> "Rows":
        """In memory that comes as it is written, by the page: not by the huge page, of thousands of rows."""
        memory = mmap.mmap(-1, Rows.num_bytes(num_rows, dim))
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        return Rows.over(memory, num_rows, dim)

    @staticmethod
    def over(memory: mmap.mmap, num_rows: int, dim: int) -> "Rows":
        return Rows(torch.from_numpy(np.frombuffer(memory, np.float32).reshape(num_rows, 2 * dim + 2)))

    @staticmethod
    def num_bytes(num_rows: int, dim: int) -> int:
        return 4 * num_rows * (2 * dim + 2)
