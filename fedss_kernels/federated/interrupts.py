"""Ctrl-C: heard at the end of a round, or not at all. Only the main thread can choose."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

ECHO = 1.0  # seconds in which another signal is the same press, as a terminal and torchrun both send one


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """A process started in here ignores Ctrl-C from its first moment: to stop it is its parent's business."""
    with _handled(signal.SIG_IGN):
        yield


@contextlib.contextmanager
def noticed(say: str) -> Iterator[Callable[[], bool]]:
    """Gives what tells whether Ctrl-C was pressed, which prints `say`; pressed again it stops at once."""
    pressed: list[float] = []

    def press(number: int, frame: object) -> None:
        if not pressed:
            print(say, file=sys.stderr)
        elif time.monotonic() - pressed[0] > ECHO:
            raise KeyboardInterrupt
        pressed.append(time.monotonic())

    with _handled(press):
        yield lambda: bool(pressed)


@contextlib.contextmanager
def _handled(handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
