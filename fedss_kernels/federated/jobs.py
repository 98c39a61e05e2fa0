"""Runs in processes of their own, several at a time."""

import logging
import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from . import checkpoint
from .config import Config, ConfigError
from .interrupts import deaf
from .remarks import remarks
from .report import Run, write_run_report
from .rounds import run
from .run_folder import RoundMetrics, read_run
from .simulation import TooFewClients

OnRound = Callable[[int, RoundMetrics | None], None]  # (job, its metrics; None as it starts)


@dataclass(frozen=True)
class Failure:
    words: str  # one line
    lasting: bool = False  # it is its options that do not train: played again it fails again


def play_all(
    configs: Sequence[Config], jobs: int, on_round: OnRound, resume: bool
) -> tuple[dict[int, Run], dict[int, Failure]]:
    """Plays every configuration: the run of each job, or why there is none. One that fails leaves the others.

    A run whose model is not finite has failed too.
    """
    failures, runs = run_all(configs, jobs, on_round, resume), {}
    for job, config in enumerate(configs):
        if job in failures:
            continue
        try:
            played = Run(*read_run(folder_of(config)))
        except (OSError, ValueError, KeyError, TypeError) as error:
            failures[job] = Failure(f"{folder_of(config)} cannot be read: {type(error).__name__}: {error}")
            continue
        if played.summary.not_finite_since is not None:
            failures[job] = Failure("; ".join(remarks(played.summary)), lasting=True)
        else:
            runs[job] = played
    return runs, dict(sorted(failures.items()))


def run_all(configs: Sequence[Config], jobs: int, on_round: OnRound, resume: bool) -> dict[int, Failure]:
    """Plays every configuration, in its folder; returns what became of each job that failed."""
    context = multiprocessing.get_context("spawn")
    waiting = [job for job, config in enumerate(configs) if not (resume and _is_done(config))]
    errors: dict[int, Failure] = {}
    running: dict[Connection, tuple[int, Any]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                job = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
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
                on_round(job, None)
            for ready in wait(list(running)):
                _receive(cast(Connection, ready), running, errors, on_round)
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()
    return errors


def _receive(
    receiver: Connection,
    running: dict[Connection, tuple[int, Any]],
    errors: dict[int, Failure],
    on_round: OnRound,
) -> None:
    job, process = running[receiver]
    try:
        message = receiver.recv()
    except (EOFError, OSError):  # OSError: it ended in the middle of a message
        process.join()
        if process.exitcode and job not in errors:
            cause = " (killed? out of memory?)" if process.exitcode < 0 else ""
            errors[job] = Failure(f"its process ended with exit code {process.exitcode}{cause}")
        del running[receiver]
        return
    if isinstance(message, RoundMetrics):
        on_round(job, message)
    else:
        errors[job] = message


def _child(sender: Connection, config: Config, resume: bool) -> None:
    """One run, if it is not done; sends its metrics, or a line about what went wrong."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.getLogger("fedss_kernels").addHandler(logging.NullHandler())  # what is left out is in the ledger
    try:
        begun = resume and checkpoint.exists(folder_of(config))
        if not (resume and (folder_of(config) / "summary.json").exists()):
            # a run that was stopped before its first checkpoint starts again
            run(replace(config, overwrite=config.overwrite or resume), on_round=sender.send, resume=begun)
        write_run_report(folder_of(config), Run(*read_run(folder_of(config))))
        (folder_of(config) / "error.txt").unlink(missing_ok=True)  # of an attempt before
    except BrokenPipeError:
        pass  # the parent is gone: nobody waits for this run
    except Exception as error:
        lasting = isinstance(error, (TooFewClients, ConfigError))
        sender.send(Failure(f"{type(error).__name__}: {error}", lasting))  # first: the disk may be full
        folder = folder_of(config)
        if folder.is_dir():
            (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")


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
