"""Half a net as a function of its parameters in one vector, and a net cut in two."""

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ..models.blocks import blocks_of
from ..models.copies import copied


class Half:
    """y = half(flat, x), for any vector `flat` (P,) of the module's trainable parameters.

    What is not trained, and buffers, are the module's own. `initial` is the vector that it came with.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.names = list(trained)
        self.shapes = [p.shape for p in trained.values()]
        self.sizes = [p.numel() for p in trained.values()]
        first = next(module.parameters(), torch.zeros(0))
        self.initial = torch.cat([first.new_zeros(0), *(p.detach().reshape(-1) for p in trained.values())])

    def __call__(self, flat: Tensor, x: Tensor) -> Tensor:  # (P,), (B, ...) -> (B, ...)
        parts = zip(self.names, self.shapes, flat.split(self.sizes) if self.sizes else (), strict=True)
        return functional_call(self.module, {name: part.view(shape) for name, shape, part in parts}, (x,))

    def each(self, flats: Tensor, x: Tensor) -> Tensor:  # (K, P), (K, b, ...) -> (K, b, ...)
        """Row k's half of row k's input, all at once: a convolution becomes one in K groups."""
        return vmap(self, randomness="different")(flats, x)


def cut(net: nn.Module, after: int, head: nn.Module | None = None) -> tuple[nn.Module, nn.Module]:
    """(the first `after` blocks, the rest with the net's pooling and a head), on parameters of their own.

    Raises ValueError where the net has not that many blocks and one more, and as `blocks_of`.
    """
    net = copied(net)
    blocks = [block for _, block in blocks_of(net)]
    if not 0 <= after < len(blocks):
        there = f"as the net has {len(blocks)} block{'s' * (len(blocks) > 1)} and the server needs one"
        raise ValueError(f"cut: expected 0 to {len(blocks) - 1}, {there}, got {after}")
    pool = getattr(net, "pool", None)
    rest = [*blocks[after:], *(module for module in (pool, head) if isinstance(module, nn.Module))]
    return nn.Sequential(*blocks[:after]), nn.Sequential(*rest)
