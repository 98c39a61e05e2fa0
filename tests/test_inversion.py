"""The model inversion attack: its measures by hand, its decoders' shapes, and that it finds what is there."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fedss_kernels.federated.split_learning.inversion import (
    PlainDecoder,
    ResidualDecoder,
    attacked,
    nearness,
    of_the_mean_image,
    ssim,
    train_attacker,
)


def images(count: int, channels: int = 1, size: int = 8, seed: int = 0) -> torch.Tensor:
    """Smooth blobs, so that there is something to reconstruct."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"))
    centre = rng.uniform(0, size, (count, channels, 2, 1, 1))
    return torch.from_numpy(np.exp(-((grid - centre) ** 2).sum(2) / 6)).float()


def by_a_loop(a: np.ndarray, b: np.ndarray) -> float:
    """SSIM of one image (channels, H, W), pixel by pixel, from the formula."""
    x = np.arange(11) - 5
    line = np.exp(-(x**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    found = []
    for p, q in zip(a, b, strict=True):
        p, q = np.pad(p, 5), np.pad(q, 5)
        for i in range(a.shape[1]):
            for j in range(a.shape[2]):
                u, v = p[i : i + 11, j : j + 11], q[i : i + 11, j : j + 11]
                mu, mv = (window * u).sum(), (window * v).sum()
                vu, vv = (window * u * u).sum() - mu * mu, (window * v * v).sum() - mv * mv
                cov = (window * u * v).sum() - mu * mv
                found.append(
                    (2 * mu * mv + 1e-4) * (2 * cov + 9e-4) / ((mu * mu + mv * mv + 1e-4) * (vu + vv + 9e-4))
                )
    return float(np.mean(found))


def test_ssim_is_the_formula_and_1_of_equal_images():
    rng = np.random.default_rng(1)
    a, b = rng.random((2, 3, 3, 13, 9))
    found = ssim(torch.from_numpy(a), torch.from_numpy(b))
    assert found.numpy() == pytest.approx([by_a_loop(p, q) for p, q in zip(a, b, strict=True)], abs=1e-12)
    assert ssim(torch.from_numpy(a), torch.from_numpy(a)).numpy() == pytest.approx(1)


def test_ssim_is_differentiable():
    a, b = torch.rand(2, 2, 1, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda a: ssim(a, b), a.requires_grad_())


def test_nearness_is_of_each_image_and_then_the_mean():
    here = torch.zeros(2, 1, 4, 4)
    there = torch.stack([torch.full((1, 4, 4), 0.1), torch.full((1, 4, 4), 0.01)])
    found = nearness(there, here)
    assert found.mse == pytest.approx((0.01 + 0.0001) / 2)
    assert found.psnr == pytest.approx((20 + 40) / 2, rel=1e-5)
    assert nearness(here, here).psnr == 120 and nearness(here, here).ssim == pytest.approx(1)


@pytest.mark.parametrize("kind", [ResidualDecoder, PlainDecoder])
@pytest.mark.parametrize("latent", [(4, 16, 16), (64, 32, 32), (8, 4, 4)])
def test_decoders_make_images_of_any_latent(kind, latent):
    made = kind(latent, (3, 32, 32), width=8)(torch.randn(2, *latent))
    assert made.shape == (2, 3, 32, 32) and made.min() >= 0 and made.max() <= 1


def test_the_papers_decoder_has_the_blocks_that_it_names():
    """N4 for a latent of half the size: one in, four, one for the missing doubling, one doubling, one out."""
    names = [type(layer).__name__ for layer in ResidualDecoder((4, 16, 16), (3, 32, 32)).layers]
    assert names == ["_Residual"] * 6 + ["Sequential"] + ["_Residual"]


def test_a_latent_of_a_size_that_no_doubling_makes_is_refused():
    with pytest.raises(ValueError, match="latent: expected a height and width .* 32 x 32, got 5 x 5"):
        ResidualDecoder((4, 5, 5), (3, 32, 32))


@pytest.mark.parametrize("learns", ["mse", "ssim"])
@pytest.mark.exhaustive
def test_an_attack_sees_what_latents_show_and_nothing_where_they_show_nothing(learns):
    own, clients = images(128), images(32, seed=1)
    means = of_the_mean_image(own, clients)

    def found(latents):
        torch.manual_seed(0)
        decoder = ResidualDecoder((1, 4, 4), (1, 8, 8), width=8, depth=1)
        train_attacker(
            decoder, latents(own), own, np.random.default_rng(0), learns=learns, epochs=10, lr=0.01
        )
        return nearness(attacked(decoder, latents(clients)), clients)

    seen = found(lambda x: nn.functional.avg_pool2d(x, 2))
    blind = found(lambda x: torch.zeros(len(x), 1, 4, 4))
    assert seen.ssim > 0.8 > blind.ssim and seen.mse < means.mse / 4
    if learns == "mse":
        assert blind.mse == pytest.approx(means.mse, rel=0.25)


def test_the_best_epoch_is_kept_and_equal_seeds_give_equal_attackers():
    own, told = images(64), []

    def trained():
        torch.manual_seed(0)
        decoder = PlainDecoder((1, 8, 8), (1, 8, 8), width=4, depth=1)
        told.clear()
        train_attacker(
            decoder,
            own,
            own,
            np.random.default_rng(3),
            epochs=4,
            lr=0.3,
            on_epoch=lambda epoch, loss: told.append(loss),
        )
        return decoder

    first, second = trained(), trained()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    held_out = torch.from_numpy(np.random.default_rng(3).permutation(64))[:6]
    kept = (attacked(first, own[held_out]) - own[held_out]).square().mean().item()
    assert len(told) == 4 and min(told) < told[-1] and kept == pytest.approx(min(told), rel=1e-5)


@pytest.mark.parametrize(
    "count, options, words",
    [
        (8, {"learns": "l1"}, "learns: expected one of mse, ssim, got 'l1'"),
        (7, {}, "latents: expected one for each of two images or more, got 7 for 8"),
    ],
)
def test_wrong_arguments_are_named(count, options, words):
    decoder = PlainDecoder((1, 8, 8), (1, 8, 8), width=4)
    with pytest.raises(ValueError, match=words):
        train_attacker(decoder, images(8)[:count], images(8), np.random.default_rng(0), **options)


def test_an_attacker_of_one_image_is_refused():
    decoder = PlainDecoder((1, 8, 8), (1, 8, 8), width=4)
    with pytest.raises(ValueError, match="got 1 for 1"):
        train_attacker(decoder, images(1), images(1), np.random.default_rng(0))
    assert math.isfinite(of_the_mean_image(images(2), images(2)).psnr)


def test_latents_that_are_no_pixels_are_refused():
    with pytest.raises(ValueError, match=r"latent: expected \(channels, height, width\), got \(65, 192\)"):
        PlainDecoder((65, 192), (3, 32, 32))


def test_an_attacker_that_never_trained_shows_no_picture():
    """One latent that is not finite makes the decoder so; as it was drawn it is no attack."""
    own = images(16)
    latents = own.clone()
    latents[:, :, 0, 0] = torch.nan
    decoder = PlainDecoder((1, 8, 8), (1, 8, 8), width=4)
    train_attacker(decoder, latents, own, np.random.default_rng(0), epochs=2)
    assert attacked(decoder, own).isnan().all()
