"""Any folder of images with a folder for each class, of its own or of `train` and one of TESTS:

<class>/**/*.jpg                     a share of each class' images, drawn by the seed, is the test set
train/<class>/**/*.jpg  test/<class>/**/*.jpg

In letters of any case, training, train_set and so on too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .class_folders import ByClass, ClassFolders
from .composition import alike, told_apart
from .damage import DamagedImages, printable, say_left_out
from .federated_data import FederatedData, Found
from .images import OnProgress, cached_images
from .known_classes import say_unknown, untested
from .partition import Partition, divide, divide_test, draw_share

SOURCE = "wherever they come from: this is a folder of your own"
TEST_SHARE = 0.2


def load_image_folder(
    *,
    data_dir: Path | None,
    seed: int,
    task: str = "classification",
    cache_dir: Path | None = None,
    image_size: int = 256,
    test_share: float = TEST_SHARE,
    skip_damaged: bool = False,
    on_progress: OnProgress | None = None,
    how: Partition | None = None,
    on_found: Callable[[Found], None] | None = None,
) -> FederatedData:
    """Every image below data_dir/<class>, in colour, resized to image_size x image_size.

    Where there are folders `train` and one of TESTS those are the split; else a share `test_share` of
    each class' images is the test set of a classification, a share of the classes that of a retrieval.
    """
    folder = _existing(data_dir)
    walk, unread = ClassFolders("image_folder", skip_damaged=skip_damaged), tuple[str, ...]()
    if given := walk.split(folder):
        train, test = walk.classes(given[0]), walk.classes(given[1])
        if test_share != TEST_SHARE:
            names = " and ".join(folder.name for folder in given)
            unread = (f"test_share {test_share:g} has no effect: {names} are folders",)
    else:
        split = split_classes if task == "retrieval" else split_images
        train, test = split(walk.classes(folder), seed, test_share)
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
        how=how or Partition("classes", images_per_client=None, classes_per_client=None),
        notes=(*walk.notes, *unread),
        on_found=on_found,
    )


def _existing(data_dir: Path | None) -> Path:
    if data_dir is None:
        raise FileNotFoundError("image_folder: no folder given; expected one with a folder for each class")
    if not Path(data_dir).is_dir():
        raise FileNotFoundError(
            f"image_folder: {data_dir} is not a folder; expected one for each class in it"
        )
    return Path(data_dir)


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
    if not test:
        most = max(map(len, by_class.values()))
        raise ValueError(
            f"no class has an image to spare for the test: a share of {share} of {most} images, rounded, is "
            "none: give folders train and test"
        )
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
    skip_damaged: bool,
    notes: tuple[str, ...] = (),
    on_found: Callable[[Found], None] | None = None,  # called before any image is read, which takes long
    **options: Any,  # of _from_whole_files
) -> FederatedData:
    """The data set of these files; classes are numbered in the order of `train`.

    With `skip_damaged` it is that of the files that can be read, as if there were no others.

    Raises ValueError where a classification's test has a class that training lacks, or a retrieval's one that
    it has, or a file is there twice. Else as `cached_images`.
    """
    try:
        return _from_whole_files(name, train, test, task=task, notes=notes, on_found=on_found, **options)
    except DamagedImages as damaged:
        left = _left(name, train, test, task, damaged) if skip_damaged else None
        if left is None:
            raise
        *parts, said = left
        return from_files(name, *parts, task=task, skip_damaged=True, notes=(*notes, *said), **options)


def _from_whole_files(
    name: str,
    train: Mapping[str, list[Path]],
    test: Mapping[str, list[Path]],
    *,
    task: str,
    seed: int,
    image_size: int,
    cache_dir: Path | None,
    source: str,
    on_progress: OnProgress | None,
    how: Partition,
    owner: Mapping[Path, str] | None = None,  # whose a training image is, where images have authors
    notes: tuple[str, ...],
    on_found: Callable[[Found], None] | None,
) -> FederatedData:
    """As `from_files`, of files that can all be read; else raises DamagedImages."""
    _check_classes(name, train, test, task)
    number = {name: c for c, name in enumerate(train)}
    of_test = number if task == "classification" else {c: i for i, c in enumerate(test)}
    files = [file for of_class in train.values() for file in of_class]
    test_files = [file for of_class in test.values() for file in of_class]
    _check_once(name, [*files, *test_files])
    labels, test_labels = _labels(train, number), _labels(test, of_test)
    made_by = how if owner else how.fitted(np.bincount(labels))
    clients, client_names = divide(labels, made_by, seed, *_authors(files, owner))
    known = (*notes, *untested(len(train) - len(test) if task == "classification" else 0))
    if on_found:
        on_found(Found(name, len(train), len(files), len(test_files), len(clients), made_by, known))
    images, test_images = cached_images(
        name, [files, test_files], image_size, cache_dir, source, on_progress=on_progress
    )
    return FederatedData(
        name=name,
        images=images,
        labels=torch.from_numpy(labels),
        clients=clients,
        client_names=client_names,
        test_images=test_images,
        test_labels=torch.from_numpy(test_labels),
        num_classes=len(train),
        class_names=tuple(map(printable, train)),
        test_class_names=tuple(map(printable, test)) if task == "retrieval" else (),
        task=task,
        how=made_by,
        notes=known,
        test_clients=divide_test(labels, clients, test_labels, made_by, task, seed),
    )


def _check_classes(
    name: str, train: Mapping[str, list[Path]], test: Mapping[str, list[Path]], task: str
) -> None:
    common, new = [c for c in test if c in train], [c for c in test if c not in train]
    pair = alike(new, train) or ()
    why = f" ({told_apart(*pair)})" if pair else ""
    if task == "classification" and new:
        missing, way = (pair[0], f"{why}: rename one as the other") if pair else (new[0], "")
        raise ValueError(f"{name}: no training image of {missing!r}, a class of the test{way}")
    if task == "retrieval" and (shared := [*pair, *common]):
        raise ValueError(
            f"{name}: {shared[0]!r} is a class of training and of the test{why}, which a retrieval's must "
            "not share; expected task 'classification'"
        )
    if len(train) < 2:
        raise ValueError(f"{name}: expected at least 2 classes to train on, got 1: {next(iter(train))}")


def _labels(by_class: Mapping[str, list[Path]], number: Mapping[str, int]) -> np.ndarray:
    """(N,) int64: the class of each image."""
    sizes = [len(found) for found in by_class.values()]
    return np.repeat(np.array([number[c] for c in by_class], dtype=np.int64), sizes)


def _check_once(name: str, files: list[Path]) -> None:
    twice = next((file for file, count in Counter(files).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{name}: {twice} is listed twice, of training and test images")


def _authors(
    files: list[Path], owner: Mapping[Path, str] | None
) -> tuple[list[str] | None, np.ndarray | None]:
    """(names of the images' authors, the place among them of each image's); None where there are none."""
    if not owner:
        return None, None
    authors = sorted({owner[file] for file in files})
    place = {author: k for k, author in enumerate(authors)}
    return authors, np.array([place[owner[file]] for file in files])


def _left(
    name: str,
    train: Mapping[str, list[Path]],
    test: Mapping[str, list[Path]],
    task: str,
    damaged: DamagedImages,
) -> tuple[ByClass, ByClass, list[str]] | None:
    """(what is left of training, of the test, notes on what isn't), and says it; None where one is empty."""
    left, test_left = _without(train, damaged.files), _without(test, damaged.files)
    unknown = {c for c in test_left if c not in left} if task == "classification" else set()
    test_left = {c: found for c, found in test_left.items() if c not in unknown}
    if not (left and test_left):
        return None
    lost = (c for part in (train, test) for c in part for file in part[c] if file in damaged.files)
    said = say_left_out(name, lost, f", listed in {damaged.listing}")
    return left, test_left, [*said, *say_unknown(name, unknown)]


def _without(by_class: Mapping[str, list[Path]], files: Container[Path]) -> ByClass:
    left = {c: [file for file in found if file not in files] for c, found in by_class.items()}
    return {c: found for c, found in left.items() if found}
