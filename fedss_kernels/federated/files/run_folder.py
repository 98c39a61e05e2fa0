"""The folder of one run: what it holds, and how it is written and read back.

config.json   every option, resolved
metrics.csv   one line for each round
ledger.csv    one line for each client of each round: bytes by kind; of clients that learn without labels what
              a step takes and all of them compute, by a model of one client
classes.csv   the names of the classes, by their numbers in the class matrix, and those of a retrieval's test
checkpoint-*  what a run that was stopped goes on from, and a finished one to more rounds
record/       the run's own copy of the tables, from which it is resumed and reported
summary.json  the figures at the end; it says that the run is finished
model.pt      {"extractor": state dict, "weight": W}, for torch.load(path, weights_only=True); without W
              where that is in a class store; of clients that keep their own rows these too: "clients" (n,),
              "heads" (n, C, D), and "bodies" (n, P) where their nets are their own
report.html, accuracy_by_round.png, accuracy_by_bytes.png, and of clients that learn without labels
step_by_round.png
probe.csv, probe.md, probe.png
              what `fedss probe` found
*-changed.csv what another program made of a table
error.txt     the traceback, where a run of `fedss compare` failed
"""

import csv
import dataclasses
import io
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config, ConfigError, SharedConfig, read_options
from ..config_error import UnknownMethod
from ..data import FederatedData
from ..disk import reason, remove_unfinished, replacing, systems_errors, write_whole
from ..ledger import Entry, is_flow
from ..lock import Lock
from ..measures import BY_TASK, Measures
from ..to_paste import to_paste
from . import checkpoint
from .checkpoint import Checkpoint, CheckpointError
from .facts import Facts
from .fingerprint import Fingerprint
from .record import Record, read_facts, read_table, remove_record
from .round_metrics import RoundMetrics
from .summary import Summary

RUN_FILES = (
    "config.json",
    "metrics.csv",
    "ledger.csv",
    "classes.csv",
    "summary.json",
    "model.pt",
    "report.html",
    "accuracy_by_round.png",
    "accuracy_by_bytes.png",
    "step_by_round.png",
    *(f"probe.{kind}" for kind in ("csv", "md", "png")),
    "error.txt",
)
MAY_CHANGE = ("rounds", *checkpoint.MAY_DIFFER)  # options of a run that goes on
log = logging.getLogger(__name__)


