"""A class matrix in files: the bits of one in memory, and those of the last checkpoint whatever happens."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_federation import DIM, NUM_CLASSES, tiny_config, tiny_data, tiny_model

from fedss_kernels.federated import CheckpointError, Stopped, run
from fedss_kernels.federated.server.class_store import ClassStore
from fedss_kernels.federated.server.row_table import SGD, Adagrad, RowTable

ROUNDS = 6


def train(folder: Path, *, store="rows", resume=False, stop_after=None, **options):
    settings = {"rounds": ROUNDS, "checkpoint_every": 2, "out": folder / "run"} | options
    seen = []
    return run(
        tiny_config(class_store=folder / store if store else None, **settings),
        data=tiny_data(),
        model=tiny_model(),
        on_round=seen.append,
        resume=resume,
        stop=None if stop_after is None else lambda: seen[-1].round == stop_after,
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_it_agrees_with_memory_bit_for_bit(optimizer, tmp_path):
    in_memory = train(tmp_path / "a", store=None, server_optimizer=optimizer)
    in_files = train(tmp_path / "b", server_optimizer=optimizer)
    assert in_files.weight is None and len(in_files.table) == NUM_CLASSES
    assert torch.equal(in_files.table[:], in_memory.weight) and torch.equal(
        in_memory.table[:], in_memory.weight
    )
    model = torch.load(tmp_path / "b/run/model.pt", weights_only=True)
    assert set(model) == {"extractor"}
    left = sorted(path.name for path in (tmp_path / "b/rows").iterdir())
    assert left == ["rows.bin", "store.json", "undo-000006.bin"]  # that of the last checkpoint, and empty
    assert (tmp_path / "b/rows/undo-000006.bin").stat().st_size == 64


@pytest.mark.parametrize("stop_after", [1, 4, 5])
def test_a_run_that_is_stopped_goes_on_bit_for_bit(stop_after, tmp_path):
    expected = train(tmp_path / "whole")
    with pytest.raises(Stopped):
        train(tmp_path / "stopped", stop_after=stop_after)
    (tmp_path / "stopped/rows").rename(tmp_path / "stopped/moved")
    result = train(tmp_path / "stopped", store="moved", resume=True)
    assert torch.equal(result.table[:], expected.table[:])


@pytest.mark.exhaustive
def test_killed_at_random_moments_runs_go_on_bit_for_bit(tmp_path):
    """Of both kinds of store; most kills hit a write, as the runs do little else."""
    script = Path(__file__).parent / "kill_and_resume.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "2", "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" kills, ") == 2


def table_of(store: ClassStore, optimizer=None) -> RowTable:
    return RowTable(
        *(len(store.rows.numbers), DIM, optimizer or SGD(1.0, 0.9)),
        lambda ids: ids[:, None].float().expand(-1, DIM),
        store,
    )


def step(table: RowTable, *class_ids: int) -> None:
    ids = torch.tensor(class_ids)
    table.step(ids, torch.full((len(ids), DIM), 0.5 + table.now))


@pytest.fixture
def stepped(tmp_path):
    """(a store with a checkpoint after 2 rounds and 3 rounds more, the rows at the checkpoint)"""
    store = ClassStore.new(tmp_path / "rows", 9, DIM)
    table = table_of(store)
    step(table, 1, 2)
    step(table, 2, 5)
    table.stored()
    store.prepare(2)
    store.mark(2)
    then = store.rows.numbers.clone()
    step(table, 5, 8)
    step(table, 2, 5)
    step(table, 0)
    return store, then


@pytest.mark.parametrize("optimizer", [SGD(1.0, 0.9), Adagrad(0.1)])
def test_reads_after_a_roll_back_are_those_at_the_checkpoint(optimizer, tmp_path):
    store = ClassStore.new(tmp_path, 6, DIM)
    table = table_of(store, optimizer)
    step(table, 1, 4)
    store.prepare(1)
    store.mark(1)
    then = table[:]
    step(table, 0, 1)
    assert not torch.equal(table[:], then)
    table.restore({}, 1)
    assert torch.equal(table[:], then) and table.now == 1


def test_the_journal_keeps_each_row_once_and_before_it_changes(stepped):
    store, then = stepped
    width = then.shape[1]
    (journal,) = store.folder.glob("undo-*.bin")
    assert journal.stat().st_size == 64 + 3 * 16 + 4 * (8 + 4 * width)  # 3 entries; rows 5, 8, then 2, then 0
    store.roll_back(2)
    assert torch.equal(store.rows.numbers, then)
    assert journal.stat().st_size == 64
    store.roll_back(2)
    assert torch.equal(store.rows.numbers, then)


def test_a_roll_back_that_is_interrupted_can_be_had_again(stepped, monkeypatch):
    """Where the new journal is half written, and where it is not yet in the old one's place."""
    store, then = stepped

    def fail(*arguments):
        raise OSError("the end")

    for name in ("fedss_kernels.federated.server.class_store.write_synced", "os.replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="the end"):
            patch.setattr(name, fail)
            store.roll_back(2)
    store.roll_back(2)
    assert torch.equal(store.rows.numbers, then)
    assert sorted(path.name for path in store.folder.iterdir()) == [
        "rows.bin",
        "store.json",
        "undo-000002.bin",
    ]


def test_an_entry_that_is_not_whole_was_of_rows_that_did_not_change(stepped):
    """As if the process had ended while the third entry was written, at each of its lengths."""
    store, then = stepped
    (journal,) = store.folder.glob("undo-*.bin")
    whole, changed = journal.read_bytes(), store.rows.numbers.clone()
    last = 16 + 8 + 4 * then.shape[1]
    two_are_whole = whole[:56] + (2).to_bytes(8, "little") + whole[64:]
    for length in range(len(whole) - last, len(whole) + 1):
        journal.write_bytes(two_are_whole[:length])
        store.rows.numbers.copy_(changed)
        store.roll_back(2)
        back = {5, 8, 2} | ({0} if length == len(whole) else set())
        for row in range(9):
            expected = then if row in back else changed
            assert torch.equal(store.rows.numbers[row], expected[row]), (length, row)


def allocated(store: ClassStore) -> int:
    return 512 * (store.folder / "rows.bin").stat().st_blocks


def test_only_pages_that_are_written_take_room(tmp_path):
    """Of a hundred million rows, 200 GB: those that are side by side together, the others each."""
    store = ClassStore.new(tmp_path / "rows", 10**8, 256)
    table = RowTable(10**8, 256, SGD(1.0, 0.9), lambda ids: torch.ones(len(ids), 256), store)
    table.step(torch.tensor([0, 1, 2, 77_777, 50_000_000, 99_999_999]), torch.ones(6, 256))
    assert allocated(store) <= 64 * 4096
    assert table.read(torch.tensor([99_999_998, 77_777])).mean(1).tolist() == [1, 0]


def test_rows_have_their_place_on_the_disk_before_they_are_written(tmp_path, monkeypatch):
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "fedss_kernels.federated.server.class_store.allocate",
        lambda descriptor, first, length: found.append((first, first + length)),
    )
    size = 4 * (2 * 300 + 2)  # not a divisor of a page
    store = ClassStore.new(tmp_path / "rows", 1000, 300)
    table = RowTable(1000, 300, SGD(1.0, 0.9), lambda ids: torch.ones(len(ids), 300), store)
    monkeypatch.setattr(store, "_in_memory", False)
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        ids = torch.randperm(1000, generator=rng)[:40].sort().values
        new = [row for row in ids.tolist() if store.rows.stepped[row] == 0]
        found.clear()
        table.step(ids, torch.ones(40, 300))
        for row in new:
            assert any(first <= row * size and (row + 1) * size <= end for first, end in found), row
        assert len(found) <= len(new)


