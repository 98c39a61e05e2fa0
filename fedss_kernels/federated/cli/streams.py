"""What a command says, whoever listens.

A reader that goes away (`fedss run | head`, a terminal that is closed) stops no command: the rest goes
unheard, and the exit code is its own. Where output is lost otherwise, as on a full disk, the command
goes on too, and its last word and its exit code say so.
"""

import contextlib
import errno
import io
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO, cast

_NOBODY_LISTENS = {errno.EPIPE, errno.EIO}  # a pipe, a terminal


class Unheard:
    """A stream of which the rest goes nowhere once it cannot be written to; `lost` is why."""

    def __init__(self, stream: TextIO):
        self._stream, self.lost = stream, ""

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if error.errno not in _NOBODY_LISTENS:
            self.lost = error.strerror or str(error)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # what is in buffers, and what others write, goes there too
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def forgiving() -> Iterator[list[Unheard]]:
    """stdout and stderr, `Unheard` each; a warning is a line."""
    _open_closed()
    before = sys.stdout, sys.stderr
    unheard = [Unheard(stream or open(os.devnull, "w", encoding="utf-8")) for stream in before]
    for stream in before:  # what an encoding lacks becomes ?, not a traceback
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in unheard)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show
            yield unheard
    finally:
        for stream in unheard:
            stream.flush()
        sys.stdout, sys.stderr = before


def _open_closed() -> None:
    """A standard stream that is closed leaves its number free: the next file would get what is printed."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _show(message: Warning | str, *of: object, **more: object) -> None:
    print(f"fedss: {' '.join(str(message).split())}", file=sys.stderr)
