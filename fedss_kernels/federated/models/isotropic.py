"""A residual net of one width and one grid throughout, for learning block by block.

All blocks take as much memory, and any of them may be left out, as each makes what it takes.
"""

from torch import Tensor, nn

from .blocks import Chain
from .layers import InColour, check_at_least_1, group_norm


def isotropic_net(embedding_dim: int = 192, depth: int = 12, patch: int = 4) -> Chain:
    """Images (B, 1 or 3, H, W) in [0, 1] to (B, D), by `depth` blocks of D / 4 channels.

    The stem makes a grid of one place for each patch x patch pixels: 8x8 of 32x32 pixels. Features are means
    over the four quarters of the grid, so that they tell where in the image something is; no layer follows.
    """
    check_at_least_1("isotropic", embedding_dim=embedding_dim, depth=depth, patch=patch)
    if embedding_dim % 32:
        expected = "expected embedding_dim a multiple of 32, 4 times its width"
        raise ValueError(f"model: isotropic: {expected}, got {embedding_dim}")
    width = embedding_dim // 4
    stem = nn.Sequential(InColour(), *_convolved(3, width, 2 * patch - 1, patch))
    blocks = {f"block{i}": Residual(width) for i in range(1, depth + 1)}
    return Chain(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), stem=stem, **blocks)


class Residual(nn.Module):
    """(B, width, h, w) to the same: x and what two convolutions make of it, each with a norm and ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(*_convolved(width, width, 3), *_convolved(width, width, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def _convolved(before: int, after: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False)
    return [convolution, group_norm(after), nn.ReLU(inplace=True)]
