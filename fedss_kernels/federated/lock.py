"""A file that one process at a time may hold."""

import importlib
import os
from pathlib import Path


class InUse(ValueError):
    """Another process, or another run of this one, holds it."""


class Lock:
    """Held until it is released or forgotten; where the system has no such locks, by nobody."""

    def __init__(self, path: Path):
        self._descriptor: int | None = None
        self._descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl = importlib.import_module("fcntl")
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except OSError:
            self.release()
            raise InUse(f"another run is using {path.parent}") from None

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.release()
