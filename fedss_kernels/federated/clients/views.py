"""Random views of images, for learning without labels: two views of one image are to be alike.

"simclr" (Chen et al., ICML 2020, arXiv:2002.05709), as far as it serves small images: a box of a fifth of the
image or more, flip, colour jitter, grey. "moco" (MoCo v2, Chen et al., arXiv:2003.04297): boxes from .08 of
the image on, jitter of the hue too, grey, blur, flip.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .augment import as_input
from .colours import in_grey, jitter
from .resampling import blurred, resampled

TRIES = 10  # for a box that is inside the image
ASPECTS = (3 / 4, 4 / 3)  # width to height of a box
STRENGTH = 0.4  # of the jitter: factors of brightness, contrast and saturation in 1 +- this
JITTERED, GREY = 0.8, 0.2  # shares of the images
SIGMAS = (0.1, 2.0)  # of the blur, pixels


@dataclass(frozen=True)
class Recipe:
    """In what the kinds differ."""

    smallest: float  # share of the image in a box
    turn: float  # of the hue, the largest, as a share of the circle
    blurred: float  # share of the images


RECIPES = {
    "simclr": Recipe(smallest=0.2, turn=0.0, blurred=0.0),
    "moco": Recipe(smallest=0.08, turn=0.1, blurred=0.5),
}


@dataclass(frozen=True)
class Views:
    """Of images uint8 (B, 1 or 3, H, W) a view each: float32 (B, 1 or 3, size, size).

    In this order: a box of a random size, shape and place, bilinearly; brightness, contrast, saturation and
    hue, in an order of its own, of four images in five; grey, of one in five; blur; left for right, of every
    other one. Images of one channel have brightness and contrast alone of what is done to colours.

    Values are in [0, 1], up to rounding, as `as_input` makes them and nets take them here: no recipe's mean
    and standard deviation are taken out; nets that want it do so themselves.

    A view is a function of its image and of DRAWS numbers: it depends neither on the rest of the batch nor on
    the number of threads. Raises ValueError for another kind, size, images or draws.
    """

    kind: str
    size: int
    smallest_box: float | None = None  # share of the image in a box, at least; None: as the recipe has it

    def __post_init__(self) -> None:
        if self.kind not in RECIPES:
            raise ValueError(f"views: expected one of {', '.join(RECIPES)}, got {self.kind!r}")
        if self.size < 1:
            raise ValueError(f"views: expected a size of at least 1, got {self.size}")
        if self.smallest_box is not None and not 0 < self.smallest_box <= 1:
            raise ValueError(f"views: expected a smallest_box in (0, 1], got {self.smallest_box}")

    @property
    def recipe(self) -> Recipe:
        usual = RECIPES[self.kind]
        return usual if self.smallest_box is None else replace(usual, smallest=self.smallest_box)

    def __call__(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        return self.made(images, self.draw(len(images), rng))

    @staticmethod
    def draw(count: int, rng: np.random.Generator) -> np.ndarray:  # (count, DRAWS) in [0, 1)
        """What `count` views are made of. Those of several generators may be stacked, and made at once."""
        return rng.random((count, DRAWS))

    @torch.no_grad()
    def made(
        self,
        images: Tensor,  # (B, 1 or 3, H, W) uint8
        draws: np.ndarray,  # (B, DRAWS)
    ) -> Tensor:  # (B, 1 or 3, size, size) float32, on the images' device
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            got = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"images: expected uint8 (B, 1 or 3, H, W), got {got}")
        if draws.shape != (len(images), DRAWS):
            raise ValueError(f"draws: expected shape {(len(images), DRAWS)}, got {draws.shape}")
        choice = choose(draws, self.recipe, (images.shape[2], images.shape[3]))
        # turned before the rest, which has no left and right, at no cost
        found = resampled(as_input(images), choice.boxes, choice.flipped, self.size)
        jitter(found, choice.factors, choice.turns, choice.orders)
        in_grey(found, choice.grey)
        if len(choice.blurred):
            index = torch.from_numpy(choice.blurred).to(found.device)
            found[index] = blurred(found[index], choice.sigmas[choice.blurred])
        return found


@dataclass(frozen=True)
class Choice:
    """What is done to each of B images."""

    boxes: np.ndarray  # (B, 4): top, left, height, width
    factors: np.ndarray  # (B, 3): of brightness, contrast, saturation
    turns: np.ndarray  # (B,): of the hue
    orders: np.ndarray  # (B, 3 or 4): permutations of these, without the hue where it is never turned
    grey: np.ndarray  # the images in grey, (n,) ascending
    blurred: np.ndarray  # those that are blurred, (m,) ascending
    sigmas: np.ndarray  # (B,)
    flipped: np.ndarray  # (B,) bool


WIDTHS = (2 * TRIES, 2, 1, 4, 4, 1, 1, 1, 1)  # of the parts that `choose` makes of a row of draws
DRAWS = sum(WIDTHS)


def choose(draws: np.ndarray, recipe: Recipe, shape: tuple[int, int]) -> Choice:
    """`draws` (B, DRAWS), uniform in [0, 1), as what they stand for with images of (H, W) = `shape`."""
    parts = np.split(draws, np.cumsum(WIDTHS)[:-1], axis=1)
    tries, place, jittered, amounts, keys, grey, blurs, sigma, flipped = parts
    amounts = np.where(jittered < JITTERED, 2 * amounts - 1, 0.0)
    low, high = SIGMAS
    return Choice(
        _boxes(tries.reshape(-1, TRIES, 2), place, recipe.smallest, *shape),
        1 + STRENGTH * amounts[:, :3],
        recipe.turn * amounts[:, 3],
        keys[:, : 4 if recipe.turn else 3].argsort(1),
        np.flatnonzero(grey < GREY),
        np.flatnonzero(blurs < recipe.blurred),
        low + (high - low) * sigma[:, 0],
        flipped[:, 0] < 0.5,
    )


def _boxes(tries: np.ndarray, place: np.ndarray, smallest: float, H: int, W: int) -> np.ndarray:
    """The first try that is inside the image, at any place in it; else the middle of it.

    Areas are uniform in [smallest, 1] of the image, logarithms of aspects in those of ASPECTS.
    """
    area = H * W * (smallest + (1 - smallest) * tries[:, :, 0])
    low, high = np.log(ASPECTS)
    aspect = np.exp(low + (high - low) * tries[:, :, 1])
    sides = np.stack([np.sqrt(area / aspect), np.sqrt(area * aspect)], 2).round().clip(1)  # (B, TRIES, 2)
    middle = min(H, round(W / ASPECTS[0])), min(W, round(H * ASPECTS[1]))
    sides = np.concatenate([sides, np.broadcast_to(middle, (len(tries), 1, 2))], 1)
    first = (sides <= (H, W)).all(2).argmax(1)[:, None]  # that fits; the middle, of number TRIES, does
    side = np.take_along_axis(sides, first[:, :, None], 1)[:, 0]  # (B, 2)
    room = (H, W) - side
    at = np.where(first < TRIES, np.floor(place * (room + 1)), np.floor(room / 2))
    return np.concatenate([at, side], 1).astype(np.int64)
