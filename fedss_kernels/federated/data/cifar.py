"""CIFAR-10 and CIFAR-100: 50,000 and 10,000 colour images of 32x32 pixels (Krizhevsky, 2009).

Read from what the authors distribute, the archive or what it unpacks to, in the first form that is there:

    cifar-10-binary.tar.gz  cifar-10-batches-bin/  data_batch_1.bin ... data_batch_5.bin, test_batch.bin
    cifar-10-python.tar.gz  cifar-10-batches-py/   the same without .bin, pickled
    cifar-100-binary.tar.gz cifar-100-binary/      train.bin, test.bin
    cifar-100-python.tar.gz cifar-100-python/      the same without .bin, pickled

and CIFAR-10 from JPEG files, train/<class>/<NNNN>.jpg and test/<class>/<NNNN>.jpg, in a folder or in
cifar10_jpeg.tar.xz. A record of the binary form is one byte of label, of CIFAR-100 two (coarse, fine), and
the 3 * 32 * 32 of an image. Nobody is known to own an image: by default 100 clients share them by
Dirichlet(0.5).
"""

from __future__ import annotations

import io
import lzma
import pickle
import posixpath
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..disk import named
from .cache import Arrays, cached_arrays
from .class_folders import ClassFolders, image_endings, is_hidden, kind_of
from .damage import DamagedImages, of_the_system, say_left_out
from .federated_data import FederatedData
from .images import VERSION, OnProgress, decode
from .known_classes import of_known, say_unknown, untested
from .partition import Partition, divide, divide_test
from .pixels import Failure, failure, read_file, unlimited
from .saved_text import text_of

SOURCE = "https://www.cs.toronto.edu/~kriz/cifar.html"
SIZE = 32
PIXELS = 3 * SIZE * SIZE
JPEGS = "cifar10_jpeg.tar.xz"
# What a damaged archive may raise.
DAMAGES = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError)


@dataclass(frozen=True)
class Format:
    """Of one of the two, in both forms."""

    name: str
    binary: str  # the folder in the archive NAME-binary.tar.gz
    python: str
    archive: str  # archive + "-binary.tar.gz"
    train: tuple[str, ...]
    test: str
    label_bytes: int  # before an image; the last is the class
    label_key: bytes
    num_classes: int
    names: str  # of the file with the classes' names, a line each
    meta: str  # the same in the pickled form
    names_key: bytes


CIFAR10 = Format(
    name="cifar10",
    binary="cifar-10-batches-bin",
    python="cifar-10-batches-py",
    archive="cifar-10",
    train=tuple(f"data_batch_{i}" for i in range(1, 6)),
    test="test_batch",
    label_bytes=1,
    label_key=b"labels",
    num_classes=10,
    names="batches.meta.txt",
    meta="batches.meta",
    names_key=b"label_names",
)
CIFAR100 = Format(
    name="cifar100",
    binary="cifar-100-binary",
    python="cifar-100-python",
    archive="cifar-100",
    train=("train",),
    test="test",
    label_bytes=2,
    label_key=b"fine_labels",
    num_classes=100,
    names="fine_label_names.txt",
    meta="meta",
    names_key=b"fine_label_names",
)
Batch = tuple[np.ndarray, np.ndarray]  # (n, 3, 32, 32) uint8, (n,) int64


def load_cifar(
    form: Format,
    *,
    data_dir: Path | None,
    seed: int,
    task: str = "classification",
    cache_dir: Path | None = None,
    skip_damaged: bool = False,
    on_progress: OnProgress | None = None,
    how: Partition | None = None,
) -> FederatedData:
    """Raises FileNotFoundError where no form is whole, ValueError where a file isn't what it should be.

    With `skip_damaged` it goes on without JPEG files that can't be read; the other forms are whole or not.
    """
    if task != "classification":
        raise ValueError(f"task: expected classification for {form.name}, got {task!r}")
    arrays = _read(form, data_dir, partial(_from_jpegs, cache_dir, skip_damaged, on_progress))
    walk = ClassFolders(form.name)
    walk.left_out.update(arrays.get("other_files", np.array([], str)).tolist())
    notes = (*walk.notes, *say_left_out(form.name, arrays.get("left_out", np.array([], str)).tolist()))
    if "other_files" in arrays:  # from files by class, of which some may be gone
        arrays, said = _of_known_classes(arrays)
        notes += said
    for part in ("labels", "test_labels"):
        strange = arrays[part][(arrays[part] < 0) | (arrays[part] >= form.num_classes)]
        if len(strange):
            raise ValueError(
                f"{form.name}: {part}: expected classes in [0, {form.num_classes}), got {strange[0]}; get it "
                f"again from {SOURCE}"
            )
    how = how or Partition("dirichlet", num_clients=100)
    clients, client_names = divide(arrays["labels"], how, seed)
    return FederatedData(
        name=form.name,
        images=torch.from_numpy(arrays["images"]),
        labels=torch.from_numpy(arrays["labels"]),
        clients=clients,
        client_names=client_names,
        test_images=torch.from_numpy(arrays["test_images"]),
        test_labels=torch.from_numpy(arrays["test_labels"]),
        num_classes=len(arrays["class_names"]),
        class_names=tuple(arrays["class_names"].tolist()),
        task=task,
        notes=notes,
        test_clients=divide_test(arrays["labels"], clients, arrays["test_labels"], how, task, seed),
    )


