"""A run's own record, which it is resumed and reported from. The files beside it are for readers.

record/facts.json    sizes of the data and the net
record/metrics.csv   the two tables once more, line by line as the readers' own are written
record/ledger.csv
"""

import csv
import hashlib
import io
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..disk import append, named, replacing, write_whole
from .checkpoint import CheckpointError

TABLES = ("metrics.csv", "ledger.csv")
log = logging.getLogger(__name__)


class Record:
    """Appends to both copies of a table, at the cost of the lines alone, and knows the table's checksum."""

    def __init__(self, run: Path, hashes: dict[str, Any]):
        self.run, self.folder = run, folder_of(run)
        self.hashes = hashes  # of each of TABLES

    @classmethod
    def new(cls, run: Path, facts: str) -> "Record":
        """Of no lines. An earlier run's is to be removed first."""
        folder = folder_of(run)
        folder.mkdir(exist_ok=True)
        write_whole(folder / "facts.json", facts)
        return cls(run, {name: hashlib.sha256() for name in TABLES})

    @classmethod
    def cut(cls, run: Path, facts: str, lengths: Mapping[str, int], digests: Mapping[str, str]) -> "Record":
        """As it was at a checkpoint, whose lengths and checksums these are; the readers' tables too.

        Raises CheckpointError where neither copy of a table holds what the checkpoint goes with.
        """
        contents = {name: _found(run, name, lengths[name], digests[name]) for name in TABLES}
        folder_of(run).mkdir(exist_ok=True)
        write_whole(folder_of(run) / "facts.json", facts)
        for name, content in contents.items():
            _make(folder_of(run) / name, content)
        record = cls(run, {name: hashlib.sha256(content) for name, content in contents.items()})
        record.restore_tables()
        return record

    def append(self, name: str, lines: Sequence[Sequence[object]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text).writerows(lines)
        content = text.getvalue().encode()
        for folder in (self.folder, self.run):
            append(folder / name, content)
        self.hashes[name].update(content)

    def synced(self) -> tuple[dict[str, int], dict[str, str]]:
        """(lengths, checksums) of the tables, whose lines are on the disk."""
        lengths = {}
        for name in TABLES:
            with named(self.folder / name), (self.folder / name).open("rb") as file:
                os.fsync(file.fileno())
                lengths[name] = os.fstat(file.fileno()).st_size
        return lengths, {name: of.hexdigest() for name, of in self.hashes.items()}

    def restore_tables(self) -> None:
        """Makes the readers' tables the record's again. What else was in one is kept beside it, and said."""
        for name in TABLES:
            own, there = (self.folder / name).read_bytes(), self.run / name
            found = there.read_bytes() if there.exists() else b""
            if not found.startswith(own) and not own.startswith(found):
                aside = there.with_name(f"{there.stem}-changed{there.suffix}")
                os.replace(there, aside)
                log.warning(
                    "%s was changed by another program: that is now %s, and the table is as the run wrote it",
                    there,
                    aside.name,
                )
            _make(there, own)


def folder_of(run: Path) -> Path:
    return run / "record"


def remove_record(run: Path) -> None:
    """Its own files alone."""
    for name in ("facts.json", *TABLES):
        (folder_of(run) / name).unlink(missing_ok=True)


def read_facts(run: Path) -> bytes:
    return (folder_of(run) / "facts.json").read_bytes()


def read_table(run: Path, name: str) -> list[dict[str, str]]:
    """The lines of a run's table, by column, but for one that is half written."""
    own = folder_of(run) / name
    content = (own if own.exists() else run / name).read_bytes()
    whole = content[: content.rfind(b"\n") + 1].decode("utf-8-sig")  # as a spreadsheet saves it
    return list(csv.DictReader(io.StringIO(whole, newline="")))


def _found(run: Path, name: str, length: int, digest: str) -> bytes:
    """The table at a checkpoint, from whichever copy has it."""
    for path in (folder_of(run) / name, run / name):
        content = path.read_bytes()[:length] if path.exists() else b""
        if hashlib.sha256(content).hexdigest() == digest:
            return content
    raise CheckpointError(
        f"neither {folder_of(run) / name} nor {run / name} is what it was at the checkpoint"
    )


def _make(path: Path, content: bytes) -> None:
    """Makes a file hold this; one that begins with it is only cut."""
    if path.exists():
        with path.open("rb") as file:
            if file.read(len(content)) == content:
                return os.truncate(path, len(content))
    with replacing(path) as file:
        file.write(content)
