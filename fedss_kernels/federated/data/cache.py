"""A folder of arrays that took a while to make."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..disk import reason

Arrays = dict[str, np.ndarray]
# Files that a writer who was killed leaves behind, and after how many seconds untouched they are such.
LEFTOVERS = {"*.tmp": 3600.0, "*.partial": 30 * 86400.0}


def default_cache_dir() -> Path:
    """$FEDSS_CACHE, else fedss-kernels in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache)."""
    if os.environ.get("FEDSS_CACHE"):
        return Path(os.environ["FEDSS_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "fedss-kernels"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / "fedss-kernels"


def key_of(parts: Iterable[bytes]) -> str:
    """What tells files in the cache apart, in their names."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        what = "it is a file, not a folder" if folder.exists() else "it is a link to what is not there"
        raise NotADirectoryError(errno.ENOTDIR, what, str(folder)) from None


@contextlib.contextmanager
def written_to(folder: Path, name: str) -> Iterator[None]:
    """Makes the folder; a failure of the system in here is one to write to it, and is said so."""
    try:
        _make_folder(folder)
        yield
    except OSError as error:
        if error.errno is None:  # said already
            raise
        way = "set cache_dir, or FEDSS_CACHE, to a folder that can be written"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            way = "make room, or set cache_dir to another folder"
        raise OSError(
            f"{name}: cannot write to the cache in {folder}: {error.strerror}; {way}, and start again: what "
            "is in the cache by now is kept"
        ) from None


def remove_leftovers(folder: Path) -> None:
    for pattern, age in LEFTOVERS.items():
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > age:
                    path.unlink()


def cached_arrays(name: str, key: dict, make: Callable[[], Arrays], cache_dir: Path | None = None) -> Arrays:
    """make(), or what it returned when it was last called with this `key`.

    `key` names everything that the arrays depend on, versions of libraries included; it must survive json.
    A file that is damaged, or is of another key, is made again; a folder that can't be written costs a
    warning and no more.
    """
    text = json.dumps(key, sort_keys=True)
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    path = folder / f"{name}-{key_of([text.encode()])}.npz"
    arrays = _read(path, text)
    if arrays is None:
        arrays = make()
        try:
            _write(path, text, arrays)
        except OSError as error:
            warnings.warn(
                f"{name} is not cached: {reason(error)}; set FEDSS_CACHE to a folder that can be written",
                stacklevel=2,
            )
    return arrays


def _read(path: Path, key: str) -> Arrays | None:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        wanted = json.loads(str(arrays.pop("key")))
        return arrays if wanted == {"key": key, "names": sorted(arrays)} else None
    except Exception:  # a damaged archive may raise anything; it is made again
        return None


def _write(path: Path, key: str, arrays: Arrays) -> None:
    """Under another name first, so that no reader sees half of it, whoever else writes the same file."""
    described = json.dumps({"key": key, "names": sorted(arrays)})
    members: dict[str, Any] = {"key": np.array(described), **arrays}
    _make_folder(path.parent)
    remove_leftovers(path.parent)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **members)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
