import errno
import hashlib
import io
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedss_kernels.federated.data import load
from fedss_kernels.federated.data.omniglot import decode

DATA = Path(os.environ.get("FEDSS_TEST_DATA", Path(__file__).parents[2] / "shared" / "data")) / "omniglot"
ALPHABETS = {"Latin": 3, "Greek": 2, "Runes": 2, "Ogham": 1}  # characters in each


def png(pixels: np.ndarray) -> bytes:
    """(105, 105) bool, True is ink, as the authors save it: 1 bit, ink 0."""
    file = io.BytesIO()
    Image.fromarray(~pixels).convert("1").save(file, "PNG")
    return file.getvalue()


def drawing(alphabet: str, character: int, drawer: int) -> np.ndarray:
    """A bar whose place says the character and whose length says the drawer."""
    pixels = np.zeros((105, 105), dtype=bool)
    top = 30 * (character - 1) + len(alphabet)
    pixels[top : top + 12, : 4 * drawer] = True
    return pixels


def authors_files(part: str = "images_evaluation") -> dict[str, bytes]:
    return {
        f"{part}/{alphabet}/character{c:02d}/{c:04d}_{drawer:02d}.png": png(drawing(alphabet, c, drawer))
        for alphabet, characters in ALPHABETS.items()
        for c in range(1, characters + 1)
        for drawer in range(1, 21)
    }


def write_zip(folder: Path, files: dict[str, bytes], part: str = "images_evaluation") -> Path:
    with zipfile.ZipFile(folder / f"{part}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{part}/", "")
        for name, content in files.items():
            archive.writestr(name, content)
    return folder / f"{part}.zip"


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def read(folder: Path | None, task: str = "classification", seed: int = 0, **options):
    cache = folder.parent / "cache" if folder else None
    return load("omniglot", data_dir=folder, seed=seed, task=task, cache_dir=cache, **options)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def test_classification_split(folder):
    write_zip(folder, authors_files())
    data = read(folder)
    assert data.num_classes == 8 and data.class_names[0] == "Greek/character01"
    assert data.images.shape == (8 * 16, 1, 28, 28) and data.test_images.shape == (8 * 4, 1, 28, 28)
    assert len(data.clients) == 4 * 16 and data.client_names[0] == "Greek/01"
    assert not {name for name in data.client_names if name.endswith(("/17", "/18", "/19", "/20"))}
    for name, rows in zip(data.client_names, data.clients, strict=True):
        held = [data.class_names[label] for label in data.labels[rows].tolist()]
        assert held == [f"{name[:-3]}/character{c:02d}" for c in range(1, ALPHABETS[name[:-3]] + 1)]
    assert torch.bincount(data.labels).tolist() == [16] * 8
    assert torch.bincount(data.test_labels).tolist() == [4] * 8
    assert torch.cat(data.clients).sort().values.equal(torch.arange(len(data.images)))


def test_pixels_are_area_means_with_high_ink(folder):
    write_zip(folder, authors_files())
    data = read(folder)
    client = data.client_names.index("Latin/05")
    row = data.clients[client][1]
    assert data.class_names[data.labels[row]] == "Latin/character02"
    # 105 / 28 = 3.75 original pixels to one: the mean over each cell, computed here on a grid of a quarter
    # pixel.
    fine = drawing("Latin", 2, 5).repeat(4, 0).repeat(4, 1)
    expected = 255 * fine.reshape(28, 15, 28, 15).mean((1, 3))
    assert np.abs(data.images[row, 0].numpy() - expected).max() <= 0.5


def test_zip_and_folder_give_the_same(folder, tmp_path):
    write_zip(folder, authors_files())
    unpacked = tmp_path / "unpacked"
    write_folder(unpacked, authors_files())
    a, b = read(folder), read(unpacked)
    assert a.images.equal(b.images) and a.labels.equal(b.labels) and a.class_names == b.class_names


def test_both_parts_are_read(folder):
    write_zip(folder, authors_files())
    background = {
        name.replace("/", "/Old_", 1): content for name, content in authors_files("images_background").items()
    }
    write_folder(folder, background)
    assert read(folder).num_classes == 16


