"""The folder of one run: what it holds, and how it is written and read back.

config.json   every option, resolved
metrics.csv   one line for each round
ledger.csv    one line for each client of each round: bytes by kind
checkpoint-*  what a run that was stopped goes on from; gone once it is finished
summary.json  the figures at the end
model.pt      {"extractor": state dict, "weight": W}, for torch.load(path, weights_only=True); without W
              where that is in a class store
report.html, accuracy_by_round.png, accuracy_by_bytes.png
error.txt     the traceback, where a run of `fedss compare` failed
"""

import csv
import dataclasses
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .checkpoint import Checkpoint, CheckpointError
from .config import Config
from .ledger import Entry, Traffic
from .lock import Lock

TABLES = ("metrics.csv", "ledger.csv")
RUN_FILES = (
    "config.json",
    "metrics.csv",
    "ledger.csv",
    "summary.json",
    "model.pt",
    "report.html",
    "accuracy_by_round.png",
    "accuracy_by_bytes.png",
    "error.txt",
)


@dataclass(frozen=True)
class RoundMetrics:
    """One line of metrics.csv. Accuracies are shares in [0, 1], None in rounds without an evaluation."""

    round: int  # rounds done, from 1
    loss: float  # mean over the cohort's images of the clients' training loss
    client_lr: float
    top1: float | None
    map_at_10: float | None
    recall_at_1: float | None
    recall_at_10: float | None
    # test images whose embedding is not finite, which are misses; None as of the accuracies
    not_finite: int | None = field(default=None, kw_only=True)
    # the round from which on the model has had numbers that are not finite, and no accuracies
    not_finite_since: int | None = field(default=None, kw_only=True)
    attempts: int  # cohorts drawn, as one in which too few answer is followed by another
    accepted: int  # answers that counted
    dropped: int  # clients that never answered
    late: int  # clients that took longer than the deadline
    rejected: int  # answers that were left out, as something was wrong with them
    discarded: int  # answers that nothing was wrong with, in cohorts of which too few answered
    mean_class_set: float  # mean |S_k| over the clients drawn
    bytes_down_extractor: int
    bytes_down_rows: int
    bytes_up_ids: int
    bytes_up_extractor: int
    bytes_up_rows: int
    bytes_so_far: int  # of this and all earlier rounds
    seconds: float  # since the run began, evaluations included

    @property
    def traffic(self) -> Traffic:
        return Traffic(*(getattr(self, f"bytes_{field.name}") for field in fields(Traffic)))


@dataclass(frozen=True)
class Summary:
    """The figures at the end of a run. Bytes are those of all clients and rounds."""

    method: str
    data: str
    task: str
    seed: int
    top1: float | None
    map_at_10: float | None
    recall_at_1: float | None
    recall_at_10: float | None
    rounds: int
    cohort: int
    accepted: int
    dropped: int
    late: int
    rejected: int
    discarded: int
    num_classes: int  # C
    num_clients: int
    num_train_images: int
    num_test_images: int
    num_parameters: int  # of the extractor
    embedding_dim: int
    mean_class_set: float  # mean |S_k|
    traffic: Traffic
    full_traffic: Traffic  # what full_softmax moves in as many rounds
    seconds: float
    not_finite: int | None = None  # as in the last round
    not_finite_since: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Summary":
        traffic = {name: Traffic(**values[name]) for name in ("traffic", "full_traffic")}
        return cls(**{**values, **traffic})

    @property
    def accuracy(self) -> float | None:
        """The measure of the task: top-1 of classification, MAP@10 of retrieval."""
        return self.top1 if self.task == "classification" else self.map_at_10


