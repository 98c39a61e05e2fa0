"""The folder of a comparison, which one process at a time may use.

The lock is on comparison.json, by which the folder is known, so that nothing else lies there. A new one is
locked before it takes the place of the one that was there, and so never free in between.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..disk import replacing
from ..files.run_folder import check_folder, clear
from ..lock import Lock
from ..plan import FILE, Plan
from .standing import say_left_over

WHO = "another comparison"
_TRIES = 9  # a file that is never the one it was opened as is on a system that numbers files anew


@contextmanager
def going_on(out: Path, plan: Plan) -> Iterator[None]:
    """Nobody else uses the folder of a comparison that is resumed.

    Raises CheckpointError as Plan.check_same, InUse where it is going on already.
    """
    lock = _locked(out / FILE) if (out / FILE).exists() else None
    try:
        plan.check_same(out)
        yield
    finally:
        if lock:
            lock.release()


@contextmanager
def beginning(out: Path, plan: Plan, files: tuple[str, ...]) -> Iterator[None]:
    """Nobody else uses the folder, which is freed of an earlier one's `files`, of them FILE the first.

    Raises as check_folder, and InUse where a comparison is going on there. Nothing is changed then.
    """
    check_folder(out, files, overwrite=plan.config.overwrite)
    (out / FILE).touch()
    lock = _locked(out / FILE)
    try:
        lock = _replaced(lock, out, plan, files)
        yield
    finally:
        lock.release()


def _replaced(lock: Lock, out: Path, plan: Plan, files: tuple[str, ...]) -> Lock:
    """On the new comparison.json, which is this plan's. That what is there may go is known, but for it."""
    new = not (out / FILE).stat().st_size
    try:
        if not new:  # another may have begun and ended since the folder was looked at
            check_folder(out, files, overwrite=plan.config.overwrite)
            say_left_over(out, plan)
        clear(out, files[1:])
        with replacing(out / FILE) as file:
            file.write(plan.text.encode())
            mine = Lock(Path(file.name), WHO) if lock.held else lock
    except BaseException:
        if new:  # which would be taken for another program's
            (out / FILE).unlink(missing_ok=True)
        raise
    if mine is not lock:
        lock.release()
    return mine


def _locked(path: Path) -> Lock:
    """On the file that has this name. Raises InUse."""
    lock = Lock(path, WHO)
    for _ in range(_TRIES):
        if lock.is_on(path):
            break
        lock.release()  # before it was locked another took its place
        lock = Lock(path, WHO)
    return lock
