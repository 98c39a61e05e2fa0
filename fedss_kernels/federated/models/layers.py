"""Layers that several nets have."""

from torch import Tensor, nn


class InColour(nn.Module):
    """Images of one channel as three."""

    def forward(self, images: Tensor) -> Tensor:
        return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


class Standardised(nn.Module):
    """Images (B, 1 or 3, H, W) in [0, 1] as (B, 3, H, W), each colour less its mean, over its deviation.

    They are those of CIFAR-10's training images, whatever the images are: so they are constants of the net.
    """

    MEANS = 0.4914, 0.4822, 0.4465  # red, green, blue
    DEVIATIONS = 0.2470, 0.2435, 0.2616

    def forward(self, images: Tensor) -> Tensor:
        means, deviations = (images.new_tensor(of)[:, None, None] for of in (self.MEANS, self.DEVIATIONS))
        return (images - means) / deviations


def group_norm(channels: int, of_a_group: int = 8) -> nn.GroupNorm:
    """For a multiple of so many channels."""
    return nn.GroupNorm(channels // of_a_group, channels)


def check_features(name: str, features: int, embedding_dim: int) -> None:
    """Raises ValueError where a net whose features are the embedding is to have another."""
    if embedding_dim != features:
        raise ValueError(
            f"model: {name}: expected embedding_dim {features}, its features, which no layer follows, got "
            f"{embedding_dim}"
        )


def check_at_least_1(name: str, **settings: int) -> None:
    """Raises ValueError for the first of a net's settings that is less."""
    for setting, value in settings.items():
        if value < 1:
            raise ValueError(f"model: {name}: expected {setting} of at least 1, got {value}")
