"""Folders of images as classes: what is found below them, and what is left out, counted.

What Pillow reads here is an image, by its file's ending; what is hidden is none. Links are followed, a folder
is looked at once, and one that cannot be read is an error: nothing gets lost unsaid.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from .composition import alike, told_apart
from .damage import NOWHERE, OR_SKIP

ByClass = dict[str, list[Path]]  # the files of each class, sorted

# Formats that Pillow knows and that are no pictures: EPS is a program for Ghostscript, MPEG a film.
NO_PICTURES = ("EPS", "MPEG")
# Endings of pictures that Pillow reads only where it was built so, or never.
OF_PICTURES = (".avif", ".avifs", ".heic", ".heif", ".j2k", ".jp2", ".jxl", ".svg", ".webp")
# Endings of files that often have several pictures: pages, frames.
OF_SEVERAL = (".apng", ".avifs", ".dcx", ".flc", ".fli", ".gif", ".tif", ".tiff")
NAMED = 5  # things of a kind that a note names
_OF_A_SPLIT = "(?:[ _-]?(?:set|data|images))?"
TRAIN = re.compile(f"(?:train|training){_OF_A_SPLIT}", re.IGNORECASE)
# The kinds of test folders, of several the first.
TESTS = ("test", "val", "valid", "validation", "eval")
_TEST = {
    name: re.compile(f"{name}{more}{_OF_A_SPLIT}", re.IGNORECASE)
    for name, more in zip(TESTS, ("(?:ing)?", "", "", "", "(?:uation)?"), strict=True)
}


def image_endings() -> frozenset[str]:
    """ ".jpg" and what else Pillow reads here, in small letters."""
    from PIL import Image, ImageFile, features

    Image.preinit()  # common formats before all others, in the order in which they are tried
    found = set()
    for ending, format in Image.registered_extensions().items():
        opener = Image.OPEN[format][0] if format in Image.OPEN else None
        stub = isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile)
        if opener and not stub and format not in NO_PICTURES:
            found.add(ending.lower())
    if not features.check("webp"):
        found.discard(".webp")
    if not features.check("jpg_2000"):
        found -= {".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"}
    return frozenset(found)


def is_hidden(name: str) -> bool:
    """Whether a file in an archive, by its path there, is hidden, or what a Mac puts beside the files."""
    return any(piece.startswith((".", "__MACOSX")) for piece in name.split("/"))


def kind_of(name: str | Path) -> str:
    """By which files that are left out are counted: ".txt", in small letters, or "no ending"."""
    return os.path.splitext(name)[1].lower() or "no ending"


class DanglingLink(FileNotFoundError):
    """A link to what is not there, or to itself; to a folder, perhaps of many images."""


class ClassFolders:
    """Looks for images below folders, and keeps count of what it leaves out.

    Raises OSError for what can't be read, ValueError for a folder that is there twice, by links.
    """

    def __init__(
        self,
        name: str,  # of the data set
        endings: frozenset[str] | None = None,
        skip_damaged: bool | None = None,  # go on without folders in others that may not be read; None: never
    ):
        self.name, self.skip_damaged = name, skip_damaged
        self.endings = image_endings() if endings is None else endings
        self.left_out = Counter[str]()  # files, by ending or reason
        self.of_several = Counter[str]()  # files that may have more than one picture, by ending
        self.unread: list[str] = []  # what can't be read, and why
        self.unused: list[str] = []  # folders without an image, or beside those that are used
        self.levels: list[str] = []  # what may be the classes instead
        self._seen: dict[tuple[int, int], Path] = {}

    def classes(self, folder: Path) -> ByClass:
        """The images below each folder in `folder`, the folders' names the classes."""
        self._enter(folder)
        found = ByClass()
        for entry in self._entries(folder):
            with self._reading():
                if not self._is_folder(entry):
                    self.left_out["in no class's folder"] += 1
                elif files := self.images(Path(entry.path)):
                    found[entry.name] = files
                else:
                    self.unused.append(entry.name)
        if not found:
            self._nothing_found(folder)
        self._check_names(folder, found)
        self._check_level(folder, found)
        return found

    def images(self, folder: Path) -> list[Path]:
        """Sorted, of all folders in it too."""
        self._enter(folder)
        found = []
        for entry in self._entries(folder):
            with self._reading():
                found += self._images_at(entry)
        return sorted(found)

    def note_empty(self, folder: Path, images: list[Path]) -> None:
        """Keeps folders below `folder` that have none of its `images` as unused; of nested ones the outer."""
        held = {parent for image in images for parent in image.parents}
        inner = [folder]
        while inner:
            for entry in self._entries(inner.pop()):
                if not self._is_folder(entry):
                    continue
                path = Path(entry.path)
                if path in held:
                    inner.append(path)
                else:
                    self.unused.append(path.relative_to(folder).as_posix())

    def _images_at(self, entry: os.DirEntry[str]) -> list[Path]:
        ending = kind_of(entry.name)
        if ending in self.endings and _leads_nowhere(entry):  # whoever reads it says that it is missing
            return [Path(entry.path)]
        if self._is_folder(entry):
            return self.images(Path(entry.path))
        if ending not in self.endings:
            self.left_out[ending] += 1
            return []
        if ending in OF_SEVERAL:
            self.of_several[ending] += 1
        return [Path(entry.path)]  # a FIFO too: whoever reads it says that it is none

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """A folder that may not be read, or a link to nothing, is left out here, or the reason to end.

        As a folder is that goes away while it is read.
        """
        try:
            yield
        except (PermissionError, DanglingLink) as error:
            words = str(error)
            if self.skip_damaged:
                found = words.removeprefix(f"{self.name}: ")
                if found not in self.unread:  # it is looked for training and test, then for classes
                    self.unread.append(found)
            elif self.skip_damaged is None or words.endswith(OR_SKIP):
                raise
            else:
                raise type(error)(words + OR_SKIP) from None

    def split(self, folder: Path) -> tuple[Path, Path] | None:
        """(training's folder, the test's) where `folder` has such."""
        entries = self._entries(folder)
        names = []
        for entry in entries:
            with self._reading():
                if self._is_folder(entry):
                    names.append(entry.name)
        train = self._one(folder, [name for name in names if TRAIN.fullmatch(name)])
        tests = {kind: [name for name in names if of.fullmatch(name)] for kind, of in _TEST.items()}
        test = next((self._one(folder, found) for found in tests.values() if found), None)
        if train is None or test is None:
            if train is not None and len(names) == 1:
                raise FileNotFoundError(
                    f"{self.name}: {folder} has {train} alone: expected one of {', '.join(TESTS)} too; or "
                    f"give {folder / train}, of which a share is the test"
                )
            return None
        self.unused += [name for name in names if name not in (train, test)]
        self.left_out["in no class's folder"] += len(entries) - len(names)
        return folder / train, folder / test

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out, in words."""
        notes = []
        if total := self.left_out.total():
            kinds = [f"{kind} {count:,}" for kind, count in self.left_out.most_common() if count]
            notes.append(f"left out: {total:,} file{'s' * (total != 1)} ({_some(kinds)})")
            missing = [ending for ending in OF_PICTURES if ending in self.left_out]
            if missing:
                notes.append(f"the Pillow installed here reads no {', '.join(missing)}")
        if self.of_several:
            kinds = [f"{kind} {count:,}" for kind, count in self.of_several.most_common()]
            notes.append(f"of files with several pictures the first is read ({_some(kinds)})")
        if self.unread:
            notes.append(f"left out what cannot be read: {_some(self.unread)}")
        if self.unused:
            notes.append(f"unused folders: {_some(sorted(self.unused))}")
        return (*notes, *self.levels)

    # ---- one folder

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """All that is not hidden, by name."""
        try:
            with os.scandir(folder) as found:
                return sorted((e for e in found if not e.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            self._cannot_read(folder, error)

    def _is_folder(self, entry: os.DirEntry[str]) -> bool:
        try:
            if entry.is_symlink():
                entry.stat()
            return entry.is_dir()
        except OSError as error:
            self._cannot_read(Path(entry.path), error, leads_nowhere=_leads_nowhere(entry))

    def _enter(self, folder: Path) -> None:
        try:
            stat = folder.stat()
        except OSError as error:
            self._cannot_read(folder, error)
        before = self._seen.setdefault((stat.st_dev, stat.st_ino), folder)
        if before is not folder and stat.st_ino:
            raise ValueError(f"{self.name}: {folder} is a link to {before}, which is looked at already")

    def _cannot_read(self, path: Path, error: OSError, leads_nowhere: bool = False) -> NoReturn:
        gone = leads_nowhere or isinstance(error, FileNotFoundError)
        kind = "a link to what is not there" if gone else "not to be read"
        as_it_is = DanglingLink if leads_nowhere else type(error)
        raise as_it_is(f"{self.name}: {path} is {kind} ({error.strerror})") from None

    def _one(self, folder: Path, names: list[str]) -> str | None:
        if len(names) > 1:
            raise ValueError(f"{self.name}: {folder} has {' and '.join(names)}: expected one of them")
        return names[0] if names else None

    # ---- whether the folders are the classes

    def _nothing_found(self, folder: Path) -> NoReturn:
        loose = sum(Path(entry.name).suffix.lower() in self.endings for entry in self._entries(folder))
        has = f", where {loose:,} images are in no folder" if loose else ""
        left_out = f" ({'; '.join(self.notes)})" if self.notes else ""
        raise FileNotFoundError(
            f"{self.name}: no <class>/*.jpg in {folder}{has}: expected a folder for each class{left_out}"
        )

    def _check_names(self, folder: Path, classes: ByClass) -> None:
        """Nobody could tell two that look the same apart in a table; most likely they are one class."""
        if pair := alike(classes, classes):
            raise ValueError(
                f"{self.name}: {folder} has two folders {pair[0]!r} ({told_apart(*pair)}): put their images "
                "in one of them, or rename one"
            )

    def _check_only(self, folder: Path, name: str, files: list[Path]) -> None:
        parents = {file.parent for file in files}
        common = Path(os.path.commonpath(parents))
        inner = sorted({file.relative_to(common).parts[0] for file in files})
        if common not in parents:
            raise ValueError(
                f"{self.name}: {folder} has one folder of images, {name}; {_some(inner)} are in {common}: "
                f"if these are the classes, or training and test, give {common} instead"
            )

    def _check_level(self, folder: Path, classes: ByClass) -> None:
        """One folder around the classes is an error, so is half a split; doubt is worth a word."""
        if len(classes) == 1:
            self._check_only(folder, *next(iter(classes.items())))
        inner = {
            name: {file.relative_to(folder / name).parts[0] for file in files}
            for name, files in classes.items()
            if not any(file.parent == folder / name for file in files)
        }
        for name, within in inner.items():
            if len(within) > 1 and any(of.fullmatch(name) for of in (TRAIN, *_TEST.values())):
                raise ValueError(
                    f"{self.name}: {folder} has {name}, with {_some(sorted(within))} in it, like half a "
                    f"split: expected train and one of {', '.join(TESTS)}, or a folder for each class"
                )
        first = next(iter(inner.values()), set())
        if len(inner) == len(classes) and len(first) > 1 and all(each == first for each in inner.values()):
            self.levels.append(f"the classes are {_some(list(classes))}, not {_some(sorted(first))} in them")


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_symlink() and not entry.stat()
    except OSError as error:  # else, as of a folder that nobody may enter, another matter
        return error.errno in NOWHERE


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
