"""Stanford Online Products, from a tiny set as its authors distribute it."""

import os
from pathlib import Path

import pytest
import torch
from image_files import each_once, shown, write_image

from fedss_kernels.federated import Config, run
from fedss_kernels.federated.data import FederatedData, Partition, images, load
from fedss_kernels.federated.data.sop import HEADER

KINDS = ("bicycle", "cabinet")
TRAIN = {c: 2 + c % 3 for c in range(1, 11)}  # images of each class_id
TEST = {c: 2 for c in range(11, 15)}
HOW = Partition("classes", num_clients=3, classes_per_client=4)


def write_sop(folder: Path) -> Path:
    """Image number i, from 1 on through both lists, shows colour(i)."""
    image = 0
    for name, classes in (("Ebay_train.txt", TRAIN), ("Ebay_test.txt", TEST)):
        lines = [" ".join(HEADER)]
        for c, count in classes.items():
            for view in range(count):
                image += 1
                path = f"{KINDS[c % 2]}_final/{1000 + c}_{view}.JPG"
                write_image(folder / path, image)
                lines.append(f"{image} {c} {c % 2 + 1} {path}")
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def read(folder: Path | None, how: Partition | None = HOW, **options) -> FederatedData:
    options = {"task": "retrieval", "image_size": 8, "seed": 0, **options}
    return load(
        "sop", data_dir=folder, cache_dir=folder.parent / "cache" if folder else None, how=how, **options
    )


@pytest.fixture
def folder(tmp_path):
    return write_sop(tmp_path / "data" / "Stanford_Online_Products")


def test_classes_of_training_and_test(folder):
    for data in (read(folder), read(folder.parent)):
        assert data.class_names == tuple(map(str, TRAIN)) and data.task == "retrieval"
        assert torch.bincount(data.labels).tolist() == list(TRAIN.values())
        assert torch.bincount(data.test_labels).tolist() == list(TEST.values())
        count = sum(TRAIN.values())
        assert shown(data.images) == list(range(1, count + 1))
        assert shown(data.test_images) == list(range(count + 1, count + 1 + sum(TEST.values())))


def test_clients_have_so_many_classes(folder):
    data = read(folder)
    assert len(data.clients) == 3 and each_once(data.clients, len(data.images))
    assert {len(data.labels[held].unique()) for held in data.clients} == {4}
    first, other = read(folder, seed=0), read(folder, seed=1)
    assert all(map(torch.equal, data.clients, first.clients))
    assert not all(map(torch.equal, data.clients, other.clients))


def test_by_default_the_papers_numbers(folder):
    """100 images and 20 classes: more than these 30 of 10 have."""
    with pytest.raises(ValueError, match=r"30 images of 10 classes among 1 clients: .* got 20"):
        read(folder, how=None)
    preset = Config(data="sop")
    assert (preset.partition, preset.images_per_client, preset.classes_per_client) == ("classes", 100, 20)
    assert (preset.cohort, preset.rounds, preset.client_lr, preset.task) == (32, 2000, 0.01, "retrieval")
    assert (preset.image_size, preset.crop_size, preset.batch_size, preset.scale) == (256, 224, 32, 20.0)


def test_the_second_time_nothing_is_decoded(folder, monkeypatch):
    first = read(folder)
    monkeypatch.setattr(images, "decode", None)
    assert torch.equal(read(folder).images, first.images)


def test_no_classification(folder):
    with pytest.raises(
        ValueError, match="task: sop's test classes are none of training's: expected retrieval"
    ):
        read(folder, task="classification")


def test_nothing_there(tmp_path):
    message = (
        r"sop: looked for Ebay_train\.txt and Ebay_test\.txt in .*; get them from .*Stanford_Online_Products"
    )
    with pytest.raises(FileNotFoundError, match=message):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"sop: no folder given to look for Ebay_train\.txt"):
        read(None)


def test_a_path_that_is_not_utf_8(folder):
    """In the list as in the folder."""
    name, other = b"bicycle_final/1004_1.JPG", b"bicycle_final/caf\xe9.JPG"
    root = os.fsencode(folder)
    os.rename(root + b"/" + name, root + b"/" + other)
    for part in folder.glob("Ebay_*.txt"):
        part.write_bytes(part.read_bytes().replace(name, other))
    assert len(read(folder).images) + len(read(folder).test_images) == 38


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16"])
def test_lists_that_an_editor_saved(folder, coding):
    """With a byte order mark first."""
    for part in folder.glob("Ebay_*.txt"):
        part.write_text(part.read_text(), encoding=coding)
    assert read(folder).class_names == tuple(map(str, TRAIN))


@pytest.mark.parametrize("end", ["\n", "\r\n\n", "  \n\t"])
def test_blank_lines_at_the_end_are_an_editors(folder, end):
    whole = read(folder)
    for name in ("Ebay_train.txt", "Ebay_test.txt"):
        part = folder / name
        part.write_text(part.read_text() + end)
    assert torch.equal(read(folder).labels, whole.labels)


def test_a_list_in_utf_16_that_ends_within_a_character(folder):
    part = folder / "Ebay_train.txt"
    part.write_bytes(part.read_text().encode("utf-16")[:-1])
    words = r"sop: .*Ebay_train\.txt is damaged \(utf-16-le: truncated data\); get it again from http"
    with pytest.raises(ValueError, match=words):
        read(folder)


def test_missing_parts_are_named(folder):
    (folder / "bicycle_final" / "1004_1.JPG").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"sop: 1 of 38 images are missing: .*1004_1\.JPG; get them from"
    ):
        read(folder)
    assert (
        len(read(folder, skip_damaged=True).images) + len(read(folder, skip_damaged=True).test_images) == 37
    )
    (folder / "Ebay_test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"sop: looked for Ebay_test\.txt in"):
        read(folder)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", r"Ebay_train\.txt, line 1: expected 'image_id class_id super_class_id path', got ''"),
        ("1 1 1 a.JPG\n", "line 1: expected 'image_id"),
        (
            " ".join(HEADER) + "\n1 1 1 a.JPG\n2 1 1\n",
            "line 3: expected three numbers and a path, got '2 1 1'",
        ),
        (" ".join(HEADER) + "\n1 x 1 a.JPG\n", "line 2: expected three numbers"),
        (" ".join(HEADER) + "\n", "lists no images"),
        (
            " ".join(HEADER) + "\n1 11 1 bicycle_final/1002_0.JPG\n",
            r"^sop: class 11 is in both Ebay_train\.txt and Ebay_test\.txt of .*; get them again from https",
        ),
        (
            " ".join(HEADER) + "\n1 1 1 bicycle_final/1002_0.JPG\n2 2 1 bicycle_final/1002_0.JPG\n",
            r"1002_0\.JPG is listed twice, of training and test images",
        ),
    ],
)
def test_a_list_that_is_not_the_authors(folder, content, message):
    (folder / "Ebay_train.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        read(folder, how=Partition("iid", num_clients=1))


@pytest.mark.parametrize("model, crop_size", [("conv4_rgb", 28), ("mobilenet_v3_small", 40)])
def test_two_rounds(model, crop_size, folder, request):
    if model != "conv4_rgb":
        request.getfixturevalue("torchvision")
    config = Config(
        data="sop",
        data_dir=folder,
        cache_dir=folder.parent / "cache",
        image_size=48,
        crop_size=crop_size,
        model=model,
        num_clients=3,
        classes_per_client=4,
        num_negatives=2,
        cohort=2,
        rounds=2,
    )
    summary = run(config).summary
    assert summary.task == "retrieval" and summary.num_classes == 10 and 0 <= summary.map_at_10 <= 1
