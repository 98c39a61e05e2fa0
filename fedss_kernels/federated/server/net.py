"""The extractor on the server: one vector phi, in blocks of which a round trains some while others rest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from .row_table import Optimizer

_FIRST = torch.zeros(1, dtype=torch.int64)


@dataclass
class _Range:
    """A range of phi as the table of one row that an optimiser steps. It makes every step: none is behind."""

    weight: Tensor  # (1, N) float32
    state: Tensor  # (1, N) float32, the optimiser's

    def __post_init__(self) -> None:
        self.stepped = torch.zeros(1, dtype=torch.int64)


class Net:
    """`net.phi` (P,), `net.step(gradient, trained)`.

    A block that is not trained in a round rests: its numbers stay to the bit. It has no velocity, or sums of
    Adagrad, when it is trained again: those were of another time, and it would coast on them.
    """

    def __init__(
        self,
        first: Tensor,  # (P,): the initial phi
        optimizer: Optimizer,
        blocks: Sequence[int],  # sizes of consecutive ranges of phi, P together
    ):
        if sum(blocks) != len(first) or min(blocks) < 0:
            raise ValueError(f"blocks: expected sizes of {len(first)} numbers together, got {list(blocks)}")
        self.optimizer, self.blocks = optimizer, tuple(blocks)
        self.weight, self.state = first.clone()[None], torch.zeros(1, len(first))
        self.finite = True  # whether all numbers are that were written here so far
        self.phi = self._read()  # as it is now; never changed in place

    def step(
        self,
        gradient: Tensor,  # of the blocks that were trained, one after the other: (P,) of all
        trained: Sequence[bool] | None = None,  # of each block whether it was; None: all were
    ) -> None:
        """Raises ValueError for a gradient or blocks that are not these, before anything changes."""
        ranges = self._ranges([True] * len(self.blocks) if trained is None else trained)
        expected = sum(end - begin for begin, end, moves in ranges if moves)
        if len(gradient) != expected:
            raise ValueError(
                f"gradient: expected the {expected} numbers of the blocks trained, got {len(gradient)}"
            )
        at = 0
        for begin, end, moves in ranges:
            weight, state = self.weight[:, begin:end], self.state[:, begin:end]
            if moves:
                own = gradient[None, at : at + end - begin]
                self.finite &= self.optimizer.step(_Range(weight, state), _FIRST, own, 0)
                at += end - begin
            else:
                state.zero_()
        self.phi = self._read()

    def begin(self, block: int, numbers: Tensor) -> None:
        """A block begins anew, with these numbers (N,) and as if it had made no step."""
        at = sum(self.blocks[:block])
        self.weight[0, at : at + self.blocks[block]] = numbers
        self.state[0, at : at + self.blocks[block]] = 0
        self.phi = self._read()

    def _ranges(self, trained: Sequence[bool]) -> list[tuple[int, int, bool]]:
        """(begin, end, whether it is stepped) of neighbours of one kind: of all blocks, one."""
        if len(trained) != len(self.blocks):
            raise ValueError(
                f"trained: expected one of each of {len(self.blocks)} blocks, got {len(trained)}"
            )
        found, end = [], 0
        for moves, blocks in groupby(zip(self.blocks, trained, strict=True), key=lambda block: block[1]):
            begin, end = end, end + sum(size for size, _ in blocks)
            found.append((begin, end, bool(moves)))
        return found

    def _read(self) -> Tensor:
        return self.optimizer.read(_Range(self.weight, self.state), _FIRST, 0)[0]

    def stored(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "state": self.state}

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        self.weight.copy_(stored["weight"])
        self.state.copy_(stored["state"])
        self.phi = self._read()
