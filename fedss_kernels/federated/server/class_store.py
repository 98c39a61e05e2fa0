"""A class matrix in files: larger than memory if need be, and never copied for a checkpoint.

rows.bin         the rows, of which a round touches few; what was never written takes no room
store.json       which store it is, and its sizes
undo-000120.bin  what the rows changed since the checkpoint after 120 rounds were then

Before a row changes for the first time since a checkpoint, what it was goes to the journal, and the journal
to the disk. So whenever the process ends, the matrix of the last checkpoint can be had again: `roll_back`. A
journal is there before its checkpoint is: a checkpoint without it is of a store that went on otherwise.
"""

import contextlib
import json
import mmap
import os
import struct
import uuid
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..disk import (
    allocate,
    append,
    named,
    reads_take_room,
    sync_folder,
    write_synced,
)
from ..files.checkpoint import CheckpointError
from ..lock import Lock
from .rows import Rows

FORMAT = 1
_ROWS, _IDENTITY = "rows.bin", "store.json"
_CHUNK = 2**20  # bytes read at a time
_MAGIC = b"fedss undo 1\n"
_TITLE = struct.Struct("<16s32sQQ")  # magic, the store's identity, rounds done, entries that are whole
_HEAD = struct.Struct("<QII")  # rows in an entry, checksum of what follows, checksum of these two


