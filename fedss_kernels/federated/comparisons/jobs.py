"""Runs in processes of their own, several at a time."""

import contextlib
import logging
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from .. import files
from ..config import Config, ConfigError
from ..defaults import FITTED, FITTED_OPTIONS
from ..disk import reason, write_whole
from ..fedavg_round import TooFewClients
from ..files import checkpoint
from ..files.checkpoint import differences
from ..files.round_metrics import RoundMetrics
from ..files.run_folder import read_run
from ..given_back import give_back
from ..interrupts import deaf, ending, ignore
from ..plugins import load_in_process_of
from ..reports.remarks import remarks
from ..reports.report import attempt, write_run_report
from ..reports.reported_run import Run
from ..run_loop import Stopped, run

LASTING = (TooFewClients, ConfigError)  # errors of options that do not train
_LISTEN = 0.5  # seconds after which it is asked again whether to stop
log = logging.getLogger(__name__)
OnRound = Callable[[int, RoundMetrics | None], None]  # (job, its metrics; None as it starts)


@dataclass(frozen=True)
class Tuned:
    """How many of a run's clients have fine-tuned its model."""

    done: int
    total: int


OnHeard = Callable[[int, RoundMetrics | Tuned | None], None]


@dataclass(frozen=True)
class Failure:
    words: str  # one line
    lasting: bool = False  # it is its options that do not train: played again it fails again


STOPPED = Failure("stopped")


class JobsStopped(Exception):
    """Runs were asked to stop, and have saved their rounds."""


