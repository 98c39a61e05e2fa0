"""What is soon not needed is removed, by whoever comes next where its owner was killed."""

import errno
import os
import tempfile
from pathlib import Path

import pytest

from fedss_kernels.federated.scratch import scratch


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_it_is_gone_at_the_end_whatever_happened(tmp_path):
    with pytest.raises(KeyboardInterrupt), scratch("given", b"content") as folder:
        assert folder.parent == tmp_path and (folder / "given").read_bytes() == b"content"
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_what_killed_processes_left_is_removed_and_what_is_in_use_stays(tmp_path):
    def aged(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        os.utime(folder, (0, 0))
        return folder

    left, foreign, new = aged("fedss-scratch-left"), aged("thesis"), tmp_path / "fedss-scratch-new"
    new.mkdir()
    with scratch("given", b"") as used:
        assert not left.exists() and foreign.exists() and new.exists()
        aged(used.name)
        with scratch("given", b""):
            assert used.exists()
    assert sorted(tmp_path.iterdir()) == [new, foreign]


def test_a_full_disk_is_told_with_the_way_round(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space left on device .*TMPDIR.*fedss-scratch-"):
        with scratch("given", b""):
            pass
    assert not list(tmp_path.iterdir())
