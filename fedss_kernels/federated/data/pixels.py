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

Run as a script this is a process that decodes, see `serve`. So it imports nothing of the package: a process
is there in the time that Pillow and numpy take to import, and a caller's own script is not run again in it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import stat
import struct
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

WHITES = (0xFF, 0xFFF, 0xFFFF)
LENGTH = struct.Struct("<cQ")  # before an answer of `serve`: its kind, its bytes
PIXELS, DAMAGED, UNREAD = b"=", b"d", b"u"
# What code that is wrong raises, here or in Pillow: another version may read the same file.
OF_CODE = (AttributeError, TypeError, NameError, ImportError, AssertionError)


class NotRead(ValueError):
    """An image of a kind that is not read; nothing says that it is damaged."""


@dataclass(frozen=True)
class Failure:
    """Why there are no pixels: the content is `damaged`, or something else was in the way."""

    reason: str
    damaged: bool


def read_file(path: str | Path) -> bytes:
    """The content of a file. Raises OSError where it is something else: a FIFO would be waited for."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFDIR: "folder"}
        raise OSError(errno.EINVAL, f"a {kinds.get(stat.S_IFMT(mode), 'device')}, not a file")
    return Path(path).read_bytes()


def failure(error: Exception) -> Failure:
    """What an exception of `read_file` or `decode` says of a file, in words."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return Failure("no image that Pillow can open: cut short, or of another format", damaged=True)
    if isinstance(error, MemoryError):
        return Failure("it needs more memory than there is", damaged=False)
    if isinstance(error, OSError) and error.errno is not None:
        return Failure(error.strerror or str(error), damaged=False)
    text = " ".join(str(error).split())
    known = isinstance(
        error, OSError | ValueError | SyntaxError
    )  # with words for a reader; others have a number or a name
    reason = text if known and text else f"{type(error).__name__}: {text}"
    return Failure(reason, damaged=not isinstance(error, (NotRead, *OF_CODE)))


# ---- decoding


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
        _check_kind(content)
        raise
    if _has_planes_of_16_bits(image):
        content = _interleaved(image, content)
        image = Image.open(io.BytesIO(content))
    layout = _layout_of_16_bits(image)
    if layout.startswith("RGBa"):
        _lay_out(image, layout.replace("a", "A"))  # its numbers as they are
    try:
        image.load()
    except OSError:
        if image.format != "JPEG" or not _only_unterminated(content):
            raise
        image = Image.open(io.BytesIO(content + JPEG_END))
        image.load()
    if layout:
        _scale_colours(image, layout, content)
    return image


def _coloured(image: PillowImage) -> PillowImage:
    """In RGB, on white."""
    from PIL import Image

    if image.mode == "L" and _tag(image, SAMPLE_FORMAT) == 2:
        _check_grey(np.asarray(image).view(np.int8))  # Pillow reads -1 as 255
    if image.mode[0] in "IF":
        return Image.fromarray(_of_8_bits(np.asarray(image), image)).convert("RGB")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    seen = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")


def _of_8_bits(grey: np.ndarray, image: PillowImage) -> np.ndarray:
    """A grey image of more bits, which `convert` would clip. Raises ValueError where white is unknown."""
    _check_grey(grey)
    eight = _scaled(grey, _white(image, grey.max()))
    if image.format == "TIFF" and not _tag(image, PHOTOMETRIC):
        eight = 255 - eight  # 0 is white; of 8 bits and fewer Pillow knows. Without the tag too, as there
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        eight[grey == clear] = 255
    return eight


def _check_grey(grey: np.ndarray) -> None:
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
    return _tag(image, MAX_SAMPLE)


# ---- a TIFF file's tags

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
STRIPS, TURN, CHANNELS, STRIP_ROWS, STRIP_SIZES, MAX_SAMPLE, PLANAR = 273, 274, 277, 278, 279, 281, 284
PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILES, TILE_SIZES = 317, 322, 323, 324, 325
EXTRA_CHANNELS, SAMPLE_FORMAT = 338, 339


def _tag(image: PillowImage, tag: int) -> int:
    """A tag's number, the first where each channel has one; 0 where there is none."""
    numbers = _tags(image, tag)
    return numbers[0] if numbers else 0


def _tags(image: PillowImage, tag: int) -> tuple[int, ...]:
    """A tag's whole numbers; () where there are none."""
    return _whole_numbers((getattr(image, "tag_v2", None) or {}).get(tag, ()))


def _whole_numbers(value: Any) -> tuple[int, ...]:
    numbers = value if isinstance(value, tuple) else (value,)
    return numbers if all(isinstance(number, int) for number in numbers) else ()


def _check_kind(content: bytes) -> None:
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


def _has_planes_of_16_bits(image: PillowImage) -> bool:
    return (
        image.format == "TIFF"
        and _tag(image, PLANAR) == 2
        and 16 in _tags(image, BITS)
        and _channels(image) > 1
    )


def _channels(image: PillowImage) -> int:
    return max(_tag(image, CHANNELS), len(_tags(image, BITS)))


def _interleaved(image: PillowImage, content: bytes) -> bytes:
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
        PHOTOMETRIC: _tags(image, PHOTOMETRIC),
        STRIPS: (0,),
        CHANNELS: (kept,),
        STRIP_ROWS: (height,),
        STRIP_SIZES: (len(data),),
    }
    tags |= {tag: _tags(image, tag) for tag in (TURN, MAX_SAMPLE) if _tags(image, tag)}
    if image.mode == "RGBA":
        tags[EXTRA_CHANNELS] = _tags(image, EXTRA_CHANNELS) or (2,)  # alpha: the colours times it, or not
    return _tiff(b"II*\0", tags, data)