def test_on_a_full_disk_a_step_is_an_error_that_changes_nothing(stepped, monkeypatch):
    store, then = stepped

    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    table, before = table_of(store), store.rows.numbers.clone()
    table.now = 5
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device: .*rows.bin"):
        patch.setattr("fedss_kernels.federated.server.class_store.allocate", fail)
        step(table, 3, 5)
    assert torch.equal(store.rows.numbers, before) and table.now == 5
    store.roll_back(2)
    assert torch.equal(store.rows.numbers, then)


def test_on_a_disk_that_is_truly_full_it_goes_on_once_there_is_room(tmp_path):
    """On a small disk in memory, where one may be mounted; there reading takes room too."""
    disk, wide = tmp_path / "disk", 2048  # a row has 16 KB
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")

    def table(store: ClassStore | None) -> RowTable:
        return RowTable(99, wide, SGD(1.0, 0.9), lambda ids: torch.ones(len(ids), wide), store)

    def play(table: RowTable) -> None:
        while table.now < 50:
            table.step(torch.tensor([table.now]), torch.full((1, wide), 0.5))

    try:
        (disk / "fill").write_bytes(bytes(1_700_000))
        in_files, in_memory = table(ClassStore.new(disk / "rows", 99, wide)), table(None)
        with pytest.raises(OSError, match="No space left on device: .*rows.bin"):
            play(in_files)
        assert 10 < in_files.now < 30
        with pytest.raises(OSError, match="No space left on device: .*rows.bin"):
            in_files.read(torch.tensor([98, 50]))
        (disk / "fill").unlink()
        play(in_files)
        play(in_memory)
        assert torch.equal(in_files[:], in_memory[:])
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_journal_that_was_cut_or_is_gone_is_an_error_and_changes_nothing(stepped):
    store, _ = stepped
    (journal,) = store.folder.glob("undo-*.bin")
    whole, changed = journal.read_bytes(), store.rows.numbers.clone()
    for length in range(len(whole)):
        journal.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="is damaged"):
            store.roll_back(2)
    journal.unlink()
    with pytest.raises(CheckpointError, match="is not as the checkpoint left it"):
        store.roll_back(2)
    assert torch.equal(store.rows.numbers, changed)


