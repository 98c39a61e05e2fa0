"""A class matrix in files: larger than memory if need be, and never copied for a checkpoint.

rows.bin         the rows, of which a round touches few; what was never written takes no room
store.json       which store it is, and its sizes
undo-000120.bin  what the rows changed since the checkpoint after 120 rounds were then

Before a row changes for the first time since a checkpoint, what it was goes to the journal, and the journal
to the disk. So whenever the process ends, the matrix of the last checkpoint can be had again: `roll_back`.
"""

import json
import mmap
import os
import struct
import uuid
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .checkpoint import CheckpointError, sync_folder, write_synced
from .rows import Rows

FORMAT = 1
_ROWS, _IDENTITY = "rows.bin", "store.json"
_HEAD = struct.Struct("<QII")  # rows in an entry, checksum of what follows, checksum of these two


class ClassStore:
    """The files of one matrix, open. `rows` is what is in them, written when the system likes."""

    def __init__(self, folder: Path, num_rows: int, dim: int, identity: str):
        self.folder, self.identity = folder, identity
        with (folder / _ROWS).open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), Rows.num_bytes(num_rows, dim))
        if hasattr(mmap, "MADV_RANDOM"):  # rows come in no order: no reading ahead
            self._memory.madvise(mmap.MADV_RANDOM)
        self.rows = Rows.over(self._memory, num_rows, dim)
        self._since: int | None = None  # rounds done at the last checkpoint; None: there is none

    @classmethod
    def new(cls, folder: Path, num_rows: int, dim: int, *, overwrite: bool = False) -> "ClassStore":
        """Of rows that are zeros. Raises FileExistsError where a store is, unless it may be overwritten."""
        check_free(folder, overwrite=overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        for path in [folder / _IDENTITY, folder / _ROWS, *folder.glob("undo-*.bin")]:
            path.unlink(missing_ok=True)
        identity = uuid.uuid4().hex
        of_store = {"format": FORMAT, "id": identity, "num_rows": num_rows, "dim": dim}
        write_synced(folder / _IDENTITY, json.dumps(of_store).encode())
        with (folder / _ROWS).open("xb") as file:
            file.truncate(Rows.num_bytes(num_rows, dim))
        sync_folder(folder)
        return cls(folder, num_rows, dim, identity)

    @classmethod
    def opened(cls, folder: Path, num_rows: int, dim: int, identity: str | None) -> "ClassStore":
        """The store of that identity. Raises CheckpointError where it is not, or not whole."""
        try:
            found = json.loads((folder / _IDENTITY).read_bytes())
            length = (folder / _ROWS).stat().st_size
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} holds no class store: {error}") from None
        expected = {"format": FORMAT, "id": identity, "num_rows": num_rows, "dim": dim}
        if found != expected:
            raise CheckpointError(f"{folder} holds another class store than the checkpoint's")
        if length != Rows.num_bytes(num_rows, dim):
            raise CheckpointError(f"{folder / _ROWS} has {length:,} bytes, not those it was made with")
        return cls(folder, num_rows, dim, found["id"])

    def keep(self, class_ids: Tensor) -> None:
        """To be called before rows change: their old values, where a roll-back may need them, on disk."""
        if self._since is None:
            return
        unkept = class_ids[self.rows.stepped[class_ids] <= self._since]
        if len(unkept) == 0:
            return
        content = unkept.numpy().tobytes() + self.rows.numbers[unkept].numpy().tobytes()
        head = struct.pack("<QI", len(unkept), zlib.crc32(content))
        with self._journal(self._since).open("ab") as file:
            file.write(head + struct.pack("<I", zlib.crc32(head)) + content)
            file.flush()
            os.fsync(file.fileno())

    def sync(self) -> None:
        """The rows as they are now, on disk."""
        self._memory.flush()

    def mark(self, rounds: int) -> None:
        """There is a checkpoint of what was synced: from now on `keep` keeps what it needs."""
        write_synced(self._journal(rounds), b"")
        sync_folder(self.folder)
        self.forget_journals(but=rounds)
        self._since = rounds

    def roll_back(self, rounds: int) -> None:
        """The rows of the checkpoint after so many rounds. Raises CheckpointError for a damaged journal.

        Where the process ended in `keep` the last entry is not whole: its rows did not change yet.
        """
        path = self._journal(rounds)
        entries = _read(path, self.rows.numbers.shape) if path.exists() else []
        for class_ids, numbers in reversed(entries):  # a row that was kept twice was first kept rightly
            self.rows.numbers[class_ids] = numbers
        self.sync()
        path.unlink(missing_ok=True)
        self.mark(rounds)

    def _journal(self, rounds: int) -> Path:
        return self.folder / f"undo-{rounds:06}.bin"

    def forget_journals(self, but: int | None = None) -> None:
        """Nothing will be rolled back any more, but to the checkpoint after so many rounds."""
        for path in self.folder.glob("undo-*.bin"):
            if but is None or path != self._journal(but):
                path.unlink()


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Raises FileExistsError where a store is that may not be overwritten."""
    if (folder / _ROWS).exists() and not (overwrite and (folder / _IDENTITY).exists()):
        raise FileExistsError(
            f"there is a class store in {folder}: choose another folder, or replace it with --overwrite"
        )


def _read(path: Path, shape: torch.Size) -> list[tuple[Tensor, Tensor]]:
    """(class_ids, rows) of each whole entry of a journal."""
    num_rows, width = shape
    journal, at, entries = path.read_bytes(), 0, []
    while len(journal) - at >= _HEAD.size:
        count, checksum, of_head = _HEAD.unpack_from(journal, at)
        if zlib.crc32(journal[at : at + _HEAD.size - 4]) != of_head:
            raise CheckpointError(f"{path} is damaged: the head of an entry")
        at += _HEAD.size
        content = journal[at : at + count * (8 + 4 * width)]
        if len(content) < count * (8 + 4 * width):
            break
        if zlib.crc32(content) != checksum:
            raise CheckpointError(f"{path} is damaged: its checksum is another")
        class_ids = torch.from_numpy(np.frombuffer(content, np.int64, count).copy())
        numbers = np.frombuffer(content, np.float32, offset=8 * count).reshape(count, width)
        entries.append((class_ids, torch.from_numpy(numbers.copy())))
        at += len(content)
    return entries
