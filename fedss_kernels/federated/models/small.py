"""Small nets of our own, made for one core and small batches."""

from __future__ import annotations

from torch import Tensor, nn

from .blocks import named_blocks
from .layers import check_features


class SmallConvNet(nn.Module):
    """Four convolutions with GroupNorm and a linear layer: (B, in_channels, H, W) in [0, 1] to (B, D).

    H and W are 25 to 32. Made for one core and small batches: the first convolution halves the image, so that
    the others work on 16x16 or less. GroupNorm, because federated averaging can't average the running
    statistics of BatchNorm. 127 thousand parameters.

    Blocks: the convolutions, each with its norm, and the layer.
    """

    def __init__(
        self,
        embedding_dim: int = 64,
        in_channels: int = 1,
        channels: tuple[int, int, int, int] = (16, 32, 64, 64),
        groups: int = 4,
    ) -> None:
        super().__init__()
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim: expected at least 1, got {embedding_dim}")
        if len(channels) != 4 or any(c < 1 or c % groups for c in channels):
            raise ValueError(f"channels: expected four multiples of groups {groups}, got {channels}")
        layers: list[nn.Module] = []
        for before, after, stride in zip((in_channels, *channels), channels, (2, 1, 2, 2), strict=False):
            layers += [
                nn.Conv2d(before, after, kernel_size=3, stride=stride, padding=1, bias=False),
                nn.GroupNorm(groups, after),
                nn.ReLU(inplace=True),
            ]
        # 28 -> 14 -> 14 -> 7 -> 4, 32 -> 16 -> 16 -> 8 -> 4
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.embedding = nn.Linear(channels[-1] * 4 * 4, embedding_dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.embedding(self.features(images))

    @property
    def blocks(self) -> nn.Sequential:
        *convolved, flatten = self.features
        stem, block1, block2, block3 = (nn.Sequential(*convolved[i : i + 3]) for i in range(0, 12, 3))
        embedding = nn.Sequential(flatten, self.embedding)
        return named_blocks(stem=stem, block1=block1, block2=block2, block3=block3, embedding=embedding)


class FourConvNet(nn.Module):
    """The 4conv of FedBABU for CIFAR: images (B, 3, 32, 32) in [0, 1] to their features (B, 256).

    Oh, Kim and Yun, ICLR 2022, arXiv:2106.06042, appendix F.2: four times a 3x3 convolution of 64, a norm,
    ReLU and the largest of each 2x2. No layer follows: the 2x2x64 that are left are the embedding, so D is
    256. GroupNorm for their BatchNorm, as federated averaging can't average running statistics. 113,088
    parameters, as theirs. H and W may be up to 47.

    Blocks: the convolutions, each with what follows it, and the embedding, which has no parameters.
    """

    def __init__(self, embedding_dim: int = 256, groups: int = 4) -> None:
        super().__init__()
        check_features("conv4_32", 256, embedding_dim)
        self.blocks = named_blocks(
            stem=_convolution(3, groups),
            block1=_convolution(64, groups),
            block2=_convolution(64, groups),
            block3=_convolution(64, groups),
            embedding=nn.Flatten(),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(images)


def _convolution(channels: int, groups: int) -> nn.Sequential:
    """(B, channels, H, W) to (B, 64, H // 2, W // 2)."""
    return nn.Sequential(
        nn.Conv2d(channels, 64, kernel_size=3, padding=1),
        nn.GroupNorm(groups, 64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
    )
