"""What a command says may be lost; what it does is not."""

import os
import subprocess
import sys

import pytest

from fedss_kernels.federated import cli

SMALL = ["--glyph-classes=12", "--glyph-writers=4", "--cohort=2", "--num-negatives=3", "--embedding-dim=8"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FEDSS_CACHE", str(tmp_path_factory.getbasetemp() / "glyph-cache"))


@pytest.fixture
def stdout_to(monkeypatch):
    """Makes a file descriptor this process' sys.stdout."""
    streams = []

    def to(descriptor: int) -> None:
        streams.append(os.fdopen(descriptor, "w"))
        monkeypatch.setattr(sys, "stdout", streams[-1])

    yield to
    for stream in streams:
        stream.close()  # an error where something is left that cannot be written


def to_nobody() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.exhaustive
def test_a_reader_that_goes_away_stops_nothing(stdout_to, tmp_path, capfd):
    for command in (["--help"], ["doctor"], ["run", *SMALL, "--rounds=2", f"--out={tmp_path}"]):
        stdout_to(to_nobody())
        assert cli.main(command) == 0
    assert (tmp_path / "report.html").exists() and capfd.readouterr().err == ""


@pytest.mark.exhaustive
def test_output_that_is_lost_otherwise_is_told_and_stops_nothing(stdout_to, tmp_path, capfd):
    stdout_to(os.open("/dev/full", os.O_WRONLY))
    assert cli.main(["run", *SMALL, "--rounds=2", f"--out={tmp_path}"]) == 1
    assert (tmp_path / "report.html").exists()
    assert capfd.readouterr().err == "fedss run: its output could not be written: No space left on device\n"


@pytest.mark.exhaustive
def test_closed_streams_are_nowhere_and_not_the_next_file(tmp_path):
    """What is printed with file descriptors 1 and 2 free would go to the files that are opened next."""
    command = f"exec {sys.executable} -m fedss_kernels run {' '.join(SMALL)} --rounds=1 --out={tmp_path}/a"
    done = subprocess.run(f"{command} <&- >&- 2>&-", shell=True)
    assert done.returncode == 0
    assert cli.main(["run", *SMALL, "--rounds=1", f"--out={tmp_path}/b"]) == 0
    assert (tmp_path / "a/ledger.csv").read_bytes() == (tmp_path / "b/ledger.csv").read_bytes()
