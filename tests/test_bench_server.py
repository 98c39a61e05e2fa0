"""The server's benchmark, at sizes that take a second: what it writes is what it measured."""

import csv
import subprocess
import sys

import pytest
from fedss_kernels.bench.server import STAGES


@pytest.mark.exhaustive
def test_every_number_of_classes_is_measured_and_saved(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark, inside, times in no worker
    command = [sys.executable, "-m", "fedss_kernels.bench.server", "--rounds", "2"]
    command += [
        "--classes",
        "40000",
        "--in-files",
        "4000",
        "--store",
        tmp_path,
        "--out",
        tmp_path / "out",
    ]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    with (tmp_path / "out" / "server.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["classes"], line["store"]) for line in lines] == [
        ("40000", "memory"),
        ("4000", "files"),
    ]
    for line in lines:
        stages = [float(line[stage]) for stage in STAGES]
        assert all(seconds > 0 for seconds in stages)
        assert sum(stages) == pytest.approx(float(line["round"]), rel=0.5)
    memory, files = lines
    assert int(memory["peak_bytes"]) - int(files["peak_bytes"]) > 30_000 * 2 * 64 * 4 / 2  # it was filled
    assert 0 < int(files["file_bytes"]) <= 4000 * (2 * 64 * 4 + 8) + 2**13
    assert (tmp_path / "out" / "server.md").read_text() + "\n" == printed
    assert printed.count("\n| ") == 4 and "| 40,000 | memory |" in printed
    assert (tmp_path / "out" / "server.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "the files of the rows are gone"
