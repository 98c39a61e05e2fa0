"""bench.private_retrieval: it prints what it measured, and a server does better than one read a query."""

import subprocess
import sys

import pytest


@pytest.mark.exhaustive
def test_answers_to_all_queries_take_less_than_reading_the_table_for_each(monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark, inside, times in no worker
    command = [sys.executable, "-m", "fedss_kernels.bench.private_retrieval", "--seconds", "0.1"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    header, _, *found = lines
    assert [(line[0], *line[3:5]) for line in found] == [("Landmarks", "56", "56"), ("SOP", "283", "51")]
    for line in found:
        assert len(line) == len(header)
        answers, once, each, of_each = (float(line[place]) for place in (5, 6, 8, 9))
        assert each == pytest.approx(once * int(line[2]), rel=0.05)
        assert answers < 1.5 * each and of_each == pytest.approx(answers / each, abs=0.01)