load_cifar10 = partial(load_cifar, CIFAR10)
load_cifar100 = partial(load_cifar, CIFAR100)


def _read(form: Format, data_dir: Path | None, from_jpegs: Callable[[Path], Arrays]) -> Arrays:
    wanted = f"{form.archive}-binary.tar.gz or {form.archive}-python.tar.gz (or what they unpack to)"
    if data_dir is None:
        raise FileNotFoundError(
            f"{form.name}: no folder given to look for {wanted} in; get them from {SOURCE}"
        )
    folder = Path(data_dir)
    for parsed, inside, suffix, kind in (
        (_from_binary, form.binary, ".bin", "binary"),
        (_from_pickle, form.python, "", "python"),
    ):
        batches = [name + suffix for name in (*form.train, form.test)]
        names = form.names if suffix else form.meta
        files = _find(form, folder, inside, f"{form.archive}-{kind}.tar.gz", [*batches, names])
        if files is not None:
            return _joined(form, [parsed(form, files[name], name) for name in batches], files[names], suffix)
    if form is CIFAR10:
        if (folder / JPEGS).is_file():
            return from_jpegs(folder / JPEGS)
        halves = [half for half in ("train", "test") if (folder / half).is_dir()]
        if len(halves) == 2:
            return from_jpegs(folder)
        if halves:
            absent = "test" if halves == ["train"] else "train"
            raise FileNotFoundError(
                f"cifar10: {folder} has {halves[0]} alone: expected {absent} too, as train/<class>/*.jpg and "
                f"test/<class>/*.jpg; or {wanted}, from {SOURCE}"
            )
    reason = "" if folder.is_dir() else ", which is not a folder"
    raise FileNotFoundError(f"{form.name}: looked for {wanted} in {folder}{reason}; get them from {SOURCE}")


def _find(
    form: Format, data_dir: Path, inside: str, archive: str, names: list[str]
) -> Mapping[str, bytes] | None:
    """The content of the files `names`, from a folder or from an archive; None where neither is there.

    The last two of them are the test's batch and the classes' names.
    """
    for folder in (data_dir / inside, data_dir):
        there = [name for name in names if (folder / name).is_file()]
        # A file named test or meta says little beside others; a training batch does, or two of the files.
        if there and (folder != data_dir or there[0] in names[:-2] or len(there) > 1):
            _check_whole(form, there, names, folder)
            return {name: (folder / name).read_bytes() for name in names}
    path = data_dir / archive
    if not path.is_file():
        return None
    found = {}
    for name, content in _members(form.name, path):
        if name.partition("/")[2] in names:
            found[name.partition("/")[2]] = content
    _check_whole(form, list(found), names, path)
    return found


def _check_whole(form: Format, there: list[str], names: list[str], place: Path) -> None:
    missing = [name for name in names if name not in there]
    if missing:
        raise FileNotFoundError(
            f"{form.name}: looked for {', '.join(missing)} in {place}, where of its files there "
            f"are {', '.join(there) or 'none'}; get it from {SOURCE}"
        )


def _members(name: str, path: Path) -> list[tuple[str, bytes]]:
    """(name, content) of every file in an archive; "./a/b" is a/b."""
    try:
        with named(path), tarfile.open(path) as archive:
            opened = ((member.name, archive.extractfile(member)) for member in archive if member.isfile())
            return [(posixpath.normpath(member), file.read()) for member, file in opened if file is not None]
    except DAMAGES as error:
        if of_the_system(error):
            raise
        raise ValueError(f"{name}: {path} is damaged ({error}); get it again from {SOURCE}") from error


