"""Many image files as pixels, in processes. What comes out does not depend on how many there are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from . import pixels
from .pixels import DAMAGED, LENGTH, PIXELS, Failure

AHEAD = 16  # files that each process may be ahead of who takes the pixels
# Of these signals a decoder dies by its own doing, that is by what is in the file; of others by somebody's.
CRASHES = {getattr(signal, name, None) for name in ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT")}


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decoded(files: Sequence[Path], size: int, processes: int) -> Iterator[bytes | Failure]:
    """Of each file in turn its pixels, or why there are none.

    Raises OSError where somebody ends a decoding process. However it ends, the processes do too.
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
    """A process of `pixels.serve`. Ctrl-C does not reach it: its parent hears it, and ends it."""

    def __init__(self, size: int):
        self.size = size
        self.process = self._started()

    def _started(self) -> subprocess.Popen:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        return subprocess.Popen(
            [sys.executable, pixels.__file__, str(self.size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env=environment,
        )

    def __call__(self, file: Path) -> bytes | Failure:
        try:
            return self._ask(file)
        except (BrokenPipeError, EOFError):
            code = self.process.wait()
        if -code in CRASHES:
            self.end()
            self.process = self._started()
            return Failure(f"its decoder crashed, by {signal.Signals(-code).name}", damaged=True)
        ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        raise OSError(
            f"the process that decoded {printable(file)} was ended {ended} (out of memory?); what was "
            "decoded is kept: start again to go on"
        )

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
        return answer if kind == PIXELS else Failure(answer.decode(), kind == DAMAGED)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            try:
                pipe.close()
            except BrokenPipeError:  # a question that nobody will answer
                pass


def printable(name: str | Path) -> str:
    r"""A file's name for a message: bytes of it that are not UTF-8 as \xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
