"""A net is a list of blocks, each of which takes what the one before it made: stem, block 1 ... embedding."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn


def blocks_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of a net's blocks, in order, from its attribute `blocks`; one without is one, "net".

    `blocks` is an nn.Sequential or nn.ModuleList, or a list or tuple, whose names are 0, 1 and so on. The
    blocks hold every parameter of the module, each once and in the order of module.parameters(), so that
    those of a block are one range of the flat vector of all. Raises ValueError, naming the parameter, where
    they do not.
    """
    if not hasattr(module, "blocks"):
        return [("net", module)]
    named = _named(module.blocks)
    held = list(chain.from_iterable(block.parameters() for _, block in named))
    names = {parameter: name for name, parameter in module.named_parameters()}
    if strangers := [parameter for parameter in held if parameter not in names]:
        raise ValueError(
            "model: expected blocks with parameters of the model alone, got one of shape "
            f"{tuple(strangers[0].shape)} that is not among them"
        )
    count = Counter(held)
    _refuse("that hold every parameter", "without", (names[p] for p in names if p not in count))
    _refuse("that share no parameter", "several with", (names[p] for p in count if count[p] > 1))
    moved = (name for (own, name), p in zip(names.items(), held, strict=True) if own is not p)
    _refuse("in the order of the model's parameters", "another place for", moved)
    return named


def named_blocks(**blocks: nn.Module) -> nn.Sequential:
    """What a net of ours has for `blocks`: another view of its own modules, in the order they are applied."""
    return nn.Sequential(OrderedDict(blocks))


class Chain(nn.Module):
    """Blocks one after another, then `pool`, which has no parameters: images (B, channels, H, W) to (B, F).

    `pool` takes what any of the blocks makes, so that a net may end after each of them.
    """

    def __init__(self, pool: nn.Module, **blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = named_blocks(**blocks)
        self.pool = pool

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(self.blocks(images))


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


def _named(blocks: object) -> list[tuple[str, nn.Module]]:
    if isinstance(blocks, nn.Sequential | nn.ModuleList):
        names: Iterable[str] = blocks._modules  # named_children() leaves out what comes a second time
    elif isinstance(blocks, list | tuple) and all(isinstance(block, nn.Module) for block in blocks):
        names = map(str, range(len(blocks)))
    else:
        raise ValueError(
            "model: expected its attribute blocks to be an nn.Sequential or nn.ModuleList, got "
            f"{type(blocks).__name__}"
        )
    return list(zip(names, blocks, strict=True))


def _refuse(expected: str, got: str, names: Iterable[str]) -> None:
    """Raises ValueError for the first of these parameters, if there is one."""
    for name in names:
        raise ValueError(f"model: expected blocks {expected}, got {got} {name!r}")