def _joined(form: Format, batches: list[Batch], names: bytes, suffix: str) -> Arrays:
    *train, (test_images, test_labels) = batches
    sizes = [len(labels) for _, labels in batches]
    if len(set(sizes)) > 1 and form is CIFAR10:  # all have 10,000; train and test of CIFAR-100 differ
        raise ValueError(f"{form.name}: expected batches of equal size, got {sizes}; get it from {SOURCE}")
    listed = text_of(names, "backslashreplace").split() if suffix else _names_in_pickle(form, names)
    if len(listed) != form.num_classes:
        raise ValueError(
            f"{form.name}: expected {form.num_classes} names of classes in "
            f"{form.names if suffix else form.meta}, got {len(listed)}; get it again from {SOURCE}"
        )
    return {
        "images": np.concatenate([images for images, _ in train]),
        "labels": np.concatenate([labels for _, labels in train]),
        "test_images": test_images,
        "test_labels": test_labels,
        "class_names": np.array(listed),
    }


def _from_binary(form: Format, content: bytes, name: str) -> Batch:
    record = form.label_bytes + PIXELS
    if not content or len(content) % record:
        raise ValueError(
            f"{form.name}: {name}: expected records of {record} bytes, got {len(content)} bytes; get it "
            f"again from {SOURCE}"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    images = records[:, form.label_bytes :].reshape(-1, 3, SIZE, SIZE)
    return images.copy(), records[:, form.label_bytes - 1].astype(np.int64)


# ---- pickles: nothing in one is called or made but what stands here


class _Array:
    """What a pickled numpy array was: its shape, its type and its bytes. No code of numpy reads them."""

    shape: object = None
    dtype: object = None
    content: object = None

    def __init__(self, *ignored: object) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, _, self.content = state


class _Dtype:
    def __init__(self, name: Any = None, *ignored: object) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        pass  # the byte order, of which a byte has none


ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    (module, name): stand_in
    for name, stand_in, modules in (
        ("_reconstruct", _Array, ("numpy.core.multiarray", "numpy._core.multiarray")),
        ("ndarray", _Array, ("numpy",)),
        ("dtype", _Dtype, ("numpy",)),
    )
    for module in modules
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no such file needs")
        return ALLOWED[module, name]


def _unpickled(form: Format, content: bytes, name: str) -> dict:
    """Written by Python 2, its text is bytes."""
    try:
        found = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(
            f"{form.name}: {name} is not as its authors wrote it ({error}); get it again from {SOURCE}"
        ) from None
    if not isinstance(found, dict):
        raise ValueError(f"{form.name}: {name}: expected a dictionary, got {type(found).__name__}")
    return found


def _from_pickle(form: Format, content: bytes, name: str) -> Batch:
    found = _unpickled(form, content, name)
    labels, data = found.get(form.label_key), found.get(b"data")
    count = len(labels) if isinstance(labels, list) else 0
    pixels = data.content if isinstance(data, _Array) else None
    whole = (
        isinstance(labels, list)
        and count > 0
        and all(type(label) is int and 0 <= label < form.num_classes for label in labels)
        and isinstance(data, _Array)
        and data.shape == (count, PIXELS)
        and isinstance(data.dtype, _Dtype)
        and data.dtype.name in ("u1", b"u1")
    )
    if not (whole and isinstance(pixels, bytes) and len(pixels) == count * PIXELS):
        raise ValueError(
            f"{form.name}: {name}: expected b'data', (n, {PIXELS}) uint8, and {form.label_key!r}, n classes "
            f"below {form.num_classes}; get it again from {SOURCE}"
        )
    images = np.frombuffer(pixels, np.uint8).reshape(-1, 3, SIZE, SIZE)
    return images.copy(), np.array(labels, dtype=np.int64)


def _names_in_pickle(form: Format, content: bytes) -> list[str]:
    names = _unpickled(form, content, form.meta).get(form.names_key)
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise ValueError(f"{form.name}: {form.meta}: expected a list of names, {form.names_key!r}")
    return [name.decode("utf-8", "backslashreplace") for name in names]


# ---- JPEG files


def _from_jpegs(
    cache_dir: Path | None, skip_damaged: bool, on_progress: OnProgress | None, place: Path
) -> Arrays:
    """From a folder or an archive with train/<class>/*.jpg and test/<class>/*.jpg."""
    import PIL

    walk = ClassFolders("cifar10")
    files = [place] if place.is_file() else [*walk.images(place / "train"), *walk.images(place / "test")]
    stats = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key: dict[str, Any] = {"version": VERSION, "pillow": PIL.__version__, "files": stats}
    key["other_files"] = sorted(walk.left_out.items())
    if skip_damaged:
        key["skip_damaged"] = True

    def make() -> Arrays:
        found = _jpegs(place, files, others := walk.left_out.copy())
        with unlimited:
            arrays, failures = _decoded(place, found, on_progress or (lambda what, done, total: None))
        measured = of_known(arrays["labels"], arrays["test_labels"])[2]
        if failures and not (skip_damaged and len(measured)):
            raise DamagedImages.inside("cifar10", str(place), failures, len(found), cache_dir, SOURCE)
        if failures:
            arrays["left_out"] = np.array([name.split("/")[1] for name in failures])
        arrays["other_files"] = np.array(list(others.elements()), str)
        return arrays

    return cached_arrays("cifar10", key, make, cache_dir)


def _of_known_classes(arrays: Arrays) -> tuple[Arrays, tuple[str, ...]]:
    """(the arrays without classes that have no training image, notes on what the test lacks)"""
    names, tested = arrays["class_names"], np.unique(arrays["test_labels"])
    classes, labels, rows, test_labels = of_known(arrays["labels"], arrays["test_labels"])
    notes = say_unknown("cifar10", names[np.setdiff1d(tested, classes)].tolist())
    known = {
        "labels": labels,
        "test_images": arrays["test_images"][rows],
        "test_labels": test_labels,
        "class_names": names[classes],
    }
    return arrays | known, (*notes, *untested(len(np.setdiff1d(classes, tested))))


def _jpegs(place: Path, files: list[Path], others: Counter[str]) -> Sequence[tuple[str, bytes | Path]]:
    """(name, its content or what has it) of every image in an archive or a folder, in order of their names.

    Counts in `others` what else is in an archive; what is hidden is not looked at, as in a folder.
    """
    found: Sequence[tuple[str, bytes | Path]]
    if place.is_file():
        found = _members("cifar10", place)
    else:
        found = [(file.relative_to(place).as_posix(), file) for file in files]
    endings, images = image_endings(), []
    for name, content in found:
        pieces = name.split("/")
        if is_hidden(name):
            continue
        if kind_of(name) not in endings:
            others[kind_of(name)] += 1
        elif len(pieces) > 2 and pieces[0] not in ("train", "test"):
            others["neither in train nor in test"] += 1
        else:
            images.append((name, content))
    loose = next((name for name, _ in images if name.count("/") < 2), None)
    if loose is not None:
        raise ValueError(f"cifar10: expected train/<class>/*.jpg and test/<class>/*.jpg, got {loose}")
    for split in ("train", "test"):
        if images and not any(name.startswith(f"{split}/") for name, _ in images):
            raise ValueError(f"cifar10: no images in {place / split}")
    return sorted(images, key=lambda image: image[0])


def _decoded(
    place: Path, found: Sequence[tuple[str, bytes | Path]], say: OnProgress
) -> tuple[Arrays, dict[str, Failure]]:
    """The images that can be read, and of the others what is wrong with them."""
    classes = sorted({name.split("/")[1] for name, _ in found})
    if len(classes) != CIFAR10.num_classes:
        raise ValueError(
            f"cifar10: expected train/<class>/*.jpg and test/<class>/*.jpg of 10 classes in {place}, got "
            f"{', '.join(classes) or 'none'}"
        )
    trained = {name.split("/")[1] for name, _ in found if name.startswith("train/")}
    if unknown := [c for c in classes if c not in trained]:
        raise ValueError(f"cifar10: no training image of {unknown[0]!r}, a class of the test, in {place}")
    arrays: Arrays = {"class_names": np.array(classes)}
    failures: dict[str, Failure] = {}
    done = 0
    for split, prefix in (("train", ""), ("test", "test_")):
        pixels, labels = [], []
        for name, content in found:
            if not name.startswith(f"{split}/"):
                continue
            try:
                pixels.append(decode(read_file(content) if isinstance(content, Path) else content, SIZE))
                labels.append(classes.index(name.split("/")[1]))
            except Exception as error:  # a damaged image may raise anything
                failures[name] = failure(error)
            done += 1
            say("cifar10: decoding images", done, len(found))
        arrays[f"{prefix}images"] = (
            np.frombuffer(b"".join(pixels), np.uint8).reshape(-1, 3, SIZE, SIZE).copy()
        )
        arrays[f"{prefix}labels"] = np.array(labels, np.int64)
    return arrays, failures