def test_a_flipped_bit_is_an_error_or_changes_nothing(stepped):
    """The number of whole entries, which is a least one, may become smaller."""
    store, then = stepped
    (journal,) = store.folder.glob("undo-*.bin")
    whole, changed = journal.read_bytes(), store.rows.numbers.clone()
    for at in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        journal.write_bytes(damaged)
        store.rows.numbers.copy_(changed)
        if at // 8 == 56 and at % 8 < 2:
            store.roll_back(2)
            assert torch.equal(store.rows.numbers, then)
            continue
        with pytest.raises(CheckpointError, match="is damaged"):
            store.roll_back(2)
        assert torch.equal(store.rows.numbers, changed)


def test_a_row_that_is_moved_in_every_round_is_kept_once(tmp_path):
    store = ClassStore.new(tmp_path, 6, DIM)
    table = table_of(store)
    step(table, 1, 4)
    table.stored()
    store.prepare(1)
    store.mark(1)
    then = table[:]
    for _ in range(5):
        step(table, 4)
        table.move(torch.tensor([0, 1, 4]), torch.ones(3, DIM))
    (journal,) = tmp_path.glob("undo-*.bin")
    width = store.rows.numbers.shape[1]
    assert journal.stat().st_size == 64 + 2 * 16 + 3 * (8 + 4 * width)  # row 4, then rows 0 and 1
    table.restore({}, 1)
    assert torch.equal(table[:], then)


@pytest.mark.parametrize("stop_after", [3, 5])
def test_fedaws_goes_on_bit_for_bit_too(stop_after, tmp_path):
    options = {"method": "fedaws", "spreadout_margin": 2.0, "lr_decay": "cosine"}
    expected = train(tmp_path / "whole", store=None, **options)
    with pytest.raises(Stopped):
        train(tmp_path / "stopped", stop_after=stop_after, **options)
    assert torch.equal(train(tmp_path / "stopped", resume=True, **options).table[:], expected.weight)


def test_a_store_that_went_on_with_another_copy_of_the_run_is_refused(tmp_path):
    """A run folder is copied, and the copy resumed to its end on the one store there is."""
    with pytest.raises(Stopped):
        train(tmp_path, stop_after=3)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    train(tmp_path, out=tmp_path / "copy", resume=True)
    with pytest.raises(CheckpointError, match="is not as the checkpoint left it"):
        train(tmp_path, resume=True)


@pytest.mark.exhaustive
def test_another_store_is_refused(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path, stop_after=3)
    ClassStore.new(tmp_path / "other", NUM_CLASSES, DIM)
    with pytest.raises(CheckpointError, match="holds another class store"):
        train(tmp_path, store="other", resume=True)
    with pytest.raises(CheckpointError, match="holds no class store"):
        train(tmp_path, store="nowhere", resume=True)
    with pytest.raises(CheckpointError, match="has the class matrix in a class store"):
        train(tmp_path, store=None, resume=True)
    identity = tmp_path / "rows/store.json"
    whole = identity.read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 7
        if _parsed(damaged) == _parsed(whole):
            continue  # another spelling of the same, or another owner
        identity.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="class store"):
            train(tmp_path, resume=True)
    identity.write_bytes(whole)
    with (tmp_path / "rows/rows.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(CheckpointError, match="has 100 bytes"):
        train(tmp_path, resume=True)


def _parsed(content: bytes) -> object:
    """What a store is known by: all but whose it is."""
    try:
        found = json.loads(content)
    except ValueError:
        return None
    return {name: found.get(name) for name in ("format", "id", "num_rows", "dim")}


def test_a_file_is_no_folder_for_a_store(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="class_store: .*file is a file, not a folder"):
        ClassStore.new(tmp_path / "file", 4, 2)


def test_a_store_is_not_overwritten_unasked(tmp_path):
    first = train(tmp_path / "a")
    with pytest.raises(FileExistsError, match="there is a class store in"):
        train(tmp_path / "a", out=tmp_path / "elsewhere")
    again = train(tmp_path / "a", overwrite=True)
    assert torch.equal(first.table[:], again.table[:])
    with pytest.raises(FileExistsError, match="is of the run in .*: it is not overwritten"):
        train(tmp_path / "a", out=tmp_path / "elsewhere", overwrite=True)
    assert not (tmp_path / "elsewhere").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "rows.bin").write_text("somebody's")
    with pytest.raises(FileExistsError, match="is no class store: it is not overwritten"):
        train(tmp_path, store="foreign", overwrite=True)
    assert (foreign / "rows.bin").read_text() == "somebody's"
