"""A net of blocks that all have one shape, small enough for every test: a stem, three blocks, a pool."""

import torch
from tiny_federation import DIM, PIXELS
from torch import nn

from fedss_kernels.federated.models.blocks import named_blocks

STEM, BLOCK = PIXELS * DIM + DIM, DIM * DIM + DIM
SIZES = [STEM, BLOCK, BLOCK, BLOCK]


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


class Layered(nn.Module):
    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, width), nn.Tanh())
        self.layers = nn.ModuleList(Residual(width) for _ in range(layers))
        self.pool = nn.Identity()

    @property
    def blocks(self) -> nn.Sequential:
        layers = {f"block{i}": layer for i, layer in enumerate(self.layers, 1)}
        return named_blocks(stem=self.stem, **layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.pool(self.blocks(images))


def layered_net(layers: int = 3, width: int = DIM) -> Layered:
    torch.manual_seed(3)
    return Layered(layers, width)
