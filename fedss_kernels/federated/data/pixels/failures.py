"""Why there are no pixels of a file."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

# What code that is wrong raises, here or in Pillow: another version may read the same file.
OF_CODE = (AttributeError, TypeError, NameError, ImportError, AssertionError)


class NotRead(ValueError):
    """An image of a kind that is not read; nothing says that it is damaged."""


@dataclass(frozen=True)
class Failure:
    """Why there are no pixels: the content is `damaged`, or something else was in the way."""

    reason: str
    damaged: bool
    not_read: bool = False  # of a kind that is not read

    @property
    def settled(self) -> bool:
        """Whether the same content would give no pixels again."""
        return self.damaged or self.not_read


def read_file(path: str | Path) -> bytes:
    """The content of a file. Raises OSError where it is something else: a FIFO would be waited for."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFDIR: "folder"}
        raise OSError(errno.EINVAL, f"a {kinds.get(stat.S_IFMT(mode), 'device')}, not a file")
    return Path(path).read_bytes()


def failure(error: Exception) -> Failure:
    """What an exception of `read_file` or `decode` says of a file, in words."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return Failure("no image that Pillow can open: cut short, or of another format", damaged=True)
    if isinstance(error, MemoryError):
        return Failure("it needs more memory than there is", damaged=False)
    if isinstance(error, OSError) and error.errno is not None:
        return Failure(error.strerror or str(error), damaged=False)
    text = " ".join(str(error).split())
    known = isinstance(
        error, OSError | ValueError | SyntaxError
    )  # with words for a reader; others have a number or a name
    reason = text if known and text else f"{type(error).__name__}: {text}"
    not_read = isinstance(error, NotRead)
    return Failure(reason, damaged=not (not_read or isinstance(error, OF_CODE)), not_read=not_read)
