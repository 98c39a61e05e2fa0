"""Peak memory of one call, in a fresh process that did nothing before it."""

import contextlib
import ctypes
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

# (warm up, call): the first loads code and starts threads on a tiny problem, the second is measured.
Prepared = tuple[Callable[[], object], Callable[[], object]]


def peak_bytes(prepare: Callable[..., Prepared], *arguments: object) -> int | None:
    """Bytes of resident memory that `prepare(*arguments)`'s call adds at its peak to what its inputs take.

    Counts results, gradients and scratch, whichever allocator they come from; not the inputs, and not what
    loading the code took. None where it cannot be told: off Linux, or where the process died of it.
    `prepare` is a module's function, and is called in the new process.
    """
    if not CLEAR.exists():
        return None
    # A server that has imported everything, and started no thread that a fork would lose, forks each process.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fedss_kernels"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, torch.get_num_threads(), prepare, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None
    finally:
        process.join()


def _measure(
    sender: Connection, threads: int, prepare: Callable[..., Prepared], arguments: tuple[object, ...]
) -> None:
    torch.set_num_threads(threads)
    warm_up, call = prepare(*arguments)
    warm_up()
    with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or the call would be given memory that was freed before
    CLEAR.write_text("5")  # the peak starts again from what is resident now
    before = resident_peak()
    result = call()
    sender.send(resident_peak() - before)
    del result


def resident_peak() -> int:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
