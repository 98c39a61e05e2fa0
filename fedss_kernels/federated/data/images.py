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
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..lock import InUse, Lock
from . import decoding
from .array_file import DIGEST, ArrayFile, Shape, is_whole, map_images
from .cache import default_cache_dir, remove_leftovers, written_to
from .decoding import printable
from .pixels import Failure, decode, failure, read_file

VERSION = 2  # raise it whenever the same files would give another array
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff")
NAMED = 5  # files that an error names
SHARE = 2 << 20  # bytes of files that are worth a process of their own
KEPT_EVERY = 1.0  # seconds; what was decoded since is lost where the process is killed
WAIT = 0.2  # seconds between two looks at what another process makes
OnProgress = Callable[[str, int, int], None]  # (what is going on, how much of it is done, of how much)
log = logging.getLogger(__name__)


class DamagedImages(ValueError):
    """Files that are damaged or can't be read; a data set may go on without them."""

    def __init__(self, message: str, files: Mapping[Path, str], listing: Path):
        super().__init__(message)
        self.files, self.listing = files, listing  # with the reasons

    @classmethod
    def inside(
        cls,
        name: str,  # of the data set
        place: str,  # the archive or folder that the files are in
        failures: Mapping[str, str],
        total: int,
        cache_dir: Path | None,
        source: str,
    ) -> DamagedImages:
        """Of a data set that is read as a whole, from an archive or a folder."""
        folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
        listing = folder / f"{name}-{_key(map(os.fsencode, failures))}-damaged.txt"
        listed = _try_listing(listing, failures)
        first, reason = next(iter(failures.items()))
        more = f", and {len(failures) - 1} more of {total} images" if len(failures) > 1 else ""
        return cls(
            f"{name}: {place}: {printable(first)} is damaged ({reason}){more}; get it again from {source}"
            f"{OR_SKIP}{listed}",
            {Path(file): why for file, why in failures.items()},
            listing,
        )


class MissingImages(DamagedImages, FileNotFoundError):
    """Files that are not there."""


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
    say = on_progress or (lambda what, done, total: None)
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    prefix = f"{name}-{image_size}px-"
    digests, sizes = _fingerprints(name, parts, image_size, source, folder / prefix, say)
    keys = [_key([of_part.tobytes()]) for of_part in digests]
    paths = [folder / f"{prefix}{key}.npy" for key in keys]
    shapes = [(len(files), 3, image_size, image_size) for files in parts]
    unfinished = [i for i, path in enumerate(paths) if not is_whole(path, shapes[i])]
    if unfinished:
        listing = folder / f"{prefix}{_key([key.encode() for key in keys])}-damaged.txt"
        total = sum(map(len, parts))
        known = _listed(listing, parts, image_size)
        if known:
            raise _damaged(name, known, total, listing, source)
        failures: dict[Path, Failure] = {}
        with written_to(folder, name):
            _check_room(folder, [(paths[i], shapes[i]) for i in unfinished], name)
            _mention_old(folder, name, image_size)
            for i in unfinished:
                before = sum(map(len, parts[:i]))
                maker = _Maker(name, prefix, parts[i], digests[i], shapes[i], paths[i], say, before, total)
                failures |= maker.make(_processes(processes, sizes[i]))
            _clear(folder, prefix, paths, digests)
            _forget_lists(folder, prefix, (file for files in parts for file in files if file not in failures))
            if failures:
                write_listing(listing, {file: _line(found) for file, found in failures.items()})
        if failures:
            raise _damaged(name, failures, total, listing, source)
    return [map_images(path, shape) for path, shape in zip(paths, shapes, strict=True)]


# ---- which files they are


def _fingerprints(
    name: str,
    parts: Sequence[Sequence[Path]],
    image_size: int,
    source: str,
    prefix: Path,  # of the files in the cache
    say: OnProgress,
) -> tuple[list[np.ndarray], list[int]]:
    """Of each file a digest of all that its image depends on, its time of change too; each part's bytes."""
    import PIL

    begin = hashlib.sha256(json.dumps([VERSION, PIL.__version__, image_size]).encode())
    digests = list[np.ndarray]()
    sizes, missing, total = [], list[Path](), sum(map(len, parts))
    for files in parts:
        of_part, size = bytearray(), 0
        for i, file in enumerate(files):
            if i % 1000 == 999:
                say(f"{name}: looking at files", sum(map(len, digests)) + i, total)
            try:
                stat = file.stat()
            except (FileNotFoundError, NotADirectoryError):
                missing.append(file)
                continue
            digest = begin.copy()
            digest.update(os.fsencode(file.absolute()) + b"\0%d\0%d" % (stat.st_size, stat.st_mtime_ns))
            of_part += digest.digest()[: DIGEST.itemsize]
            size += stat.st_size
        digests.append(np.frombuffer(of_part, DIGEST))
        sizes.append(size)
    if missing:
        raise _missing(name, missing, total, prefix, source)
    return digests, sizes


