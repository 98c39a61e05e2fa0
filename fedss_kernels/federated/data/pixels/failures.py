"""Why there are no pixels of a file."""

from __future__ import annotations

import enum
import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

# What code that is wrong raises, here or in Pillow: another version may read the same file.
OF_CODE = (AttributeError, TypeError, NameError, ImportError, AssertionError)


class NotRead(ValueError):
    """An image of a kind that is not read; nothing says that it is damaged."""


class Fault(enum.Enum):
    """What is at fault; the letter tells it to another process."""

    CONTENT = b"c"  # it is damaged
    KIND = b"k"  # images of such a kind are not read
    ELSEWHERE = b"e"  # the file system, the memory, code: the next time it may be gone


@dataclass(frozen=True)
class Failure:
    """Why there are no pixels of a file."""

    reason: str
    fault: Fault

    @property
    def damaged(self) -> bool:
        return self.fault is Fault.CONTENT

    @property
    def settled(self) -> bool:
        """Whether the same content would give no pixels again."""
        return self.fault is not Fault.ELSEWHERE


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
        return Failure("no image that Pillow can open: cut short, or of another format", Fault.CONTENT)
    if isinstance(error, MemoryError):
        return Failure("it needs more memory than there is", Fault.ELSEWHERE)
    if isinstance(error, OSError) and error.errno is not None:
        return Failure(error.strerror or str(error), Fault.ELSEWHERE)
    text = " ".join(str(error).split())
    # These have words for a reader; others have a number or a name.
    known = isinstance(error, OSError | ValueError | SyntaxError)
    reason = text if known and text else f"{type(error).__name__}: {text}"
    if isinstance(error, NotRead):
        return Failure(reason, Fault.KIND)
    return Failure(reason, Fault.ELSEWHERE if isinstance(error, OF_CODE) else Fault.CONTENT)
