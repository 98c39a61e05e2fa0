"""What latents show of images: the inversion attack on clients' halves, several side by side.

The attacker has some images like the clients', drawn from all of them, and trains a decoder on what a half
makes of them (split_learning/inversion.py). It is tried on others, the same for every half. A half that looks
resistant may only have met a weak attacker: so there are three, and who looks at no latent at all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...plotting import as_it_is
from ..algorithms import METHODS
from ..clients.player import Player
from ..config import Config, ConfigError
from ..data import FederatedData
from ..files.run_folder import as_trained
from ..randomness import NO_CLIENT, Purpose, generator
from ..reports.measured import write_figures
from ..split_learning.half import cut
from ..split_learning.inversion import (
    Nearness,
    PlainDecoder,
    ResidualDecoder,
    attacked,
    doublings_of,
    held_out_of,
    nearness,
    of_the_mean_image,
    train_attacker,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ATTACKERS: dict[str, tuple[type[ResidualDecoder] | type[PlainDecoder], str]] = {
    "residual, for MSE": (ResidualDecoder, "mse"),  # the paper's
    "residual, for SSIM": (ResidualDecoder, "ssim"),
    "plain, for MSE": (PlainDecoder, "mse"),
}
NO_LATENTS = "the mean image"
SHOWN = 8  # images in the picture
FEW = 100  # images of an attacker: from fewer it hardly learns, whatever a half shows
WORDS = (
    "In split learning clients send what the first blocks of a net make of their images. Who gets that, "
    "knows these blocks and has some images like the clients' can train a decoder back to images. Here it "
    "was done, and tried on images that the attacker does not have. How near it comes is told by the mean "
    "squared error of pixels from 0 to 1 (more is safer), by the structural similarity SSIM, which is 1 for "
    "equal images, and PSNR in decibels (less is safer). The mean image is what one would answer without "
    "any latent."
)


@dataclass(frozen=True)
class Line:
    """Means over images."""

    half: str
    latents: int  # numbers of an image that are sent
    attacker: str
    mse: float
    ssim: float
    psnr: float  # decibels


@dataclass(frozen=True)
class Found:
    lines: Sequence[Line]
    images: Tensor  # (SHOWN, channels, H, W), of those that the attack was tried on
    pictures: Mapping[str, Tensor]  # what was made of their latents, by half and attacker
    remark: str = ""  # on the attackers' images


@dataclass(frozen=True)
class Images:
    """(N, channels, H, W) float32 in [0, 1] each."""

    own: Tensor  # that the attacker has
    others: Tensor  # that the attack is tried on

    @classmethod
    def drawn(
        cls,
        images: Tensor,  # (N, channels, H, W) uint8
        share: float,
        count: int,
        seed: int,
        prepared: Callable[[Tensor], Tensor],
        rows: Tensor | None = None,  # (n,) of the images; None: all
    ) -> "Images":
        """A share of the images, and `count` of the rest. Raises ValueError where there are not so many."""
        rows = torch.arange(len(images)) if rows is None else rows
        known = round(share * len(rows))
        if known < 2 or known + count > len(rows):
            got = f"{known:,} and {count:,} of {len(rows):,}"
            raise ValueError(
                f"images: expected 2 or more for the attacker, and others to try it on, got {got}"
            )
        rng = generator(seed, 0, 0, NO_CLIENT, Purpose.INVERSION)
        order = rows[torch.from_numpy(rng.permutation(len(rows)))]
        return cls(*(prepared(images[part]).cpu() for part in order[: known + count].split([known, count])))

    @property
    def remark(self) -> str:
        """Where an attacker has few images."""
        known = len(self.own)
        words = f"each attacker has {known} images, and trains on {known - held_out_of(known)} of them"
        return f"{words}: from so few it may learn nothing, whatever a half shows" if known < FEW else ""


def check(config: Config) -> None:
    """Raises ConfigError for a method whose clients send no latents."""
    if not METHODS[config.method].split:
        raise ConfigError("method", f"expected one whose clients send latents, got {config.method!r}")


def clients_half(
    config: Config, data: FederatedData, state: Mapping[str, Tensor] | None = None
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """(the blocks that clients have of a net with this state, or as it is drawn, how images are its input)

    Raises ConfigError as `check`, and where the configuration is of another net.
    """
    check(config)
    extractor = Player(as_trained(config), data).extractor
    if state is not None:
        extractor.module.load_state_dict(state)
    half, _ = cut(extractor.module.cpu(), config.cut)
    return half.eval(), extractor.as_input


def check_latents(half: nn.Module, images: Images) -> None:
    """Raises ValueError where latents are not channels of pixels, which doublings make as large as images."""
    doublings_of(_latents(half, images.own[:1]).shape[1:], images.own.shape[1:])


def measure(
    halves: Mapping[str, nn.Module],
    images: Images,
    *,
    seed: int,
    epochs: int = 50,
    width: int = 64,
    on_line: Callable[[Found], None] = lambda found: None,  # after each line, what is found so far
) -> Found:
    """A line for the mean image, and one for each half and each of ATTACKERS. Raises as `check_latents`."""
    lines, pictures = list[Line](), dict[str, Tensor]()
    found = Found(lines, images.others[:SHOWN], pictures, images.remark)

    def note(half: str, latents: int, attacker: str, near: Nearness) -> None:
        lines.append(Line(half, latents, attacker, near.mse, near.ssim, near.psnr))
        on_line(found)

    note("none", 0, NO_LATENTS, of_the_mean_image(images.own, images.others))
    for name, half in halves.items():
        own, sent = (_latents(half, of) for of in (images.own, images.others))
        for attacker, (decoder, learns) in ATTACKERS.items():
            rng = generator(seed, 1, 0, NO_CLIENT, Purpose.INVERSION)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(int(rng.integers(2**63)))
                made = decoder(own.shape[1:], images.own.shape[1:], width)
            train_attacker(made, own, images.own, rng, learns=learns, epochs=epochs)
            reconstructed = attacked(made, sent)
            pictures[f"{name}: {attacker}"] = reconstructed[:SHOWN]
            note(name, sent[0].numel(), attacker, nearness(reconstructed, images.others))
    return found


@torch.no_grad()
def _latents(half: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([half(batch) for batch in images.split(256)])


def write(out: Path, found: Found) -> str:
    """inversion.csv, inversion.md, inversion.png and a section of report.html; returns the table's text."""
    every = [[field.name for field in fields(Line)], *map(astuple, found.lines)]
    header = ["half", "numbers sent of an image", "attacker", "MSE", "SSIM", "PSNR"]
    rows = [
        [
            line.half,
            f"{line.latents:,}",
            line.attacker,
            f"{line.mse:.4f}",
            f"{line.ssim:.3f}",
            f"{line.psnr:.1f}",
        ]
        for line in found.lines
    ]
    title = "What latents show of images"
    words = f"{WORDS} Here {found.remark}." if found.remark else WORDS
    return write_figures(out, "inversion", every, lambda: plot(found), title, words, header, rows)


def plot(found: Found) -> "Figure":
    """A row of images, and under it a row of what each attacker made of what was sent of them."""
    from matplotlib.figure import Figure

    rows = {"the images": found.images, **found.pictures}
    figure = Figure(figsize=(7, 1.15 * len(rows)), layout="constrained")
    for axes, (name, images) in zip(
        figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows.items(), strict=True
    ):
        line = torch.cat(list(images.permute(0, 2, 3, 1)), dim=1)  # (H, SHOWN W, channels)
        axes.imshow(line.squeeze(2).numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_title(as_it_is(name), loc="left", fontsize=8)
    return figure
