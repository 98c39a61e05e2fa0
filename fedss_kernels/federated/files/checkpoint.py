"""Checkpoints: everything that the next round depends on, in a folder that is there whole or not at all.

checkpoint-000120/          once 120 rounds are done
    state.safetensors       the server's tensors
    checkpoint.json         all else: the round, the configuration, versions, the lengths of the run's
                            tables, checksums, what data and net are known by

It is written under another name, synced, and renamed; the one before goes when the new one is there. So
whatever is interrupted, the last good one stands. What was changed since in it, or in the tables that it goes
with, is noticed.
"""

import functools
import hashlib
import importlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import _C
from ..algorithms import METHODS
from ..config import Config
from ..disk import reason, sync_folder, write_synced
from ..learning_rate import learning_rate
from .fingerprint import Fingerprint

FORMAT = 4
# What a run reads from, besides its own folder. What is in the two files the fingerprint knows.
PLACES = ("data_dir", "cache_dir", "init_checkpoint", "half_checkpoint", "class_store")
MAY_DIFFER = ("out", *PLACES, "checkpoint_every", "workers")  # options that no bit of a result depends on
BY_ROUNDS = ("eval_every", "warmup_rounds")  # options whose defaults follow the number of rounds
_STATE, _REST = "state.safetensors", "checkpoint.json"
log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be gone on from, and why."""


@dataclass(frozen=True)
class Checkpoint:
    round: int  # rounds done
    tensors: Mapping[str, Tensor]
    table_bytes: Mapping[str, int]  # lengths of the run's tables then: file name -> bytes
    table_sha256: Mapping[str, str]  # of what they held
    fingerprint: Fingerprint  # of the data and the net that the run began with
    store: str | None = None  # identity of the class store that has the class matrix


def safetensors() -> ModuleType:
    """Imported when needed: the package's other half does without it."""
    return importlib.import_module("safetensors.torch")


def write(folder: Path, config: Config, checkpoint: Checkpoint) -> None:
    """Writes it to the run's folder, in place of the one before. The tables must be synced already."""
    state = safetensors().save({name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()})
    rest = {
        "format": FORMAT,
        "round": checkpoint.round,
        "config": config.to_dict(),
        "table_bytes": dict(checkpoint.table_bytes),
        "table_sha256": dict(checkpoint.table_sha256),
        "fingerprint": asdict(checkpoint.fingerprint),
        "versions": versions(),
        "store": checkpoint.store,
        "state_sha256": hashlib.sha256(state).hexdigest(),
    }
    unfinished = folder / "checkpoint-unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        write_synced(unfinished / _STATE, state)
        write_synced(unfinished / _REST, json.dumps(rest | {"sha256": _seal(rest)}, indent=2).encode())
        sync_folder(unfinished)
    except OSError:  # a full disk needs the room
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    finished = folder / f"checkpoint-{checkpoint.round:06}"
    os.rename(unfinished, finished)
    sync_folder(folder)
    remove_older(folder)


def remove_older(folder: Path) -> None:
    """All but the last one, if they can be: the last one is gone on from, whatever else is there."""
    for older in _all(folder)[:-1]:
        shutil.rmtree(older, ignore_errors=True)


def read(folder: Path, config: Config) -> Checkpoint:
    """The last one in a run's folder.

    Raises CheckpointError where there is none, for one that was damaged, or that is another version's or
    another configuration's, with a list of what differs; and as `_check_rounds`.
    """
    path, rest = _sealed(folder)
    state = _bytes(path, _STATE)
    if rest["state_sha256"] != hashlib.sha256(state).hexdigest():
        raise CheckpointError(f"{path} is damaged: its checksum is another")
    there = rest["config"] | {"rounds": config.rounds}  # of which there may be more
    if different := differences(there, config.to_dict()):
        raise CheckpointError(
            f"{path} is of another configuration: {'; '.join(different)}{_by_default(rest['config'], config)}"
        )
    _check_rounds(replace(config, rounds=rest["config"]["rounds"]), config, rest["round"])
    if others := _other_versions(rest):
        log.warning("%s was written with %s: from here on bits may be others", path, others)
    lengths, digests, store = (rest[name] for name in ("table_bytes", "table_sha256", "store"))
    tensors = safetensors().load(state)
    return Checkpoint(rest["round"], tensors, lengths, digests, Fingerprint(**rest["fingerprint"]), store)


def read_config(folder: Path) -> Config:
    """That of the last one in a run's folder. Raises as `read`, and ConfigError as `Config.from_dict`."""
    path, rest = _sealed(folder)
    return Config.from_dict(rest["config"], path / _REST)


