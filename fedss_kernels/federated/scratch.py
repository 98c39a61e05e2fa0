"""A folder for what is soon not needed any more, where the system has such: TMPDIR."""

import contextlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .disk import named
from .lock import InUse, Lock

_PREFIX, _LOCK = "fedss-scratch-", "lock"
_MOMENT = 60  # seconds in which a new folder is surely locked


@contextlib.contextmanager
def scratch(name: str, content: bytes) -> Iterator[Path]:
    """With one file in it; gone at the end. What processes that were killed left of theirs goes first."""
    _remove_leftovers()
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as created:
        folder = Path(created)
        try:
            (folder / _LOCK).touch()
            with named(folder):
                (folder / name).write_bytes(content)
        except OSError as error:
            what = f"{error.strerror} (another folder: set TMPDIR)"
            raise OSError(error.errno, what, error.filename) from None
        lock = Lock(folder / _LOCK)
        try:
            yield folder
        finally:
            lock.release()


def _remove_leftovers() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, InUse):  # in use, or just removed by another
            found = folder.lstat()
            old = time.time() - found.st_mtime > _MOMENT
            own = stat.S_ISDIR(found.st_mode) and (not hasattr(os, "getuid") or found.st_uid == os.getuid())
            if old and own:
                (folder / _LOCK).touch()
                lock = Lock(folder / _LOCK)
                if lock.held:
                    shutil.rmtree(folder)
                lock.release()
