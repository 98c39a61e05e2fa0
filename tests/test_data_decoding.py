"""Decoding in processes: the same whatever their number, whoever dies."""

import os
import signal
import subprocess

import pytest
from image_files import photograph

from fedss_kernels.federated.data import decoding
from fedss_kernels.federated.data.decoding import decoded
from fedss_kernels.federated.data.images import cached_images
from fedss_kernels.federated.data.pixels import Failure, decode


@pytest.fixture
def files(tmp_path):
    files = [tmp_path / os.fsdecode(b"%d-\xff.jpg" % i) for i in range(12)]
    for i, file in enumerate(files):
        photograph(200 + 20 * (i % 3), 100 + i).save(file)
    files[5].write_bytes(b"nonsense")
    return files


def test_the_same_bytes_whatever_the_number(files, tmp_path):
    good, bytes_of = files[:5] + files[6:], {}
    for processes in (1, 2, 3):
        folder = tmp_path / str(processes)
        cached_images("tiny", [good], 8, folder, "", processes=processes)
        (path,) = folder.iterdir()
        bytes_of[processes] = path.name, path.read_bytes()
    assert bytes_of[1] == bytes_of[2] == bytes_of[3]


def test_in_order_and_with_the_reasons(files, tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    found = list(decoded([*files, tmp_path / "pipe.jpg", tmp_path / "lost.jpg"], 8, processes=2))
    assert found.pop() == Failure("No such file or directory", damaged=False)
    assert found.pop() == Failure("a FIFO, not a file", damaged=False)
    assert found[5] == Failure("no image format that Pillow knows", damaged=True)
    for i, file in enumerate(files):
        assert i == 5 or found[i] == decode(file.read_bytes(), 8)


def _started(monkeypatch) -> list[subprocess.Popen]:
    processes = []
    start = decoding._Decoder._started
    monkeypatch.setattr(
        decoding._Decoder, "_started", lambda decoder: processes.append(start(decoder)) or processes[-1]
    )
    return processes


def test_a_file_on_which_the_decoder_crashes_is_damaged(files):
    decoder = decoding._Decoder(8)
    decoder.process.send_signal(signal.SIGSEGV)
    assert decoder(files[0]) == Failure("its decoder crashed, by SIGSEGV", damaged=True)
    assert decoder(files[0]) == decode(files[0].read_bytes(), 8), "another is there"
    decoder.end()


def test_a_decoder_that_somebody_kills_is_not_the_files_fault(files, monkeypatch):
    monkeypatch.setattr(decoding, "AHEAD", 1)
    processes = _started(monkeypatch)
    images = decoded(files, 8, processes=2)
    next(images)
    for process in processes:
        process.kill()
    with pytest.raises(
        OSError, match=r"that decoded .*\\xff\.jpg was ended by SIGKILL \(out of memory\?\); .* kept"
    ):
        list(images)
    assert len(processes) == 2 and all(process.poll() is not None for process in processes)


def test_who_stops_reading_leaves_no_process(files, monkeypatch):
    processes = _started(monkeypatch)
    images = decoded(files, 8, processes=2)
    next(images)
    assert all(process.poll() is None for process in processes)
    images.close()
    assert len(processes) == 2 and all(process.poll() is not None for process in processes)
