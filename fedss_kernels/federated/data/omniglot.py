"""Omniglot: characters of many alphabets, each drawn once by 20 people (Lake et al., Science 350, 2015).

A character is a class. A client is an (alphabet, drawer) pair: drawer 3 of Tibetan and drawer 3 of Korean
need not be the same person. Drawers 17 to 20 are the test split of classification; a retrieval holds out
whole alphabets instead. Read from the authors' zip files (github.com/brendenlake/omniglot, folder python)
or from what they unpack to:

    images_background/<alphabet>/character<NN>/<id>_<drawer 01..20>.png      105x105, 1 bit, ink is 0
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..disk import named
from .cache import Arrays, cached_arrays
from .class_folders import ClassFolders, is_hidden, kind_of
from .damage import OR_SKIP, DamagedImages, of_the_system, say_left_out
from .drawings import Drawings, partition
from .federated_data import FederatedData
from .images import OnProgress
from .partition import Partition
from .pixels import Failure, failure, read_file

VERSION = 4  # raise it whenever the same files would give other arrays
PARTS = ("images_background", "images_evaluation")
SOURCE = "https://github.com/brendenlake/omniglot/tree/master/python"
DRAWERS = 20
FIRST_TEST_DRAWER = 17
ORIGINAL_SIZE = 105
SIZE = 28
# A pixel of the small image covers 105 / 28 = 15 / 4 of the original's in each direction: entry (i, j)
# counts the quarters of original pixel j in small pixel i.
OVERLAP = (np.arange(4 * ORIGINAL_SIZE) // 15 == np.arange(SIZE)[:, None]).astype(np.float32)
OVERLAP = OVERLAP.reshape(SIZE, ORIGINAL_SIZE, 4).sum(2)
FILE_NAME = re.compile(r"([^/]+)/(character\d+)/\d+_(0[1-9]|1\d|20)\.png")
MISPLACED = "not where a drawing is"


def load_omniglot(
    *,
    data_dir: Path | None,
    seed: int,
    task: str = "classification",
    cache_dir: Path | None = None,
    holdout: float = 0.25,
    skip_damaged: bool = False,
    on_progress: OnProgress | None = None,
    how: Partition | None = None,
) -> FederatedData:
    """Reads images_background, images_evaluation or both from `data_dir`, each zipped or unpacked.

    Images are averaged down to 28x28, ink is high. `seed` chooses the alphabets that a retrieval holds out,
    a share `holdout` of them. Files that are no drawings by drawers 01 to 20 are counted in its notes. Raises
    FileNotFoundError where neither part is there, ValueError where a file isn't what it should be or one of
    the parts has no drawing; with `skip_damaged` the data set goes on without images that can't be read.
    """
    parts = find_parts(data_dir)
    walk = _walk()
    key: dict[str, Any] = {
        "version": VERSION,
        "files": [file for part in parts for file in _fingerprint(part, walk)],
        "other_files": sorted(walk.left_out.items()),
    }
    if skip_damaged:
        key["skip_damaged"] = True
    arrays = cached_arrays(
        "omniglot", key, lambda: read(parts, skip_damaged, cache_dir, on_progress), cache_dir
    )
    walk.left_out = Counter(arrays["other_files"].tolist())
    walk.unused += arrays["unused"].tolist()
    notes = (*walk.notes, *say_left_out("omniglot", arrays.get("left_out", np.array([], str)).tolist()))
    data = partition("omniglot", _table(arrays), task, seed, holdout, how)
    return replace(data, notes=(*notes, *data.notes))


def find_parts(data_dir: Path | None) -> list[Path]:
    """The parts that `data_dir` holds, each a zip file or a folder; the folder where both are there."""
    wanted = "Omniglot's images_background.zip or images_evaluation.zip (or what they unpack to)"
    if data_dir is None:
        raise FileNotFoundError(f"omniglot: no folder given to look for {wanted} in; get them from {SOURCE}")
    folder = Path(data_dir)
    found = []
    for part in PARTS:
        if (folder / part).is_dir():
            found.append(folder / part)
        elif (folder / f"{part}.zip").is_file():
            found.append(folder / f"{part}.zip")
    if not found:
        reason = "" if folder.is_dir() else ", which is not a folder"
        raise FileNotFoundError(f"omniglot: looked for {wanted} in {folder}{reason}; get them from {SOURCE}")
    return found


def _fingerprint(part: Path, walk: ClassFolders) -> list[tuple[str, int, int]]:
    """(name, size, time of change) of a zip file, or of all files in a folder."""
    files = [part] if part.is_file() else walk.images(part)
    if not part.is_file():
        walk.note_empty(part, files)  # a character whose drawings are gone
    stats = ((str(file.absolute()), file.stat()) for file in files)
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _walk() -> ClassFolders:
    return ClassFolders("omniglot", frozenset({".png"}))


def read(
    parts: list[Path],
    skip_damaged: bool = False,
    cache_dir: Path | None = None,  # for the list of those that are damaged
    on_progress: OnProgress | None = None,
) -> Arrays:
    """Every image of `parts`, in the order of alphabet, character, drawer."""
    found, failures, lost = list[Drawing](), dict[str, Failure](), list[Drawing]()
    walk = _walk()
    for part in parts:
        before = len(found) + len(lost)
        for alphabet, character, drawer, name, content in (
            _from_zip(part, walk) if part.is_file() else _from_folder(part, walk)
        ):
            try:
                found.append((alphabet, character, drawer, decode(content(), name)))
            except (*DAMAGES, ValueError) as error:
                why = failure(error)
                failures[name] = replace(why, reason=why.reason.removeprefix(f"omniglot: {name} "))
                lost.append((alphabet, character, drawer, b""))
            if on_progress:
                on_progress("omniglot: decoding images", len(found) + len(lost), 0)
        if len(found) + len(lost) == before:
            left_out = "".join(f" ({note})" for note in walk.notes)
            raise ValueError(
                f"omniglot: no {part.stem}/<alphabet>/character<NN>/<id>_<drawer>.png in {part}{left_out}; "
                f"get it again from {SOURCE}, or remove it"
            )
    drawings = sorted(found)
    where = " or ".join(map(str, parts))
    if failures and not (skip_damaged and drawings):
        total = len(found) + len(lost)
        raise DamagedImages.inside("omniglot", where, failures, total, cache_dir, SOURCE)
    lost += _missing(drawings + lost, skip_damaged)
    characters = sorted({(alphabet, character) for alphabet, character, _, _ in drawings})
    alphabets = sorted({alphabet for alphabet, _ in characters})
    number = {name: i for i, name in enumerate(characters)}
    packed = np.frombuffer(b"".join(image for *_, image in drawings), dtype=np.uint8)
    return {
        "images": packed.reshape(-1, SIZE, SIZE).copy(),
        "character": np.array([number[a, c] for a, c, _, _ in drawings], dtype=np.int64),
        "drawer": np.array([drawer for _, _, drawer, _ in drawings], dtype=np.int64),
        "character_names": np.array([f"{a}/{c}" for a, c in characters]),
        "alphabet": np.array([alphabets.index(a) for a, _ in characters], dtype=np.int64),
        "alphabet_names": np.array(alphabets),
        "other_files": np.array(list(walk.left_out.elements()), str),
        "unused": np.array(walk.unused, str),  # of zip files; of folders it is looked at anew
        **({"left_out": np.array([f"{a}/{c}" for a, c, *_ in lost])} if lost else {}),
    }


def _table(arrays: Arrays) -> Drawings:
    return Drawings(
        images=arrays["images"],
        character=arrays["character"],
        person=arrays["drawer"],
        in_test=arrays["drawer"] >= FIRST_TEST_DRAWER,
        character_names=tuple(arrays["character_names"].tolist()),
        alphabet=arrays["alphabet"],
        alphabet_names=tuple(arrays["alphabet_names"].tolist()),
    )


Drawing = tuple[str, str, int, bytes]  # alphabet, character, drawer, the image's SIZE * SIZE bytes
File = tuple[str, str, int, str, Callable[[], bytes]]  # the same, but a name for messages, and what reads it


# What a damaged archive may raise: a broken directory or stream, a method nobody knows, a password asked.
DAMAGES = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, UnicodeError)


def _from_zip(path: Path, walk: ClassFolders) -> Iterator[File]:
    """What isn't hidden, as in a folder; `walk` keeps what is left out, and folders without a drawing."""
    folders, held = set[str](), set[str]()
    try:
        with named(path), zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                top, _, below = name.partition("/")
                match = FILE_NAME.fullmatch(below) if top == path.stem else None
                if match is None:
                    if name.endswith("/"):
                        folders |= _folders(below) if top == path.stem and not is_hidden(name) else set()
                    elif not is_hidden(name):
                        kind = kind_of(name)
                        walk.left_out[MISPLACED if kind == ".png" else kind] += 1
                else:
                    held |= _folders(below)
                    yield match[1], match[2], int(match[3]), name, partial(archive.read, name)
    except DAMAGES as error:
        if of_the_system(error):
            raise
        raise ValueError(f"omniglot: {path} is damaged ({error}); get it again from {SOURCE}") from error
    walk.unused += [name for name in folders - held if name.rpartition("/")[0] in {"", *held}]  # the outer


