"""Runs in processes of their own, several at a time."""

import logging
import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from . import checkpoint, idle_settings
from .config import Config
from .interrupts import deaf
from .report import Run, write_run_report
from .rounds import run
from .run_folder import RoundMetrics, read_run

OnRound = Callable[[int, RoundMetrics | None], None]  # (job, its metrics; None as it starts)


def run_all(configs: Sequence[Config], jobs: int, on_round: OnRound, resume: bool) -> dict[int, str]:
    """Plays every configuration; returns the error of each job that failed."""
    context = multiprocessing.get_context("spawn")
    waiting = [job for job, config in enumerate(configs) if not (resume and _is_done(config))]
    errors: dict[int, str] = {}
    running: dict[Connection, tuple[int, Any]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                job = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(sender, configs[job], resume), daemon=True)
                with deaf():
                    process.start()
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
    errors: dict[int, str],
    on_round: OnRound,
) -> None:
    job, process = running[receiver]
    try:
        message = receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode and job not in errors:
            errors[job] = f"its process ended with exit code {process.exitcode} (killed? out of memory?)"
        del running[receiver]
        return
    if isinstance(message, RoundMetrics):
        on_round(job, message)
    else:
        errors[job] = message


def _child(sender: Connection, config: Config, resume: bool) -> None:
    """One run, if it is not done; sends its metrics, or a line about what went wrong."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    idle_settings.log.addHandler(logging.NullHandler())  # the same of every run: the parent has said it
    try:
        begun = resume and checkpoint.exists(folder_of(config))
        if not (resume and (folder_of(config) / "summary.json").exists()):
            # a run that was stopped before its first checkpoint starts again
            run(replace(config, overwrite=config.overwrite or resume), on_round=sender.send, resume=begun)
        write_run_report(folder_of(config), Run(*read_run(folder_of(config))))
    except BrokenPipeError:
        pass  # the parent is gone: nobody waits for this run
    except Exception as error:
        folder = folder_of(config)
        if folder.is_dir():
            (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        sender.send(f"{type(error).__name__}: {error}")


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
