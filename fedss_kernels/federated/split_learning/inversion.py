"""What whoever sees a client's latents can make of its images: the model inversion attack.

Li et al., "MocoSFL: enabling cross-client collaborative self-supervised learning", ICLR 2023, section 4. The
server is honest but curious, knows the client's half of the net, and has some images like the clients'. It
trains a decoder from latents to images on these, and applies it to what clients send. How near it comes is
told by MSE, PSNR = -10 log10(MSE) and SSIM of pixels in [0, 1], means over images. What it would get by
always answering the mean of its own images is the line to compare with.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian
LEARNS = ("mse", "ssim")
VALIDATION = 0.1  # of the attacker's images: they choose the epoch


@dataclass(frozen=True)
class Nearness:
    """Of reconstructions to images: means over the images."""

    mse: float
    ssim: float
    psnr: float  # decibels


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """The structural similarity of images (B, channels, H, W) with numbers in [0, 1]: (B,), 1 of equal ones.

    Wang, Bovik, Sheikh and Simoncelli, 2004: (2 m_a m_b + c1)(2 s_ab + c2) / ((m_a^2 + m_b^2 + c1)(s_a^2 +
    s_b^2 + c2)) of local means, variances and covariance under a Gaussian window of 11 x 11 pixels, sigma
    1.5, with zeros around the image; c1 = 1e-4, c2 = 9e-4; the mean over pixels and channels. Differentiable.
    """
    channels = a.shape[1]
    x = torch.arange(WINDOW, dtype=a.dtype, device=a.device) - WINDOW // 2
    line = torch.exp(-(x**2) / (2 * SIGMA**2))
    line = line / line.sum()

    def local(values: Tensor) -> Tensor:  # the window is a product of two lines
        rows = line.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
        across = F.conv2d(values, rows, padding=(0, WINDOW // 2), groups=channels)
        return F.conv2d(across, rows.transpose(2, 3), padding=(WINDOW // 2, 0), groups=channels)

    mean_a, mean_b = local(a), local(b)
    both = mean_a * mean_b
    squares = mean_a**2 + mean_b**2
    variances, covariance = local(a**2 + b**2) - squares, local(a * b) - both
    c1, c2 = 1e-4, 9e-4
    found = (2 * both + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))
    return found.mean((1, 2, 3))


def nearness(reconstructed: Tensor, images: Tensor) -> Nearness:
    """Of images (B, channels, H, W) with numbers in [0, 1]. PSNR is of each image, as MSE is."""
    mse = (reconstructed - images).square().mean((1, 2, 3)).double()
    psnr = -10 * mse.clamp_min(1e-12).log10()  # 120 dB at most: of 8-bit pixels none is nearer
    return Nearness(mse.mean().item(), ssim(reconstructed, images).mean().item(), psnr.mean().item())


class ResidualDecoder(nn.Module):
    """Latents (B, c, h, w) -> images (B, channels, H, W) in [0, 1]; H / h = W / w a power of two.

    The attacker of MocoSFL's paper: residual blocks of `width` channels, norm - ReLU - 3x3 twice. One takes
    the latents in, `depth` follow; then transposed convolutions double the size as often as it takes, and a
    block stands in for each of two that isn't needed; a last block makes pixels.
    """

    def __init__(
        self,
        latent: Sequence[int],  # (c, h, w)
        image: Sequence[int],  # (channels, H, W)
        width: int = 64,
        depth: int = 4,
    ):
        super().__init__()
        doublings = doublings_of(latent, image)
        self.layers = nn.Sequential(
            _Residual(latent[0], width),
            *(_Residual(width, width) for _ in range(depth + max(0, 2 - doublings))),
            *(_doubled(width) for _ in range(doublings)),
            _Residual(width, image[0]),
        )

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents).sigmoid()


class PlainDecoder(nn.Module):
    """An attacker of another architecture: convolutions and bilinear doublings, no shortcut anywhere."""

    def __init__(
        self,
        latent: Sequence[int],  # (c, h, w)
        image: Sequence[int],  # (channels, H, W)
        width: int = 64,
        depth: int = 3,
    ):
        super().__init__()
        layers, at = list[nn.Module](), latent[0]
        for layer in range(depth + doublings_of(latent, image)):
            if layer >= depth:
                layers.append(nn.Upsample(scale_factor=2, mode="bilinear"))
            layers += [nn.Conv2d(at, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            at = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(at, image[0], 3, padding=1))

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents).sigmoid()


class _Residual(nn.Module):
    def __init__(self, into: int, out: int):
        super().__init__()
        self.branch = nn.Sequential(
            *(nn.BatchNorm2d(into), nn.ReLU(), nn.Conv2d(into, out, 3, padding=1, bias=False)),
            *(nn.BatchNorm2d(out), nn.ReLU(), nn.Conv2d(out, out, 3, padding=1)),
        )
        self.shortcut = nn.Identity() if into == out else nn.Conv2d(into, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.branch(x)


def _doubled(width: int) -> nn.Module:
    enlarge = nn.ConvTranspose2d(width, width, 3, stride=2, padding=1, output_padding=1, bias=False)
    return nn.Sequential(enlarge, nn.BatchNorm2d(width), nn.ReLU())


def doublings_of(latent: Sequence[int], image: Sequence[int]) -> int:
    """How many make the one (c, h, w) as large as the other; raises ValueError where no number does."""
    if len(latent) != 3:
        raise ValueError(f"latent: expected (channels, height, width), got {tuple(latent)}")
    for doublings in range(16):
        if tuple(size << doublings for size in latent[1:]) == tuple(image[1:]):
            return doublings
    raise ValueError(
        f"latent: expected a height and width that doublings make those of images, {image[1]} x {image[2]}, "
        f"got {latent[1]} x {latent[2]}"
    )


def train_attacker(
    decoder: nn.Module,
    latents: Tensor,  # (N, c, h, w) of the attacker's own images
    images: Tensor,  # (N, channels, H, W) in [0, 1]
    rng: np.random.Generator,  # which of them are held out, and the order of the others
    *,
    learns: str = "mse",  # one of LEARNS: to lessen MSE, or to raise SSIM
    epochs: int = 50,
    batch_size: int = 32,
    lr: float = 1e-3,  # of Adam
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,  # the loss on held-out images
) -> nn.Module:
    """Trains `decoder` in place and returns it, in eval mode and as it was after its best epoch.

    The best is that of the least mean loss on a tenth of the images, which is not trained on. Where that is
    finite after no epoch all of its numbers are NaN, and so is what it makes of latents. Raises
    ValueError for fewer than two images, or latents of others.
    """
    if learns not in LEARNS:
        raise ValueError(f"learns: expected one of {', '.join(LEARNS)}, got {learns!r}")
    if len(latents) != len(images) or len(images) < 2:
        raise ValueError(
            f"latents: expected one for each of two images or more, got {len(latents)} for {len(images)}"
        )
    order = torch.from_numpy(rng.permutation(len(images)))
    count = held_out_of(len(images))
    held_out, own = order[:count], order[count:]
    optimizer = torch.optim.Adam(decoder.parameters(), lr=lr)
    best, kept = math.inf, _copy(decoder)
    for epoch in range(epochs):
        decoder.train()
        for batch in own[torch.from_numpy(rng.permutation(len(own)))].split(batch_size):
            optimizer.zero_grad()
            _loss(decoder(latents[batch]), images[batch], learns).mean().backward()
            optimizer.step()
        decoder.eval()
        with torch.no_grad():
            parts = [_loss(decoder(latents[part]), images[part], learns) for part in held_out.split(256)]
        loss = torch.cat(parts).mean().item()
        on_epoch(epoch, loss)
        if loss < best:
            best, kept = loss, _copy(decoder)
    if best == math.inf and epochs:  # no attack: what it makes of latents is to be no picture
        kept = {n: t.fill_(torch.nan) if t.is_floating_point() else t for n, t in kept.items()}
    decoder.load_state_dict(kept)
    return decoder.eval()


def held_out_of(images: int) -> int:
    """How many of an attacker's images are not trained on, and choose the epoch."""
    return max(1, round(VALIDATION * images))


def _loss(reconstructed: Tensor, images: Tensor, learns: str) -> Tensor:  # (B,)
    if learns == "mse":
        return (reconstructed - images).square().mean((1, 2, 3))
    return 1 - ssim(reconstructed, images)


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@torch.no_grad()
def attacked(decoder: nn.Module, latents: Tensor, batch_size: int = 256) -> Tensor:
    """What the decoder makes of latents (N, c, h, w): images (N, channels, H, W)."""
    return torch.cat([decoder(batch) for batch in latents.split(batch_size)])


def of_the_mean_image(own: Tensor, images: Tensor) -> Nearness:
    """What an attacker gets that looks at no latent, and always answers the mean of its `own` images."""
    return nearness(own.mean(0, keepdim=True).expand_as(images), images)
