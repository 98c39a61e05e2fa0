"""Image files as one array in the cache: decoded and resized once, then mapped.

In the cache's folder, of a data set NAME at SIZE pixels:

    NAME-SIZEpx-KEY.npy            an array_file, of the files that KEY is the fingerprint of
    NAME-SIZEpx-KEY.partial        the same, of which some images are missing yet
    NAME-SIZEpx-KEY-damaged.txt    a line for each file that could not be read: its path, a tab, the reason
    NAME-SIZEpx-KEY-missing.txt    the same of files that were not there

An image that any of these arrays has is not decoded again while its file stays as it is. Pillow decodes,
extra `sim`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Container, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from ..lock import InUse, Lock
from . import decoding
from .array_file import DIGEST, ArrayFile, Shape, is_whole, map_images
from .cache import default_cache_dir, key_of, remove_leftovers, written_to
from .damage import MISSING, NOWHERE, DamagedImages, MissingImages, read_list, some, write_list
from .pixels import Failure, decode, failure, read_file, unlimited

VERSION = 5  # raise it whenever the same files would give another array
SHARE = 2 << 20  # bytes of files that are worth a process of their own
WAIT = 0.2  # seconds between two looks at what another process makes
OnProgress = Callable[[str, int, int], None]  # (what is going on, how much of it is done, of how much)
log = logging.getLogger(__name__)


def cached_images(
    name: str,  # of the data set
    parts: Sequence[Sequence[Path]],
    image_size: int,
    cache_dir: Path | None,
    source: str,  # where the files come from
    *,
    processes: int | None = None,  # that decode; None: a core each, where there is enough to do
    on_progress: OnProgress | None = None,
) -> list[Tensor]:  # of each part (N, 3, image_size, image_size) uint8, mapped
    """Every file's image, resized to image_size x image_size; decoded once for the same files and size.

    Raises MissingImages for files that are not there, a FileNotFoundError, DamagedImages, a ValueError, for
    images that can't be read, OSError where the cache has no room or can't be written: each says which, and
    the first two where to get them. What is missing, or has no room, is said before anything is decoded;
    whatever happens then, what was decoded is kept for the next time.
    """
    if image_size < 1:
        raise ValueError(f"image_size: expected at least 1, got {image_size}")
    if not all(parts):
        raise ValueError(f"{name}: no images; get them from {source}")
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    files = _Files(name, parts, image_size, folder, source, on_progress or (lambda what, done, total: None))
    unfinished = [part for part in files.look() if not is_whole(part.path, part.shape)]
    if unfinished:
        _make(files, unfinished, processes)
    return [map_images(part.path, part.shape) for part in files.found]


@dataclass
class _Part:
    """Files whose images are one array."""

    files: Sequence[Path]
    digests: np.ndarray  # (N,) DIGEST, of all that each image depends on
    bytes: int  # of the files
    path: Path  # of the array
    shape: Shape
    before: int  # images in the parts before

    @property
    def partial(self) -> Path:
        return self.path.with_suffix(".partial")


@dataclass
class _Files:
    """What `cached_images` is asked for, and after a `look` the parts that are found."""

    name: str
    parts: Sequence[Sequence[Path]]
    image_size: int
    folder: Path
    source: str
    say: OnProgress
    found: list[_Part] = field(default_factory=list)

    @property
    def prefix(self) -> str:
        return f"{self.name}-{self.image_size}px-"

    @property
    def total(self) -> int:
        return sum(map(len, self.parts))

    @property
    def listing(self) -> Path:
        key = key_of(part.path.name.encode() for part in self.found)
        return self.folder / f"{self.prefix}{key}-damaged.txt"

    def look(self) -> list[_Part]:
        """Each file's size and time of change. Raises MissingImages at once, as decoding takes long."""
        import PIL

        begin = hashlib.sha256(json.dumps([VERSION, PIL.__version__, self.image_size]).encode())
        lost, seen = dict[Path, str](), 0
        for files in self.parts:
            digests, size, before = bytearray(), 0, seen
            for file in files:
                seen += 1
                if seen % 1000 == 0:
                    self.say(f"{self.name}: looking at files", seen, self.total)
                try:
                    stat = file.stat()
                except OSError as error:
                    lost[file] = MISSING if error.errno in NOWHERE else error.strerror or str(error)
                    continue
                digest = begin.copy()
                digest.update(os.fsencode(file.absolute()) + b"\0%d\0%d" % (stat.st_size, stat.st_mtime_ns))
                digests += digest.digest()[: DIGEST.itemsize]
                size += stat.st_size
            path = self.folder / f"{self.prefix}{key_of([bytes(digests)])}.npy"
            shape = (len(files), 3, self.image_size, self.image_size)
            self.found.append(_Part(files, np.frombuffer(digests, DIGEST), size, path, shape, before))
        if lost:
            raise MissingImages.of(self.name, lost, self.total, self.folder / self.prefix, self.source)
        return self.found


