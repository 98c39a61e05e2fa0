"""The bytes that a rank sends for a sharded step, measured at sizes that take a second."""

import csv

import pytest
from fedss_kernels.bench import sharded


@pytest.mark.exhaustive
@pytest.mark.skipif(
    not sharded.WRITTEN.exists(),
    reason="what a process wrote is read from Linux' /proc/self/io, which is not there",
)
def test_what_a_rank_sends_hangs_on_the_rows_and_not_on_the_classes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sharded, "SHAPES", [(40, 16, 32), (400, 16, 32), (40, 64, 32)])
    assert sharded.main(["--ranks", "2", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert (tmp_path / "sharded.md").read_text() + "\n" == text
    with (tmp_path / "sharded.csv").open(newline="") as file:
        few, many, rows = ({n: int(v) for n, v in line.items()} for line in csv.DictReader(file))
    assert few["sent"] == many["sent"] < rows["sent"]
    for line in (few, many, rows):
        assert line["embeddings"] == 3 * 4 * line["rows"] * line["dim"] // 2
        assert line["data_parallel"] == 4 * line["classes"] * line["dim"]
        beside = line["sent"] - line["embeddings"]  # settings, numbers of a row, and gloo's own headers
        assert 0 < beside < 2000 + 150 * line["rows"]
        assert f"{line['sent']:,} | {line['embeddings']:,}" in text
