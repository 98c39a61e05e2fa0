from collections.abc import Sequence

import torch
from torch import Tensor, nn


def blocks_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    blocks = getattr(module, "blocks", None)
    if blocks is None:
        return [("net", module)]
    return list(blocks.named_children())


def ranges(sizes: Sequence[int], chosen: Sequence[bool]) -> list[slice]:
    """The ranges of a vector that its chosen blocks take, in order: neighbours are one."""
    found: list[slice] = []
    end = 0
    for size, here in zip(sizes, chosen, strict=True):
        begin, end = end, end + size
        if here and found and found[-1].stop == begin:
            found[-1] = slice(found[-1].start, end)
        elif here:
            found.append(slice(begin, end))
    return found


def of_blocks(numbers: Tensor, sizes: Sequence[int], chosen: Sequence[bool]) -> Tensor:
    """The numbers of the chosen blocks, one after the other; `numbers` itself where all are."""
    if all(chosen):
        return numbers
    return torch.cat([numbers[:0], *(numbers[r] for r in ranges(sizes, chosen))])
