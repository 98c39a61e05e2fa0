"""Walks over folders of images: what is found, what is said to be left out, and what is an error."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from image_files import each_once, shown, write_image
from PIL import Image, features
from test_data_image_folder import read, write_tree

from fedss_kernels.federated.data import Partition, load
from fedss_kernels.federated.data.class_folders import ClassFolders, image_endings

TWO = Partition("iid", num_clients=2)
AVIF = [".avif"] if features.check("avif") else []


def test_what_pillow_reads_is_an_image(tmp_path):
    endings = [".jfif", ".pgm", ".JPG", ".tga", *AVIF]
    for name in ("ant", "bee"):
        for i, ending in enumerate(endings):
            write_image(tmp_path / "data" / name / f"{i}{ending}", 0)
    data = read(tmp_path / "data", how=TWO)
    assert len(data.images) + len(data.test_images) == 2 * len(endings)
    assert data.notes == ()


def test_no_program_film_or_measurement_is_an_image():
    assert not image_endings() & {".eps", ".ps", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".pdf"}
    assert image_endings() >= {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff"}


@pytest.mark.exhaustive
def test_photographs_are_tried_before_rare_formats():
    """In a new process: which endings there are must not make each JPEG be taken for 30 others first."""
    code = (
        "from fedss_kernels.federated.data.class_folders import image_endings; image_endings()\n"
        "from PIL import Image; print(*Image.ID[:6])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"JPEG", "PNG", "GIF"} < set(found.stdout.split())


def test_a_line_says_what_there_is_and_what_is_left_out(tmp_path):
    folder = write_tree(tmp_path / "data", {"ant": 12, "bee": 12, "cat": 12, "dog": 12})
    for i in range(18):
        (folder / "ant" / f"{i}.heic").touch()
    for i in range(5):
        (folder / "bee" / f"{i}.TXT").touch()
    (folder / "readme").touch()
    (folder / "drafts").mkdir()
    found = []
    data = read(folder, how=Partition("iid", num_clients=4), on_found=found.append)
    assert data.found.line == (
        "4 classes, 40 training and 8 test images, 4 clients; left out: 24 files (.heic 18, .txt 5, in no "
        "class's folder 1); the Pillow installed here reads no .heic; unused folders: drafts"
    )
    assert found == [data.found]


def test_it_is_said_before_images_are_read(tmp_path, monkeypatch):
    def stop(found):
        raise InterruptedError

    folder = write_tree(tmp_path / "data", {"ant": 10, "bee": 10})
    monkeypatch.setattr("fedss_kernels.federated.data.image_folder.cached_images", None)
    with pytest.raises(InterruptedError):
        read(folder, how=TWO, on_found=stop)


def test_a_class_too_small_for_a_test_image_is_said(tmp_path):
    folder = write_tree(tmp_path / "data", {"ant": 10, "bee": 1})
    assert read(folder, how=TWO).notes == ("classes without a test image: 1",)
    folder = write_tree(tmp_path / "few", {"ant": 2, "bee": 2})
    with pytest.raises(ValueError, match="a share of 0.2 of 2 images, rounded, is none: .* train and test"):
        read(folder, how=TWO)


def test_files_of_several_pictures_are_told_of_which_the_first_is_read(tmp_path):
    folder = write_tree(tmp_path / "data", {"ant": 10, "bee": 10})
    pages = [Image.new("RGB", (4, 4), (0, 0, blue)) for blue in (255, 0)]
    for ending in ("tif", "gif"):
        pages[0].save(folder / "ant" / f"first.{ending}", save_all=True, append_images=pages[1:])
    data = read(folder, how=TWO)
    assert data.notes == ("of files with several pictures the first is read (.gif 1, .tif 1)",)
    every = torch.cat([data.images, data.test_images])
    assert len(every) == 22 and (every[:, 2].flatten(1) > 250).all(1).sum() == 2


def test_a_pillow_without_avif_is_said(tmp_path, monkeypatch):
    known = Image.registered_extensions()
    lacking = {ending: name for ending, name in known.items() if name != "AVIF"}
    monkeypatch.setattr(Image, "registered_extensions", lambda: lacking)
    folder = write_tree(tmp_path / "data", {"ant": 10, "bee": 10})
    (folder / "ant" / "0.avif").touch()
    notes = ("left out: 1 file (.avif 1)", "the Pillow installed here reads no .avif")
    assert read(folder, how=TWO).notes == notes


# ---- splits


@pytest.mark.parametrize(
    "train, test",
    [
        ("Training", "Test"),
        ("train", "eval"),
        ("TRAIN", "Valid"),
        ("train_set", "test_set"),
        ("training-data", "Testing"),
        ("Train", "evaluation"),
    ],
)
def test_split_folders_of_any_spelling(train, test, tmp_path):
    folder = tmp_path / "data"
    write_tree(folder / train, {"ant": 4, "bee": 4})
    write_tree(folder / test, {"bee": 2, "ant": 1}, first=100)
    data = read(folder, how=TWO)
    assert data.class_names == ("ant", "bee") and shown(data.test_images) == [102, 100, 101]
    assert data.notes == ()


def test_folders_beside_the_two_are_said_and_the_test_is_before_the_validation(tmp_path):
    folder = tmp_path / "data"
    for name in ("train", "val", "Test", "raw"):
        write_tree(folder / name, {"ant": 4, "bee": 4})
    (folder / "labels.csv").touch()
    data = read(folder, how=TWO)
    assert len(data.test_images) == 8
    assert data.notes == ("left out: 1 file (in no class's folder 1)", "unused folders: raw, val")
    write_tree(folder / "testing", {"ant": 4})
    with pytest.raises(ValueError, match=r"data has Test and testing: expected one of them"):
        read(folder, how=TWO)


def test_half_a_split_is_no_class(tmp_path):
    folder = tmp_path / "data"
    write_tree(folder / "Training", {"ant": 4, "bee": 4})
    write_tree(folder, {"extra": 4})
    with pytest.raises(ValueError, match="data has Training, with ant, bee in it, like half a split"):
        read(folder, how=TWO)
    write_tree(tmp_path / "vehicles", {"car": 5, "plane": 5, "train": 5})
    assert read(tmp_path / "vehicles", how=TWO).class_names == ("car", "plane", "train")


# ---- the wrong level


@pytest.mark.parametrize("inside", ["dataset", "a/b", "dataset/train"])
def test_one_level_too_high_says_which_folder_to_give(inside, tmp_path):
    folder = tmp_path / "data"
    write_tree(folder / inside, {"ant": 4, "bee": 4})
    if inside == "dataset/train":
        write_tree(folder / "dataset/test", {"ant": 4, "bee": 4})
    wanted = folder / inside if inside != "dataset/train" else folder / "dataset"
    with pytest.raises(ValueError, match=f"give {wanted} instead"):
        read(folder, how=TWO)
    assert read(wanted, how=TWO).num_classes == 2


def test_one_level_too_low_says_so(tmp_path):
    folder = write_tree(tmp_path / "data", {"ant": 4, "bee": 4})
    with pytest.raises(FileNotFoundError, match="4 images are in no folder: expected a folder for each"):
        read(folder / "ant", how=TWO)


def test_one_class_is_none_to_tell_from_another(tmp_path):
    folder = write_tree(tmp_path / "data", {"ant": 4})
    with pytest.raises(ValueError, match="expected at least 2 classes to train on, got 1: ant"):
        read(folder, how=TWO)


def test_like_folders_within_all_classes_are_worth_a_word(tmp_path):
    folder = tmp_path / "data"
    for name in ("part1", "part2"):
        write_tree(folder / name, {"ant": 4, "bee": 4})
    assert read(folder, how=TWO).notes == ("the classes are part1, part2, not ant, bee in them",)


# ---- names that look the same

ONE_PIECE, TWO_PIECES = "caf\u00e9", "cafe\u0301"
ONE_NAME = r"('{}' and '{}' are one name, composed otherwise (Unicode's NFC and NFD))"


@pytest.mark.parametrize("train, test", [(ONE_PIECE, TWO_PIECES), (TWO_PIECES, ONE_PIECE)])
@pytest.mark.parametrize("task", ["classification", "retrieval"])
def test_a_class_of_the_test_composed_otherwise_than_in_training_is_told_as_such(train, test, task, tmp_path):
    folder = tmp_path / "data"
    write_tree(folder / "train", {"ant": 2, train: 2})
    write_tree(folder / "test", {"a wasp": 1, test: 1} if task == "retrieval" else {"ant": 1, test: 1}, 10)
    why = ONE_NAME.format(ascii(test)[1:-1], ascii(train)[1:-1])
    words = {
        "classification": f"no training image of '{test}', a class of the test {why}: rename one as the "
        "other",
        "retrieval": f"'{test}' is a class of training and of the test {why}, which a retrieval's must not "
        "share; expected task 'classification'",
    }
    with pytest.raises(ValueError, match=f"^{re.escape(f'image_folder: {words[task]}')}$"):
        read(folder, how=TWO, task=task)
    (folder / "test" / test).rename(folder / "test" / train)
    if task == "classification":
        assert read(folder, how=TWO).class_names == tuple(sorted(["ant", train]))


def test_a_class_that_training_lacks_is_told_after_those_composed_otherwise(tmp_path):
    folder = tmp_path / "data"
    write_tree(folder / "train", {"ant": 2, ONE_PIECE: 2})
    write_tree(folder / "test", {"bee": 1, TWO_PIECES: 1}, first=10)
    with pytest.raises(ValueError, match=f"no training image of '{TWO_PIECES}'.* composed otherwise"):
        read(folder, how=TWO)
    (folder / "test" / TWO_PIECES).rename(folder / "test" / ONE_PIECE)
    with pytest.raises(ValueError, match="no training image of 'bee', a class of the test$"):
        read(folder, how=TWO)


def test_two_classes_that_look_the_same_are_refused(tmp_path):
    """Those that differ in the case of letters are two, as they always were."""
    folder = write_tree(tmp_path / "data", {"ant": 5, "Ant": 5, ONE_PIECE: 5})
    assert read(folder, how=TWO).num_classes == 3
    (folder / TWO_PIECES).mkdir()
    assert read(folder, how=TWO).num_classes == 3, "one without images is no class"
    write_tree(folder, {TWO_PIECES: 1}, first=20)
    why = ONE_NAME.format(r"cafe\u0301", r"caf\xe9")
    words = f"{folder} has two folders '{TWO_PIECES}' {why}: put their images in one of them, or rename one"
    with pytest.raises(ValueError, match=f"^image_folder: {re.escape(words)}$"):
        read(folder, how=TWO)


# ---- links, and what cannot be read


def test_links_to_folders_are_followed(tmp_path):
    folder = write_tree(tmp_path / "data", {"ant": 5})
    write_tree(tmp_path / "elsewhere", {"bee": 5, "more": 5}, first=5)
    (folder / "bee").symlink_to(tmp_path / "elsewhere" / "bee")
    (folder / "ant" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    data = read(folder, how=TWO)
    assert torch.bincount(data.labels).tolist() == [8, 4] and each_once(data.clients, 12)
    (folder / "bee" / "round").symlink_to(folder / "bee")
    with pytest.raises(ValueError, match=r"image_folder: .*bee/round is a link to .*bee, which is looked at"):
        read(folder, how=TWO)


def test_a_split_of_links_to_one_folder_is_refused(tmp_path):
    folder = tmp_path / "data"
    write_tree(folder / "train", {"ant": 5, "bee": 5})
    (folder / "test").symlink_to(folder / "train")
    with pytest.raises(ValueError, match="test is a link to .*train"):
        read(folder, how=TWO)


@pytest.mark.parametrize("target", ["gone", "data/cat"])  # the latter is itself
@pytest.mark.parametrize("split", [False, True])
def test_a_link_to_nothing_is_an_error_or_left_out(target, split, tmp_path):
    folder = write_tree(tmp_path / "data", {"ant": 5, "bee": 5})
    link = folder / "cat"
    if split:
        for part in ("train", "test"):
            write_tree(folder / part, {"ant": 5, "bee": 5})
        shutil.rmtree(folder / "ant")
        shutil.rmtree(folder / "bee")
    link.symlink_to(tmp_path / target)
    message = "image_folder: .*cat is a link to what is not there .* go on without them: --skip-damaged"
    with pytest.raises(FileNotFoundError, match=message):
        read(folder, how=TWO)
    data = read(folder, how=TWO, skip_damaged=True)
    assert data.num_classes == 2
    (note,) = (note for note in data.notes if "cannot be read" in note)
    assert note.count("cat is a link to what is not there") == 1


@pytest.mark.parametrize("target", ["gone.jpg", "data/ant/9.jpg"])  # the latter is itself
def test_an_image_that_is_a_link_to_nothing_is_missing_and_can_be_left_out(target, tmp_path, caplog):
    folder = write_tree(tmp_path / "data", {"ant": 5, "bee": 5})
    (folder / "ant" / "9.jpg").symlink_to(tmp_path / target)
    advice = (
        r"1 of 11 images are missing: .*ant/9\.jpg; .* go on without them: --skip-damaged; all of them are"
    )
    with pytest.raises(FileNotFoundError, match=f"image_folder: {advice} listed in"):
        read(folder, how=TWO)
    data = read(folder, how=TWO, skip_damaged=True)
    assert len(data.images) + len(data.test_images) == 10
    assert "left out 1 image that could not be read: ant 1, listed in" in caplog.text
    assert any(note in caplog.text for note in data.notes)
    (folder / "ant" / "more").symlink_to(tmp_path / "gone")  # a folder, perhaps of many images
    with pytest.raises(FileNotFoundError, match="ant/more is a link to what is not there"):
        read(folder, how=TWO)
    data = read(folder, how=TWO, skip_damaged=True)
    assert len(data.images) + len(data.test_images) == 10
    assert any("ant/more is a link to what is not there" in note for note in data.notes)


@pytest.mark.parametrize("unreadable", ["bee", "ant/more"])
def test_a_folder_that_cannot_be_read_is_an_error(unreadable, tmp_path, monkeypatch):
    folder = write_tree(tmp_path / "data", {"ant": 5, "bee": 5})
    (folder / "ant" / "more").mkdir()
    real = os.scandir

    def scandir(path):
        if str(path) == str(folder / unreadable):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    why = rf"{unreadable} is not to be read \(Permission denied\)"
    with pytest.raises(
        PermissionError, match=rf"image_folder: .*{why}; or go on without .*: --skip-damaged$"
    ):
        read(folder, how=TWO)
    (folder / "cat").mkdir()
    for i in range(5):
        write_image(folder / "cat" / f"{i}.png", i)
    data = read(folder, how=TWO, skip_damaged=True)
    assert data.class_names == (("ant", "cat") if unreadable == "bee" else ("ant", "bee", "cat"))
    assert any(re.fullmatch(f"left out what cannot be read: .*{why}", note) for note in data.notes)


def test_a_folder_that_nothing_can_be_looked_at_in(tmp_path, monkeypatch):
    """Its files' names can be read: each of them is left out."""
    folder, real = write_tree(tmp_path / "data", {"ant": 5, "bee": 5, "cat": 5}), Path.stat

    def stat(path, **options):
        if path.parent == folder / "bee":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    words = r"5 of 15 images are missing or cannot be read: .*bee/00\d\.jpg \(Permission denied\)"
    with pytest.raises(ValueError, match=f"{words}.*; or go on without them: --skip-damaged"):
        read(folder, how=TWO)
    data = read(folder, how=TWO, skip_damaged=True)
    assert data.class_names == ("ant", "cat") and "left out 5 images" in data.notes[-1]