def read_fingerprint(folder: Path) -> tuple[Fingerprint, str]:
    """(that of the last one in a run's folder, what it was written with that is another here).

    Raises CheckpointError where it cannot be read.
    """
    _, rest = _sealed(folder)
    return Fingerprint(**rest["fingerprint"]), _other_versions(rest)


def _other_versions(rest: Mapping[str, Any]) -> str:
    there = rest["versions"]  # an earlier version's has fewer
    others = [f"{name} {there[name]}" for name, now in versions().items() if there.get(name, now) != now]
    return " and ".join(others)


def _sealed(folder: Path) -> tuple[Path, dict[str, Any]]:
    """(where the last one is, what is in its checkpoint.json)"""
    found = _all(folder)
    if not found:
        raise CheckpointError(f"no checkpoint in {folder}")
    path = found[-1]
    read = _bytes(path, _REST)
    try:
        rest = json.loads(read)
        whole = rest.pop("sha256") == _seal(rest)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not whole:
        raise CheckpointError(f"{path} is damaged: its checksum is another")
    if rest["format"] != FORMAT:
        raise CheckpointError(
            f"{path} is of format {rest['format']}, this version reads {FORMAT}: go on with the version of "
            "fedss-kernels that wrote it, or start anew"
        )
    return path, rest


def _bytes(path: Path, name: str) -> bytes:
    """What one of its files holds. Raises CheckpointError: damaged is one without it, not what is refused."""
    try:
        return (path / name).read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is damaged: it has no {name}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None


def _by_default(there: Mapping[str, Any], here: Config) -> str:
    """Of what may differ though nobody gave it, as a run of more rounds has another default."""
    names = [name for name in BY_ROUNDS if there.get(name) != getattr(here, name)]
    if not names or there["rounds"] == here.rounds:
        return ""
    given = ", ".join(f"{name} {there.get(name)}" for name in names)
    return f"; left out it follows the number of rounds: give {given}, as the run began"


def _check_rounds(there: Config, here: Config, done: int) -> None:
    """Raises CheckpointError where a run of so many rounds would not have come to where this one is.

    Another number is as good as the first while the rounds that are done would have had the same rates: with
    a constant rate always, with one that decays until the warm-up is over, by steps until the first. Where
    parts of the model are others from round to round none is.
    """
    if here.rounds < done or (here.rounds == done < there.rounds):
        raise CheckpointError(f"rounds: {done} are done, expected at least {done + 1}, got {here.rounds}")
    finished = f"the run of {done} is finished: "
    way = finished if done == there.rounds else f"go on with {there.rounds}, or "
    if METHODS[here.method].by_round and here.rounds != there.rounds:
        raise CheckpointError(
            f"rounds: {there.rounds} there, {here.rounds} here: which blocks {here.method} trains in a round "
            f"may be by the number of all rounds; {way}start a run of {here.rounds} anew"
        )
    for round in range(done):
        before, now = learning_rate(there, round), learning_rate(here, round)
        if before != now:
            raise CheckpointError(
                f"rounds: {there.rounds} there, {here.rounds} here: as lr_decay is {here.lr_decay}, round "
                f"{round + 1}, which is done, had a rate of {before:.6g} and would have had {now:.6g}; "
                f"{way}start a run of {here.rounds} anew"
            )


def versions() -> dict[str, str]:
    """What the bits of a run depend on besides its settings, data and net."""
    return {
        "fedss-kernels": _own_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "instruction set": _C.instruction_set(),
    }


@functools.cache  # it is looked for on the disk
def _own_version() -> str:
    try:
        return version("fedss-kernels")
    except PackageNotFoundError:
        return "not installed"


def exists(folder: Path) -> bool:
    """Whether there is one in a run's folder."""
    return bool(_all(folder))


def last_round(folder: Path) -> int:
    """Rounds that the last one in a run's folder has, of which there is one."""
    return _round(_all(folder)[-1])


def remove(folder: Path) -> None:
    for path in _all(folder):
        shutil.rmtree(path)
    shutil.rmtree(folder / "checkpoint-unfinished", ignore_errors=True)


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """A line for each option that matters and is not the same."""
    names = [name for name in {**there, **here} if name not in MAY_DIFFER]
    absent = "no such option"
    return [
        f"{name}: {there.get(name, absent)!r} there, {here.get(name, absent)!r} here"
        for name in names
        if there.get(name, absent) != here.get(name, absent)
    ]


def _all(folder: Path) -> list[Path]:
    """Those that are whole, the oldest first."""
    return sorted(
        (path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()),
        key=_round,
    )


def _round(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _seal(rest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