def play_all(
    configs: Sequence[Config],
    jobs: int,
    on_heard: OnHeard,
    resume: bool,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[dict[int, Run], dict[int, Failure]]:
    """Plays every configuration: the run of each job, or why there is none. One that fails leaves the others.

    A run whose model is not finite has failed too. Raises JobsStopped as `run_all`.
    """
    failures = run_all(configs, jobs, on_heard, resume, stop)
    runs, others = played(configs)
    runs = {job: run for job, run in runs.items() if job not in failures}
    return runs, dict(sorted((others | failures).items()))


def played(
    configs: Sequence[Config], unknown: Collection[str] = ()
) -> tuple[dict[int, Run], dict[int, Failure]]:
    """What is in the folders of these runs: each that is done, or why it does not count.

    One that was made anew in its folder with other options does not. The `unknown` options may be any, and
    those that a configuration leaves to be chosen for the data.
    """
    runs, failures = dict[int, Run](), dict[int, Failure]()
    for job, config in enumerate(configs):
        folder = folder_of(config)
        if not folder.exists():
            failures[job] = Failure(f"not begun: there is no {folder}")
            continue
        try:
            found = Run(*read_run(folder))
        except (OSError, ValueError, KeyError, TypeError) as error:
            failures[job] = _last_failure(folder) or Failure(str(error))
            continue
        done = len(found.history)
        if different := _differences(found.config, config, unknown):
            words = f"{folder} holds a run that is not of this comparison ({'; '.join(different)}): remove it"
            failures[job] = Failure(f"{words}, and go on with --resume", lasting=True)
        elif found.summary.not_finite_since is not None:
            failures[job] = Failure("; ".join(remarks(found.summary)), lasting=True)
        elif done < config.rounds and (failure := _last_failure(folder)):
            failures[job] = failure
        elif done != config.rounds:
            counted = "1 round is" if done == 1 else f"{done} rounds are"
            failures[job] = Failure(f"{counted} done, of a comparison of {config.rounds}")
        else:
            runs[job] = found
    return runs, failures


def _differences(there: Config, here: Config, unknown: Collection[str]) -> list[str]:
    """As those of checkpoints, but for the rounds: there may be others in the folder as yet."""
    left = {name for name in FITTED_OPTIONS if getattr(here, name) is FITTED}
    either = ({**each.to_dict(), **dict.fromkeys({"rounds", *left, *unknown})} for each in (there, here))
    return differences(*either)


def _last_failure(folder: Path) -> Failure | None:
    """What a run failed of, from its error.txt; None where there is none."""
    try:
        lines = (folder / "error.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    if not lines or not lines[-1]:
        return None
    name, _, words = lines[-1].partition(": ")
    kind = name.rpartition(".")[2]
    lasting = kind in [each.__name__ for each in LASTING]
    return Failure(f"{kind}: {words}" if words else name, lasting)


def run_all(
    configs: Sequence[Config], jobs: int, on_heard: OnHeard, resume: bool, stop: Callable[[], bool]
) -> dict[int, Failure]:
    """Plays every configuration, in its folder; returns what became of each job that failed.

    Once `stop()` is true those that are going on finish their rounds and save; then it raises JobsStopped.
    """
    context = multiprocessing.get_context("spawn")
    waiting = [job for job, config in enumerate(configs) if not (resume and _is_done(config))]
    errors: dict[int, Failure] = {}
    running: dict[Connection, tuple[int, Any]] = {}
    try:
        while running or (waiting and not stop()):
            while waiting and len(running) < jobs and not stop():
                job = waiting.pop(0)
                receiver, sender = context.Pipe()
                process = context.Process(target=_child, args=(sender, configs[job], resume), daemon=True)
                try:
                    with deaf():
                        process.start()
                except OSError as error:  # too many processes, too little memory
                    errors[job] = Failure(f"its process could not be started: {error.strerror}")
                    sender.close()
                    continue
                sender.close()  # so that the receiver sees the end when the child's copy is gone
                running[receiver] = (job, process)
                on_heard(job, None)
            for ready in wait(list(running), timeout=_LISTEN):
                _receive(cast(Connection, ready), running, errors, on_heard)
            if stop():
                _ask_to_stop(running)
    finally:
        for _, process in running.values():
            process.kill()
            process.join()
    if stop() and (waiting or STOPPED in errors.values()):
        raise JobsStopped
    return errors


def _ask_to_stop(running: Iterable[Connection]) -> None:
    """Again and again does no harm."""
    for connection in running:
        with contextlib.suppress(OSError):  # it is done already
            connection.send(None)


def _receive(
    receiver: Connection,
    running: dict[Connection, tuple[int, Any]],
    errors: dict[int, Failure],
    on_heard: OnHeard,
) -> None:
    job, process = running[receiver]
    try:
        message = receiver.recv()
    except (EOFError, OSError):  # OSError: it ended in the middle of a message
        process.join()
        if process.exitcode and job not in errors:
            errors[job] = Failure(f"its process {ending(process.exitcode)}")
        del running[receiver]
        return
    if isinstance(message, RoundMetrics | Tuned):
        on_heard(job, message)
    elif isinstance(message, str):
        log.warning("%s", message)
    else:
        errors[job] = message


class _PassedUp(logging.Handler):
    """What is to be said of a run's folder, for the parent to say."""

    def __init__(self, sender: Connection):
        super().__init__(logging.WARNING)
        self.sender = sender

    def emit(self, record: logging.LogRecord) -> None:
        self.sender.send(record.getMessage())


def _child(sender: Connection, config: Config, resume: bool) -> None:
    """One run, if it is not done; sends its metrics, warnings about its folder, or what went wrong.

    What it gets back is that it is to stop: signals are for the parent.
    """
    ignore()
    give_back()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.getLogger("fedss_kernels").addHandler(logging.NullHandler())  # what is left out is in the ledger
    logging.getLogger(files.__name__).handlers = [_PassedUp(sender)]
    try:
        load_in_process_of(config)
        begun = resume and checkpoint.exists(folder_of(config))
        if not (resume and (folder_of(config) / "summary.json").exists()):
            # a run that was stopped before its first checkpoint starts again
            run(
                replace(config, overwrite=config.overwrite or resume),
                on_round=sender.send,
                on_tuned=lambda done, total: sender.send(Tuned(done, total)),
                resume=begun,
                stop=sender.poll,
            )
        made = Run(*read_run(folder_of(config)))
        for line in attempt(folder_of(config), write_run_report, folder_of(config), made):
            print(line, file=sys.stderr)
        (folder_of(config) / "error.txt").unlink(missing_ok=True)  # of an attempt before
    except BrokenPipeError:
        pass  # the parent is gone: nobody waits for this run
    except Stopped:
        sender.send(STOPPED)
    except Exception as error:
        lasting = isinstance(error, LASTING)
        line = reason(error) if isinstance(error, OSError) else str(error)
        with contextlib.suppress(BrokenPipeError):  # the parent is gone
            sender.send(Failure(f"{type(error).__name__}: {line}", lasting))  # first: the disk may be full
        with contextlib.suppress(OSError):  # no folder, no room in it
            write_whole(folder_of(config) / "error.txt", traceback.format_exc())


def _end_with_parent() -> None:
    """Whatever this process is doing: a resumed comparison would find it writing to the run's folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _is_done(config: Config) -> bool:
    return all((folder_of(config) / name).exists() for name in ("summary.json", "report.html"))


def folder_of(config: Config) -> Path:
    assert config.out is not None
    return config.out
