"""Image files for the tests of data sets: plain colours, so that what comes of one is known."""

import io
import struct
import zlib
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


def tiff(
    numbers: np.ndarray,  # (H, W, channels), of one byte or two
    *,
    order: str = "<",
    planes: bool = False,
    compressed: bool = False,
    strip: int = 0,  # rows in each; 0: all
    tile: tuple[int, int] | None = None,  # rows and columns, instead of strips
    **more: int | tuple[int, ...],  # t262=0: another tag; (): without it
) -> bytes:
    """A TIFF file's content, in forms that Pillow writes none of."""
    height, width, channels = numbers.shape
    size = numbers.dtype.itemsize
    across, down = (tile[1], tile[0]) if tile else (width, strip or height)
    parts = []
    for layer in np.split(numbers, channels, axis=2) if planes else [numbers]:
        for y in range(0, height, down):
            for x in range(0, width, across):
                part = layer[y : y + down, x : x + across]
                if tile:
                    part = np.pad(
                        part, [(0, n - m) for n, m in zip(tile, part.shape, strict=False)] + [(0, 0)]
                    )
                data = part.astype(f"{order}{numbers.dtype.kind}{size}").tobytes()
                parts.append(zlib.compress(data) if compressed else data)
    places = [8 + sum(map(len, parts[:i])) for i in range(len(parts))]
    tags: dict[int, int | tuple[int, ...]] = {256: width, 257: height, 258: (8 * size,) * channels}
    tags |= {259: 8 if compressed else 1, 262: 2 if channels > 2 else 1, 277: channels, 284: 1 + planes}
    tags |= {322: across, 323: down} if tile else {278: down}
    tags |= {324 if tile else 273: tuple(places), 325 if tile else 279: tuple(map(len, parts))}
    tags |= {338: 2} if channels == 4 else {}
    tags |= {int(name[1:]): value for name, value in more.items()}
    tags = {tag: value for tag, value in tags.items() if value != ()}
    at = places[-1] + len(parts[-1])
    directory, beyond = struct.pack(f"{order}H", len(tags)), b""
    for tag, value in sorted(tags.items()):
        values = value if isinstance(value, tuple) else (value,)
        packed = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:
            place = at + 6 + 12 * len(tags) + len(beyond)
            packed, beyond = struct.pack(f"{order}I", place), beyond + packed
        directory += struct.pack(f"{order}HHI", tag, 4, len(values)) + packed
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", at)
    return head + b"".join(parts) + directory + bytes(4) + beyond


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