def test_retrieval_holds_out_whole_alphabets(folder):
    write_zip(folder, authors_files())
    data = read(folder, "retrieval")
    trained = {name.split("/")[0] for name in data.class_names}
    assert len(trained) == 3 and len(data.clients) == 3 * 20
    test_classes = sum(ALPHABETS.values()) - data.num_classes
    assert torch.bincount(data.test_labels).tolist() == [20] * test_classes
    assert torch.bincount(data.labels).tolist() == [20] * data.num_classes
    choices = {read(folder, "retrieval", seed).class_names for seed in range(12)}
    assert len(choices) > 1
    assert read(folder, "retrieval").class_names == data.class_names


def test_cache_serves_until_a_file_changes(folder, monkeypatch):
    files = authors_files()
    path = write_zip(folder, files)
    first = read(folder)
    with monkeypatch.context() as patch:
        patch.setattr("fedss_kernels.federated.data.omniglot.read", None)
        assert read(folder).images.equal(first.images)
    blank = {name: png(np.zeros((105, 105), dtype=bool)) for name in files}
    write_zip(folder, blank)
    os.utime(path, ns=(1, 1))
    assert int(read(folder).images.max()) == 0


@pytest.mark.parametrize("part", ["nowhere", ""])
def test_missing_data_says_what_where_and_whence(folder, part):
    with pytest.raises(
        FileNotFoundError, match=rf"images_evaluation\.zip.* in .*{part}.*github\.com/brendenlake/omniglot"
    ):
        read(folder / part)


def test_no_folder_given():
    with pytest.raises(FileNotFoundError, match=r"no folder given.*images_evaluation\.zip"):
        read(None)


def test_damaged_zip(folder):
    path = write_zip(folder, authors_files())
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"images_evaluation\.zip is damaged"):
        read(folder)


