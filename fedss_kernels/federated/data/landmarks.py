"""Landmarks-User-160k: photographs of landmarks by who took them (Hsu, Qi and Brown, ECCV 2020).

A landmark is a class, an author a client: 164,172 images of 2,028 landmarks by 1,262 authors. Read from the
authors' lists, which have no images, and the images of Google Landmarks v2, whose train set they are of:

    federated_train.csv               user_id,image_id,class
    test.csv                          image_id,class
    0/0/0/000a1b2c3d4e5f67.jpg        by the first three letters of the id, or all in one folder; here or in
                                      a folder `train` or `images`
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path

from .class_folders import ByClass
from .federated_data import FederatedData, Found
from .image_folder import from_files
from .images import OnProgress
from .partition import Partition
from .saved_text import text_of

SOURCE = "https://storage.googleapis.com/gresearch/federated-vision-datasets/landmarks-user-160k.zip"
IMAGES = "https://github.com/cvdfoundation/google-landmark (train)"
COLUMNS = {"federated_train.csv": ("user_id", "image_id", "class"), "test.csv": ("image_id", "class")}
FOLDERS = ("", "train", "images")


def load_landmarks(
    *,
    data_dir: Path | None,
    seed: int,
    task: str = "classification",
    cache_dir: Path | None = None,
    image_size: int = 256,
    skip_damaged: bool = False,
    on_progress: OnProgress | None = None,
    how: Partition | None = None,
    on_found: Callable[[Found], None] | None = None,
) -> FederatedData:
    """Reads both lists and the images they name from `data_dir`; `seed` is for partitions but the natural."""
    if task != "classification":
        raise ValueError(f"task: expected classification for landmarks, got {task!r}")
    folder = find_folder(data_dir)
    train_rows, test_rows = (read_list(folder / name, columns) for name, columns in COLUMNS.items())
    find = _Finder(folder)
    owner = {find(row["image_id"]): row["user_id"] for row in train_rows}
    if len(owner) < len(train_rows):
        raise ValueError(f"landmarks: federated_train.csv has an image twice; get it again from {SOURCE}")
    return from_files(
        "landmarks",
        _by_class(train_rows, find),
        _by_class(test_rows, find),
        task=task,
        seed=seed,
        image_size=image_size,
        cache_dir=cache_dir,
        source=IMAGES,
        skip_damaged=skip_damaged,
        on_progress=on_progress,
        how=how or Partition("natural"),
        owner=owner,
        on_found=on_found,
    )


def find_folder(data_dir: Path | None) -> Path:
    if data_dir is None:
        raise FileNotFoundError(
            f"landmarks: no folder given to look for {' and '.join(COLUMNS)} in; get them from {SOURCE}"
        )
    missing = [name for name in COLUMNS if not (Path(data_dir) / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"landmarks: looked for {' and '.join(missing)} in {data_dir}; get them from {SOURCE}"
        )
    return Path(data_dir)


def read_list(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of one. Raises ValueError, with the line, for any that's odd."""
    with io.StringIO(text_of(path.read_bytes(), "backslashreplace"), newline="") as file:
        reader = csv.DictReader(file)
        if not set(columns) <= set(reader.fieldnames or ()):
            raise ValueError(
                f"landmarks: {path}: expected columns {', '.join(columns)}, got "
                f"{', '.join(reader.fieldnames or ()) or 'none'}; get it again from {SOURCE}"
            )
        rows = []
        for row in _rows(reader, path):
            whole = all(row[column] for column in columns)
            if not whole or not row["class"].isdecimal() or not row["image_id"].isalnum():
                raise ValueError(
                    f"landmarks: {path}, line {reader.line_num}: expected {', '.join(columns)}, the class a "
                    f"number, got {[row[column] for column in columns]}; get it again from {SOURCE}"
                )
            rows.append(row)
    if not rows:
        raise ValueError(f"landmarks: {path} lists no images; get it again from {SOURCE}")
    return rows


def _rows(reader: csv.DictReader, path: Path) -> Iterator[dict[str, str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise ValueError(
            f"landmarks: {path}, line {reader.line_num}: {error}; get it again from {SOURCE}"
        ) from None


def _by_class(rows: list[dict[str, str]], find: _Finder) -> ByClass:
    found: dict[int, list[Path]] = {}
    for row in rows:
        found.setdefault(int(row["class"]), []).append(find(row["image_id"]))
    return {str(c): sorted(found[c]) for c in sorted(found)}


class _Finder:
    """Where an id's image is; where it should be, if it is nowhere."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.found: dict[str, Path] = {}

    def __call__(self, image_id: str) -> Path:
        if image_id not in self.found:
            places = [
                self.folder / inside / place
                for inside in FOLDERS
                for place in (Path(*image_id[:3], f"{image_id}.jpg"), Path(f"{image_id}.jpg"))
            ]
            self.found[image_id] = next((place for place in places if place.is_file()), places[0])
        return self.found[image_id]
