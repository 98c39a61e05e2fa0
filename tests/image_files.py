"""Image files for the tests of data sets: plain colours, so that what comes of one is known."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

Colour = tuple[int, int, int]


def colour(i: int) -> Colour:
    """Another for each i < 512, 36 apart in some channel, which JPEG keeps apart."""
    return 36 * (i % 8), 36 * (i // 8 % 8), 36 * (i // 64 % 8)


def write_image(path: Path, i: int, size: tuple[int, int] = (20, 12)) -> Path:
    """All of it colour(i); the name's ending says the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour(i)).save(path)
    return path


def encoded(i: int, size: tuple[int, int] = (32, 32)) -> bytes:
    """The same as a JPEG file's content."""
    file = io.BytesIO()
    Image.new("RGB", size, colour(i)).save(file, "JPEG")
    return file.getvalue()


def photograph(width: int, height: int) -> Image.Image:
    """Full of detail, so that its file is long, and every part of it another."""
    rng = np.random.default_rng([width, height])
    coarse = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def shown(images: torch.Tensor) -> list[int]:
    """Of images in one colour each the i in colour(i); a test fails where there is more than one colour."""
    flat = images.flatten(2).double()
    assert (flat.amax(2) - flat.amin(2)).max() <= 4
    steps = np.rint(flat.mean(2).numpy() / 36).astype(int)
    return (steps @ np.array([1, 8, 64])).tolist()


def each_once(clients: tuple[torch.Tensor, ...], count: int) -> bool:
    """Whether every one of `count` images is held by one client."""
    return torch.cat(clients).sort().values.equal(torch.arange(count))