def _plane(image: PillowImage, content: bytes, i: int) -> np.ndarray:
    """(H, W): one channel's numbers, read as a grey picture."""
    from PIL import Image

    same = (WIDTH, HEIGHT, COMPRESSION, FILL_ORDER, STRIP_ROWS, PREDICTOR, TILE_WIDTH, TILE_HEIGHT)
    tags = {tag: _tags(image, tag) for tag in same if _tags(image, tag)}
    for tag in (STRIPS, STRIP_SIZES, TILES, TILE_SIZES):
        every = _tags(image, tag)
        count = len(every) // _channels(image)
        if count:
            tags[tag] = every[i * count : (i + 1) * count]
    grey = tags | {BITS: (16,), PHOTOMETRIC: (1,), CHANNELS: (1,)}
    plane = Image.open(io.BytesIO(_tiff(content[:16], grey, content)))
    plane.load()
    return np.asarray(plane)


# ---- colours of 16 bits, of which Pillow reads the upper 8

_OF_16_BITS = re.compile("(LA|RGB[AaX]?|CMYK);16[BLN]")
_OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


def _layout_of_16_bits(image: Any) -> str:
    """Pillow's name for how such colours lie in the file that was opened; "" for another file."""
    if image.format == "JPEG" or not image.tile:
        return ""
    arguments = image.tile[0][3]  # the decoder's; all parts have the same layout
    layout = arguments[0] if isinstance(arguments, tuple | list) and arguments else arguments
    return layout if isinstance(layout, str) and _OF_16_BITS.fullmatch(layout) else ""


def _scale_colours(image: PillowImage, layout: str, content: bytes) -> None:
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
    _lay_out(image, "RGBA" if grey else layout[:-1].replace("a", "A") + _OTHER_BYTE[layout[-1]])
    image.load()
    return np.asarray(image)[..., [1, 1, 1, 3]] if grey else np.asarray(image)


def _lay_out(image: Any, layout: str) -> None:
    """Has the file read as if its numbers lay so."""
    image.tile = [
        _with_arguments(tile, layout if isinstance(tile[3], str) else (layout, *tile[3][1:]))
        for tile in image.tile
    ]


def _with_arguments(tile: Any, arguments: str | tuple[Any, ...]) -> Any:
    """A tile with others for its decoder: a tuple with names, or in earlier versions of Pillow without."""
    return tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)


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


# ---- JPEG without its end

JPEG_END = b"\xff\xd9"


def _other_bits(bits: int, first: int) -> bytes:
    """Bits, and restart markers from the number `first` on, each with bits after it.

    A decoder that waits for a marker skips the bits before it, and resumes with those after the one that it
    waits for, unless it meets one of the two after that first: not both times, from 0 on and from 4 on.
    """
    some = bytes([bits]) * 64
    return some + b"".join(bytes([0xFF, 0xD0 + (first + i) % 8]) + some for i in range(8))


CONTINUATIONS = (b"", _other_bits(0x55, 0), _other_bits(0xAA, 4))


def _only_unterminated(content: bytes) -> bool:
    """Whether every pixel of a JPEG file is there, and only its end marker is not.

    libjpeg fills in what is missing and does not tell through Pillow. But then the pixels depend on what is
    put in its place.
    """
    from PIL import Image

    content = content.removesuffix(b"\xff")
    found = set()
    for continuation in CONTINUATIONS:
        try:
            with Image.open(io.BytesIO(content + continuation + JPEG_END)) as image:
                if image.info.get("progressive") and not _all_scans(content):
                    return False
                found.add(image.tobytes())
        except OSError:
            return False
    return len(found) == 1


def _all_scans(content: bytes) -> bool:
    """Whether a progressive JPEG has each coefficient of each component to its last bit.

    A scan's header says which components, coefficients and bits it has: after FF DA and its own length, the
    number of components, two bytes for each, the first and last coefficient, the bits (high, low).
    """
    at = 2
    while content[at + 1 : at + 2] != b"\xda" and at < len(content):  # the segments before the first scan
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    lowest: dict[tuple[int, int], int] = {}
    for scan in re.finditer(rb"\xff\xda\x00.([\x01-\x04])", content[at:], re.DOTALL):
        count, header = scan[1][0], content[at + scan.end() :]
        if len(header) < 2 * count + 3:
            return False
        first, last, bits = header[2 * count : 2 * count + 3]
        for component in header[: 2 * count : 2]:
            lowest |= dict.fromkeys(((component, i) for i in range(first, last + 1)), bits & 15)
    components = {component for component, _ in lowest}
    return bool(components) and all(lowest.get((c, i)) == 0 for c in components for i in range(64))


# ---- a process that decodes


def serve(size: int, questions: BinaryIO, answers: BinaryIO) -> None:
    """Of each file whose path comes, in a line of hexadecimal digits, the pixels or a Failure's reason."""
    with unlimited:
        for line in questions:
            path = os.fsdecode(bytes.fromhex(line.decode()))
            try:
                kind, answer = PIXELS, decode(read_file(path), size)
            except Exception as error:
                found = failure(error)
                kind, answer = (DAMAGED if found.damaged else UNREAD), found.reason.encode("utf-8", "replace")
            answers.write(LENGTH.pack(kind, len(answer)) + answer)
            answers.flush()


if __name__ == "__main__":
    del sys.path[0]  # this file's folder, whose modules are of the package
    try:
        serve(int(sys.argv[1]), sys.stdin.buffer, sys.stdout.buffer)
    except BrokenPipeError:  # who asked is gone
        os._exit(0)
