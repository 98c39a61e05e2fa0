"""Many image files as pixels, in processes. What comes out does not depend on how many there are."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from . import pixels
from .damage import printable
from .pixels import Failure, Fault
from .pixels.serving import LENGTH, PIXELS

AHEAD = 16  # files that each process may be ahead of who takes the pixels
# Of these signals a decoder dies by its own doing, that is by what is in the file; of others by somebody's.
CRASHES = {getattr(signal, name, None) for name in ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT")}


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decoded(files: Sequence[Path], size: int, processes: int) -> Iterator[bytes | Failure]:
    """Of each file in turn its pixels, or why there are none.

    Raises OSError where a process cannot decode anything. However it ends, the processes do too.
    """
    decoders = [_Decoder(size) for _ in range(processes)]
    idle = SimpleQueue[_Decoder]()
    for decoder in decoders:
        idle.put(decoder)

    def decode_one(file: Path) -> bytes | Failure:
        decoder = idle.get()
        try:
            return decoder(file)
        finally:
            idle.put(decoder)

    block = AHEAD * processes
    with ThreadPoolExecutor(processes) as pool:
        try:
            for first in range(0, len(files), block):
                yield from pool.map(decode_one, files[first : first + block])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for decoder in decoders:
                decoder.end()


class _Decoder:
    """A process of `pixels.serving`. Ctrl-C does not reach it: its parent hears it, and ends it."""

    def __init__(self, size: int):
        self.size, self.ended, self.lock = size, False, threading.Lock()
        self.start()

    def start(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with self.lock:
            if self.ended:
                raise EOFError
            self.process = subprocess.Popen(
                [sys.executable, os.path.dirname(pixels.__file__), str(self.size)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                env=environment,
            )

    def __call__(self, file: Path) -> bytes | Failure:
        """Asks once more where the process was killed: others may have wanted the memory just then."""
        for _ in range(2):
            try:
                return self._ask(file)
            except (BrokenPipeError, EOFError):
                code = self.process.wait()
            if code >= 0:
                raise OSError(f"{printable(file)}: its decoder ended with exit code {code}; see what it said")
            self._close()
            self.start()
            if -code in CRASHES:
                break
        name = signal.Signals(-code).name
        if -code in CRASHES:
            return Failure(f"its decoder crashed, by {name}", Fault.CONTENT)
        return Failure(f"its decoder was killed twice, by {name} (out of memory?)", Fault.ELSEWHERE)

    def _ask(self, file: Path) -> bytes | Failure:
        questions, answers = self.process.stdin, self.process.stdout
        assert questions and answers
        questions.write(os.fsencode(file).hex().encode() + b"\n")
        questions.flush()
        head = answers.read(LENGTH.size)
        if len(head) < LENGTH.size:
            raise EOFError
        kind, length = LENGTH.unpack(head)
        answer = answers.read(length)
        if len(answer) < length:
            raise EOFError
        if kind == PIXELS:
            return answer
        return Failure(answer.decode(), Fault(kind))

    def end(self) -> None:
        with self.lock:
            self.ended = True
        self.process.kill()
        self.process.wait()
        self._close()

    def _close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            with contextlib.suppress(BrokenPipeError):  # a question that nobody will answer
                pipe.close()
