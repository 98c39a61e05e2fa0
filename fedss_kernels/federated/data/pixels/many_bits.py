"""Images of more than 8 bits, which Pillow clips or cuts: scaled by what is white in them."""

from __future__ import annotations

import io
import re
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from .failures import NotRead
from .tiff import MAX_SAMPLE, PHOTOMETRIC, tag_of

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

WHITES = (0xFF, 0xFFF, 0xFFFF)


# ---- grey


def of_8_bits(grey: np.ndarray, image: PillowImage) -> np.ndarray:
    """A grey image of more bits, which `convert` would clip. Raises ValueError where white is unknown."""
    check_grey(grey)
    eight = _scaled(grey, _white(image, grey.max()))
    if image.format == "TIFF" and not tag_of(image, PHOTOMETRIC):
        eight = 255 - eight  # 0 is white; of 8 bits and fewer Pillow knows. Without the tag too, as there
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        eight[grey == clear] = 255
    return eight


def check_grey(grey: np.ndarray) -> None:
    low, high = grey.min(), grey.max()
    if grey.dtype.kind == "f" or low < 0 or high > WHITES[-1]:
        raise NotRead(f"expected 8 or 16 bits a channel, got {grey.dtype}, {low} to {high}")


def _scaled(numbers: np.ndarray, white: int) -> np.ndarray:
    return (numbers / (white / 255)).round().astype(np.uint8)


def _white(image: PillowImage, high: int) -> int:
    """What the file says, else the least white that `high`, its largest number, does not exceed."""
    stated = _stated_white(image)
    if max(high, 1) <= stated <= WHITES[-1]:
        return stated
    return next(white for white in WHITES if high <= white)


def _stated_white(image: PillowImage) -> int:
    """What the file itself says is white; 0 where it says nothing."""
    if image.format == "PPM":
        return WHITES[-1]  # Pillow has scaled it by the file's maxval
    return tag_of(image, MAX_SAMPLE)


# ---- colours of 16 bits, of which Pillow reads the upper 8

_OF_16_BITS = re.compile("(LA|RGB[AaX]?|CMYK);16[BLN]")
_OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


def layout_of_16_bits(image: Any) -> str:
    """Pillow's name for how such colours lie in the file that was opened; "" for another file."""
    if image.format == "JPEG" or not image.tile:
        return ""
    arguments = image.tile[0][3]  # the decoder's; all parts have the same layout
    layout = arguments[0] if isinstance(arguments, tuple | list) and arguments else arguments
    return layout if isinstance(layout, str) and _OF_16_BITS.fullmatch(layout) else ""


def scale_colours(image: PillowImage, layout: str, content: bytes) -> None:
    """In place, where white is not 65535. Alpha that exceeds the colours' white has 65535 for opaque.

    And the colour that is transparent, of 16 bits too, becomes white. Colours times alpha are put on white.
    """
    from PIL import Image

    upper = np.asarray(image)
    last = layout[layout.index(";") - 1]
    alpha, multiplied = last in "Aa", last == "a"
    colours = upper.shape[2] - alpha
    clear = image.info.pop("transparency", None)
    most = 256 * int(upper[..., :colours].max()) + 255
    if clear is None and not multiplied and _white(image, most) == WHITES[-1]:
        return
    numbers = 256 * upper.astype(np.int32) + _lower_bytes(content, layout)
    white = _white(image, numbers[..., :colours].max())
    as_they_are = white == WHITES[-1] and not multiplied
    eight = upper.copy() if as_they_are else _scaled(np.minimum(numbers, white), white)
    if alpha and numbers[..., -1].max() > white:
        eight[..., -1] = _scaled(numbers[..., -1], WHITES[-1])
    if clear is not None:
        eight[(numbers == clear).all(axis=-1)] = 255
    if multiplied:
        eight[..., :3] = np.minimum(eight[..., :3] + (255 - eight[..., 3:].astype(int)), 255)
        eight[..., 3] = 255
    image.paste(Image.frombytes(image.mode, image.size, eight.tobytes()))


def _lower_bytes(content: bytes, layout: str) -> np.ndarray:
    """Of each number the byte that Pillow leaves out, (H, W, channels); grey is in three channels."""
    from PIL import Image

    image = Image.open(io.BytesIO(content))
    grey = layout.startswith("LA")
    # "RGBA": a pixel's bytes as they are
    lay_out(image, "RGBA" if grey else layout[:-1].replace("a", "A") + _OTHER_BYTE[layout[-1]])
    image.load()
    return np.asarray(image)[..., [1, 1, 1, 3]] if grey else np.asarray(image)


def lay_out(image: Any, layout: str) -> None:
    """Has the file read as if its numbers lay so."""
    image.tile = [
        _with_arguments(tile, layout if isinstance(tile[3], str) else (layout, *tile[3][1:]))
        for tile in image.tile
    ]


def _with_arguments(tile: Any, arguments: str | tuple[Any, ...]) -> Any:
    """A tile with others for its decoder: a tuple with names, or in earlier versions of Pillow without."""
    return tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)
