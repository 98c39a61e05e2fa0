"""Any folder of images with a folder for each class, of its own or of `train` and one of TESTS:

<class>/**/*.jpg                     a share of each class' images, drawn by the seed, is the test set
train/<class>/**/*.jpg  test/<class>/**/*.jpg
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Container, Mapping
from pathlib import Path

import numpy as np
import torch

from .damage import DamagedImages, printable, say_left_out, some
from .images import EXTENSIONS, OnProgress, cached_images
from .partition import FederatedData, Partition, divide, draw_share

SOURCE = "wherever they come from: this is a folder of your own"
ByClass = dict[str, list[Path]]  # the files of each class, sorted
TESTS = ("test", "val", "valid", "validation")
log = logging.getLogger(__name__)


def load_image_folder(
    *,
    data_dir: Path | None,
    seed: int,
    task: str = "classification",
    cache_dir: Path | None = None,
    image_size: int = 256,
    test_share: float = 0.2,
    skip_damaged: bool = False,
    on_progress: OnProgress | None = None,
    how: Partition | None = None,
) -> FederatedData:
    """Every image below data_dir/<class>, in colour, resized to image_size x image_size.

    Where there are folders `train` and one of TESTS those are the split; else a share `test_share` of
    each class' images is the test set of a classification, a share of the classes that of a retrieval.
    """
    folder = _existing(data_dir)
    given = next((folder / name for name in TESTS if (folder / name).is_dir()), None)
    if (folder / "train").is_dir() and given:
        train, test = find_classes(folder / "train"), find_classes(given)
    else:
        classes = find_classes(folder)
        if list(classes) == ["train"]:
            expected = ", ".join(TESTS)
            raise FileNotFoundError(f"image_folder: {folder} has train alone: expected {expected} too")
        split = split_classes if task == "retrieval" else split_images
        train, test = split(classes, seed, test_share)
    return from_files(
        "image_folder",
        train,
        test,
        task=task,
        seed=seed,
        image_size=image_size,
        cache_dir=cache_dir,
        source=SOURCE,
        skip_damaged=skip_damaged,
        on_progress=on_progress,
        how=how or Partition("classes"),
    )


def _existing(data_dir: Path | None) -> Path:
    if data_dir is None:
        raise FileNotFoundError("image_folder: no folder given; expected one with a folder for each class")
    if not Path(data_dir).is_dir():
        raise FileNotFoundError(
            f"image_folder: {data_dir} is not a folder; expected one for each class in it"
        )
    return Path(data_dir)


def find_classes(folder: Path) -> ByClass:
    """The images below each folder in `folder`, the folders' names the classes. Hidden ones don't count."""
    found = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith("."):
            files = images_below(Path(entry.path))
            if files:
                found[entry.name] = files
    if not found:
        raise FileNotFoundError(
            f"no <class>/*.jpg in {folder} (or of {', '.join(EXTENSIONS)}): expected a folder for each class"
        )
    return found


def images_below(folder: Path) -> list[Path]:
    """Sorted; none that is hidden, or in a hidden folder."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in names
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    return sorted(found)


def split_images(by_class: Mapping[str, list[Path]], seed: int, share: float) -> tuple[ByClass, ByClass]:
    """(training, test): `share` of each class' images are the test's, rounded, but never all of them."""
    _check_share(share)
    train, test = ByClass(), ByClass()
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 0x5911])))
    for name, files in by_class.items():
        count = min(round(share * len(files)), len(files) - 1)
        chosen = set(rng.permutation(len(files))[:count].tolist())
        train[name] = [file for i, file in enumerate(files) if i not in chosen]
        if chosen:
            test[name] = [files[i] for i in sorted(chosen)]
    return train, test


def split_classes(by_class: Mapping[str, list[Path]], seed: int, share: float) -> tuple[ByClass, ByClass]:
    """(training, test): `share` of the classes are the test's, at least one, but never all of them."""
    held_out = draw_share(len(by_class), seed, share, name="test_share", of="classes")
    chosen = {list(by_class)[i] for i in held_out.tolist()}
    train = {name: files for name, files in by_class.items() if name not in chosen}
    return train, {name: by_class[name] for name in sorted(chosen)}


