"""Nets for images of 32 pixels with weight-standardised convolutions, to be cut after any of their blocks.

Of MocoSFL (Li et al., ICLR 2023), whose clients train on one image at a time and so have no statistics of
a batch: GroupNorm of 4 channels a group, and each filter less its mean, over its standard deviation (Qiao et
al., arXiv:1903.10520). Pixels are standardised as theirs are. To such filters, each of mean 0, that is of
weight at the edges, where what is outside is then of a mean colour and not black: five points of kNN for the
small net.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Chain
from .layers import Standardised, check_features, group_norm

CHANNELS_OF_A_GROUP = 4


def resnet18_32(embedding_dim: int = 512) -> Chain:
    """ResNet-18 (He et al., CVPR 2016) of images (B, 1 or 3, H, W) in [0, 1] to (B, 512), their means.

    The stem is a 3x3 convolution of stride 1, and no pooling follows. Cut after the stem it is that of
    MocoSFL-1, 1,856 parameters, after block1 that of MocoSFL-3, 75,840; of 32x32 pixels 65,536 numbers cross
    either cut.
    """
    check_features("resnet18_32", 512, embedding_dim)
    blocks, before = dict[str, nn.Module](), 64
    for i, after in enumerate((64, 64, 128, 128, 256, 256, 512, 512), 1):
        blocks[f"block{i}"] = BasicBlock(before, after, stride=1 if before == after else 2)
        before = after
    return Chain(_mean(), stem=nn.Sequential(Standardised(), *_convolved(3, 64)), **blocks)


def conv4_ws(embedding_dim: int = 128) -> Chain:
    """Four such convolutions for CPUs, of (B, 1 or 3, H, W) in [0, 1] to (B, 128), their means.

    3 to 16 to 32 to 64 to 128 channels; all but the second halve the image. 97,680 parameters, 464 of them
    in the stem.
    """
    check_features("conv4_ws", 128, embedding_dim)
    stem = nn.Sequential(Standardised(), *_convolved(3, 16, 2))
    layers = ((16, 32, 1), (32, 64, 2), (64, 128, 2))
    blocks = {f"block{i}": nn.Sequential(*_convolved(*layer)) for i, layer in enumerate(layers, 1)}
    return Chain(_mean(), stem=stem, **blocks)


class StandardisedConv2d(nn.Conv2d):
    """A convolution by (w - mean) / (standard deviation + 1e-5) of each filter, unbiased; without a bias."""

    def __init__(self, before: int, after: int, kernel: int, stride: int = 1) -> None:
        super().__init__(before, after, kernel, stride, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(self.weight, dim=(1, 2, 3), correction=1, keepdim=True)
        weight = (self.weight - mean) / (deviation + 1e-5)
        return F.conv2d(x, weight, None, self.stride, self.padding)


class BasicBlock(nn.Module):
    """(B, before, h, w) to (B, after, h / stride, w / stride): two convolutions and a way around them."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        *convolved, _ = [*_convolved(before, after, stride), *_convolved(after, after)]
        self.branch = nn.Sequential(*convolved)
        around = StandardisedConv2d(before, after, 1, stride), group_norm(after, CHANNELS_OF_A_GROUP)
        self.around = nn.Sequential() if stride == 1 else nn.Sequential(*around)

    def forward(self, x: Tensor) -> Tensor:
        return (self.branch(x) + self.around(x)).relu_()


def _convolved(before: int, after: int, stride: int = 1) -> list[nn.Module]:
    norm = group_norm(after, CHANNELS_OF_A_GROUP)
    return [StandardisedConv2d(before, after, 3, stride), norm, nn.ReLU(inplace=True)]


def _mean() -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