@dataclass(frozen=True)
class RunFolder:
    """Writes a run's files as it goes: every round's lines are written before the next round begins."""

    path: Path
    config: Config
    fingerprint: str  # of the data and the net
    hashes: dict[str, Any]  # of what the tables hold
    lock: Lock  # on config.json, for as long as the run lasts

    @classmethod
    def new(cls, path: Path, config: Config, fingerprint: str) -> "RunFolder":
        """For a run from the start. Raises as `check_folder`, and InUse where a run is going on."""
        checkpoint.safetensors()  # where it is missing, better now than at the first checkpoint
        check_folder(path, RUN_FILES, overwrite=config.overwrite)
        # a run that is going on there would write on
        before = Lock(path / "config.json") if (path / "config.json").exists() else None
        checkpoint.remove(path)
        prepare(path, RUN_FILES, overwrite=config.overwrite)
        if before:
            before.release()
        config.save(path / "config.json")
        hashes = {name: hashlib.sha256() for name in TABLES}
        folder = cls(path, config, fingerprint, hashes, Lock(path / "config.json"))
        folder._append("metrics.csv", [[field.name for field in fields(RoundMetrics)]])
        kinds = [field.name for field in fields(Traffic)]
        head = ["round", "attempt", "client", "num_rows", "outcome", "fault"]
        folder._append("ledger.csv", [[*head, *kinds]])
        return folder

    @classmethod
    def resumed(
        cls, path: Path, config: Config, fingerprint: str
    ) -> "tuple[RunFolder, Checkpoint, list[RoundMetrics]]":
        """(the folder of a run that stopped, its last checkpoint, the rounds until then).

        The tables are cut to the rounds that the checkpoint has. Raises CheckpointError as `checkpoint.read`,
        and where a run is finished or going on, its data or net are others, or its tables are not those of
        the checkpoint.
        """
        if (path / "summary.json").exists():
            raise CheckpointError(f"the run in {path} is finished")
        found = checkpoint.read(path, config)
        if found.fingerprint != fingerprint:
            raise CheckpointError(f"the run in {path} began with other data or another net")
        hashes = {}
        for name in TABLES:
            try:
                content = (path / name).read_bytes()[: found.table_bytes[name]]
            except OSError as error:
                raise CheckpointError(f"{path / name} cannot be read: {error.strerror}") from None
            hashes[name] = hashlib.sha256(content)
            if hashes[name].hexdigest() != found.table_sha256[name]:
                raise CheckpointError(f"{path / name} is not what it was at the checkpoint")
        folder = cls(path, config, fingerprint, hashes, Lock(path / "config.json"))
        for name in TABLES:
            os.truncate(path / name, found.table_bytes[name])
        return folder, found, read_metrics(path / "metrics.csv")

    def save_checkpoint(self, rounds: int, tensors: Mapping[str, Tensor], store: str | None = None) -> None:
        """Of what the server holds after so many rounds; the tables are synced first."""
        lengths = {}
        for name in TABLES:
            with (self.path / name).open("rb") as file:
                os.fsync(file.fileno())
                lengths[name] = os.fstat(file.fileno()).st_size
        digests = {name: of.hexdigest() for name, of in self.hashes.items()}
        found = Checkpoint(rounds, tensors, lengths, digests, self.fingerprint, store)
        checkpoint.write(self.path, self.config, found)

    def add(self, metrics: RoundMetrics, entries: list[Entry]) -> None:
        self._append("metrics.csv", [astuple(metrics)])
        self.add_entries(entries)

    def add_entries(self, entries: Sequence[Entry]) -> None:
        """To the ledger alone: of a round that no cohort made."""
        self._append(
            "ledger.csv",
            [
                (e.round, e.attempt, e.client, e.num_rows, e.outcome, e.fault, *astuple(e.traffic))
                for e in entries
            ],
        )

    def _append(self, name: str, lines: Sequence[Sequence[object]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text).writerows(lines)
        content = text.getvalue().encode()
        with (self.path / name).open("ab") as file:
            file.write(content)
        self.hashes[name].update(content)

    def finish(self, summary: Summary, extractor: nn.Module, weight: Tensor | None) -> None:
        state = {name: value.detach().clone() for name, value in extractor.state_dict().items()}
        rows = {} if weight is None else {"weight": weight.clone()}
        torch.save({"extractor": state, **rows}, self.path / "model.pt")
        # Under its name when it is whole: it says that the run is finished.
        unfinished = self.path / "summary-unfinished.json"
        unfinished.write_text(json.dumps(summary.to_dict(), indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, self.path / "summary.json")
        checkpoint.remove(self.path)

    def close(self) -> None:
        """Another process may use the folder."""
        self.lock.release()


def check_folder(path: Path, files: tuple[str, ...], *, overwrite: bool) -> None:
    """Makes the folder; raises FileExistsError or another OSError if results can't go there.

    What is in the folder is kept, unless `overwrite` is set and an earlier run left it, as the first of
    `files` shows.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file, not a folder")
    if path.exists() and any(path.iterdir()):
        if not overwrite:
            resume = ", go on with it with --resume" if checkpoint.exists(path) else ""
            raise FileExistsError(
                f"the folder {path} is not empty: choose another{resume}, or replace it with --overwrite"
            )
        if not _is_ours(path / files[0]):
            raise FileExistsError(
                f"the folder {path} holds no earlier results ({files[0]}): it is not overwritten"
            )
    make_folder(path)


def make_folder(path: Path) -> None:
    """Makes the folder where there is none. Raises OSError if it cannot be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(f"the folder {path} cannot be written to: {error.strerror}") from None


def _is_ours(marker: Path) -> bool:
    """Whether a config.json or comparison.json is one that an earlier run wrote."""
    try:
        values = json.loads(marker.read_text(encoding="utf-8"))
        Config.from_dict(values.get("config", values))
    except (OSError, ValueError, TypeError, AttributeError):
        return False
    return "rounds" in values.get("config", values)


def prepare(path: Path, files: tuple[str, ...], *, overwrite: bool) -> None:
    """Makes the folder, and frees it of an earlier run's `files` alone. Raises as `check_folder`.

    And of what was measured of it, the sections of its report. The first of the files, by which the folder is
    known to be one of ours, goes last.
    """
    check_folder(path, files, overwrite=overwrite)
    for section in path.glob("section-*.html"):
        section.unlink()
    for name in reversed(files):
        (path / name).unlink(missing_ok=True)


def read_run(path: Path) -> tuple[Config, list[RoundMetrics], Summary]:
    """What a finished run left in its folder."""
    summary = Summary.from_dict(json.loads((path / "summary.json").read_text(encoding="utf-8")))
    return Config.load(path / "config.json"), read_metrics(path / "metrics.csv"), summary


def read_model(path: Path) -> tuple[dict[str, Tensor], Tensor]:
    """(the net's state, W (C, D)) of a finished run. Raises ValueError where there is no W, as in a store."""
    try:
        found = torch.load(path / "model.pt", weights_only=True)
    except OSError as error:
        raise ValueError(f"no model.pt of a finished run in {path}: {error.strerror}") from None
    if "weight" not in found:
        raise ValueError(f"{path / 'model.pt'} has no class matrix: it is in a class store")
    return found["extractor"], found["weight"]


def read_metrics(path: Path) -> list[RoundMetrics]:
    with path.open(newline="", encoding="utf-8") as file:
        return [
            RoundMetrics(**{name: _number(text) for name, text in line.items()})
            for line in csv.DictReader(file)
        ]


def _number(text: str) -> Any:
    if not text:
        return None
    return int(text) if text.lstrip("-").isdigit() else float(text)
