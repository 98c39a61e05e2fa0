"""Landmarks-User-160k, from a tiny set as its authors distribute it, images as in Google Landmarks v2."""

from pathlib import Path

import pytest
import torch
from image_files import each_once, shown, write_image

from fedss_kernels.federated.data import FederatedData, Partition, images, load

# (user, class) of each training image; the class of each test image
TRAIN = [("7", 0), ("7", 2), ("12", 1), ("7", 0), ("12", 0), ("99", 2), ("12", 1), ("99", 10)]
TEST = [10, 0, 1, 2]


def image_id(i: int) -> str:
    return f"{i * 2654435761 % 2**64:016x}"[::-1]


def write_lists(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    rows = [f"{user},{image_id(i)},{c}" for i, (user, c) in enumerate(TRAIN, start=1)]
    (folder / "federated_train.csv").write_text("\n".join(["user_id,image_id,class", *rows, ""]))
    rows = [f"{image_id(i)},{c}" for i, c in enumerate(TEST, start=len(TRAIN) + 1)]
    (folder / "test.csv").write_text("\n".join(["image_id,class", *rows, ""]))


def place(layout: str, i: int) -> str:
    name = image_id(i)
    tree = f"{name[0]}/{name[1]}/{name[2]}/{name}.jpg"
    return {"tree": tree, "train": f"train/{tree}", "flat": f"images/{name}.jpg", "here": f"{name}.jpg"}[
        layout
    ]


def write_all(folder: Path, layout: str = "tree") -> Path:
    """Image number i, from 1 on through both lists, shows colour(i)."""
    write_lists(folder)
    for i in range(1, len(TRAIN) + len(TEST) + 1):
        write_image(folder / place(layout, i), i)
    return folder


def read(folder: Path | None, **options) -> FederatedData:
    cache = folder.parent / "cache" if folder else None
    return load("landmarks", data_dir=folder, cache_dir=cache, **{"image_size": 8, "seed": 0, **options})


@pytest.fixture
def folder(tmp_path):
    return write_all(tmp_path / "data")


def test_authors_whose_names_are_not_utf_8_stay_apart(folder):
    path = folder / "federated_train.csv"
    content = path.read_bytes().replace(b"\n12,", b"\nM\xfcller,").replace(b"\n7,", b"\nM\xf6ller,")
    path.write_bytes(content)
    assert read(folder).client_names == ("99", r"M\xf6ller", r"M\xfcller")


@pytest.mark.parametrize("layout", ["tree", "train", "flat", "here"])
def test_authors_are_clients(layout, tmp_path):
    data = read(write_all(tmp_path / "data", layout))
    assert data.client_names == ("12", "7", "99") and data.class_names == ("0", "1", "2", "10")
    assert each_once(data.clients, len(TRAIN))
    number = {name: c for c, name in enumerate(data.class_names)}
    colours = shown(data.images)
    for name, held in zip(data.client_names, data.clients, strict=True):
        expected = {i: number[str(c)] for i, (user, c) in enumerate(TRAIN, start=1) if user == name}
        assert {colours[row]: int(data.labels[row]) for row in held.tolist()} == expected
    found = dict(zip(shown(data.test_images), data.test_labels.tolist(), strict=True))
    assert found == {len(TRAIN) + 1 + i: number[str(c)] for i, c in enumerate(TEST)}


def test_another_partition(folder):
    data = read(folder, how=Partition("iid", num_clients=4))
    assert [len(held) for held in data.clients] == [2] * 4 and each_once(data.clients, 8)


def test_the_second_time_nothing_is_decoded(folder, monkeypatch):
    first = read(folder)
    monkeypatch.setattr(images, "decode", None)
    assert torch.equal(read(folder).images, first.images)


def test_nothing_there(tmp_path):
    message = (
        r"landmarks: looked for federated_train\.csv and test\.csv in .*get them from .*landmarks-user-160k"
    )
    with pytest.raises(FileNotFoundError, match=message):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"landmarks: no folder given"):
        read(None)


def test_lists_without_images(tmp_path):
    write_lists(tmp_path / "data")
    with pytest.raises(
        FileNotFoundError, match=r"12 of 12 images are missing: .*cvdfoundation/google-landmark"
    ):
        read(tmp_path / "data")


def test_missing_and_damaged_images_are_named(folder):
    lost = folder / place("tree", 3)
    content = lost.read_bytes()
    lost.write_bytes(content[:200])
    with pytest.raises(ValueError, match=rf"landmarks: 1 of 12 images are damaged: .*{image_id(3)}\.jpg"):
        read(folder)
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of 12 images are missing: .*{image_id(3)}\.jpg"):
        read(folder)


def test_without_missing_and_damaged_images(folder, caplog):
    """Author 99 loses both: nobody is left to know class 10."""
    for i in (6, 8):
        (folder / place("tree", i)).unlink()
    (folder / place("tree", 3)).write_bytes(b"")
    data = read(folder, skip_damaged=True)
    assert data.client_names == ("12", "7") and data.class_names == ("0", "1", "2")
    assert sorted(shown(data.images)) == [1, 2, 4, 5, 7] and shown(data.test_images) == [10, 11, 12]
    assert each_once(data.clients, 5)
    assert "left out 2 images that could not be read: 2 1, 10 1, listed in" in caplog.text
    assert "left out 1 image that could not be read: 1 1, listed in" in caplog.text
    assert "classes without a training image now, left out of the test too: 10" in caplog.text


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("federated_train.csv", "", "expected columns user_id, image_id, class, got none"),
        ("federated_train.csv", "image_id,class\na,1\n", "expected columns .*, got image_id, class"),
        (
            "federated_train.csv",
            "user_id,image_id,class\n1,abc,2\n1,abd\n",
            "line 3: expected user_id, .*None",
        ),
        ("federated_train.csv", "user_id,image_id,class\n1,abc,x\n", "line 2: .*the class a number"),
        ("federated_train.csv", "user_id,image_id,class\n1,abc,0\n2,abc,0\n", "has an image twice"),
        ("test.csv", "image_id,class\n", "test.csv lists no images"),
        ("test.csv", "image_id,class\nabc,5\n", "no training image of '5', a class of the test"),
        ("test.csv", "image_id,class\n../../x,1\n", "line 2: .*x"),
    ],
)
def test_a_list_that_is_not_the_authors(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read(folder)


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16"])
def test_lists_that_a_spreadsheet_saved(folder, coding):
    """With a byte order mark first, which is no part of a column's name."""
    before = read(folder)
    for path in folder.glob("*.csv"):
        path.write_text(path.read_text(), encoding=coding)
    data = read(folder)
    assert data.client_names == before.client_names and torch.equal(data.images, before.images)


def test_blank_lines_at_the_end_are_an_editors(folder):
    whole = read(folder)
    for part in folder.glob("*.csv"):
        part.write_text(part.read_text() + "\n  \n")
    assert torch.equal(read(folder).labels, whole.labels)


def test_no_retrieval(folder):
    with pytest.raises(ValueError, match="task: expected classification for landmarks"):
        read(folder, task="retrieval")
