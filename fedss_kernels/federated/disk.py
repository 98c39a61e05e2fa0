"""Writing to a disk that may be full, slow, or of an odd kind.

What must be there whole or not at all is written under another name, synced, and renamed. An OSError says
which file it is about. What some file systems cannot do, and no result hangs on, is done where it can be.
"""

import contextlib
import errno
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# What a system answers that does not know the call, or not for this kind of file.
UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOTTY, errno.EINVAL}


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """An OSError in here, as of a write, has the file's name if it has none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def reason(error: OSError) -> str:
    """In a line: No space left on device: runs/a/metrics.csv."""
    what = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return what if error.filename is None else f"{what}: {os.fsdecode(error.filename)}"


def why(error: Exception) -> str:
    """In a line: the system's `reason`, or an error of another kind by its kind."""
    if isinstance(error, OSError):
        return reason(error)
    return " ".join(f"{type(error).__name__}: {error}".split())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that is written under another name; at the end it is synced and has this one.

    Where it could not be written whole nothing is left of it, and what had the name before still has it.
    """
    unfinished = path.with_name(f"{path.name}-unfinished")
    try:
        with named(unfinished), unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str) -> None:
    r"""In UTF-8; what a file's name in it has that is none, as \xff."""
    text = content.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    with replacing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def systems_errors() -> Iterator[None]:
    """Of a library that tells a full disk in words of its own, as torch.save does: the system's, not its."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise cause from None


def write_synced(path: Path, content: bytes) -> None:
    """A new file."""
    with named(path), path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def append(path: Path, content: bytes) -> None:
    """All of it, or nothing."""
    with named(path), path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(before)
            raise


def check_room(folder: Path, count: int) -> None:
    """Raises OSError where a file of so many bytes has no room now."""
    with named(folder), tempfile.TemporaryFile(dir=folder) as file:
        allocate(file.fileno(), 0, count)


def remove_unfinished(folder: Path) -> None:
    """What a process that was killed was writing there, where no other is."""
    for path in folder.glob("*-unfinished"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def sync_folder(path: Path) -> None:
    """So that what was made or renamed in it is there after a loss of power too, where that can be had."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with named(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def reads_take_room(folder: Path) -> bool:
    """Whether a page of a file there that was never written takes room as it is read through a mapping.

    So it is where files are in memory, as in tmpfs.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(mmap.PAGESIZE)
        with mmap.mmap(file.fileno(), mmap.PAGESIZE) as mapping:
            mapping[0]
        return getattr(os.fstat(file.fileno()), "st_blocks", 0) > 0


def allocate(descriptor: int, first: int, length: int) -> None:
    """Bytes of a file get their place on the disk; what is in them stays.

    A write to them through a mapping then finds it: on a full disk such a write would end the process. Raises
    OSError where there is no room.
    """
    try:
        if hasattr(os, "posix_fallocate"):
            return os.posix_fallocate(descriptor, first, length)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    page = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
    for page_begins in range(first - first % page, first + length, page):  # by hand: a byte of each as it is
        at = max(first, page_begins)
        os.pwrite(descriptor, os.pread(descriptor, 1, at), at)
