"""The cache of decoded images: what they become, when they are decoded again, and what is wrong with them."""

import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from image_files import colour, shown, write_image
from PIL import Image
from tiny_federation import tiny_data

from fedss_kernels.federated.data import images
from fedss_kernels.federated.data.array_file import map_images, mapped_from, write_header
from fedss_kernels.federated.data.images import cached_images, decode


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
    assert str(caught.value) == (
        f"tiny: 7 of 11 images are missing: {', '.join(map(str, lost[:5]))} and 2 more; "
        "get them from their authors"
    )


def test_what_is_missing_of_a_part_is_said_before_another_is_decoded(files, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "decode", None)
    with pytest.raises(FileNotFoundError, match=r"tiny: 1 of 5 images are missing: .*lost\.jpg"):
        cached_images("tiny", [files, [tmp_path / "lost.jpg"]], 8, tmp_path / "cache", "their authors")


def test_damaged_images_are_all_named_and_nothing_is_kept(files, tmp_path):
    files[1].write_bytes(files[1].read_bytes()[:300])
    files[2].write_bytes(b"nonsense")
    with pytest.raises(
        ValueError, match=r"tiny: 2 of 4 images are damaged: .*1\.jpg .*2\.bmp .*their authors"
    ):
        read(files, tmp_path)
    assert not list((tmp_path / "cache").iterdir())


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
