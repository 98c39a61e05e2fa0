"""The benchmarks run, check what they time, and save what they print."""

import csv
import sys

import pytest
from fedss_kernels.bench import bench_sampled_softmax, bench_scatter_add


@pytest.mark.parametrize("module", [bench_sampled_softmax, bench_scatter_add])
def test_quick_run_saves_its_table(module, tmp_path, monkeypatch, capsys):
    saved = tmp_path / "table.csv"
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--out", str(saved)])
    monkeypatch.setattr("fedss_kernels.bench.measure.median_seconds.__defaults__", (0.01, 2, 3))
    module.main()
    with saved.open(encoding="utf-8") as file:
        header, row = csv.reader(file)
    assert len(header) == len(row) and float(row[1]) > 0
    assert header[1] == "ours, ms" and row[0] in capsys.readouterr().out
