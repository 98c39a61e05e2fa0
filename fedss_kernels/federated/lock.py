"""A file that one process at a time may hold."""

import errno
import importlib
import os
import warnings
from pathlib import Path

# What a system answers where another holds it: flock the first, locks of ranges, as on NFS, the last too.
_TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


class InUse(ValueError):
    """Another process, or another run of this one, holds it."""


class Lock:
    """Held until it is released or forgotten; `held` is false where the file's system has no such locks.

    Raises InUse, in words: `who` is using the folder.
    """

    def __init__(self, path: Path, who: str = "another run"):
        self._descriptor: int | None = None
        # NFS locks for writing only what is open for it
        mode = os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY
        self._descriptor = os.open(path, mode)
        self.held = False
        try:
            fcntl = importlib.import_module("fcntl")
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.held = True
        except ImportError:
            pass
        except OSError as error:
            if error.errno in _TAKEN:
                self.release()
                raise InUse(f"{who} is using {path.parent}") from None
            warnings.warn(
                f"{path.parent} cannot be locked ({error.strerror}): nothing keeps {who} out of it",
                stacklevel=2,
            )

    def is_on(self, path: Path) -> bool:
        """Whether it is of the file that has this name now."""
        if self._descriptor is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._descriptor), path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.release()
