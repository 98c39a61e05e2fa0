"""Image files that cannot be read: said in one line, listed in a file, and left out if the user wants it."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from .cache import default_cache_dir, key_of
from .pixels import Failure, Fault

NAMED = 5  # of many, that a message names
OR_SKIP = "; or go on without them: --skip-damaged"
ESCAPES = {b"\\": rb"\\", b"\t": rb"\t", b"\n": rb"\n", b"\r": rb"\r"}  # in a list, the backslash first
# In a list, before a reason. A reader tries them in this order: nothing is before every reason.
BEFORE = {Fault.KIND: "not read: ", Fault.ELSEWHERE: "cannot be read: ", Fault.CONTENT: ""}
MISSING = "missing"  # a reason
NOWHERE = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ELOOP,
)  # no file at a path's or a link's end: it is missing
log = logging.getLogger(__name__)


class DamagedImages(ValueError):
    """Files that are damaged or can't be read; a data set may go on without them."""

    def __init__(self, message: str, files: Mapping[Path, str], listing: Path):
        super().__init__(message)
        self.files, self.listing = files, listing  # with the reasons

    @classmethod
    def among(
        cls, name: str, failures: Mapping[Path, Failure], total: int, listing: Path, source: str
    ) -> DamagedImages:
        """Of `total` files, the others of which are in the cache; they are in the list already."""
        fault = "are damaged" if all(found.damaged for found in failures.values()) else "cannot be read"
        named = some(f"{printable(file)} ({found.reason})" for file, found in failures.items())
        return cls(
            f"{name}: {len(failures)} of {total} images {fault}: {named}; get them again from {source}"
            f"{OR_SKIP}; all of them are listed in {listing}, the others are kept in the cache",
            {file: found.reason for file, found in failures.items()},
            listing,
        )

    @classmethod
    def inside(
        cls,
        name: str,  # of the data set
        place: str,  # the archive or folder that the files are in
        failures: Mapping[str, Failure],
        total: int,
        cache_dir: Path | None,
        source: str,
    ) -> DamagedImages:
        """Of a data set that is read as a whole, from an archive or a folder."""
        folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
        listing = folder / f"{name}-{key_of(map(os.fsencode, failures))}-damaged.txt"
        reasons = {Path(file): found.reason for file, found in failures.items()}
        listed = _try_to_list(listing, reasons)
        first, found = next(iter(failures.items()))
        fault = "is damaged" if found.damaged else "cannot be read"
        more = f", and {len(failures) - 1} more of {total} images" if len(failures) > 1 else ""
        return cls(
            f"{name}: {place}: {printable(first)} {fault} ({found.reason}){more}; get it again from {source}"
            f"{OR_SKIP}{listed}",
            reasons,
            listing,
        )


class MissingImages(DamagedImages, FileNotFoundError):
    """Files that are not there, or that nobody may look at."""

    @classmethod
    def of(
        cls, name: str, reasons: Mapping[Path, str], total: int, prefix: Path, source: str
    ) -> MissingImages:
        listing = prefix.with_name(f"{prefix.name}{key_of(map(os.fsencode, reasons))}-missing.txt")
        listed = _try_to_list(listing, reasons)
        if set(reasons.values()) == {MISSING}:
            fault, named = "are missing", some(map(printable, reasons))
        else:
            fault = "are missing or cannot be read"
            named = some(f"{printable(file)} ({reason})" for file, reason in reasons.items())
        return cls(
            f"{name}: {len(reasons)} of {total} images {fault}: {named}; get them from {source}"
            f"{OR_SKIP}{listed}",
            reasons,
            listing,
        )


def of_the_system(error: Exception) -> bool:
    """Whether a file could not be read, whatever is in it. EINVAL is of one that points before its start."""
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


def printable(name: str | Path) -> str:
    r"""A file's name for a message: bytes of it that are not UTF-8 as \xff, a line's end as \n."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def some(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - NAMED} more" if len(every) > NAMED else ""
    return ", ".join(every[:NAMED]) + more


def say_left_out(name: str, classes: Iterable[str], where: str = "") -> tuple[str, ...]:
    """How many images a data set goes on without, by class, those that lose most first: its note, if any."""
    lost = Counter(classes)
    if not lost:
        return ()
    counts = some(f"{printable(c)} {count}" for c, count in lost.most_common())
    images = "image" if lost.total() == 1 else "images"
    note = f"left out {lost.total():,} {images} that could not be read: {counts}{where}"
    log.warning("%s: %s", name, note)
    return (note,)


# ---- lists


def write_list(path: Path, failures: Mapping[Path, Failure]) -> None:
    _write(path, {file: BEFORE[found.fault] + found.reason for file, found in failures.items()})


def _write(path: Path, reasons: Mapping[Path, str]) -> None:
    r"""A line for each file, in the bytes of its name: what `cut -f 1` gives is a list of the files.

    A tab, a line's end and a backslash in a name are \t, \n, \r and \\.
    """
    lines = [
        _escaped(os.fsencode(file)) + b"\t" + reason.encode() + b"\n" for file, reason in reasons.items()
    ]
    path.write_bytes(b"".join(lines))


def _escaped(name: bytes) -> bytes:
    for plain, escape in ESCAPES.items():
        name = name.replace(plain, escape)
    return name


def _unescaped(name: bytes) -> bytes:
    plain = {escape: plain for plain, escape in ESCAPES.items()}
    return re.sub(rb"\\[\\tnr]", lambda found: plain[found[0]], name)


def _try_to_list(path: Path, reasons: Mapping[Path, str]) -> str:
    """Where the list is, for a message; nothing where the cache can't be written, which is another matter."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, reasons)
    except OSError:
        return ""
    return f"; all of them are listed in {path}"


def read_list(path: Path) -> dict[Path, Failure]:
    """What `write_list` wrote; nothing where there is no such list."""
    try:
        lines = [line.partition(b"\t") for line in path.read_bytes().splitlines()]
    except OSError:
        return {}
    reasons = {
        Path(os.fsdecode(_unescaped(name))): reason.decode("utf-8", "replace") for name, _, reason in lines
    }
    return {file: _listed(reason) for file, reason in reasons.items()}


def _listed(reason: str) -> Failure:
    fault = next(fault for fault, before in BEFORE.items() if reason.startswith(before))
    return Failure(reason.removeprefix(BEFORE[fault]), fault)
