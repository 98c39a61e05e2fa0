"""TIFF files that Pillow does not read as they look: what their tags say, and their planes of 16 bits."""

from __future__ import annotations

import contextlib
import io
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from .failures import NotRead

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

# ---- tags

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
STRIPS, TURN, CHANNELS, STRIP_ROWS, STRIP_SIZES, MAX_SAMPLE, PLANAR = 273, 274, 277, 278, 279, 281, 284
PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILES, TILE_SIZES = 317, 322, 323, 324, 325
EXTRA_CHANNELS, SAMPLE_FORMAT = 338, 339


def tag_of(image: PillowImage, tag: int) -> int:
    """A tag's number, the first where each channel has one; 0 where there is none."""
    numbers = tags_of(image, tag)
    return numbers[0] if numbers else 0


def tags_of(image: PillowImage, tag: int) -> tuple[int, ...]:
    """A tag's whole numbers; () where there are none."""
    return _whole_numbers((getattr(image, "tag_v2", None) or {}).get(tag, ()))


def _whole_numbers(value: Any) -> tuple[int, ...]:
    numbers = value if isinstance(value, tuple) else (value,)
    return numbers if all(isinstance(number, int) for number in numbers) else ()


def check_kind(content: bytes) -> None:
    """Raises NotRead for a TIFF file that Pillow does not open though its tags are there."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    kind, needed = "", {WIDTH, HEIGHT, BITS, PHOTOMETRIC}
    if content.startswith(b"MM\0+"):
        kind = "big-endian BigTIFF"
    elif content.startswith((b"II*\0", b"MM\0*", b"II+\0")):
        with contextlib.suppress(Exception):  # a damaged one may raise anything
            tags, file = ImageFileDirectory_v2(content[: 16 if content[2] == 43 else 8]), io.BytesIO(content)
            file.seek(tags.next)
            tags.load(file)
            if needed <= set(tags) and (STRIP_SIZES in tags or TILE_SIZES in tags):
                order = "big" if content.startswith(b"MM") else "little"
                bits = " ".join(map(str, _whole_numbers(tags[BITS])))
                kind = f"{order}-endian, BitsPerSample {bits}, PhotometricInterpretation {tags[PHOTOMETRIC]}"
    if kind:
        raise NotRead(f"a kind of TIFF that Pillow does not open: {kind}; save it as another")


def _tiff(head: bytes, tags: dict[int, tuple[int, ...]], data: bytes) -> bytes:
    """A TIFF file's content, in the byte order and format of another's head; places in `tags` are in `data`.

    The directory is before the data, so that data cut short are not found to go on in it.
    """
    order = "<" if head.startswith(b"II") else ">"
    big = 43 in head[2:4]  # BigTIFF, whose numbers are twice as long
    kind, number, count, start = (16, "Q", "Q", 16) if big else (4, "I", "H", 8)
    width = struct.calcsize(number)
    after = start + struct.calcsize(order + count) + len(tags) * (4 + 2 * width) + width
    before = after + sum(width * len(value) for value in tags.values() if len(value) > 1)
    entries, beyond = b"", b""
    for tag, numbers in sorted(tags.items()):
        if tag in (STRIPS, TILES):
            numbers = tuple(before + place for place in numbers)
        value = struct.pack(f"{order}{len(numbers)}{number}", *numbers)
        entries += struct.pack(order + "HH" + number, tag, kind, len(numbers))
        if len(numbers) > 1:
            entries += struct.pack(order + number, after + len(beyond))
            beyond += value
        else:
            entries += value
    first = struct.pack(order + number, start)
    directory = struct.pack(order + count, len(tags)) + entries + bytes(width)
    return head[: start - width] + first + directory + beyond + data


# ---- colours of 16 bits in planes, which Pillow takes for planes of 8, or of which it gives the upper 8


def has_planes_of_16_bits(image: PillowImage) -> bool:
    return (
        image.format == "TIFF"
        and tag_of(image, PLANAR) == 2
        and 16 in tags_of(image, BITS)
        and _channels(image) > 1
    )


def _channels(image: PillowImage) -> int:
    return max(tag_of(image, CHANNELS), len(tags_of(image, BITS)))


def interleaved(image: PillowImage, content: bytes) -> bytes:
    """The same picture as an uncompressed TIFF file, whose numbers lie pixel by pixel."""
    kept = len(image.getbands())
    numbers = np.stack([_plane(image, content, i) for i in range(kept)], axis=-1)
    height, width = numbers.shape[:2]
    data = numbers.astype("<u2").tobytes()
    tags = {
        WIDTH: (width,),
        HEIGHT: (height,),
        BITS: (16,) * kept,
        COMPRESSION: (1,),
        PHOTOMETRIC: tags_of(image, PHOTOMETRIC),
        STRIPS: (0,),
        CHANNELS: (kept,),
        STRIP_ROWS: (height,),
        STRIP_SIZES: (len(data),),
    }
    tags |= {tag: tags_of(image, tag) for tag in (TURN, MAX_SAMPLE) if tags_of(image, tag)}
    if image.mode == "RGBA":
        tags[EXTRA_CHANNELS] = tags_of(image, EXTRA_CHANNELS) or (2,)  # alpha: the colours times it, or not
    return _tiff(b"II*\0", tags, data)


def _plane(image: PillowImage, content: bytes, i: int) -> np.ndarray:
    """(H, W): one channel's numbers, read as a grey picture."""
    from PIL import Image

    same = (WIDTH, HEIGHT, COMPRESSION, FILL_ORDER, STRIP_ROWS, PREDICTOR, TILE_WIDTH, TILE_HEIGHT)
    tags = {tag: tags_of(image, tag) for tag in same if tags_of(image, tag)}
    for tag in (STRIPS, STRIP_SIZES, TILES, TILE_SIZES):
        every = tags_of(image, tag)
        count = len(every) // _channels(image)
        if count:
            tags[tag] = every[i * count : (i + 1) * count]
    grey = tags | {BITS: (16,), PHOTOMETRIC: (1,), CHANNELS: (1,)}
    plane = Image.open(io.BytesIO(_tiff(content[:16], grey, content)))
    plane.load()
    return np.asarray(plane)
