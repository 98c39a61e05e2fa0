"""The cache of decoded images: what they become, when they are decoded again, and what is wrong with them."""

import errno
import io
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from image_files import colour, shown, tiff, write_image
from PIL import Image
from tiny_federation import tiny_data

from fedss_kernels.federated.data import images
from fedss_kernels.federated.data.array_file import ArrayFile, map_images, mapped_from, write_header
from fedss_kernels.federated.data.cache import cached_arrays
from fedss_kernels.federated.data.damage import DamagedImages, MissingImages
from fedss_kernels.federated.data.images import cached_images, decode
from fedss_kernels.federated.data.pixels import failure, read_file


def read(files, folder, size=8):
    return cached_images("tiny", [files], size, folder / "cache", "their authors")[0]


@pytest.fixture
def files(tmp_path):
    return [write_image(tmp_path / f"{i}.{kind}", i) for i, kind in enumerate(["png", "jpg", "bmp", "jpg"])]


def test_every_format_is_decoded_in_order(files, tmp_path):
    found = read(files, tmp_path)
    assert found.shape == (4, 3, 8, 8) and found.dtype == torch.uint8
    assert shown(found) == [0, 1, 2, 3]
    assert tuple(found[2, :, 4, 4].tolist()) == colour(2), "red first"


def test_the_whole_image_is_resized_and_averaged(tmp_path):
    """Left half black, right half white, 40 x 10 to 4 x 4: two columns each; stripes of a pixel turn grey."""
    halves, stripes = np.zeros((10, 40, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)
    halves[:, 20:], stripes[:, ::2] = 255, 255
    for name, pixels in (("halves", halves), ("stripes", stripes)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    found = read([tmp_path / "halves.png", tmp_path / "stripes.png"], tmp_path, size=4)
    columns = found[0, 0, 0].tolist()
    assert columns[0] == 0 and columns[3] == 255 and columns[0] <= columns[1] < columns[2] <= columns[3]
    assert ((found[1].int() - 127).abs() <= 8).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_colour(mode, tmp_path):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new(mode, (5, 7)).save(path)
    assert read([path], tmp_path).shape == (1, 3, 8, 8)


def test_16_bits_are_scaled_and_not_clipped(tmp_path):
    dark, floats = tmp_path / "dark.png", tmp_path / "floats.tif"
    Image.fromarray(np.full((4, 4), 50 * 257, np.uint16)).save(dark)
    assert (read([dark], tmp_path) == 50).all()
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(floats)
    with pytest.raises(ValueError, match="expected 8 or 16 bits a channel, got float32, 0.5 to 0.5"):
        read([floats], tmp_path)


# ---- TIFF files of 16 bits

LAYOUTS = [{"strip": 40}, {"strip": 7}, {"tile": (16, 32)}]


def ramps(channels: int, high: int) -> np.ndarray:
    """(40, 40, channels) of 16 bits, up to `high`, another in each channel; an alpha is opaque."""
    ramp = np.linspace(0, high, 1600).round().astype(np.uint16).reshape(40, 40)
    numbers = np.stack([ramp, ramp[::-1], ramp.T, ramp][:channels], axis=2)
    if channels == 4:
        numbers[..., 3] = 0xFFFF
    return numbers


def away(content: bytes, numbers: np.ndarray, white: int) -> float:
    """The most by which a pixel is not its numbers, scaled."""
    found = np.frombuffer(decode(content, 40), np.uint8).reshape(3, 40, 40)
    return abs(found - numbers[..., :3].transpose(2, 0, 1) * (255 / white)).max()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("channels", [3, 4])
def test_colours_of_12_bits_in_16_in_any_layout(layout, compressed, order, channels):
    for high in (0xFF, 0xFFF, 0xFFFF):
        numbers = ramps(channels, high)
        content = tiff(numbers, order=order, compressed=compressed, **layout)
        assert away(content, numbers, high) <= 1


def test_colours_of_12_bits_by_lzw():
    """The strip of a grey picture that Pillow wrote, three times as wide."""
    numbers, file = ramps(3, 0xFFF), io.BytesIO()
    Image.fromarray(numbers.reshape(40, 120)).save(file, "TIFF", compression="tiff_lzw")
    tags = Image.open(file).tag_v2
    strip = file.getvalue()[tags[273][0] :][: tags[279][0]]
    after = len(tiff(numbers))
    assert away(tiff(numbers, t259=5, t273=after, t279=len(strip)) + strip, numbers, 0xFFF) <= 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("channels", [3, 4])
def test_colours_of_16_bits_in_planes(layout, compressed, order, channels):
    for high in (0xFFF, 0xFFFF):
        numbers = ramps(channels, high)
        content = tiff(numbers, planes=True, order=order, compressed=compressed, **layout)
        assert away(content, numbers, high) <= 1


def test_planes_keep_what_the_file_says_of_them():
    """Its white, its orientation; a fourth that is no alpha; that it is cut short."""
    numbers = ramps(3, 0xFFF)
    content = tiff(numbers, planes=True, t281=(0xFFFF,) * 3)
    assert away(content, numbers, 0xFFFF) <= 1
    assert away(tiff(numbers, planes=True, t274=3), numbers[::-1, ::-1], 0xFFF) <= 1
    four = np.concatenate([numbers, numbers[..., :1] + 5000], axis=2)
    assert away(tiff(four, planes=True, t338=0), numbers, 0xFFF) <= 1
    at = len(content) + 5
    with pytest.raises(OSError, match="truncated"):
        decode(tiff(numbers, planes=True, t273=(8, 3208, at)), 40)


INKS = {"t262": 5, "t338": ()}  # CMYK: 0 is none of an ink


@pytest.mark.parametrize("high", [0xFFF, 0xFFFF])
@pytest.mark.parametrize("layout", [{}, {"compressed": True}, {"planes": True}, {"tile": (16, 32)}])
@pytest.mark.parametrize("order", "<>")
def test_inks_of_16_bits(high, layout, order):
    """Cyan alone, of which the red is the rest."""
    numbers = ramps(4, high)
    numbers[..., 1:] = 0
    seen = np.full_like(numbers[..., :3], high)
    seen[..., 0] = high - numbers[..., 0]
    assert away(tiff(numbers, order=order, **INKS, **layout), seen, high) <= 1


@pytest.mark.parametrize("high, opaque", [(0xFFF, 0xFFF), (0xFFF, 0xFFFF), (0xFFFF, 0xFFFF)])
@pytest.mark.parametrize("layout", [{}, {"compressed": True}, {"planes": True}, {"tile": (16, 32)}])
@pytest.mark.parametrize("order", "<>")
def test_colours_of_16_bits_that_alpha_has_multiplied(high, opaque, layout, order):
    """On white each is what it was times alpha, and white for the rest."""
    numbers = ramps(4, high)
    alpha = np.linspace(0, 1, 40)[:, None, None]
    numbers[..., :3] = (numbers[..., :3] * alpha).round()
    numbers[..., 3:] = (opaque * alpha).round()
    seen = numbers[..., :3] + high * (1 - alpha)
    assert away(tiff(numbers, order=order, t338=1, **layout), seen, high) <= 1


def test_a_kind_of_tiff_that_pillow_does_not_open_is_not_called_damaged(tmp_path):
    """Cut short within what says the kind it is."""
    white_0, big = tmp_path / "white_0.tif", tmp_path / "big.tif"
    content = tiff(ramps(1, 0xFFFF), order=">", t262=0)
    white_0.write_bytes(content)
    big.write_bytes(b"MM\0+\0\x08\0\0" + bytes(8))
    with pytest.raises(DamagedImages, match="2 of 2 images cannot be read") as caught:
        read([white_0, big], tmp_path)
    kinds = ("big-endian, BitsPerSample 16, PhotometricInterpretation 0", "big-endian BigTIFF")
    assert [*caught.value.files.values()] == [
        f"a kind of TIFF that Pillow does not open: {kind}; save it as another" for kind in kinds
    ]
    white_0.write_bytes(content[:-60])
    with pytest.raises(DamagedImages, match="1 of 1 images are damaged.*cut short"):
        read([white_0], tmp_path)


@pytest.mark.parametrize("high", [0xFFF, 0xFFFF])
@pytest.mark.parametrize("compressed", [False, True])
def test_grey_of_16_bits_whose_0_is_white(high, compressed):
    grey = ramps(1, high)
    assert away(tiff(grey, compressed=compressed, t262=0), high - grey[..., [0, 0, 0]], high) <= 1
    eight = (ramps(1, 255)).astype(np.uint8)
    assert away(tiff(eight, compressed=compressed, t262=0), 255 - eight[..., [0, 0, 0]], 255) == 0


@pytest.mark.parametrize("compressed", [False, True])
def test_bytes_below_0_are_refused(compressed):
    numbers = np.full((40, 40, 1), 100, np.int8)
    assert away(tiff(numbers, compressed=compressed, t339=2), numbers[..., [0, 0, 0]], 255) == 0
    numbers[3, 3] = -1
    with pytest.raises(ValueError, match="expected 8 or 16 bits a channel, got int8, -1 to 100"):
        decode(tiff(numbers, compressed=compressed, t339=2), 40)


# ---- the cache


def test_the_second_time_nothing_is_decoded(files, tmp_path, monkeypatch):
    first = read(files, tmp_path)
    monkeypatch.setattr(images, "decode", None)
    assert torch.equal(read(files, tmp_path), first)
    with pytest.raises(ValueError, match="damaged"):
        read(files, tmp_path, size=9)


def test_a_changed_file_is_decoded_again(files, tmp_path):
    read(files, tmp_path)
    before = files[2].stat()
    write_image(files[2], 7)
    os.utime(files[2], ns=(1, 1))
    assert files[2].stat().st_size == before.st_size, "a BMP file, so that only the time tells"
    assert shown(read(files, tmp_path)) == [0, 1, 7, 3]
    write_image(files[2], 9, (5, 4))
    os.utime(files[2], ns=(1, 1))
    assert shown(read(files, tmp_path)) == [0, 1, 9, 3], "only the size tells"
    assert shown(read(files[::-1], tmp_path)) == [3, 9, 1, 0]


def test_half_a_cache_file_is_made_again(files, tmp_path):
    first = read(files, tmp_path).clone()
    (path,) = (tmp_path / "cache").iterdir()
    for content in (path.read_bytes()[:-1], b"nonsense", b""):
        path.write_bytes(content)
        assert torch.equal(read(files, tmp_path), first)
    assert [path] == list((tmp_path / "cache").iterdir()), "nothing else is left behind"


def test_missing_files_are_counted_and_named(files, tmp_path):
    lost = [tmp_path / f"lost{i}.jpg" for i in range(7)]
    with pytest.raises(FileNotFoundError) as caught:
        read([*files, *lost], tmp_path)
    (listing,) = (tmp_path / "cache").iterdir()
    assert str(caught.value) == (
        f"tiny: 7 of 11 images are missing: {', '.join(map(str, lost[:5]))} and 2 more; "
        "get them from their authors; or go on without them: --skip-damaged; all of them are listed in "
        f"{listing}"
    )
    assert listing.read_text() == "".join(f"{file}\tmissing\n" for file in lost)
    assert isinstance(caught.value, DamagedImages) and list(caught.value.files) == lost
    for file in lost:
        write_image(file, 5)
    read([*files, *lost], tmp_path)
    assert not listing.exists()


def test_what_is_missing_of_a_part_is_said_before_another_is_decoded(files, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "decode", None)
    with pytest.raises(FileNotFoundError, match=r"tiny: 1 of 5 images are missing: .*lost\.jpg"):
        cached_images("tiny", [files, [tmp_path / "lost.jpg"]], 8, tmp_path / "cache", "their authors")


# ---- damaged ones


def decoded(monkeypatch) -> list[bytes]:
    """The contents that are decoded from now on."""
    seen = []
    monkeypatch.setattr(images, "decode", lambda content, size: seen.append(content) or decode(content, size))
    return seen


def damage(files) -> None:
    files[1].write_bytes(files[1].read_bytes()[:300])
    files[2].write_bytes(b"nonsense")


def test_damaged_images_are_all_named_and_listed(files, tmp_path):
    damage(files)
    with pytest.raises(
        DamagedImages, match=r"tiny: 2 of 8 images are damaged: .*1\.jpg .*2\.bmp .*their authors"
    ) as caught:
        cached_images("tiny", [files, files], 8, tmp_path / "cache", "their authors")
    listing = caught.value.listing
    assert f"all of them are listed in {listing}, the others are kept in the cache" in str(caught.value)
    assert [line.split("\t")[0] for line in listing.read_text().splitlines()] == [*map(str, files[1:3])]
    assert "2.bmp\tno image that Pillow can open: cut short, or of another format\n" in listing.read_text()


def test_the_second_try_decodes_what_was_damaged(files, tmp_path, monkeypatch):
    damage(files)
    with pytest.raises(DamagedImages) as first:
        read(files, tmp_path)
    seen = decoded(monkeypatch)
    with pytest.raises(DamagedImages) as second:
        read(files, tmp_path)
    assert str(first.value) == str(second.value) and not seen, "nothing has changed, so nothing is tried"
    write_image(files[1], 1)
    with pytest.raises(DamagedImages, match="1 of 4 images"):
        read(files, tmp_path)
    assert seen == [files[1].read_bytes(), b"nonsense"]
    seen.clear()
    write_image(files[2], 2)
    assert shown(read(files, tmp_path)) == [0, 1, 2, 3]
    assert seen == [files[2].read_bytes()]
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npy"], "nothing else is left"


def test_without_the_damaged_ones_nothing_is_decoded_again(files, tmp_path, monkeypatch):
    damage(files)
    with pytest.raises(DamagedImages):
        read(files, tmp_path)
    seen = decoded(monkeypatch)
    assert shown(read([files[3], files[0]], tmp_path)) == [3, 0] and not seen
    assert len(list((tmp_path / "cache").glob("*.partial"))) == 0, "what has been taken over is removed"


def test_a_file_more_is_decoded_alone(files, tmp_path, monkeypatch):
    read(files, tmp_path)
    seen = decoded(monkeypatch)
    more = write_image(tmp_path / "more.png", 4)
    assert shown(read([files[0], more, *files[1:]], tmp_path)) == [0, 4, 1, 2, 3]
    assert seen == [more.read_bytes()]


def test_what_cannot_be_read_is_not_called_damaged_and_is_tried_again(files, tmp_path, monkeypatch):
    """A FIFO, which nobody writes to, and files that may not be read."""
    pipe = tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    files[2].write_bytes(b"nonsense")

    def read_or_not(file):
        if file == files[1]:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return read_file(file)

    with monkeypatch.context() as patch:
        patch.setattr(images, "read_file", read_or_not)
        with pytest.raises(DamagedImages) as caught:
            read([*files, pipe], tmp_path)
    reasons = [
        "Permission denied",
        "no image that Pillow can open: cut short, or of another format",
        "a FIFO, not a file",
    ]
    assert list(caught.value.files.values()) == reasons
    assert "tiny: 3 of 5 images cannot be read: " in str(caught.value)
    seen = decoded(monkeypatch)
    with pytest.raises(DamagedImages, match="2 of 5 images cannot be read: .*2.bmp .*pipe"):
        read([*files, pipe], tmp_path)
    assert seen == [files[1].read_bytes()], "it may be read now; what is damaged is not tried again"
    assert shown(read([files[0], files[1]], tmp_path)) == [0, 1]


def test_a_kind_that_is_not_read_is_not_tried_again(files, tmp_path, monkeypatch):
    floats = tmp_path / "floats.tif"
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(floats)
    for first in (True, False):
        seen = decoded(monkeypatch)
        with pytest.raises(
            DamagedImages, match="1 of 5 images cannot be read: .*floats.tif .expected 8 or 16"
        ):
            read([*files, floats], tmp_path)
        assert len(seen) == (5 if first else 0)
    monkeypatch.setattr(images, "VERSION", images.VERSION + 1)
    with pytest.raises(DamagedImages):
        read([*files, floats], tmp_path)
    assert len(seen) == 5, "another version may read it"


def test_a_fault_of_code_is_not_the_files(files, tmp_path, monkeypatch):
    """It is said, and the file is tried again."""
    assert not failure(TypeError("expected str")).damaged and failure(KeyError("tile")).damaged

    def decode_or_not(content, size):
        if content == files[1].read_bytes():
            raise AttributeError("'tuple' object has no attribute 'offset'")
        return decode(content, size)

    with monkeypatch.context() as patch:
        patch.setattr(images, "decode", decode_or_not)
        for _ in range(2):
            with pytest.raises(
                DamagedImages, match="1 of 4 images cannot be read: .*AttributeError: 'tuple'"
            ):
                read(files, tmp_path)
    assert shown(read(files, tmp_path)) == [0, 1, 2, 3]


# ---- stopped


class Killed(BaseException):
    pass


def test_a_reader_who_was_stopped_goes_on_from_there(files, tmp_path, monkeypatch):
    def stop(what, done, total):
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        cached_images("tiny", [files], 8, tmp_path / "cache", "", on_progress=stop)
    seen = decoded(monkeypatch)
    said = []
    found = cached_images(
        "tiny", [files], 8, tmp_path / "cache", "", on_progress=lambda *news: said.append(news)
    )
    assert shown(found[0]) == [0, 1, 2, 3] and seen == [files[3].read_bytes()]
    assert said == [("tiny: decoding images", 3, 4), ("tiny: decoding images", 4, 4)]


@pytest.mark.exhaustive
def test_a_killed_process_loses_no_more_than_a_moment(files, tmp_path):
    """Killed after three images, when what was decoded is kept after each.

    The script is from standard input and has no `if __name__ == "__main__":`, as a notebook has none: the
    processes that decode don't run it again.
    """
    script = f"""
import os, signal
from pathlib import Path
from fedss_kernels.federated.data import array_file, images
print("once", flush=True)
array_file.KEPT_EVERY = 0
files = [Path(name) for name in {list(map(str, files))}]
stop = lambda what, done, total: done == 3 and os.kill(os.getpid(), signal.SIGKILL)
images.cached_images("tiny", [files], 8, Path({str(tmp_path / "cache")!r}), "", processes=2, on_progress=stop)
"""
    ran = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True)
    assert ran.returncode == -signal.SIGKILL and ran.stdout == "once\n" and ran.stderr == ""
    done = []
    cached_images("tiny", [files], 8, tmp_path / "cache", "", on_progress=lambda what, i, n: done.append(i))
    assert done == [3, 4]


def test_two_readers_decode_once(files, tmp_path, monkeypatch):
    seen, waited = decoded(monkeypatch), []
    begun, go_on = threading.Event(), threading.Event()

    def first(what, done, total):
        begun.set()
        assert go_on.wait(60)

    def second(what, done, total):
        waited.append(what)
        go_on.set()

    folder = tmp_path / "cache"
    reader = threading.Thread(target=lambda: cached_images("tiny", [files], 8, folder, "", on_progress=first))
    reader.start()
    assert begun.wait(60)
    found = cached_images("tiny", [files], 8, folder, "", on_progress=second)
    reader.join()
    assert shown(found[0]) == [0, 1, 2, 3] and len(seen) == 4
    assert waited[0] == "tiny: decoding images, in another process"


def test_what_killed_writers_left_is_removed(files, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    old, new, partial = folder / "tiny-8-0.tmp", folder / "tiny-8-1.tmp", folder / "other-8px-0.partial"
    for path, age in ((old, 7200), (new, 60), (partial, 7200)):
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    read(files, tmp_path)
    assert not old.exists() and new.exists() and partial.exists()
    cached_arrays("arrays", {}, lambda: {"a": np.zeros(1)}, folder)
    os.utime(new, (0, 0))
    os.utime(partial, (0, 0))
    cached_arrays("arrays", {"another": 1}, lambda: {"a": np.zeros(1)}, folder)
    assert not new.exists() and not partial.exists()


def test_caches_of_earlier_versions_are_mentioned(files, tmp_path, caplog):
    old = tmp_path / "cache" / "tiny-8-0123456789abcdef.npy"
    old.parent.mkdir()
    old.touch()
    read(files, tmp_path)
    assert "images are decoded anew, as they are upright and on white now" in caplog.text
    assert str(old) in caplog.text and old.exists()
    caplog.clear()
    read(files, tmp_path)
    assert not caplog.text


# ---- names, folders


def test_names_that_are_not_utf_8(tmp_path, caplog):
    """Of a file, and of a folder, which is a class."""
    folder = tmp_path / "data" / os.fsdecode(b"caf\xe9")
    files = [write_image(folder / os.fsdecode(b"%d-\xff.jpg" % i), i) for i in range(4)]
    assert shown(read(files, tmp_path)) == [0, 1, 2, 3]
    files[2].write_bytes(b"")
    with pytest.raises(DamagedImages) as caught:
        read(files, tmp_path)
    str(caught.value).encode()
    assert r"caf\xe9/2-\xff.jpg (an empty file)" in str(caught.value)
    assert caught.value.listing.read_bytes() == os.fsencode(files[2]) + b"\tan empty file\n"
    with pytest.raises(DamagedImages):
        read(files, tmp_path)
    lost = [folder / os.fsdecode(b"\xfe.jpg")]
    with pytest.raises(MissingImages, match=r"caf\\xe9/\\xfe\.jpg"):
        read(lost, tmp_path)


def test_names_with_what_ends_a_line_or_a_column(tmp_path, monkeypatch):
    """A list says all of them; what is listed is not decoded again; a message stays one line."""
    names = ["a\tb.jpg", "a\nb.jpg", "a\rb.jpg", r"a\nb.jpg", r"a\\tb.jpg"]
    files = [write_image(tmp_path / "data" / name, i) for i, name in enumerate(names)]
    for file in files:
        file.write_bytes(b"")
    with pytest.raises(DamagedImages) as first:
        read(files, tmp_path)
    assert str(first.value).splitlines() == [str(first.value)] and "\t" not in str(first.value)
    lines = first.value.listing.read_bytes().split(b"\n")
    assert lines.pop() == b"" and len(lines) == 5 and all(line.count(b"\t") == 1 for line in lines)
    seen = decoded(monkeypatch)
    with pytest.raises(DamagedImages) as second:
        read(files, tmp_path)
    assert seen == [] and second.value.files == first.value.files


@pytest.mark.parametrize("place", ["file", "file/cache", "link"])
def test_a_cache_that_cannot_be_written(files, tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    why = {"file": "it is a file, not a folder", "link": "it is a link to what is not there"}
    with pytest.raises(
        OSError, match=f"tiny: cannot write to the cache in .*{place}: {why.get(place, 'Not a dir')}"
    ) as caught:
        cached_images("tiny", [files], 8, tmp_path / place, "")
    assert "set cache_dir, or FEDSS_CACHE, to a folder that can be written" in str(caught.value)
    with pytest.raises(MissingImages, match=r"lost\.jpg; get them from there"):
        cached_images("tiny", [[tmp_path / "lost.jpg"]], 8, tmp_path / place, "there")


def test_a_disk_that_fills_up(files, tmp_path, monkeypatch):
    """After two images; they are kept."""
    put, count = ArrayFile.put, iter(range(100))

    def put_or_not(array, i, image, digest):
        if next(count) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(array, i, image, digest)

    monkeypatch.setattr(ArrayFile, "put", put_or_not)
    with pytest.raises(
        OSError, match=r"tiny: cannot write .*: No space left on device; make room, or .* is kept"
    ):
        read(files, tmp_path)
    seen = decoded(monkeypatch)
    assert shown(read(files, tmp_path)) == [0, 1, 2, 3] and len(seen) == 2


def test_who_stops_the_decoding_is_told_that_nothing_is_lost(files, tmp_path, monkeypatch, caplog):
    count = iter(range(100))

    def decode_two(content, size):
        if next(count) == 2:
            raise KeyboardInterrupt
        return decode(content, size)

    with monkeypatch.context() as patch:
        patch.setattr(images, "decode", decode_two)
        with pytest.raises(KeyboardInterrupt):
            read(files, tmp_path)
    words = "stopped; those decoded are kept: the same command goes on"
    assert caplog.messages == [f"tiny: decoding images: {words}"]
    seen = decoded(monkeypatch)
    assert shown(read(files, tmp_path)) == [0, 1, 2, 3] and len(seen) == 2


def test_a_full_disk_is_said_before_anything_is_decoded(files, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "decode", None)
    with pytest.raises(
        OSError, match=r"need 3,0\d\d,.* GB in .*cache, which has .*: set cache_dir .*image_size"
    ):
        read(files, tmp_path, size=16_000_000)


@pytest.mark.parametrize(
    "count, size, message", [(4, 0, "image_size: expected at least 1"), (0, 8, "no images")]
)
def test_nothing_to_decode(files, tmp_path, count, size, message):
    with pytest.raises(ValueError, match=message):
        read(files[:count], tmp_path, size)


def test_what_is_written_to_the_images_stays_in_the_process(files, tmp_path):
    read(files, tmp_path)[:] = 255
    assert shown(read(files, tmp_path)) == [0, 1, 2, 3]


def test_more_than_memory_can_be_mapped(tmp_path):
    """A file of 8 TiB that is a hole but for its ends; 4096 bytes of it are read."""
    path, shape = tmp_path / "large.npy", (2**43 // (3 * 64 * 64), 3, 64, 64)
    with open(path, "wb") as file:
        write_header(file, shape)
        try:
            file.truncate(file.tell() + shape[0] * 3 * 64 * 64)
        except OSError:
            pytest.skip(f"needs a file system with files of 8 TiB, and that of {tmp_path} has none")
    found = map_images(path, shape)
    assert found.shape == shape and found[[0, shape[0] // 2, -1]].sum() == 0


def test_mapped_images_travel_as_a_name(files, tmp_path):
    """To a process that plays clients goes a path, not the images."""
    data = tiny_data()
    mapped = read(files * 10, tmp_path, size=32)
    labels = torch.zeros(len(mapped), dtype=torch.int64)
    data = replace(
        data,
        images=mapped,
        labels=labels,
        clients=(torch.arange(3),),
        client_names=("one",),
        test_images=mapped[:5].clone(),
        test_labels=labels[:5],
        test_clients=(),
    )
    sent = pickle.dumps(data)
    received = pickle.loads(sent)
    assert mapped_from(received.images) == mapped_from(mapped) is not None
    assert torch.equal(received.images, mapped) and torch.equal(received.test_images, mapped[:5])
    assert len(sent) < mapped.numel() / 2
    assert torch.equal(pickle.loads(pickle.dumps(tiny_data())).images, tiny_data().images)


def test_decode_keeps_the_pixels_of_an_image_that_fits(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    found = np.frombuffer(decode((tmp_path / "image.png").read_bytes(), 9), np.uint8).reshape(3, 9, 9)
    assert (found == pixels.transpose(2, 0, 1)).all()
