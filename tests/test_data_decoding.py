"""Decoding in processes: the same whatever their number, whoever dies."""

import os
import signal
import subprocess

import pytest
from image_files import photograph
from PIL import Image

from fedss_kernels.federated.data import decoding
from fedss_kernels.federated.data.decoding import decoded
from fedss_kernels.federated.data.images import cached_images
from fedss_kernels.federated.data.pixels import Failure, Fault, decode


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
    pipe, lost, floats = (tmp_path / name for name in ("pipe.jpg", "lost.jpg", "floats.tif"))
    os.mkfifo(pipe)
    Image.new("F", (4, 4), 0.5).save(floats)
    found = list(decoded([*files, floats, pipe, lost], 8, processes=2))
    assert found.pop() == Failure("No such file or directory", Fault.ELSEWHERE)
    assert found.pop() == Failure("a FIFO, not a file", Fault.ELSEWHERE)
    words = "expected 8 or 16 bits a channel, got float32, 0.5 to 0.5"
    assert found.pop() == Failure(words, Fault.KIND)
    assert found[5] == Failure(
        "no image that Pillow can open: cut short, or of another format", Fault.CONTENT
    )
    for i, file in enumerate(files):
        assert i == 5 or found[i] == decode(file.read_bytes(), 8)


def _started(monkeypatch) -> list[subprocess.Popen]:
    """The processes that are started from now on."""
    processes, start = [], decoding._Decoder.start

    def noted(decoder):
        start(decoder)
        processes.append(decoder.process)

    monkeypatch.setattr(decoding._Decoder, "start", noted)
    return processes


@pytest.mark.parametrize(
    "number, times, found",
    [
        (signal.SIGSEGV, 1, Failure("its decoder crashed, by SIGSEGV", Fault.CONTENT)),
        (signal.SIGKILL, 1, None),
        (
            signal.SIGKILL,
            2,
            Failure("its decoder was killed twice, by SIGKILL (out of memory?)", Fault.ELSEWHERE),
        ),
    ],
)
def test_a_decoder_that_dies(files, monkeypatch, number, times, found):
    """By its own doing, or somebody's: the file is tried once more. Another is there afterwards."""
    started = _started(monkeypatch)
    ask = decoding._Decoder._ask

    def killed(decoder, file):
        if len(started) <= times:
            decoder.process.send_signal(number)
        return ask(decoder, file)

    monkeypatch.setattr(decoding._Decoder, "_ask", killed)
    decoder = decoding._Decoder(8)
    image = decode(files[0].read_bytes(), 8)
    assert decoder(files[0]) == (found or image)
    assert decoder(files[0]) == image
    decoder.end()
    assert len(started) == times + 1 and all(process.poll() is not None for process in started)


def test_a_decoder_that_cannot_start(files, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(decoding.pixels, "__file__", str(tmp_path / "nothing" / "__init__.py"))
    with pytest.raises(OSError, match=r"0-\\xff.jpg: its decoder ended with exit code 2; see what it said"):
        list(decoded(files, 8, processes=1))
    assert "nothing" in capfd.readouterr().err


def test_who_stops_reading_leaves_no_process(files, monkeypatch):
    processes = _started(monkeypatch)
    images = decoded(files, 8, processes=2)
    next(images)
    assert all(process.poll() is None for process in processes)
    images.close()
    assert len(processes) == 2 and all(process.poll() is not None for process in processes)