def _key(digests: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


# ---- what is wrong with some


def _missing(name: str, files: Sequence[Path], total: int, prefix: Path, source: str) -> MissingImages:
    reasons = dict.fromkeys(files, "missing")
    listing = prefix.with_name(f"{prefix.name}{_key(map(os.fsencode, files))}-missing.txt")
    listed = _try_listing(listing, reasons)
    named = some(map(printable, files))
    return MissingImages(
        f"{name}: {len(files)} of {total} images are missing: {named}; get them from {source}{OR_SKIP}"
        f"{listed}",
        reasons,
        listing,
    )


def _damaged(
    name: str, failures: Mapping[Path, Failure], total: int, listing: Path, source: str
) -> DamagedImages:
    fault = "are damaged" if all(found.damaged for found in failures.values()) else "cannot be read"
    named = some(f"{printable(file)} ({found.reason})" for file, found in failures.items())
    return DamagedImages(
        f"{name}: {len(failures)} of {total} images {fault}: {named}; get them again from {source}{OR_SKIP}; "
        f"all of them are listed in {listing}, the others are kept in the cache",
        {file: found.reason for file, found in failures.items()},
        listing,
    )


OR_SKIP = "; or go on without them: --skip-damaged"


def some(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - NAMED} more" if len(every) > NAMED else ""
    return ", ".join(every[:NAMED]) + more


UNREAD = "cannot be read: "  # before the reasons that may be gone the next time


def _line(found: Failure) -> str:
    return found.reason if found.damaged else UNREAD + found.reason


def write_listing(path: Path, reasons: Mapping[Any, str]) -> None:
    """A line for each file, in the bytes of its name: what `cut -f 1` gives is a list of the files."""
    lines = [os.fsencode(file) + b"\t" + reason.encode() + b"\n" for file, reason in reasons.items()]
    path.write_bytes(b"".join(lines))


def _try_listing(path: Path, reasons: Mapping[Any, str]) -> str:
    """Where the list is, for a message; nothing where the cache can't be written, which is another matter."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_listing(path, reasons)
    except OSError:
        return ""
    return f"; all of them are listed in {path}"


def say_left_out(name: str, classes: Iterable[str], where: str = "") -> None:
    """How many images a data set goes on without, by class, those that lose most first."""
    lost = Counter(classes)
    if lost:
        counts = some(f"{printable(c)} {count}" for c, count in lost.most_common())
        log.warning(
            "%s: left out %d images that could not be read: %s%s",
            name,
            sum(lost.values()),
            counts,
            where,
        )


def _reasons(listing: Path) -> dict[bytes, str]:
    lines = [line.partition(b"\t") for line in listing.read_bytes().splitlines()]
    return {line[0]: line[2].decode("utf-8", "replace") for line in lines}


def _listed(listing: Path, parts: Sequence[Sequence[Path]], size: int) -> dict[Path, Failure]:
    """The files of a list that can't be read today either; of one that is damaged that is known."""
    try:
        reasons = _reasons(listing)
    except OSError:
        return {}
    found = dict[Path, Failure]()
    for files in parts:
        for file in files:
            reason = reasons.get(os.fsencode(file), "")
            if reason.startswith(UNREAD):
                (again,) = _decoded([file], size, processes=1)
                if isinstance(again, Failure):
                    found[file] = again
            elif reason:
                found[file] = Failure(reason, damaged=True)
    return found


# ---- making it


class _Maker:
    """One array, filled in a file of another name, so that no reader sees half of it."""

    def __init__(
        self,
        name: str,
        prefix: str,
        files: Sequence[Path],
        digests: np.ndarray,  # (N,) DIGEST, of the files
        shape: Shape,
        path: Path,
        say: OnProgress,
        before: int,  # images of the parts before this
        total: int,  # images of all parts
    ):
        self.what, self.prefix, self.files, self.digests = f"{name}: decoding images", prefix, files, digests
        self.shape, self.path, self.say, self.before, self.total = shape, path, say, before, total
        self.partial = path.with_suffix(".partial")

    def make(self, processes: int) -> dict[Path, Failure]:
        """The files that can't be read; where there are none the array is made."""
        with self._alone() as mine:
            if not mine:
                return {}
            array = ArrayFile(self.partial, self.shape)
            try:
                self._take_over(array)
                failures = self._decode(array, processes)
            finally:
                array.close()
            if not failures:
                os.replace(self.partial, self.path)
            return failures

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether the array is to be made; false where another process, waited for, has done so."""
        while not is_whole(self.path, self.shape):
            self.partial.touch()
            try:
                lock = Lock(self.partial)
            except InUse:
                self.say(f"{self.what}, in another process", 0, 0)
                time.sleep(WAIT)
                continue
            except FileNotFoundError:  # it is done, just now
                continue
            try:
                if is_whole(self.path, self.shape):
                    self.partial.unlink(missing_ok=True)
                    break
                if self.partial.exists():  # nobody has removed it, just now
                    yield True
                    return
            finally:
                lock.release()
        yield False

    def _take_over(self, array: ArrayFile) -> None:
        """What other arrays have of these images, those of an earlier try among them."""
        wanted = {self.digests[i].tobytes(): i for i in self._absent(array)}
        for path in sorted(self.path.parent.glob(f"{self.prefix}*")):
            if not wanted:
                break
            if path.suffix not in (".npy", ".partial") or path == self.partial:
                continue
            with contextlib.suppress(OSError, ValueError), contextlib.closing(ArrayFile(path)) as other:
                if other.shape[1:] != self.shape[1:]:
                    continue
                for row, digest in enumerate(other.digests.tolist()):
                    if digest in wanted:
                        array.put(wanted.pop(digest), other.image(row), digest)
        array.keep()

    def _absent(self, array: ArrayFile) -> list[int]:
        return np.flatnonzero(array.digests != self.digests).tolist()

    def _decode(self, array: ArrayFile, processes: int) -> dict[Path, Failure]:
        absent, failures = self._absent(array), dict[Path, Failure]()
        files = [self.files[i] for i in absent]
        total, kept = self.total, time.monotonic()
        done = self.before + len(self.files) - len(absent)
        self.say(self.what, done, total)
        with contextlib.closing(_decoded(files, self.shape[-1], processes)) as images:
            try:
                for i, image in zip(absent, images, strict=True):
                    if isinstance(image, Failure):
                        failures[self.files[i]] = image
                    else:
                        array.put(i, image, self.digests[i].tobytes())
                    if time.monotonic() - kept > KEPT_EVERY:
                        array.keep()
                        kept = time.monotonic()
                    done += 1
                    self.say(self.what, done, total)
            except KeyboardInterrupt:
                log.warning("%s: stopped after %d of %d, which are kept", self.what, done, total)
                raise
            finally:
                array.keep()
        return failures


def _processes(asked: int | None, size: int) -> int:
    return asked or max(1, min(decoding.cores(), size // SHARE))


def _decoded(files: Sequence[Path], size: int, processes: int) -> Generator[bytes | Failure, None, None]:
    """As decoding.decoded; one process is this one, as another takes a while to start."""
    if processes > 1:
        yield from decoding.decoded(files, size, processes)
        return
    for file in files:
        try:
            yield decode(read_file(file), size)
        except Exception as error:  # a damaged image may raise anything
            yield failure(error)


# ---- the cache's folder


def _check_room(folder: Path, arrays: Sequence[tuple[Path, Shape]], name: str) -> None:
    needed = sum(math.prod(shape) for _, shape in arrays)
    for path, _ in arrays:
        with contextlib.suppress(OSError):
            needed -= (
                getattr(path.with_suffix(".partial").stat(), "st_blocks", 0) * 512
            )  # that it has already
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{name}: the resized images need {needed / 1e9:,.1f} GB in {folder}, which has "
            f"{free / 1e9:,.1f} GB free: set cache_dir to another folder, or image_size to fewer pixels"
        )


def _clear(folder: Path, prefix: str, paths: Sequence[Path], digests: Sequence[np.ndarray]) -> None:
    """Removes the partial arrays that these took over, and what writers left who were killed long ago."""
    for partial in set(folder.glob(f"{prefix}*.partial")) - {path.with_suffix(".partial") for path in paths}:
        with contextlib.suppress(OSError, ValueError):  # gone, in use, or not what it should be
            lock = Lock(partial)
            try:
                with contextlib.closing(ArrayFile(partial)) as array:
                    there = set(array.digests.tolist()) - {bytes(DIGEST.itemsize)}
                if not there or any(not there.isdisjoint(of_part.tolist()) for of_part in digests):
                    partial.unlink()
            finally:
                lock.release()
    remove_leftovers(folder)


def _forget_lists(folder: Path, prefix: str, whole: Iterable[Path]) -> None:
    """Removes the lists that have some of these files, which can be read now."""
    lists = list(folder.glob(f"{prefix}*.txt"))
    names = {os.fsencode(file) for file in whole} if lists else set()
    for listing in lists:
        with contextlib.suppress(OSError):
            if not names.isdisjoint(_reasons(listing)):
                listing.unlink()


def _mention_old(folder: Path, name: str, image_size: int) -> None:
    old = [path for path in folder.glob(f"{name}-{image_size}-*.npy") if len(path.stem.split("-")[-1]) == 16]
    if old:
        log.warning(
            "%s: images are decoded anew, as they are upright and on white now; what an earlier version made "
            "can be deleted: %s",
            name,
            some(map(str, old)),
        )
