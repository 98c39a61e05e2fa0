"""Files are there whole or not at all; what some file systems cannot do is told from what went wrong."""

import errno
import io
import os

import pytest
import torch

from fedss_kernels.federated import disk


def fails(number: int):
    def fail(*arguments):
        raise OSError(number, os.strerror(number))

    return fail


def test_an_error_has_the_name_of_the_file(tmp_path):
    with pytest.raises(OSError) as caught, disk.named(tmp_path), open("/dev/full", "wb", buffering=0) as full:
        full.write(b"1")
    assert disk.reason(caught.value) == f"No space left on device: {tmp_path}"
    with pytest.raises(FileNotFoundError) as caught, disk.named(tmp_path):
        open(tmp_path / "nothing")
    assert disk.reason(caught.value) == f"No such file or directory: {tmp_path / 'nothing'}"
    assert disk.reason(OSError("words\nin lines")) == "words in lines"


def test_text_that_names_a_file_of_any_name_can_be_written(tmp_path):
    """As the system hands over a name that is not UTF-8, or one that is, in a C locale."""
    disk.write_whole(tmp_path / "page", "é caf\udcc3\udca9 \udcff")
    assert (tmp_path / "page").read_text(encoding="utf-8") == "é café \\xff"


def test_a_file_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    path = tmp_path / "table"
    disk.write_whole(path, "before")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(os, name, fails(errno.ENOSPC))
            disk.write_whole(path, "after")
        assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    disk.write_whole(path, "after")
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


def test_lines_are_appended_whole_or_not(tmp_path, room_for_files_of):
    """Where files may have 10 bytes: of the second 8 bytes two are written, and taken back."""
    path = tmp_path / "table"
    disk.append(path, b"12345678")
    with room_for_files_of(10), pytest.raises(OSError, match=f"File too large: '{path}'"):
        disk.append(path, b"abcdefgh")
    assert path.read_bytes() == b"12345678"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_folder_that_cannot_be_synced_is_not_an_error(number, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fails(number))
    disk.sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", fails(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        disk.sync_folder(tmp_path)


@pytest.mark.parametrize("how", ["by the system", "by hand", "without the call"])
def test_pages_are_allocated_and_keep_what_is_in_them(how, tmp_path, monkeypatch):
    if how == "by hand":
        monkeypatch.setattr(os, "posix_fallocate", fails(errno.EOPNOTSUPP))
    if how == "without the call":
        monkeypatch.delattr(os, "posix_fallocate")
    page = os.sysconf("SC_PAGE_SIZE")
    with (tmp_path / "rows").open("w+b") as file:
        file.truncate(1000 * page)
        file.seek(3 * page)
        file.write(b"kept")
        file.flush()
        disk.allocate(file.fileno(), 3 * page - 1, page + 2)  # the last byte of a page, the first of another
        os.fsync(file.fileno())
        assert 3 * page <= 512 * os.fstat(file.fileno()).st_blocks <= 64 * page
        content = (tmp_path / "rows").read_bytes()
    assert content[3 * page : 3 * page + 4] == b"kept" and not content.replace(b"kept", b"").strip(b"\0")


def test_no_room_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", fails(errno.ENOSPC))
    with (tmp_path / "rows").open("w+b") as file, pytest.raises(OSError, match="No space left"):
        disk.allocate(file.fileno(), 0, 1)


def test_room_is_looked_for_and_given_back(tmp_path, room_for_files_of):
    disk.check_room(tmp_path, 100)
    with room_for_files_of(99):
        with pytest.raises(OSError, match=f"File too large: '{tmp_path}'"):
            disk.check_room(tmp_path, 100)
        disk.check_room(tmp_path, 99)
    assert not any(tmp_path.iterdir())


def test_what_is_unfinished_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "checkpoint-unfinished").mkdir()
    for name in ("checkpoint-unfinished/state", "model.pt-unfinished", "model.pt", "unfinished-thesis"):
        (tmp_path / name).touch()
    disk.remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt", "unfinished-thesis"}


class Full(io.BytesIO):
    """A file on a disk with room for 100 bytes."""

    def write(self, content):
        if self.tell() + len(content) > 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(content)


def test_a_full_disk_is_told_by_its_name_whoever_writes():
    """torch.save's own words are of a position that is not expected."""
    with pytest.raises(OSError, match="No space left on device"), disk.systems_errors():
        torch.save(torch.ones(1000), Full())
    with pytest.raises(RuntimeError, match="^other$"), disk.systems_errors():
        raise RuntimeError("other")
