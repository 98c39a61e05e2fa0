"""A lock is taken by another, or it cannot be had there: the one stops a run, the other is a line."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from fedss_kernels.federated import cli
from fedss_kernels.federated.lock import InUse, Lock


@pytest.fixture
def path(tmp_path):
    (tmp_path / "file").touch()
    return tmp_path / "file"


def flock_fails(monkeypatch, number: int) -> None:
    def fail(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES])
def test_another_holds_it(number, path, monkeypatch):
    flock_fails(monkeypatch, number)
    with pytest.raises(InUse, match=f"another run is using {path.parent}"):
        Lock(path)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EIO])
def test_there_are_no_locks(number, path, monkeypatch):
    flock_fails(monkeypatch, number)
    with pytest.warns(UserWarning, match="cannot be locked .*: nothing keeps another run out of it") as said:
        lock = Lock(path)
    assert len(said) == 1 and os.strerror(number) in str(said[0].message) and not lock.held
    lock.release()


def test_it_is_open_for_writing_as_nfs_wants_it(path, monkeypatch):
    modes = []
    monkeypatch.setattr(fcntl, "flock", lambda at, how: modes.append(fcntl.fcntl(at, fcntl.F_GETFL)))
    assert Lock(path).held and modes[0] & os.O_ACCMODE == os.O_RDWR


def test_a_file_that_cannot_be_opened_is_not_in_use(tmp_path):
    with pytest.raises(FileNotFoundError):
        Lock(tmp_path / "nothing")


def test_it_is_held_by_one_process_until_that_ends(path):
    code = (
        "import fcntl, sys\n"
        f"file = open({str(path)!r})\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print(flush=True)\n"
        "sys.stdin.read()\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        holder.stdout.readline()
        with pytest.raises(InUse):
            Lock(path)
        holder.kill()
    assert Lock(path).held


@pytest.mark.exhaustive
def test_on_the_command_line_it_is_one_line_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    flock_fails(monkeypatch, errno.ENOLCK)
    small = [
        "--glyph-classes=12",
        "--glyph-writers=4",
        "--cohort=2",
        "--num-negatives=3",
        "--embedding-dim=8",
    ]
    monkeypatch.setenv("FEDSS_CACHE", str(tmp_path / "cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.filters", [("default", None, UserWarning, None, 0)])
        assert cli.main(["run", *small, "--rounds=1", f"--out={tmp_path / 'run'}"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fedss: {tmp_path / 'run'} cannot be locked (No locks available)")
