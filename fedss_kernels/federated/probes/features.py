"""A net's features at a depth: what its stem and its first so many blocks make of an image, pooled.

Depth 0 is the stem alone. A layer that ends a net, its block "embedding", is at no depth. The net's `pool`
makes a vector of what a block makes; where there is none it is the mean over each quarter of a grid, or over
the tokens of a sequence.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from ..clients.augment import as_input
from ..clients.extractor import as_embeddings, in_batches
from ..models.blocks import blocks_of

Prepared = Callable[[Tensor], Tensor]  # uint8 images -> the net's input
HEAD = "embedding"  # the block that is none of the depths


def depth_of(net: nn.Module) -> int:
    """L, how many blocks it has after the stem; 0 for a net without `blocks`."""
    return len(stem_and_blocks(net)) - 1


def places(net: nn.Module) -> dict[str, int]:
    """The depths that a net is looked at, by name: its first block, a quarter, half and the whole of them."""
    whole = depth_of(net)
    return {
        "first": min(1, whole),
        "quarter": math.ceil(whole / 4),
        "half": math.ceil(whole / 2),
        "whole": whole,
    }


def depths(net: nn.Module) -> tuple[int, ...]:
    """These, ascending and each once."""
    return tuple(sorted(set(places(net).values())))


def prefix(net: nn.Module, depth: int) -> nn.Sequential:
    """The net's own modules as a net of their own: (B, channels, H, W) to features (B, F).

    Raises ValueError for a depth that it has not.
    """
    modules = stem_and_blocks(net)
    if not 0 <= depth < len(modules):
        raise ValueError(f"depth: expected one in [0, {len(modules) - 1}], got {depth}")
    return nn.Sequential(*modules[: depth + 1], pool_of(net))


def features(
    net: nn.Module,
    images: Tensor,  # (N, channels, H, W) uint8
    depth: int,
    *,
    rows: Tensor | None = None,  # (n,) of the images; None: all
    prepared: Prepared = as_input,  # as an extractor's as_input, which crops, and moves to its device
    batch_size: int = 512,
) -> Tensor:  # (n, F) float32, in main memory
    """In batches, in eval mode. Raises ValueError for a depth that the net has not."""
    return outputs(prefix(net, depth), prepared, images, rows, batch_size)


@torch.no_grad()
def outputs(
    module: nn.Module,
    prepared: Prepared,
    images: Tensor,  # (N, channels, H, W) uint8
    rows: Tensor | None = None,  # (n,) of the images; None: all
    batch_size: int = 512,
) -> Tensor:  # (n, F) float32, in main memory
    """What a module makes of images, in batches, in eval mode."""
    module.eval()
    return in_batches(lambda batch: as_embeddings(module(prepared(batch))), images, batch_size, rows)


def pool_of(net: nn.Module) -> nn.Module:
    """What makes features of what any of its blocks makes."""
    pool: Any = getattr(net, "pool", pooled) if hasattr(net, "blocks") else pooled
    return _Pool(pool)


def pooled(made: Tensor) -> Tensor:
    """(B, C, H, W) to (B, 4 C) or, of one pixel, (B, C); (B, tokens, D) to (B, D); (B, F) as it is.

    Quarters, for the mean over all of it forgets where in the image something is.
    """
    if made.dim() == 4:
        return adaptive_avg_pool2d(made, min(2, *made.shape[2:])).flatten(1)
    return made.mean(dim=1) if made.dim() == 3 else made


class _Pool(nn.Module):
    """A function, or a module, in a sequence."""

    def __init__(self, pool: Callable[[Tensor], Tensor]):
        super().__init__()
        self.pool = pool

    def forward(self, made: Tensor) -> Tensor:
        return self.pool(made)


def stem_and_blocks(net: nn.Module) -> list[nn.Module]:
    """Without the layer that ends it."""
    return [module for name, module in blocks_of(net) if name != HEAD]