def _check_share(share: float) -> None:
    if not 0 < share < 1:
        raise ValueError(f"test_share: expected a share of the images between 0 and 1, got {share}")


def from_files(
    name: str,
    train: Mapping[str, list[Path]],
    test: Mapping[str, list[Path]],
    *,
    task: str,
    seed: int,
    image_size: int,
    cache_dir: Path | None,
    source: str,
    skip_damaged: bool,
    on_progress: OnProgress | None,
    how: Partition,
    owner: Mapping[Path, str] | None = None,  # whose a training image is, where images have authors
) -> FederatedData:
    """The data set of these files; classes are numbered in the order of `train`.

    With `skip_damaged` it is that of the files that can be read, as if there were no others.

    Raises ValueError where a classification's test has a class that training lacks, or a retrieval's one that
    it has, or a file is there twice. Else as `cached_images`.
    """
    number = {name: c for c, name in enumerate(train)}
    common, new = [c for c in test if c in number], [c for c in test if c not in number]
    if task == "classification" and new:
        raise ValueError(f"{name}: no training image of {new[0]!r}, a class of the test")
    if task == "retrieval" and common:
        raise ValueError(
            f"{name}: {common[0]!r} is a class of training and of the test, which a retrieval's must not "
            "share; expected task 'classification'"
        )
    if not test:
        raise ValueError(f"{name}: no class has an image to spare for the test")
    of_test = number if task == "classification" else {c: i for i, c in enumerate(test)}
    files = [file for of_class in train.values() for file in of_class]
    test_files = [file for of_class in test.values() for file in of_class]
    times = Counter([*files, *test_files])
    twice = next((file for file, count in times.items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{name}: {twice} is listed twice, of training and test images")
    labels = np.repeat([number[c] for c in train], [len(found) for found in train.values()])
    test_labels = np.repeat([of_test[c] for c in test], [len(found) for found in test.values()])
    authors = sorted({owner[file] for file in files}) if owner else None
    place = {author: k for k, author in enumerate(authors or ())}
    owners = np.array([place[owner[file]] for file in files]) if owner else None
    clients, client_names = divide(labels, how, seed, authors, owners)  # before the images: they take long
    try:
        images, test_images = cached_images(
            name, [files, test_files], image_size, cache_dir, source, on_progress=on_progress
        )
    except DamagedImages as damaged:
        left = _left(name, train, test, task, damaged) if skip_damaged else None
        if left is None:
            raise
        return from_files(
            name,
            *left,
            task=task,
            seed=seed,
            image_size=image_size,
            cache_dir=cache_dir,
            source=source,
            skip_damaged=True,
            on_progress=on_progress,
            how=how,
            owner=owner,
        )
    return FederatedData(
        name=name,
        images=images,
        labels=torch.from_numpy(labels.astype(np.int64)),
        clients=clients,
        client_names=client_names,
        test_images=test_images,
        test_labels=torch.from_numpy(test_labels.astype(np.int64)),
        num_classes=len(train),
        class_names=tuple(map(printable, train)),
        task=task,
    )


def _left(
    name: str,
    train: Mapping[str, list[Path]],
    test: Mapping[str, list[Path]],
    task: str,
    damaged: DamagedImages,
) -> tuple[ByClass, ByClass] | None:
    """What is left of both parts, and says what isn't; None where one of them is empty."""
    left, test_left = _without(train, damaged.files), _without(test, damaged.files)
    unknown = {c for c in test_left if c not in left} if task == "classification" else set()
    test_left = {c: found for c, found in test_left.items() if c not in unknown}
    if not (left and test_left):
        return None
    lost = (c for part in (train, test) for c in part for file in part[c] if file in damaged.files)
    say_left_out(name, lost, f", listed in {damaged.listing}")
    if unknown:
        log.warning(
            "%s: classes without a training image now, left out of the test too: %s",
            name,
            some(map(printable, sorted(unknown))),
        )
    return left, test_left


def _without(by_class: Mapping[str, list[Path]], files: Container[Path]) -> ByClass:
    left = {c: [file for file in found if file not in files] for c, found in by_class.items()}
    return {c: found for c, found in left.items() if found}