def test_what_is_no_file_is_said_with_its_reason(tmp_path):
    folder = write_tree(tmp_path / "data", {"ant": 5, "bee": 5})
    os.mkfifo(folder / "ant" / "pipe.jpg")
    with pytest.raises(
        ValueError, match=r"1 of 11 images cannot be read: .*pipe\.jpg \(a FIFO, not a file\)"
    ):
        read(folder, how=TWO)
    assert len(read(folder, how=TWO, skip_damaged=True).images) == 8


# ---- the same of the named sets


def test_a_walk_takes_only_the_endings_asked_for_and_follows_links(tmp_path):
    write_image(tmp_path / "there" / "a" / "0.png", 0)
    write_image(tmp_path / "there" / "0.jpg", 0)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "there")
    found = ClassFolders("omniglot", frozenset({".png"})).images(tmp_path / "data")
    assert [str(file.relative_to(tmp_path)) for file in found] == ["data/linked/a/0.png"]


def test_synsets_left_out_are_said(tmp_path):
    for c in (1, 2):
        for i in range(5):
            write_image(tmp_path / "data" / f"n0000000{c}" / f"{i}.JPEG", i)
    (tmp_path / "data" / "n00000003").mkdir()
    (tmp_path / "data" / "n00000001" / "a.tar").touch()
    data = read(tmp_path / "data", "imagenet21k", how=TWO)
    assert data.notes == ("left out: 1 file (.tar 1)", "unused folders: n00000003")


@pytest.mark.parametrize("packed", [False, True])
def test_no_image_of_cifar_is_lost_by_its_ending_or_place(packed, tmp_path):
    folder = tmp_path / "data"
    for c in range(10):
        for i, split in enumerate(("train", "train", "test")):
            write_image(folder / split / f"class{c}" / f"{i}.{'png' if i == 1 else 'jpg'}", c, (32, 32))

    def read_cifar():
        if packed:
            with tarfile.open(tmp_path / "cifar10_jpeg.tar.xz", "w:xz") as archive:
                for name in ("train", "test"):
                    archive.add(folder / name, name)
        place = tmp_path if packed else folder
        how = Partition("iid", num_clients=2)
        return load("cifar10", data_dir=place, seed=0, cache_dir=tmp_path / "cache", how=how)

    assert len(read_cifar().images) == 20
    write_image(folder / "train" / "loose.jpg", 0, (32, 32))
    with pytest.raises(ValueError, match="cifar10: expected train/<class>/.*got train/loose.jpg"):
        read_cifar()