@dataclass
class RunFolder:
    """Writes a run's files as it goes: every round's lines are written before the next round begins."""

    path: Path
    config: Config
    fingerprint: Fingerprint
    record: Record
    columns: Sequence[str]  # the ledger's, of what moved and what was computed
    lock: Lock  # on config.json, for as long as the run lasts

    @classmethod
    def new(cls, path: Path, config: Config, fingerprint: Fingerprint, facts: Facts) -> "RunFolder":
        """For a run from the start. Raises as `check_folder`, and InUse where a run is going on."""
        checkpoint.safetensors()  # where it is missing, better now than at the first checkpoint
        check_folder(path, RUN_FILES, overwrite=config.overwrite)
        # a run that is going on there would write on
        before = Lock(path / "config.json") if (path / "config.json").exists() else None
        checkpoint.remove(path)
        remove_record(path)
        prepare(path, RUN_FILES, overwrite=config.overwrite)
        if before:
            before.release()
        config.save(path / "config.json")
        lock = Lock(path / "config.json")
        record = Record.new(path, facts.text)
        record.append("metrics.csv", [RoundMetrics.header(facts.measures, facts.flows)])
        head = ["round", "attempt", "client", "num_rows", "outcome", "fault"]
        record.append("ledger.csv", [[*head, *facts.columns]])
        return cls(path, config, fingerprint, record, facts.columns, lock)

    @classmethod
    def resumed(
        cls, path: Path, config: Config, fingerprint: Fingerprint, facts: Facts
    ) -> "tuple[RunFolder, Checkpoint, list[RoundMetrics]]":
        """(the folder of a run that stopped, its last checkpoint, the rounds until then).

        One that is finished goes on to more rounds. The tables are cut to the rounds that the checkpoint has;
        where a reader's file was changed it is written anew, and a line says so. Raises CheckpointError as
        `checkpoint.read`, and where a run is finished, its data or net are others, or neither copy of a table
        is that of the checkpoint; InUse where it is going on. Nothing is changed then.
        """
        finished = (path / "summary.json").exists()
        if finished and not checkpoint.exists(path):
            raise CheckpointError(
                f"the run in {path} is finished, and kept no checkpoint that more rounds could follow "
                "(checkpoint_every 0, or an earlier version)"
            )
        found = checkpoint.read(path, config)
        if finished and found.round == config.rounds:
            done = "1 round is" if found.round == 1 else f"{found.round} rounds are"
            raise CheckpointError(
                f"the run in {path} is finished: its {done} done; for more of them give a larger number of "
                f"rounds, for its report: {to_paste('report', path)}"
            )
        different = found.fingerprint.differences(fingerprint)
        if different:
            raise CheckpointError(
                f"the run in {path} began with other data, another net or another method: "
                f"not as it was: {', '.join(different)}"
            )
        there, changed = read_config(path)
        if not (path / "config.json").exists():
            there.save(path / "config.json")
        lock = Lock(path / "config.json")
        try:
            record = Record.cut(path, facts.text, found.table_bytes, found.table_sha256)
        except BaseException:
            lock.release()
            raise
        folder = cls(path, config, fingerprint, record, facts.columns, lock)
        remove_unfinished(path)
        checkpoint.remove_older(path)
        if changed:
            folder._save(there)
            log.warning("%s: it is as the run began again", changed)
        return folder, found, read_metrics(path, facts.measures)

    def begin(self) -> None:
        """When nothing is in the way of the next round: a run that finished or failed is that no more.

        Its config.json has the places that it goes on from, for who measures it.
        """
        there, _ = read_config(self.path)
        now = {name: getattr(self.config, name) for name in ("rounds", *checkpoint.PLACES)}
        if any(getattr(there, name) != value for name, value in now.items()):
            self._save(dataclasses.replace(there, **now))
        for name in ("summary.json", "error.txt"):
            (self.path / name).unlink(missing_ok=True)

    def _save(self, config: Config) -> None:
        config.save(self.path / "config.json")
        before, self.lock = self.lock, Lock(self.path / "config.json")  # on the new file
        before.release()

    def name_classes(self, data: FederatedData) -> None:
        parts = {"training": data.class_names, "test": data.test_class_names}
        lines = [[part, i, name] for part, names in parts.items() for i, name in enumerate(names)]
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([["part", "number", "name"], *lines])
        write_whole(self.path / "classes.csv", text.getvalue())

    def save_checkpoint(self, rounds: int, tensors: Mapping[str, Tensor], store: str | None = None) -> None:
        """Of what the server holds after so many rounds; the tables are synced first."""
        found = Checkpoint(rounds, tensors, *self.record.synced(), self.fingerprint, store)
        checkpoint.write(self.path, self.config, found)

    def add(self, metrics: RoundMetrics, entries: Sequence[Entry]) -> None:
        self.record.append("metrics.csv", [metrics.line])
        self.add_entries(entries)

    def add_entries(self, entries: Sequence[Entry]) -> None:
        """To the ledger alone: of a round that no cohort made."""
        self.record.append(
            "ledger.csv",
            [
                (
                    *(e.round, e.attempt, e.client, e.num_rows, e.outcome, e.fault),
                    *(
                        e.traffic[column] if is_flow(column) else getattr(e.work, column, None)
                        for column in self.columns
                    ),
                )
                for e in entries
            ],
        )

    def finish(
        self, summary: Summary, extractor: nn.Module, weight: Tensor | None, own: Mapping[str, Tensor]
    ) -> None:
        """Makes model.pt and summary.json. A checkpoint of the last round stays, for a run of more rounds."""
        self.record.restore_tables()
        state = {name: value.detach().clone() for name, value in extractor.state_dict().items()}
        rows = {} if weight is None else {"weight": weight.clone()}
        with replacing(self.path / "model.pt") as file, systems_errors():
            torch.save({"extractor": state, **rows, **own}, file)
        # The last: it says that the run is finished.
        write_whole(self.path / "summary.json", json.dumps(summary.to_dict(), indent=2) + "\n")
        if not self.config.checkpoint_every:
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
            stopped = checkpoint.exists(path) and not (path / "summary.json").exists()
            resume = ", go on with it with --resume" if stopped else ""
            raise FileExistsError(
                f"the folder {path} is not empty: choose another{resume}, or replace it with --overwrite"
            )
        why = _not_ours(path / files[0])
        if why:
            raise FileExistsError(
                f"the folder {path} holds no earlier results ({why}): it is not overwritten"
            )
    make_folder(path)


