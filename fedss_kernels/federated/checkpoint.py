"""Checkpoints: everything that the next round depends on, in a folder that is there whole or not at all.

checkpoint-000120/          once 120 rounds are done
    state.safetensors       the server's tensors
    checkpoint.json         all else: the round, the configuration, the lengths of the run's tables, checksums

It is written under another name, synced, and renamed; the one before goes when the new one is there. So
whatever is interrupted, the last good one stands. What was changed since in it, or in the tables that it goes
with, is noticed.
"""

import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from .config import Config

FORMAT = 4
# Options that no bit of a result depends on.
MAY_DIFFER = ("out", "data_dir", "cache_dir", "class_store", "checkpoint_every", "workers")
_STATE, _REST = "state.safetensors", "checkpoint.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be gone on from, and why."""


@dataclass(frozen=True)
class Checkpoint:
    round: int  # rounds done
    tensors: Mapping[str, Tensor]
    table_bytes: Mapping[str, int]  # lengths of the run's tables then: file name -> bytes
    table_sha256: Mapping[str, str]  # of what they held
    fingerprint: str  # of the data and the net that the run began with
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
        "fingerprint": checkpoint.fingerprint,
        "store": checkpoint.store,
        "state_sha256": hashlib.sha256(state).hexdigest(),
    }
    unfinished = folder / "checkpoint-unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    write_synced(unfinished / _STATE, state)
    write_synced(unfinished / _REST, json.dumps(rest | {"sha256": _seal(rest)}, indent=2).encode())
    sync_folder(unfinished)
    finished = folder / f"checkpoint-{checkpoint.round:06}"
    os.rename(unfinished, finished)
    sync_folder(folder)
    for other in _all(folder):
        if other != finished:
            shutil.rmtree(other)


def read(folder: Path, config: Config) -> Checkpoint:
    """The last one in a run's folder.

    Raises CheckpointError where there is none, for one that was damaged, or that is another version's or
    another configuration's, with a list of what differs.
    """
    found = _all(folder)
    if not found:
        raise CheckpointError(f"no checkpoint in {folder}")
    path = found[-1]
    try:
        rest = json.loads((path / _REST).read_bytes())
        state = (path / _STATE).read_bytes()
        seal = rest.pop("sha256")
        whole = seal == _seal(rest) and rest["state_sha256"] == hashlib.sha256(state).hexdigest()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not whole:
        raise CheckpointError(f"{path} is damaged: its checksum is another")
    if rest["format"] != FORMAT:
        raise CheckpointError(f"{path} is of format {rest['format']}, this version reads {FORMAT}")
    different = differences(rest["config"], config.to_dict())
    if different:
        raise CheckpointError(f"{path} is of another configuration: {'; '.join(different)}")
    names = ("table_bytes", "table_sha256", "fingerprint", "store")
    return Checkpoint(rest["round"], safetensors().load(state), *(rest[name] for name in names))


def exists(folder: Path) -> bool:
    """Whether there is one in a run's folder."""
    return bool(_all(folder))


def remove(folder: Path) -> None:
    for path in [*_all(folder), folder / "checkpoint-unfinished"]:
        shutil.rmtree(path, ignore_errors=True)


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
        key=lambda path: int(path.name.removeprefix("checkpoint-")),
    )


def _seal(rest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_synced(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """So that what was made or renamed in it is there after a loss of power too."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
