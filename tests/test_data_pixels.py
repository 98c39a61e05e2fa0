"""One image file as pixels: what is seen on a screen is what comes out, or the true reason why not."""

import errno
import io
import os
import re
import socket
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_files import photograph
from PIL import Image, PngImagePlugin

from fedss_kernels.federated.data.images import decode
from fedss_kernels.federated.data.pixels import NotRead, _coloured, failure, read_file

SIZE = 8


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(content: bytes, size: int = SIZE) -> np.ndarray:
    return np.frombuffer(decode(content, size), np.uint8).reshape(3, size, size)


# ---- transparency


def _drawing(mode: str) -> Image.Image:
    """Black ink in the left half, nothing (that is black, too) in the right."""
    alpha = np.zeros((SIZE, SIZE), np.uint8)
    alpha[:, : SIZE // 2] = 255
    drawn = Image.new("RGBA", (SIZE, SIZE))
    drawn.putalpha(Image.fromarray(alpha))
    return drawn.convert(mode)


@pytest.mark.parametrize("mode, kind", [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP")])
def test_what_is_transparent_is_white(mode, kind):
    content = encoded(_drawing(mode), kind, **({"lossless": True} if kind == "WEBP" else {}))
    found = pixels(content)
    assert (found[:, :, :4] == 0).all() and (found[:, :, 4:] == 255).all()


@pytest.mark.parametrize("mode", ["PA", "La", "RGBa"])
def test_so_it_is_in_modes_that_few_files_have(mode):
    found = np.asarray(_coloured(_drawing("LA" if mode == "La" else "RGBA").convert(mode)))
    assert (found[:, :4] == 0).all() and (found[:, 4:] == 255).all()


@pytest.mark.parametrize(
    "mode, clear, kind",
    [
        ("P", 1, "PNG"),
        ("P", 1, "GIF"),
        ("P", bytes([255, 0]), "PNG"),
        ("L", 7, "PNG"),
        ("I;16", 7, "PNG"),
        ("RGB", (7, 7, 7), "PNG"),
    ],
)
def test_a_transparent_colour_is_white(mode, clear, kind):
    values = np.zeros((SIZE, SIZE), np.uint16 if mode == "I;16" else np.uint8)
    values[:, 4:] = 1 if mode == "P" else 7
    image = Image.fromarray(values) if mode != "RGB" else Image.fromarray(np.stack([values] * 3, 2))
    if mode == "P":
        image.putpalette([0, 0, 0, 7, 7, 7])
    found = pixels(encoded(image, kind, transparency=clear))
    assert (found[:, :, :4] == 0).all() and (found[:, :, 4:] == 255).all()


def test_half_transparent_is_half_white_and_opaque_is_as_it_was():
    image = Image.new("RGBA", (SIZE, SIZE), (100, 0, 0, 128))
    assert abs(pixels(encoded(image))[:, 0, 0].astype(int) - [177, 127, 127]).max() <= 1
    opaque = photograph(40, 30)
    with_alpha = opaque.copy()
    with_alpha.putalpha(255)
    assert decode(encoded(with_alpha), SIZE) == decode(encoded(opaque), SIZE)


# ---- orientation


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_upright(orientation, kind):
    """As stored by a camera held otherwise: the pixels turned, and EXIF says how to turn them back."""
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8, :8], upright[8:, :8] = 255, 128
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    assert abs(pixels(content, 16).astype(int) - upright.transpose(2, 0, 1)).max() <= 2


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\xff\xff", b"Exif\0\0"])
def test_an_exif_block_that_cannot_be_read_does_no_harm(exif):
    image = photograph(40, 30)
    assert decode(encoded(image, "JPEG", exif=exif), SIZE) == decode(encoded(image, "JPEG"), SIZE)


def test_without_such_a_block_nobody_looks_into_one(monkeypatch):
    """It takes a tenth of a small image's time; RGB is not copied either."""
    looked = []
    monkeypatch.setattr(Image.Image, "getexif", lambda image: looked.append(image) or Image.Exif())
    monkeypatch.setattr(Image.Image, "convert", None)
    image = photograph(SIZE, SIZE)
    for kind in ("JPEG", "PNG"):
        decode(encoded(image, kind), SIZE)
    assert looked == []
    exif = Image.Exif()
    exif[0x0112] = 1
    decode(encoded(image, "JPEG", exif=exif), SIZE)
    assert looked


# ---- more than 8 bits


@pytest.mark.parametrize(
    "dtype, high, kind",
    [
        (np.int32, 0xFF, "TIFF"),
        (np.int32, 0xFFF, "TIFF"),
        (np.int32, 0xFFFF, "TIFF"),
        (np.uint16, 0xFF, "PNG"),
        (np.uint16, 0xFFF, "PNG"),
        (np.uint16, 0xFFFF, "PNG"),
        (np.uint16, 0xFFF, "TIFF"),
    ],
)
def test_grey_is_scaled_by_the_bits_that_it_holds(dtype, high, kind):
    ramp = np.linspace(0, high, SIZE * SIZE).round().astype(dtype).reshape(SIZE, SIZE)
    found = pixels(encoded(Image.fromarray(ramp), kind))
    assert abs(found - 255 * ramp.astype(float) / high).max() <= 0.5 and found.max() == 255


def _png_of_16_bits(numbers: np.ndarray, colour: int, clear: bytes = b"") -> bytes:
    """A PNG file of (H, W, channels), which Pillow writes none of; colour: PNG's number of the kind."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in numbers)
    head = struct.pack(">IIBBBBB", *numbers.shape[1::-1], 16, colour, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"tRNS", clear), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
        if data or kind != b"tRNS"
    )


def _tiff_of_16_bits(numbers: np.ndarray, white: int = 0) -> bytes:
    """An uncompressed little-endian TIFF file of (H, W, 3), which says its white where that is not 0."""
    height, width, channels = numbers.shape
    data = numbers.astype("<u2").tobytes()
    after = 8 + len(data)
    tags = {256: (4, width), 257: (4, height), 258: (3, after), 259: (3, 1), 262: (3, 2), 273: (4, 8)}
    tags |= {277: (3, channels), 278: (4, height), 279: (4, len(data))} | (
        {281: (3, after + 6)} if white else {}
    )
    arrays = struct.pack("<3H", 16, 16, 16) + struct.pack("<3H", *[white] * 3)
    entries = b"".join(
        struct.pack("<HHII", tag, kind, 3 if tag in (258, 281) else 1, value)
        for tag, (kind, value) in sorted(tags.items())
    )
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", after + len(arrays)) + data + arrays + directory


@pytest.mark.parametrize("high", [0xFF, 0xFFF, 0xFFFF])
@pytest.mark.parametrize("kind", ["RGB", "RGBA", "LA", "TIFF"])
def test_so_are_colours(kind, high):
    channels, colour = {"RGB": (3, 2), "RGBA": (4, 6), "LA": (2, 4), "TIFF": (3, 0)}[kind]
    ramp = np.linspace(0, high, SIZE * SIZE).round().astype(np.uint16).reshape(SIZE, SIZE)
    numbers = np.stack([ramp, ramp[::-1], ramp.T, ramp][:channels], 2)
    if kind.endswith("A"):
        numbers[..., -1] = 0xFFFF
    content = _tiff_of_16_bits(numbers) if kind == "TIFF" else _png_of_16_bits(numbers, colour)
    wanted = 255.0 * numbers[..., [0, 0, 0] if kind == "LA" else [0, 1, 2]].transpose(2, 0, 1) / high
    assert abs(pixels(content) - wanted).max() <= (1 if high == 0xFFFF else 0.5)  # Pillow's own is cut off


def test_alpha_has_the_colours_white_or_its_own():
    numbers = np.full((SIZE, SIZE, 2), 0xFFF)
    numbers[:, :4, 0], numbers[:, 4:, 1] = 0, 0  # black, and nothing, of 12 bits both
    found = pixels(_png_of_16_bits(numbers, 4))
    assert (found[:, :, :4] == 0).all() and (found[:, :, 4:] == 255).all()
    numbers[:, :4, 0], numbers[..., 1] = 0xFFF, 0x8000  # 12 bits of white, seen through
    numbers[:, 4:, 0] = 0
    found = pixels(_png_of_16_bits(numbers, 4)).astype(int)
    assert (found[:, :, :4] == 255).all() and abs(found[:, :, 4:] - 127).max() <= 1


@pytest.mark.parametrize("high", [1, 16])
def test_a_transparent_colour_of_16_bits_is_white(high):
    """Of 12 bits or 16; one that differs in a lower byte is another."""
    numbers = np.full((SIZE, SIZE, 3), [0, 255 * high, 0])
    numbers[:, 4:] = numbers[:, :4] + [0, 0, 1]
    found = pixels(_png_of_16_bits(numbers, 2, struct.pack(">3H", 0, 255 * high, 1)))
    assert (found[:, :, 4:] == 255).all() and (found[0, :, :4] == 0).all()


def test_the_white_that_a_file_says_goes_first():
    numbers = np.full((SIZE, SIZE, 3), 0xFFF)
    assert (pixels(_tiff_of_16_bits(numbers, 0xFFFF)) == 15).all()
    numbers[:] = 0x3FFF
    assert (pixels(_tiff_of_16_bits(numbers, 0x3FFF)) == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_16_bits_may_be_black_all_over(kind):
    content = encoded(Image.fromarray(np.zeros((SIZE, SIZE), np.uint16)), kind)
    with warnings.catch_warnings(action="error"):
        assert not pixels(content).any()


@pytest.mark.parametrize("stated, seen", [(0xFFFF, 4), (0x3FFF, 16), (0xFFF, 64), (0x3FF, 255)])
def test_what_a_file_says_of_its_white_goes_first(stated, seen):
    """1023 of so many; a statement that its numbers exceed counts for nothing."""
    image = Image.fromarray(np.full((SIZE, SIZE), 1023, np.uint16))
    assert (pixels(encoded(image, "TIFF", tiffinfo={281: stated})) == seen).all()
    wrong = pixels(encoded(image, "TIFF", tiffinfo={281: 100}))
    assert (wrong == 64).all()


def test_a_pgm_file_is_scaled_by_its_maxval():
    """Of 16 bits, and dark: it says so."""
    content = b"P5 8 8 65535\n" + struct.pack(">64H", *[257 * 3] * 64)
    assert (pixels(content) == 3).all()
    assert (pixels(b"P5 8 8 1023\n" + struct.pack(">64H", *[1023] * 64)) == 255).all()


@pytest.mark.parametrize("value", [0.5, -1, 0x10000])
def test_numbers_without_a_white_are_refused(value):
    dtype = np.float32 if isinstance(value, float) else np.int32
    content = encoded(Image.fromarray(np.full((4, 4), value, dtype)), "TIFF")
    with pytest.raises(ValueError, match=f"expected 8 or 16 bits a channel, got .*, {value} to {value}"):
        decode(content, SIZE)


# ---- large ones


def _png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A white PNG of 1 bit, made without its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    packer, row = zlib.compressobj(1), b"\0" + b"\xff" * ((width + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_more_pixels_than_pillow_takes_from_strangers(monkeypatch):
    """The limit, 179 million, is made less here, for the sake of time; it is back afterwards."""
    content = _png(300, 300)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert (pixels(content) == 255).all()
    assert Image.MAX_IMAGE_PIXELS == 1000
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(content))


@pytest.mark.exhaustive
def test_200_megapixels():
    assert (pixels(_png(20_000, 10_000)) == 255).all()


def test_large_text_and_profiles_in_a_png(monkeypatch):
    large = zlib.compress(bytes(PngImagePlugin.MAX_TEXT_CHUNK + 1))
    before = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    for chunk in ((b"zTXt", b"Comment\0\0" + large), (b"iCCP", b"profile\0\0" + large)):
        assert (pixels(_png(9, 9, chunk)) == 255).all()
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 3)
    assert (pixels(_png(9, 9, (b"tEXt", b"Comment\0words"))) == 255).all()
    monkeypatch.undo()
    assert (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY) == before


def test_limits_are_back_when_the_last_thread_leaves(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    content = _png(300, 300)
    threads = [threading.Thread(target=lambda: [decode(content, SIZE) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Image.MAX_IMAGE_PIXELS == 1000


# ---- JPEG without its end

KINDS = [{}, {"optimize": True}, {"progressive": True}, {"restart_marker_rows": 1}]


@pytest.mark.parametrize("options", KINDS)
def test_a_jpeg_without_its_end_marker_is_read(options):
    content = encoded(photograph(150, 90), "JPEG", **options)
    for lost in (1, 2):
        assert decode(content[:-lost], SIZE) == decode(content, SIZE)


@pytest.mark.parametrize("options", KINDS)
def test_a_jpeg_without_some_of_its_pixels_is_not(options):
    """Cut in many places; before each marker too, where a decoder would see nothing missing."""
    content = encoded(photograph(150, 90), "JPEG", **options)
    cuts = set(range(len(content) // 4, len(content) - 4, len(content) // 25)) | {len(content) - 4}
    cuts |= {i for i in range(len(content) // 4, len(content) - 2) if content[i] == 0xFF and content[i + 1]}
    for cut in cuts:
        with pytest.raises(OSError, match="truncated"):
            decode(content[:cut], SIZE)


# ---- the true reason


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "an empty file"),
        (b"<html>404</html>", "no image that Pillow can open: cut short, or of another format"),
        (encoded(photograph(90, 90), "JPEG")[:-1000], r"image file is truncated \(\d+ bytes not processed\)"),
        (encoded(photograph(90, 90))[:-1000], "image file is truncated"),
    ],
)
def test_what_is_wrong_with_a_content(content, reason):
    with pytest.raises((ValueError, OSError)) as caught:
        decode(content, SIZE)
    found = failure(caught.value)
    assert found.damaged
    assert re.match(reason, found.reason)


def test_what_is_in_the_way_of_a_good_content():
    denied = failure(PermissionError(errno.EACCES, os.strerror(errno.EACCES), "x.jpg"))
    assert (denied.reason, denied.damaged) == ("Permission denied", False)
    assert failure(MemoryError()).reason == "it needs more memory than there is"
    assert not failure(MemoryError()).damaged and not failure(MemoryError()).settled
    kind = failure(NotRead("expected 8 bits"))
    assert (kind.reason, kind.damaged, kind.settled) == ("expected 8 bits", False, True)
    assert failure(KeyError("tile")).reason == "KeyError: 'tile'" and failure(KeyError("tile")).damaged


def test_what_is_no_file_is_not_waited_for(tmp_path):
    pipe, plug = tmp_path / "pipe.jpg", tmp_path / "plug.jpg"
    os.mkfifo(pipe)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(plug))
    for path, kind in ((pipe, "FIFO"), (plug, "socket"), (Path("/dev/null"), "device"), (tmp_path, "folder")):
        with pytest.raises(OSError, match=f"a {kind}, not a file"):
            read_file(path)