def _folders(name: str) -> set[str]:
    """Those that a file is in, or a folder's name that ends with "/" says: "a/b/c" is in "a" and "a/b"."""
    return {name[: found.start()] for found in re.finditer("/", name)}


def _from_folder(path: Path, walk: ClassFolders) -> Iterator[File]:
    for file in walk.images(path):
        match = FILE_NAME.fullmatch(file.relative_to(path).as_posix())
        if match is None:
            walk.left_out[MISPLACED] += 1
        else:
            yield match[1], match[2], int(match[3]), str(file), partial(read_file, file)


def _missing(drawings: list[Drawing], skip: bool) -> list[Drawing]:
    """Of every character those of the 20 drawers whose image isn't there.

    Raises ValueError unless they may be left out, and where one is there twice: two copies are mixed.
    """
    seen = Counter((alphabet, character, drawer) for alphabet, character, drawer, _ in drawings)
    missing = list[Drawing]()
    for alphabet, character in sorted({name[:2] for name in seen}):
        counts = [seen[alphabet, character, drawer] for drawer in range(1, DRAWERS + 1)]
        if max(counts) > 1 or (0 in counts and not skip):
            raise ValueError(
                f"omniglot: expected {DRAWERS} images of {alphabet}/{character}, one by each drawer, "
                f"got {sum(counts)} by {sum(map(bool, counts))} drawers{'' if max(counts) > 1 else OR_SKIP}"
            )
        missing += [(alphabet, character, i + 1, b"") for i, count in enumerate(counts) if not count]
    return missing


def decode(png: bytes, name: str) -> bytes:
    """A 105x105 1-bit PNG, ink 0, as SIZE * SIZE bytes of a 28x28 image, ink 255; `name` is for the error."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"omniglot: {name} is not a readable PNG ({error})") from error
    if image.mode != "1" or image.size != (ORIGINAL_SIZE, ORIGINAL_SIZE):
        raise ValueError(
            f"omniglot: {name}: expected {ORIGINAL_SIZE}x{ORIGINAL_SIZE} pixels of 1 bit (mode '1'), got "
            f"{image.width}x{image.height} of mode {image.mode!r}"
        )
    ink = (~np.asarray(image)).astype(np.float32)
    quarters = (
        OVERLAP @ ink @ OVERLAP.T
    )  # whole numbers up to 15 * 15, so exact in whatever order they are added
    return np.rint(quarters * (255 / 15**2)).astype(np.uint8).tobytes()
