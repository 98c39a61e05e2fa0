"""The byte ledger: what moves between the server and each client, by kind.

Per client and round, with P numbers in the extractor phi, S class rows of D numbers, and 4 bytes a number, or
2 where they travel as bfloat16:

    down: phi (4 P) and the class rows (4 S D)
    up:   the ids asked for (8 S), phi and the class rows again, unless it never answers

The rows come and go in the order of the ids, so the ids travel once. FullSoftmax needs none.
"""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor

ID_BYTES = 8
WIRE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def over_the_wire(numbers: Tensor, dtype: str) -> Tensor:
    """float32 numbers as they arrive where they travel as `dtype`."""
    return numbers.to(WIRE_DTYPES[dtype]).to(torch.float32)


@dataclass(frozen=True)
class Traffic:
    """Bytes moved, split by direction and kind. Sums with +."""

    down_extractor: int = 0
    down_rows: int = 0
    up_ids: int = 0
    up_extractor: int = 0
    up_rows: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def times(self, n: int) -> Traffic:
        return Traffic(*(n * count for count in astuple(self)))

    @property
    def extractor(self) -> int:
        return self.down_extractor + self.up_extractor

    @property
    def rows(self) -> int:
        return self.down_rows + self.up_rows

    @property
    def classification(self) -> int:
        """What the number of classes costs: class rows and ids."""
        return self.rows + self.up_ids

    @property
    def total(self) -> int:
        return self.extractor + self.classification


OUTCOMES = ("accepted", "dropped", "late", "rejected", "discarded")


@dataclass(frozen=True)
class Entry:
    """One client's line in the ledger of one round."""

    round: int
    attempt: int  # from 0: rounds in which too few answer are tried again
    client: int
    num_rows: int  # |S_k|
    outcome: str  # one of OUTCOMES
    fault: str  # why it was rejected, or ""
    traffic: Traffic


def faults(path: Path) -> list[tuple[str, int]]:
    """Of the answers that were left out in a run's ledger.csv what was wrong, and how often; most first."""
    with path.open(newline="", encoding="utf-8") as file:
        return Counter(line["fault"] for line in csv.DictReader(file) if line["fault"]).most_common()


def client_traffic(
    num_parameters: int,
    num_rows: int,
    embedding_dim: int,
    *,
    sends_ids: bool = True,
    answers: bool = True,
    dtype: str = "float32",
) -> Traffic:
    """What one client moves in one round, in bytes.

    >>> client_traffic(1000, 10, 64)
    Traffic(down_extractor=4000, down_rows=2560, up_ids=80, up_extractor=4000, up_rows=2560)

    A client that never `answers` asks and is sent its rows like any other, and sends nothing back.
    """
    number_bytes = WIRE_DTYPES[dtype].itemsize
    extractor, rows = number_bytes * num_parameters, number_bytes * num_rows * embedding_dim
    ids = ID_BYTES * num_rows if sends_ids else 0
    back = (extractor, rows) if answers else (0, 0)
    return Traffic(extractor, rows, ids, *back)