def make_folder(path: Path) -> None:
    """Makes the folder where there is none. Raises OSError if it cannot be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        nowhere = path.is_symlink() and not path.exists()
        why = (
            "a link to what is not there" if nowhere else "it is a file" if path.is_file() else error.strerror
        )
        raise OSError(f"the folder {path} cannot be written to: {why}") from None


def _not_ours(marker: Path) -> str:
    """Why a config.json or comparison.json is not one that an earlier run wrote; "" if it is."""
    if not marker.exists():
        return f"no {marker.name}"
    try:
        values = read_options(marker)
        kind = SharedConfig if "config" in values else Config
        values = values.get("config", values)
        kind.from_dict(values, marker)
    except UnknownMethod:
        return ""  # it was registered when the run was made
    except (ConfigError, TypeError) as error:
        return getattr(error, "message", f"{marker} is another program's")
    return "" if "rounds" in values else f"{marker} is another program's"


def prepare(path: Path, files: tuple[str, ...], *, overwrite: bool) -> None:
    """Makes the folder, and frees it of an earlier run's `files` alone. Raises as `check_folder`.

    The first of the files, by which the folder is known to be one of ours, goes last.
    """
    check_folder(path, files, overwrite=overwrite)
    clear(path, files)


def clear(path: Path, files: tuple[str, ...]) -> None:
    """Frees a folder of these files, the last first, and of the sections of their report."""
    remove_unfinished(path)
    for section in path.glob("section-*.html"):
        section.unlink()
    for name in reversed(files):
        (path / name).unlink(missing_ok=True)


def read_config(path: Path) -> tuple[Config, str]:
    """(the configuration of the run in a folder, what of its config.json is not believed).

    Users edit config.json: where the run has a checkpoint, and it is whole, that has the word, but on options
    in MAY_CHANGE. Raises ValueError where there is neither, ConfigError where they are of another version.
    """
    file = path / "config.json"
    if not checkpoint.exists(path):
        if not file.exists():
            raise ValueError(f"no run in {path}: no config.json, no checkpoint")
        return Config.load(file), ""
    try:
        began = checkpoint.read_config(path)
    except CheckpointError:  # who resumes the run is told
        return Config.load(file), ""
    try:
        now = Config.load(file)
    except ConfigError as error:
        return began, error.message
    settled = dataclasses.replace(began, **{name: getattr(now, name) for name in MAY_CHANGE})
    different = checkpoint.differences(settled.to_dict(), now.to_dict())
    return settled, f"{file} was changed ({'; '.join(different)})" if different else ""


def as_trained(config: Config) -> Config:
    """Of a finished run, whose net is in its folder: without the files that it began with."""
    return dataclasses.replace(config, init_checkpoint=None, half_checkpoint=None)


def read_run(path: Path) -> tuple[Config, list[RoundMetrics], Summary]:
    """What a run left in its folder: all of a finished one, what is done of another.

    Raises ValueError, which says why, where no round is done, or what an earlier version left is not enough.
    """
    config, _ = read_config(path)
    facts = _read_facts(path)
    history = read_metrics(path, facts.measures if facts else BY_TASK[config.task])
    if not history:
        raise ValueError(f"no round of the run in {path} is done")
    if facts is None:
        return config, history, _read_summary(path / "summary.json")
    return config, history, Summary.of(config, facts, history)


def _read_facts(path: Path) -> Facts | None:
    """None of a run of an earlier version, which left its figures at the end only."""
    try:
        return Facts.read(read_facts(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"the record of the run in {path} cannot be read: {reason(error)}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"facts.json in {path / 'record'} is not as a run wrote it: {error}") from None


def _read_summary(file: Path) -> Summary:
    try:
        return Summary.from_dict(json.loads(file.read_bytes()))
    except OSError as error:
        raise ValueError(f"no finished run in {file.parent}: summary.json: {error.strerror}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is not as a run wrote it: {error}") from None


def read_model(path: Path) -> tuple[dict[str, Tensor], Tensor]:
    """(the net's state, W (C, D)) of a finished run. Raises ValueError where there is no W, as in a store."""
    found = _read_model(path)
    if "weight" not in found:
        raise ValueError(f"{path / 'model.pt'} has no class matrix: it is in a class store, or there is none")
    return found["extractor"], found["weight"]


def read_net(path: Path) -> dict[str, Tensor]:
    """The net's state of a finished run. Raises ValueError where there is none."""
    return _read_model(path)["extractor"]


def _read_model(path: Path) -> dict[str, Any]:
    if not (path / "summary.json").exists():  # a model.pt is of fewer rounds, before more were begun
        raise ValueError(f"no finished run in {path}: no summary.json")
    try:
        found = torch.load(path / "model.pt", weights_only=True)
    except OSError as error:
        raise ValueError(f"no model.pt of a finished run in {path}: {error.strerror}") from None
    except Exception:  # what a damaged pickle raises may be anything
        found = None
    if not isinstance(found, dict) or "extractor" not in found:
        raise ValueError(f"{path / 'model.pt'} is damaged, or no run wrote it")
    return found


def check_trained_on(path: Path, data: FederatedData) -> None:
    """Raises ValueError where the checkpoint of a finished run shows that these are not its data any more.

    Where there is none that can be read, as with checkpoint_every 0, it is not known.
    """
    try:
        found, _ = checkpoint.read_fingerprint(path)
    except CheckpointError:
        return
    if different := found.other_data(data):
        raise ValueError(f"the data are not those that {path} was trained on: {', '.join(different)} differ")


def read_kept(path: Path) -> Callable[[int], tuple[Tensor | None, Tensor | None]] | None:
    """What clients of a finished run keep of the model for themselves; None where it is nothing.

    client -> (phi (P,), rows (C, D)), None for what is not its own, or not trained yet: then it is the run's.
    """
    found = torch.load(path / "model.pt", weights_only=True)
    if "clients" not in found:
        return None
    place = {client: i for i, client in enumerate(found["clients"].tolist())}
    kept = [found.get(name) for name in ("bodies", "heads")]

    def own(client: int) -> tuple[Tensor | None, Tensor | None]:
        phi, rows = (None if of is None or client not in place else of[place[client]] for of in kept)
        return phi, rows

    return own


def read_metrics(path: Path, measures: Measures) -> list[RoundMetrics]:
    """Of the run in a folder. Raises ValueError where there are none, or not as a run wrote them."""
    try:
        return [RoundMetrics.read(line, measures) for line in read_table(path, "metrics.csv")]
    except OSError as error:
        raise ValueError(f"no run in {path}: metrics.csv: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"metrics.csv in {path} is not as a run wrote it: {error}") from None


def faults(path: Path) -> list[tuple[str, int]]:
    """Of the answers that were left out in the run in a folder what was wrong, and how often; most first.

    Raises ValueError where there is no ledger, or not as a run wrote it.
    """
    try:
        return Counter(f["fault"] for f in read_table(path, "ledger.csv") if f["fault"]).most_common()
    except OSError as error:
        raise ValueError(f"no run in {path}: ledger.csv: {error.strerror}") from None
    except (ValueError, KeyError) as error:
        raise ValueError(f"ledger.csv in {path} is not as a run wrote it: {error}") from None
