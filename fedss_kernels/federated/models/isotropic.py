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
    stem = nn.Sequential(InColour(), _convolution(3, width, 2 * patch - 1, patch), *_norm_and_relu(width))
    blocks = {f"block{i}": Residual(width) for i in range(1, depth + 1)}
    return Chain(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), stem=stem, **blocks)


class Residual(nn.Module):
    """(B, width, h, w) to the same: x and what two convolutions make of it, a norm and ReLU before each.

    What is added may be of either sign. If ReLU came last blocks could only add: what all images have in
    common grows from block to block, and a chain of them tells images apart less well the longer it is.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        convolved = [[*_norm_and_relu(width), _convolution(width, width, 3)] for _ in range(2)]
        self.branch = nn.Sequential(*convolved[0], *convolved[1])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def _norm_and_relu(width: int) -> list[nn.Module]:
    return [group_norm(width), nn.ReLU(inplace=True)]


def _convolution(before: int, after: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False)
