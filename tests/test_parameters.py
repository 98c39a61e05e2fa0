"""Shares of parameters: their arithmetic, and beside what the paper says."""

import csv

import pytest

from fedss_kernels.federated import cli
from fedss_kernels.federated.figures import parameters


def test_shares_and_savings_of_the_small_net():
    lines = parameters.measure("conv4", [64])
    assert [line.data for line in lines] == ["Landmarks-User-160k", "SOP", "ImageNet-21k"]
    small = parameters.num_parameters("conv4", 64)
    for line in lines:
        assert line.extractor == small and line.class_matrix == 64 * line.num_classes
        assert line.share == line.class_matrix / (small + line.class_matrix)
        assert line.saved == pytest.approx(line.share * (1 - line.class_set / line.num_classes))
    sop = lines[1]
    assert (sop.num_classes, sop.class_set, sop.paper_saved) == (11_318, 100, 0.16)


def test_the_papers_net_has_about_the_papers_shares(torchvision):
    """torchvision's extractor is 0.6 to 0.8 million parameters smaller than the paper's figures imply."""
    lines = parameters.measure("mobilenet_v3_large", [64, 1280])
    found = {(line.data, line.embedding_dim): line for line in lines}
    assert found["SOP", 64].extractor == 2_971_952 + 64 * 961
    for line in found.values():
        if line.paper_saved is not None:
            assert line.saved == pytest.approx(line.paper_saved, abs=0.035)
    implied = 11_318 * 64 / 0.16 - 11_318 * 64
    assert implied - found["SOP", 64].extractor == pytest.approx(0.77e6, rel=0.01)


def test_the_command_writes_table_and_plot(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["parameters", "--model=conv4", "--dims=32,64", f"--out={out}"]) == 0
    with (out / "parameters.csv").open(newline="") as file:
        assert [line["embedding_dim"] for line in csv.DictReader(file)] == ["32"] * 3 + ["64"] * 3
    assert (out / "parameters.md").read_text() in capsys.readouterr().out
    assert (out / "parameters.png").read_bytes().startswith(b"\x89PNG")
