"""An image file as pixels: RGB, upright, on white, of 8 bits, resized. Or what is wrong with it.

| the file has | the pixels |
| --- | --- |
| transparency: alpha, a palette's, a colour's | what it looks like on white |
| an EXIF orientation | turned upright |
| grey of 16 or 32 bits, whole numbers; colours of 16 | white: 255, 4095 or 65535, the least none exceeds |
| inks of 16 bits (CMYK) | so is all of an ink |
| grey as floats, below 0 or above 65535 | refused: nobody knows what is white |
| grey whose 0 is white (TIFF's PhotometricInterpretation 0) | what it looks like: 0 is white |
| colours of 16 bits in planes (TIFF's PlanarConfiguration 2) | as others |
| another kind of TIFF, which Pillow does not open | refused |
| several pictures: pages, frames | the first |
| any number of pixels, any length of text or colour profile | read |
| a JPEG without its end marker, every pixel of which is there | read; with pixels missing, refused |

What a file says of its own white (TIFF's MaxSampleValue, PGM's maxval) goes before the rule for more bits,
which looks at one file: a 16-bit image in which nothing exceeds 4095 is taken for one of 12 bits.

Run as a script the folder is a process that decodes, see `serving`. So nothing in it imports what is outside:
a process is there in the time that Pillow and numpy take to import, and a caller's own script is not run
again in it.
"""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from .failures import Failure, Fault, NotRead, failure, read_file
from .jpeg import JPEG_END, only_unterminated
from .many_bits import check_grey, lay_out, layout_of_16_bits, of_8_bits, scale_colours
from .tiff import SAMPLE_FORMAT, TURN, check_kind, has_planes_of_16_bits, interleaved, tag_of

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

__all__ = ["Failure", "Fault", "NotRead", "decode", "failure", "read_file", "unlimited"]


def decode(content: bytes, size: int) -> bytes:
    """An image file's content as the 3 * size * size bytes of its channels, red first.

    The whole image is resized, whatever its proportions, each pixel an average of those that it covers.
    Raises NotRead, or whatever Pillow does, where it cannot be read.
    """
    from PIL import Image

    if not content:
        raise ValueError("an empty file")
    with unlimited:
        image = _loaded(content)
        colour = _upright(_coloured(image), image)
        if colour.size != (size, size):
            colour = colour.resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(colour).transpose(2, 0, 1).tobytes()


def _loaded(content: bytes) -> PillowImage:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        check_kind(content)
        raise
    if has_planes_of_16_bits(image):
        content = interleaved(image, content)
        image = Image.open(io.BytesIO(content))
    layout = layout_of_16_bits(image)
    if layout.startswith("RGBa"):
        lay_out(image, layout.replace("a", "A"))  # its numbers as they are
    try:
        image.load()
    except OSError:
        if image.format != "JPEG" or not only_unterminated(content):
            raise
        image = Image.open(io.BytesIO(content + JPEG_END))
        image.load()
    if layout:
        scale_colours(image, layout, content)
    return image


def _coloured(image: PillowImage) -> PillowImage:
    """In RGB, on white."""
    from PIL import Image

    if image.mode == "L" and tag_of(image, SAMPLE_FORMAT) == 2:
        check_grey(np.asarray(image).view(np.int8))  # Pillow reads -1 as 255
    if image.mode[0] in "IF":
        return Image.fromarray(of_8_bits(np.asarray(image), image)).convert("RGB")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    seen = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")


_WITH_TURN = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # of what Pillow finds in a file


def _upright(colour: PillowImage, image: PillowImage) -> PillowImage:
    """`colour`, turned as the EXIF block of `image` says."""
    if not any(name in image.info for name in _WITH_TURN) and not hasattr(image, "tag_v2"):
        return colour  # most: a look for a block takes a tenth of a small image's time
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        turn = turns[image.getexif()[TURN]]
    except Exception:  # none, or one that cannot be read, which may raise anything: as they are
        return colour
    return colour.transpose(turn)


class _Unlimited:
    """While somebody is in it, Pillow has no limits against files that a stranger made to fill the memory.

    The files here are the user's own, and named. The limits are global to Pillow and back when the last one
    leaves; so is its way to warn of oddities, which a reader of 100,000 photographs can't do anything about.
    `decode` enters by itself; who decodes many small images saves time by being in it already.
    """

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self._lift()

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.stack.close()

    def _lift(self) -> None:
        from PIL import Image, PngImagePlugin

        no_limit: list[tuple[Any, str, int | None]] = [
            (Image, "MAX_IMAGE_PIXELS", None),
            (PngImagePlugin, "MAX_TEXT_CHUNK", sys.maxsize),
            (PngImagePlugin, "MAX_TEXT_MEMORY", sys.maxsize),
        ]
        for module, name, value in no_limit:
            self.stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        self.stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=r"PIL\.")


unlimited = _Unlimited()