def test_a_zip_file_that_cannot_be_read_is_not_damaged(folder, monkeypatch):
    path = write_zip(folder, authors_files())

    def fail(*arguments, **options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(zipfile.ZipFile, "namelist", fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        read(folder)
    assert caught.value.filename == str(path)


def test_damaged_member(folder):
    path = write_zip(folder, authors_files())
    content = bytearray(path.read_bytes())
    content[2000:3000] = bytes(1000)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged|is not a readable PNG"):
        read(folder)


@pytest.mark.parametrize("unpacked", [False, True])
def test_damaged_images_are_all_listed_and_left_out(folder, unpacked, caplog):
    files = authors_files()
    damaged = [
        f"images_evaluation/Latin/character0{c}/000{c}_0{drawer}.png" for c, drawer in ((1, 2), (3, 4))
    ]
    whole = read(write_zip(folder, files).parent)
    files |= dict.fromkeys(damaged, b"nonsense")
    (folder / "images_evaluation.zip").unlink()
    (write_folder if unpacked else write_zip)(folder, files)
    with pytest.raises(
        ValueError, match=r"is damaged .*, and 1 more of 160 images; .*--skip-damaged; all .*"
    ) as caught:
        read(folder)
    listed = caught.value.listing.read_text().splitlines()
    assert sorted(line.split("\t")[0].removeprefix(f"{folder}/") for line in listed) == damaged
    assert all("is not a readable PNG" in line for line in listed)
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        data = read(folder, skip_damaged=True)
        assert "omniglot: left out 2 images that could not be read: Latin/character0" in caplog.text
        lost = {("Latin/02", "Latin/character01"), ("Latin/04", "Latin/character03")}
        for name, rows, before in zip(data.client_names, data.clients, whole.clients, strict=True):
            held = {
                data.class_names[label]: data.images[row]
                for label, row in zip(data.labels[rows], rows, strict=True)
            }
            expected = {
                data.class_names[label]: whole.images[row]
                for label, row in zip(whole.labels[before], before, strict=True)
                if (name, data.class_names[label]) not in lost
            }
            assert held.keys() == expected.keys()
            assert all(torch.equal(held[c], expected[c]) for c in held)


def test_progress_is_told(folder):
    said = []
    write_zip(folder, authors_files())
    read(folder, on_progress=lambda *news: said.append(news))
    assert said[0] == ("omniglot: decoding images", 1, 0) and said[-1][1] == 160


@pytest.mark.exhaustive
def test_damage_anywhere_is_told_in_words(folder):
    """A byte changed in each of many places: read as before, or a ValueError that names the file."""
    path = write_zip(folder, authors_files())
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), len(whole) // 150):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :])
        try:
            read(folder)
        except ValueError as error:
            assert "omniglot: " in str(error) or "images_evaluation" in str(error)
            refused += 1
    assert refused > 30


def test_a_missing_drawer(folder, caplog):
    files = authors_files()
    del files["images_evaluation/Greek/character02/0002_07.png"]
    write_zip(folder, files)
    with pytest.raises(
        ValueError, match=r"expected 20 images of Greek/character02.*got 19 by 19.*--skip-dam"
    ):
        read(folder)
    assert len(read(folder, skip_damaged=True).images) == 8 * 16 - 1
    assert "left out 1 image that could not be read: Greek/character02 1" in caplog.text


def test_a_character_that_lost_its_training_drawings_is_left_out_of_the_test(folder, caplog):
    files, lost = authors_files(), "images_evaluation/Greek/character02/0002_{:02d}.png"
    for drawer in range(1, 17):
        del files[lost.format(drawer)]
    write_zip(folder, files)
    data = read(folder, skip_damaged=True)
    note = "classes without a training image now, left out of the test too: Greek/character02"
    assert data.notes[-1] == note and f"omniglot: {note}" in caplog.text
    assert "Greek/character02" not in data.class_names and data.num_classes == 7
    assert torch.bincount(data.labels).tolist() == [16] * 7
    assert torch.bincount(data.test_labels).tolist() == [4] * 7
    assert data.test_images.equal(read(write_zip(folder, all_but(lost[:-10])).parent).test_images)


def all_but(prefix: str) -> dict[str, bytes]:
    return {name: content for name, content in authors_files().items() if not name.startswith(prefix)}


def test_characters_without_a_test_drawing_are_counted(folder):
    files = authors_files()
    for drawer in range(17, 21):
        del files[f"images_evaluation/Greek/character02/0002_{drawer:02d}.png"]
    write_zip(folder, files)
    data = read(folder, skip_damaged=True)
    assert data.num_classes == 8 and data.notes[-1] == "classes without a test image: 1"
    assert "test image" not in " ".join(read(folder, "retrieval", skip_damaged=True).notes)


@pytest.mark.parametrize("drawer", ["00", "21"])
def test_there_are_twenty_drawers(folder, drawer):
    files = authors_files()
    name = "images_evaluation/Greek/character02/0002_{}.png"
    write_zip(folder, files | {name.format(drawer): files[name.format("07")]})
    data = read(folder)
    assert data.notes == ("left out: 1 file (not where a drawing is 1)",)
    assert len(data.images) == 8 * 16 and len(data.test_images) == 8 * 4


def test_a_drawer_twice(folder):
    files = authors_files()
    files["images_evaluation/Greek/character02/9999_07.png"] = files[
        "images_evaluation/Greek/character02/0002_07.png"
    ]
    write_folder(folder, files)
    for skip in (False, True):
        with pytest.raises(ValueError, match=r"expected 20 images of Greek/character02.*got 21 by 20"):
            read(folder, skip_damaged=skip)


@pytest.mark.parametrize(
    "lost", ["empty folder", "empty zip", "a folder in the folder", "no folder in the zip"]
)
def test_a_part_without_a_drawing_is_not_passed_over(folder, lost):
    """As of an archive that was packed or unpacked another way, while the other part is whole."""
    write_zip(folder, authors_files("images_background"), "images_background")
    files = authors_files()
    if lost == "empty folder":  # beside the archive that it should hold
        write_zip(folder, files)
        (folder / "images_evaluation").mkdir()
    elif lost == "empty zip":
        write_zip(folder, {})
    elif lost == "a folder in the folder":
        write_folder(folder, {f"images_evaluation/{name}": content for name, content in files.items()})
    else:
        write_zip(folder, {name.partition("/")[2]: content for name, content in files.items()})
    with pytest.raises(
        ValueError, match=r"no images_evaluation/<alphabet>/character<NN>.*_evaluation"
    ) as said:
        read(folder)
    counted = "left out: 160 files (not where a drawing is 160)" in str(said.value)
    assert counted == (not lost.startswith("empty"))


@pytest.mark.parametrize("unpacked", [False, True])
def test_files_that_are_no_drawings_are_counted(folder, unpacked):
    """Not those that are hidden, as a Mac leaves them."""
    files = authors_files()
    strange = ("Greek/0001_01.png", "Greek/character01/0001_1.png", "Greek/note.txt", "README", ".DS_Store")
    files |= {f"images_evaluation/{name}": b"?" for name in strange}
    (write_folder if unpacked else write_zip)(folder, files)
    note = "left out: 4 files (not where a drawing is 2, .txt 1, no ending 1)"
    for _ in range(2):  # the second time from the cache
        data = read(folder)
        assert sorted(re.split(r"[(,)] ?", data.notes[0])) == sorted(re.split(r"[(,)] ?", note))
        assert data.num_classes == 8 and len(data.notes) == 1


def test_wrong_size_and_mode():
    small, grey = io.BytesIO(), io.BytesIO()
    Image.new("1", (28, 28)).save(small, "PNG")
    Image.new("L", (105, 105)).save(grey, "PNG")
    with pytest.raises(ValueError, match=r"some\.png: expected 105x105 .* got 28x28 of mode '1'"):
        decode(small.getvalue(), "some.png")
    with pytest.raises(ValueError, match=r"got 105x105 of mode 'L'"):
        decode(grey.getvalue(), "some.png")
    with pytest.raises(ValueError, match=r"some\.png is not a readable PNG"):
        decode(b"nonsense", "some.png")


@pytest.mark.skipif(
    not (DATA / "images_evaluation.zip").is_file(),
    reason=f"Omniglot's images_evaluation.zip is not in {DATA}; FEDSS_TEST_DATA names the folder above it",
)
@pytest.mark.exhaustive
def test_the_real_file(tmp_path):
    data = load("omniglot", data_dir=DATA, seed=0, cache_dir=tmp_path)
    names = {name.split("/")[0] for name in data.client_names}
    if len(names) > 20:
        pytest.skip("images_background is there too: other numbers")
    assert data.num_classes == 659 and len(names) == 20
    assert len(data.images) == 659 * 16 and len(data.test_images) == 659 * 4 and len(data.clients) == 320
    sizes = [len(rows) for rows in data.clients]
    assert (min(sizes), max(sizes)) == (20, 47)
    ink = data.images.double().mean().item() / 255
    assert 0.02 < ink < 0.2, "strokes on paper, not the other way round"
    assert len({hashlib.sha256(image.numpy().tobytes()).digest() for image in data.images}) > 0.99 * len(
        data.images
    )


def test_folders_without_a_drawing_are_told(folder):
    lost = "images_evaluation/Latin/character02"
    write_folder(folder, {n: content for n, content in authors_files().items() if not n.startswith(lost)})
    for name in (lost, "images_evaluation/Norse/character01", "images_evaluation/.hidden"):
        (folder / name).mkdir(parents=True)
    for _ in range(2):  # the second time from the cache
        data = read(folder)
        assert data.num_classes == 7 and data.notes == ("unused folders: Latin/character02, Norse",)


def test_so_are_those_of_a_zip(folder):
    lost = "images_evaluation/Latin/character02"
    files = {n: content for n, content in authors_files().items() if not n.startswith(lost)}
    names = (lost, "images_evaluation/Norse/character01", "images_evaluation/.hidden", "__MACOSX/a")
    write_zip(folder, files | {f"{name}/": b"" for name in names})
    for _ in range(2):  # the second time from the cache
        data = read(folder)
        assert data.num_classes == 7 and data.notes == ("unused folders: Latin/character02, Norse",)
    write_zip(folder, {f"{name}/": b"" for name in names})
    with pytest.raises(ValueError, match=r"no images_evaluation/.* \(unused folders: Latin, Norse\); get it"):
        read(folder)
