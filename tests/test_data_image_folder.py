"""Any folder of images, ImageNet-21k's among them: classes, splits, clients, and what is missing or wrong."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import each_once, shown, write_image

from fedss_kernels.federated import Config, ConfigError, run
from fedss_kernels.federated.data import DamagedImages, FederatedData, Partition, images, load
from fedss_kernels.federated.figures import noise
from fedss_kernels.federated.loading import load_data

CLASSES = {"ant": 10, "bee": 5, "cat": 15}
FEW = Partition("classes", num_clients=4, classes_per_client=2)


def write_tree(folder: Path, classes: dict[str, int], first: int = 0) -> Path:
    """Files <class>/<i>.jpg in colours that nobody else has, counted from `first`."""
    for name, count in classes.items():
        for i in range(count):
            write_image(folder / name / f"{i:03d}.jpg", first + i)
        first += count
    return folder


def read(folder: Path | None, name: str = "image_folder", how: Partition = FEW, **options) -> FederatedData:
    cache = folder.parent / "cache" if folder else None
    options = {"seed": 0, "image_size": 8, **options}
    return load(name, data_dir=folder, cache_dir=cache, how=how, **options)


@pytest.fixture
def folder(tmp_path):
    return write_tree(tmp_path / "data", CLASSES)


def test_a_fifth_of_each_class_is_the_test(folder):
    data = read(folder)
    assert data.class_names == ("ant", "bee", "cat") and data.images.shape[1:] == (3, 8, 8)
    assert torch.bincount(data.labels).tolist() == [8, 4, 12]
    assert torch.bincount(data.test_labels).tolist() == [2, 1, 3]
    seen = shown(data.images) + shown(data.test_images)
    assert sorted(seen) == list(range(30))
    bounds = {0: range(10), 1: range(10, 15), 2: range(15, 30)}
    for labels, colours in ((data.labels, data.images), (data.test_labels, data.test_images)):
        for label, i in zip(labels.tolist(), shown(colours), strict=True):
            assert i in bounds[label]
    assert each_once(data.clients, 24) and len(data.clients) == 4
    assert {len(data.labels[held].unique()) for held in data.clients} == {2}


def test_clients_are_tested_on_images_of_their_own_classes(folder):
    data = read(folder)
    assert torch.cat(data.test_clients).sort().values.tolist() == list(range(len(data.test_images)))
    for held, tested in zip(data.clients, data.test_clients, strict=True):
        assert set(data.test_labels[tested].tolist()) <= set(data.labels[held].tolist())


def test_a_seed_draws_the_split(folder):
    first, again, other = (shown(read(folder, seed=seed).test_images) for seed in (0, 0, 1))
    assert first == again != other


def test_a_class_of_one_image_is_trained_on(folder):
    write_image(folder / "dog" / "only.png", 40)
    data = read(folder)
    assert torch.bincount(data.labels).tolist() == [8, 4, 12, 1] and int(data.test_labels.max()) == 2
    data = read(folder, how=Partition("iid", num_clients=2), test_share=0.9)
    assert torch.bincount(data.labels).tolist() == [1, 1, 1, 1]


def test_a_retrieval_holds_out_classes(folder):
    data = read(folder, task="retrieval")
    assert data.num_classes == 2 and data.test_labels.unique().tolist() == [0]
    assert len(data.images) + len(data.test_images) == 30
    assert len({read(folder, task="retrieval", seed=seed).class_names for seed in range(8)}) == 3


@pytest.mark.parametrize("test", ["test", "validation"])
def test_a_split_that_is_given(tmp_path, test):
    folder = tmp_path / "data"
    write_tree(folder / "train", CLASSES)
    write_tree(folder / test, {"bee": 2, "cat": 1}, first=100)
    (folder / test).rename(tmp_path / "aside")
    with pytest.raises(
        FileNotFoundError,
        match="train alone: expected one of test, val, valid, validation, eval too; or give .*/data/train, "
        "of which a share is the test",
    ):
        read(folder)
    (tmp_path / "aside").rename(folder / test)
    data = read(folder)
    assert len(data.images) == 30 and shown(data.test_images) == [100, 101, 102]
    assert data.test_labels.tolist() == [1, 1, 2]
    write_tree(folder / test, {"dog": 1})
    with pytest.raises(ValueError, match="no training image of 'dog', a class of the test"):
        read(folder)
    with pytest.raises(ValueError, match="'bee' is a class of training and of the test"):
        read(folder, task="retrieval")


def test_hidden_and_other_files_do_not_count_and_folders_within_do(folder):
    for name in (
        ".hidden/0.jpg",
        "ant/.hidden/0.jpg",
        "ant/notes.txt",
        "readme.jpg",
        "ant/.0.jpg",
        "empty/notes.txt",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    write_image(folder / "bee" / "more" / "5.PNG", 50)
    data = read(folder)
    assert data.class_names == ("ant", "bee", "cat")
    assert 50 in shown(data.images) + shown(data.test_images)


def test_the_second_time_nothing_is_decoded(folder, monkeypatch):
    first = read(folder)
    monkeypatch.setattr(images, "decode", None)
    again = read(folder)
    assert torch.equal(first.images, again.images) and torch.equal(first.test_images, again.test_images)


@pytest.mark.parametrize(
    "how, clients",
    [
        (Partition("iid", num_clients=5), 5),
        (Partition("dirichlet", num_clients=6, alpha=0.1), 6),
        (Partition("classes", images_per_client=10, classes_per_client=1), 3),
    ],
)
def test_other_partitions(folder, how, clients):
    data = read(folder, how=how)
    assert len(data.clients) == clients and each_once(data.clients, 24)


def test_nobodys_images_have_no_natural_partition(folder):
    with pytest.raises(ValueError, match="these images have no authors"):
        read(folder, how=Partition("natural"))


@pytest.mark.parametrize("name", ["image_folder", "imagenet21k"])
def test_missing_folders(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{name}: no folder given"):
        read(None, name)
    with pytest.raises(FileNotFoundError, match=f"{name}: .*nowhere is not a folder"):
        read(tmp_path / "nowhere", name)
    (tmp_path / "data").mkdir()
    with pytest.raises(FileNotFoundError, match="folder for each"):
        read(tmp_path / "data", name)


def test_a_damaged_image_is_named(folder):
    (folder / "bee" / "003.jpg").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"image_folder: 1 of \d+ images are damaged: .*bee/003\.jpg"):
        read(folder)


@pytest.mark.parametrize("task", ["classification", "retrieval"])
def test_without_its_damaged_images_it_is_as_if_they_were_not_there(tmp_path, task, caplog):
    """A split that is given, as another share would be drawn of fewer files; class ant loses all."""
    folder = tmp_path / "data"
    write_tree(folder / "train", CLASSES)
    tested = {"ant": 2, "cat": 3} if task == "classification" else {"dog": 2, "elk": 3}
    write_tree(folder / "test", tested, first=100)
    damaged = [
        *(folder / "train" / "ant").iterdir(),
        folder / "train/cat/001.jpg",
        next(folder.glob("test/*/001.jpg")),
    ]
    for file in damaged:
        file.write_bytes(b"")
    with pytest.raises(DamagedImages, match="12 of 35 images are damaged"):
        read(folder, task=task)
    data = read(folder, task=task, skip_damaged=True)
    assert "image_folder: left out 12 images that could not be read: ant 1" in caplog.text
    gone = "classes without a training image now, left out of the test too: ant" in caplog.text
    assert gone == (task == "classification")
    again = read(folder, task=task, skip_damaged=True)
    for file in damaged:
        file.unlink()
    if task == "classification":
        (folder / "test/ant/000.jpg").unlink()
    expected = read(folder, task=task)
    for found in (data, again):
        assert found.class_names == expected.class_names == ("bee", "cat")
        assert torch.equal(found.images, expected.images) and torch.equal(found.labels, expected.labels)
        assert torch.equal(found.test_images, expected.test_images)
        assert torch.equal(found.test_labels, expected.test_labels)
        assert all(map(torch.equal, found.clients, expected.clients))


def test_where_nothing_is_left_it_is_refused(folder):
    for file in folder.rglob("*.jpg"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="30 of 30 images are damaged"):
        read(folder, skip_damaged=True)


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_a_share_that_cannot_be(folder, share):
    with pytest.raises(ValueError, match="test_share: expected a share of the images between 0 and 1"):
        read(folder, test_share=share)


# ---- ImageNet-21k


def test_imagenet21k(tmp_path):
    """Of 5 synsets 5 to 25 images; four fifths of each to clients of 4 synsets."""
    folder = tmp_path / "data"
    for c in range(1, 6):
        for i in range(5 * c):
            write_image(folder / f"n0000000{c}" / f"n0000000{c}_{i}.JPEG", 25 * c + i)
    data = read(folder, "imagenet21k", how=Partition("classes", images_per_client=12, classes_per_client=4))
    assert data.class_names == tuple(f"n0000000{c}" for c in range(1, 6))
    assert torch.bincount(data.labels).tolist() == [4, 8, 12, 16, 20]
    assert torch.bincount(data.test_labels).tolist() == [1, 2, 3, 4, 5]
    assert len(data.clients) == 5 and each_once(data.clients, 60)
    assert {len(data.labels[held].unique()) for held in data.clients} == {4}
    with pytest.raises(ValueError, match="num_clients: expected at most 60, .* got 25691"):
        read(folder, "imagenet21k", how=None)
    with pytest.raises(ValueError, match="task: expected classification"):
        read(folder, "imagenet21k", task="retrieval")
    write_image(folder / "cat" / "0.jpg", 0)
    with pytest.raises(ValueError, match=r"imagenet21k: .*cat is no synset: expected folders n<8 digits>"):
        read(folder, "imagenet21k")


def test_imagenet21k_still_packed(tmp_path):
    (tmp_path / "n01440764.tar").touch()
    with pytest.raises(FileNotFoundError, match=r"looked for .* \(the \.tar files in it .*image-net\.org"):
        read(tmp_path, "imagenet21k")


# ---- from the folder to the result


def config(folder: Path, **options) -> Config:
    settings = {"data": "image_folder", "data_dir": folder, "cache_dir": folder.parent / "cache"}
    settings |= {"image_size": 36, "crop_size": 32, "model": "conv4_rgb", "embedding_dim": 8}
    settings |= {"num_clients": 4, "classes_per_client": 2, "cohort": 3, "batch_size": 4, "rounds": 2}
    return Config(**(settings | {"num_negatives": 1, "eval_every": 1} | options))


def test_two_rounds(folder):
    results = [run(config(folder)) for _ in range(2)]
    assert len(results[0].history) == 2 and 0 <= results[0].summary.top1 <= 1
    assert torch.equal(results[0].weight, results[1].weight)
    assert results[0].summary.num_clients == 4 and results[0].summary.num_test_images == 6
    other = run(config(folder, crop_size=28))
    assert not torch.equal(results[0].weight, other.weight)


def test_a_run_without_damaged_images(folder, caplog):
    (folder / "bee" / "003.jpg").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="or go on without them: --skip-damaged"):
        run(config(folder))
    found = run(config(folder, skip_damaged=True, rounds=1))
    assert found.summary.num_train_images + found.summary.num_test_images == 29
    assert "image_folder: left out 1 image that could not be read: bee 1, listed in" in caplog.text


def test_progress_is_told_from_the_start(folder):
    said = []
    load_data(config(folder), on_progress=lambda *news: said.append(news))
    assert [done for _, done, _ in said] == [*range(25), *range(24, 31)], "training and test images"
    assert {(what, total) for what, _, total in said} == {("image_folder: decoding images", 30)}


@pytest.mark.exhaustive
def test_two_workers_map_the_same_images(folder):
    alone, together = (run(config(folder, workers=workers, rounds=1)) for workers in (1, 2))
    assert torch.equal(alone.weight, together.weight)


def test_gradient_noise_is_measured_on_the_centres(folder):
    settings = config(folder)
    data = load_data(settings)
    centres = replace(
        data, images=data.images[..., 2:34, 2:34], test_images=data.test_images[..., 2:34, 2:34]
    )
    cropped, whole = (
        noise.measure(settings, data, [1], batches=1, draws=1),
        noise.measure(replace(settings, crop_size=0), centres, [1], batches=1, draws=1),
    )
    assert cropped == whole and cropped[0].noise > 0


def test_a_retrieval_run(folder):
    found = run(config(folder, task="retrieval", rounds=1, num_negatives=0))
    assert found.summary.top1 is None and np.isfinite(found.summary.map_at_10)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"crop_size": 37}, ConfigError, "crop_size: expected at most 36, the images' pixels, got 37"),
        ({"model": "conv4"}, ValueError, r"model: conv4 can't take images of 3x32x32 .*conv4_rgb"),
        ({"crop_size": 0}, ValueError, r"model: conv4_rgb can't take images of 3x36x36"),
        ({"image_size": 0}, ValueError, "image_size: expected at least 1, got 0"),
        ({"partition": "natural"}, ValueError, "these images have no authors"),
        ({"data": "glyphs", "data_dir": None}, ConfigError, "image_size: expected 0 for glyphs"),
    ],
)
def test_settings_that_do_not_fit(folder, options, error, message):
    with pytest.raises(error, match=message):
        run(config(folder, **options))