class ClassStore:
    """The files of one matrix, open. `rows` is what is in them, written when the system likes."""

    def __init__(self, folder: Path, num_rows: int, dim: int, identity: str):
        self.folder, self.identity = folder, identity
        with named(folder / _ROWS), (folder / _ROWS).open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), Rows.num_bytes(num_rows, dim))
        if hasattr(mmap, "MADV_RANDOM"):  # rows come in no order: no reading ahead
            with contextlib.suppress(OSError):  # advice
                self._memory.madvise(mmap.MADV_RANDOM)
        self.rows = Rows.over(self._memory, num_rows, dim)
        self._since: int | None = None  # rounds done at the last checkpoint; None: there is none
        self._entries = 0  # in its journal
        self._moved = torch.empty(0, dtype=torch.int64)  # rows in it that have had no step since
        self._lock = Lock(folder / _IDENTITY)
        self._in_memory = reads_take_room(folder)

    @classmethod
    def new(
        cls, folder: Path, num_rows: int, dim: int, *, run: Path | None = None, overwrite: bool = False
    ) -> "ClassStore":
        """Of rows that are zeros, for the run in a folder. Raises FileExistsError as `check_free`."""
        check_free(folder, run=run, overwrite=overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        for path in [*folder.glob("undo-*"), folder / _ROWS, folder / _IDENTITY]:
            path.unlink(missing_ok=True)
        identity = uuid.uuid4().hex
        of_store = {"format": FORMAT, "id": identity, "num_rows": num_rows, "dim": dim, "run": _path(run)}
        write_synced(folder / _IDENTITY, json.dumps(of_store).encode())
        with named(folder / _ROWS), (folder / _ROWS).open("xb") as file:
            file.truncate(Rows.num_bytes(num_rows, dim))
        sync_folder(folder)
        return cls(folder, num_rows, dim, identity)

    @classmethod
    def opened(cls, folder: Path, num_rows: int, dim: int, identity: str | None) -> "ClassStore":
        """The store of that identity. Raises CheckpointError where it is not, or not whole."""
        try:
            found = json.loads((folder / _IDENTITY).read_bytes())
            length = (folder / _ROWS).stat().st_size
        except (FileNotFoundError, NotADirectoryError, ValueError) as error:
            raise CheckpointError(f"{folder} holds no class store: {error}") from None
        expected = {"format": FORMAT, "id": identity, "num_rows": num_rows, "dim": dim}
        if not isinstance(found, dict) or {name: found.get(name) for name in expected} != expected:
            raise CheckpointError(f"{folder} holds another class store than the checkpoint's")
        if length != Rows.num_bytes(num_rows, dim):
            raise CheckpointError(f"{folder / _ROWS} has {length:,} bytes, not those it was made with")
        return cls(folder, num_rows, dim, found["id"])

    def before_read(self, class_ids: Tensor) -> None:
        """To be called before rows are read: where that takes room too, as `allocate`."""
        if self._in_memory:
            self.allocate(class_ids.unique())

    def allocate(self, class_ids: Tensor) -> None:
        """To be called before rows (U,), ascending, are written for the first time: makes room on the disk.

        Raises OSError where there is none. Pages to which no row is written take none.
        """
        if len(class_ids) == 0:
            return
        size = 4 * self.rows.numbers.shape[1]
        begins = class_ids.numpy() * size
        ends = begins + size
        # rows that share a page, or lie on pages side by side, in one call
        apart = ends[:-1] // mmap.PAGESIZE + 1 < begins[1:] // mmap.PAGESIZE
        begins, ends = begins[np.insert(apart, 0, True)], ends[np.append(apart, True)]
        with named(self.folder / _ROWS), (self.folder / _ROWS).open("r+b") as file:
            for first, last in zip(begins.tolist(), ends.tolist(), strict=True):
                allocate(file.fileno(), first, last - first)

    def keep(self, class_ids: Tensor, *, stepped: bool) -> None:
        """To be called before rows change: their old values, where a roll-back may need them, on disk.

        stepped: whether `rows.stepped` will say that they changed.
        """
        if self._since is None:
            return
        unkept = class_ids[self.rows.stepped[class_ids] <= self._since]
        unkept = unkept[~torch.isin(unkept, self._moved)]
        if len(unkept) == 0:
            return
        content = unkept.numpy().tobytes() + self.rows.numbers[unkept].numpy().tobytes()
        head = struct.pack("<QI", len(unkept), zlib.crc32(content))
        journal = self._journal(self._since)
        append(journal, head + struct.pack("<I", zlib.crc32(head)) + content)
        with named(journal), journal.open("r+b") as file:
            os.fsync(file.fileno())
            # Not synced: it says what is there at least, so that a journal cut short is noticed.
            self._entries += 1
            file.write(self._title(self._since, self._entries))
        if not stepped:
            self._moved = torch.cat([self._moved, unkept])

    def sync(self) -> None:
        """The rows as they are now, on disk."""
        with named(self.folder / _ROWS):
            self._memory.flush()

    def prepare(self, rounds: int) -> None:
        """To be called before there is a checkpoint of what was synced: its journal, empty."""
        unfinished = self.folder / "undo-unfinished"  # the one before stays until this one is whole
        unfinished.unlink(missing_ok=True)
        write_synced(unfinished, self._title(rounds, 0))
        os.replace(unfinished, self._journal(rounds))
        sync_folder(self.folder)

    def mark(self, rounds: int) -> None:
        """There is that checkpoint: from now on `keep` keeps what it needs."""
        self.forget_journals(but=rounds)
        self._since, self._entries, self._moved = rounds, 0, self._moved[:0]

    def roll_back(self, rounds: int) -> None:
        """The rows of the checkpoint after so many rounds. Raises CheckpointError for a damaged journal.

        Where the process ended in `keep` the last entry is not whole: its rows did not change yet.
        """
        path = self._journal(rounds)
        try:
            file = path.open("rb")
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.folder} is not as the checkpoint left it: {error}") from None
        with file:
            entries = self._whole_entries(file)
            for at, count in reversed(entries):  # a row that was kept twice was first kept rightly
                file.seek(at)
                class_ids = torch.from_numpy(np.fromfile(file, np.int64, count))
                numbers = np.fromfile(file, np.float32, count * self.rows.numbers.shape[1])
                self.allocate(class_ids)  # whoever kept them may have ended before
                self.rows.numbers[class_ids] = torch.from_numpy(numbers).view(count, -1)
        self.sync()
        self.prepare(rounds)
        self.mark(rounds)

    def _whole_entries(self, file: BinaryIO) -> list[tuple[int, int]]:
        """(where an entry's rows begin, how many) of each; looks at every checksum before a row changes."""
        path, width = file.name, self.rows.numbers.shape[1]
        title = file.read(_TITLE.size)
        if len(title) < _TITLE.size or not title.startswith(self._title(rounds_of(path), 0)[:-8]):
            raise CheckpointError(f"{path} is damaged, or of another store")
        least, entries = _TITLE.unpack(title)[-1], list[tuple[int, int]]()
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            count, checksum, of_head = _HEAD.unpack(head)
            if zlib.crc32(head[:-4]) != of_head:
                raise CheckpointError(f"{path} is damaged: the head of an entry")
            at, found = file.tell(), 0
            size = count * (8 + 4 * width)
            for first in range(0, size, _CHUNK):
                found = zlib.crc32(file.read(min(_CHUNK, size - first)), found)
            if file.tell() < at + size:
                break
            if found != checksum:
                raise CheckpointError(f"{path} is damaged: its checksum is another")
            entries.append((at, count))
        if len(entries) < least:
            raise CheckpointError(f"{path} is damaged: {least} entries were in it, {len(entries)} are there")
        return entries

    def release(self) -> None:
        """Another run may use the files."""
        self._lock.release()

    def _journal(self, rounds: int) -> Path:
        return self.folder / f"undo-{rounds:06}.bin"

    def _title(self, rounds: int, entries: int) -> bytes:
        return _TITLE.pack(_MAGIC, self.identity.encode(), rounds, entries)

    def forget_journals(self, but: int | None = None) -> None:
        """Nothing will be rolled back any more, but to the checkpoint after so many rounds."""
        for path in self.folder.glob("undo-*.bin"):
            if but is None or path != self._journal(but):
                path.unlink()


def check_free(folder: Path, *, run: Path | None, overwrite: bool) -> None:
    """Raises FileExistsError for a file, and where a store is, but the same run's if it may be replaced."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"class_store: {folder} is a file, not a folder")
    if not (folder / _ROWS).exists() and not (folder / _IDENTITY).exists():
        return
    if not overwrite:
        raise FileExistsError(
            f"there is a class store in {folder}: choose another folder, or replace it with --overwrite"
        )
    try:
        owner = json.loads((folder / _IDENTITY).read_bytes())["run"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        raise FileExistsError(f"what is in {folder} is no class store: it is not overwritten") from None
    if owner != _path(run):
        raise FileExistsError(f"the class store in {folder} is of the run in {owner}: it is not overwritten")


def _path(run: Path | None) -> str | None:
    return None if run is None else str(run.resolve())


def rounds_of(path: str) -> int:
    """Of a journal, from its name."""
    return int(Path(path).stem.removeprefix("undo-"))
