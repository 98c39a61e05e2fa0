"""Signals that ask to stop: heard at the end of a round, at once, or not at all.

Ctrl-C (SIGINT); SIGTERM, of kill, Slurm and systemd; SIGHUP, of a terminal that is gone, which stays ignored
where it is, as under nohup. Only the main thread can choose.
"""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

ECHO = 1.0  # seconds in which another signal is the same one, as a terminal and torchrun both send it
_SIGINT, *_OTHERS = SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class Interrupted(KeyboardInterrupt):
    """Of a signal, as Ctrl-C of its own."""

    def __init__(self, number: int = signal.SIGINT):
        super().__init__(signal.Signals(number).name)
        self.exit_code = exit_code(number)


def exit_code(number: int) -> int:
    """Of a process that a signal stopped, as shells have it."""
    return 128 + number


def ending(exit_code: int) -> str:
    """In words, how a process of this exit code of `multiprocessing` ended."""
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    why = ": out of memory, or killed by hand" if name == "SIGKILL" else ""
    return f"was ended by signal {-exit_code} ({name}{why})"


class Notice:
    """Whether a signal came, as the `stop` of a run, and the exit code of the first."""

    def __init__(self) -> None:
        self.exit_code = 0

    def __call__(self) -> bool:
        return self.exit_code != 0


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """A process started in here hears none from its first moment: to stop it is its parent's business.

    Those that come for this process meanwhile wait until the end.
    """
    if not hasattr(signal, "pthread_sigmask"):
        with _handled(SIGNALS, signal.SIG_IGN):
            yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()  # a process that the first start brings with it, and that unblocks
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore() -> None:
    """For the rest of this process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def at_once() -> contextlib.AbstractContextManager[None]:
    """Others raise Interrupted too, not Ctrl-C alone, so that what is temporary is removed on the way out."""

    def stop(number: int, frame: object) -> None:
        raise Interrupted(number)

    return _handled(_OTHERS, stop)


@contextlib.contextmanager
def noticed(say: str) -> Iterator[Notice]:
    """Gives what tells whether a signal came, which prints `say` and that another stops at once.

    But not a SIGHUP: as a session ends they come from its shell and from the system.
    """
    notice, first = Notice(), 0.0

    def hear(number: int, frame: object) -> None:
        nonlocal first
        if not notice():
            notice.exit_code, first = exit_code(number), time.monotonic()
            with contextlib.suppress(RuntimeError):  # in the middle of another print
                another = "Ctrl-C again" if number == _SIGINT else "SIGTERM or Ctrl-C now"
                print(f"{say}; {another} stops at once", file=sys.stderr)
        elif time.monotonic() - first > ECHO and signal.Signals(number).name != "SIGHUP":
            raise Interrupted(number)

    with _handled(SIGNALS, hear):
        yield notice


@contextlib.contextmanager
def _handled(numbers: list[signal.Signals], handler: Any) -> Iterator[None]:
    """But for those that whoever started this process had it ignore; Ctrl-C is for whoever presses it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [n for n in numbers if n == _SIGINT or signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)
