"""Nets that can be trained block by block: their first blocks and the pool are a net too."""

import torch
from torch import Tensor, nn

from ..config_error import ConfigError
from .blocks import blocks_of


@torch.no_grad()
def check_layered(module: nn.Module, images: Tensor, *, one_shape: bool, needed_by: str = "") -> None:
    """Raises ConfigError unless a net is a stem and two or more blocks, in their order, and then its `pool`.

    `pool`, a module without parameters, makes of each block's output as many features. With `one_shape` any
    block can be left out, as what comes in is of the shape of what comes out. images: as the net takes them;
    needed_by: the method, where it is one's.
    """
    blocks, pool = [block for _, block in blocks_of(module)], getattr(module, "pool", None)
    why = (
        f"; {needed_by} has other parts from round to round (by_round), so that its net may be only its "
        "first blocks and the pool"
        if needed_by
        else ""
    )
    if len(blocks) < 3:
        raise ConfigError(
            "model", f"expected a stem and at least 2 blocks to train in turn, got {len(blocks)}{why}"
        )
    if not isinstance(pool, nn.Module) or [*pool.parameters()]:
        raise ConfigError(
            "model",
            "expected an attribute pool, a module without parameters that makes features of any block's "
            f"output, as isotropic and vit have, got {type(pool).__name__}{why}",
        )
    stem, *layers = blocks
    x, shapes, features = stem(images), [], []
    for layer in layers:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
        features.append(tuple(pool(x).shape[1:]))
    if not torch.equal(pool(x), module(images)):
        raise ConfigError(
            "model", "expected a net that is its blocks and then its pool, got one that does more"
        )
    if len({*features}) > 1:
        raise ConfigError("model", f"expected as many features after each block, got {_listed(features)}")
    if one_shape and len({tuple(stem(images).shape[1:]), *shapes}) > 1:
        expected = "expected none with a net whose blocks change the shape, as none can be left out"
        raise ConfigError("depth_budget", f"{expected}: {_listed(shapes)}")


def _listed(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)
