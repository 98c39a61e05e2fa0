"""Small nets of our own, made for one core and small batches."""

from __future__ import annotations

from torch import Tensor, nn


class SmallConvNet(nn.Module):
    """Four convolutions with GroupNorm and a linear layer: (B, in_channels, H, W) in [0, 1] to (B, D).

    H and W are 25 to 32. Made for one core and small batches: the first convolution halves the image, so that
    the others work on 16x16 or less. GroupNorm, because federated averaging can't average the running
    statistics of BatchNorm. 127 thousand parameters.
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