def _make(files: _Files, unfinished: list[_Part], processes: int | None) -> None:
    """Fills the arrays that are not whole. Raises DamagedImages, at once where a list says so."""
    failures = _known(files)
    if not failures:
        with written_to(files.folder, files.name):
            _check_room(files.folder, unfinished, files.name)
            _mention_old(files.folder, files.name, files.image_size)
            for part in unfinished:
                maker = _Maker(part, files.prefix, f"{files.name}: decoding images", files.total, files.say)
                failures |= maker.make(processes or _worth(part.bytes))
            _clear(files, failures)
            if failures:
                write_list(files.listing, failures)
    if failures:
        raise DamagedImages.among(files.name, failures, files.total, files.listing, files.source)


def _known(files: _Files) -> dict[Path, Failure]:
    """The files that the list names, but for those that can be read by now: what is settled is not tried."""
    listed = read_list(files.listing)
    found = dict[Path, Failure]()
    for file in (file for part in files.parts for file in part if file in listed):
        answer: bytes | Failure = listed[file]
        if not listed[file].settled:
            (answer,) = _decoded([file], files.image_size, processes=1)
        if isinstance(answer, Failure):
            found[file] = answer
    return found


# ---- making it


class _Maker:
    """One array, filled in a file of another name, so that no reader sees half of it."""

    def __init__(self, part: _Part, prefix: str, what: str, total: int, say: OnProgress):
        self.part, self.prefix, self.what, self.total, self.say = part, prefix, what, total, say

    def make(self, processes: int) -> dict[Path, Failure]:
        """The files that can't be read; where there are none the array is made."""
        with self._alone() as mine:
            if not mine:
                return {}
            array = ArrayFile(self.part.partial, self.part.shape)
            try:
                self._take_over(array)
                failures = self._decode(array, processes)
            except KeyboardInterrupt:
                log.warning("%s: stopped; those decoded are kept: the same command goes on", self.what)
                raise
            finally:
                array.close()
        if not failures:
            with contextlib.suppress(FileNotFoundError):  # another process has found it finished, just now
                os.replace(self.part.partial, self.part.path)
        return failures

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether the array is to be made; false where another process, waited for, has done so."""
        while not is_whole(self.part.path, self.part.shape):
            self.part.partial.touch()
            try:
                lock = Lock(self.part.partial)
            except InUse:
                self.say(f"{self.what}, in another process", 0, 0)
                time.sleep(WAIT)
                continue
            except FileNotFoundError:  # it is done, just now
                continue
            try:
                if is_whole(self.part.path, self.part.shape):
                    self.part.partial.unlink(missing_ok=True)
                    break
                if self.part.partial.exists():  # nobody has removed it, just now
                    yield True
                    return
            finally:
                lock.release()
        yield False

    def _take_over(self, array: ArrayFile) -> None:
        """What other arrays have of these images, those of an earlier try among them."""
        wanted = {self.part.digests[i].tobytes(): i for i in self._absent(array)}
        others = self.part.path.parent.glob(f"{self.prefix}*")
        for path in sorted(path for path in others if path.suffix in (".npy", ".partial")):
            if not wanted:
                break
            try:
                other = ArrayFile(path)
            except (OSError, ValueError):  # gone, or not what it should be
                continue
            with contextlib.closing(other):
                for row, digest in enumerate(other.digests.tolist()):
                    if digest in wanted and other.shape[1:] == self.part.shape[1:]:
                        array.put(wanted.pop(digest), other.image(row), digest)
                        self._say(len(wanted))

    def _say(self, absent: int) -> None:
        self.say(self.what, self.part.before + len(self.part.files) - absent, self.total)

    def _absent(self, array: ArrayFile) -> list[int]:
        return np.flatnonzero(array.digests != self.part.digests).tolist()

    def _decode(self, array: ArrayFile, processes: int) -> dict[Path, Failure]:
        absent, failures = self._absent(array), dict[Path, Failure]()
        files = [self.part.files[i] for i in absent]
        self._say(len(files))
        with contextlib.closing(_decoded(files, self.part.shape[-1], processes)) as images:
            for done, (i, image) in enumerate(zip(absent, images, strict=True), start=1):
                if isinstance(image, Failure):
                    failures[self.part.files[i]] = image
                else:
                    array.put(i, image, self.part.digests[i].tobytes())
                self._say(len(files) - done)
        return failures


def _worth(size: int) -> int:
    """The processes that so many bytes of files are worth."""
    return max(1, min(decoding.cores(), size // SHARE))


def _decoded(files: Sequence[Path], size: int, processes: int) -> Generator[bytes | Failure, None, None]:
    """As decoding.decoded; one process is this one, as another takes a while to start."""
    if min(processes, len(files)) > 1:
        yield from decoding.decoded(files, size, min(processes, len(files)))
        return
    with unlimited:
        for file in files:
            try:
                yield decode(read_file(file), size)
            except Exception as error:  # a damaged image may raise anything
                yield failure(error)


# ---- the cache's folder


def _check_room(folder: Path, parts: Sequence[_Part], name: str) -> None:
    needed = sum(math.prod(part.shape) for part in parts)
    for part in parts:
        with contextlib.suppress(OSError):  # what it has already
            needed -= 512 * getattr(part.partial.stat(), "st_blocks", 0)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{name}: the resized images need {needed / 1e9:,.1f} GB in {folder}, which has "
            f"{free / 1e9:,.1f} GB free: set cache_dir to another folder, or image_size to fewer pixels"
        )


def _clear(files: _Files, failures: Container[Path]) -> None:
    """Removes the partial arrays that these took over, the lists that have files which can be read now.

    And what writers left who were killed long ago.
    """
    partials = set(files.folder.glob(f"{files.prefix}*.partial"))
    for partial in partials - {part.partial for part in files.found}:
        with contextlib.suppress(OSError, ValueError):  # gone, in use, or not what it should be
            lock = Lock(partial)
            try:
                with contextlib.closing(ArrayFile(partial)) as array:
                    there = set(array.digests.tolist()) - {bytes(DIGEST.itemsize)}
                if not there or any(not there.isdisjoint(part.digests.tolist()) for part in files.found):
                    partial.unlink()
            finally:
                lock.release()
    lists = list(files.folder.glob(f"{files.prefix}*.txt"))
    whole = {file for part in files.parts for file in part if file not in failures} if lists else set()
    for listing in lists:
        if not whole.isdisjoint(read_list(listing)):
            listing.unlink(missing_ok=True)
    remove_leftovers(files.folder)


@functools.cache  # said once
def _mention_old(folder: Path, name: str, image_size: int) -> None:
    old = [path for path in folder.glob(f"{name}-{image_size}-*.npy") if len(path.stem.split("-")[-1]) == 16]
    if old:
        log.warning(
            "%s: images are decoded anew, as they are upright and on white now; what an earlier version made "
            "can be deleted: %s",
            name,
            some(map(str, old)),
        )
