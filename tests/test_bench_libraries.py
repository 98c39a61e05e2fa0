"""The benchmark beside other libraries' losses: it checks what it times, and says what it could not time."""

import csv
import math

import pytest
import torch
import torch.nn.functional as F
from fedss_kernels.bench import libraries
from fedss_kernels.bench.bench_sampled_softmax import Shape
from fedss_kernels.bench.results import Mismatch

from fedss_kernels.federated import cli

WIDE, PAIRS = Shape(5, 7, 8, 40), Shape(6, 6, 8, 6)


@pytest.fixture(autouse=True)
def no_worker_of_tests(monkeypatch):
    """pytest-benchmark, inside, refuses to time where it finds itself in a worker of pytest-xdist."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


@pytest.mark.exhaustive
def test_a_run_prints_and_saves_what_it_timed(tmp_path, capsys):
    pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")
    options = ["--shapes=5x7x8x40,6x6x8x6", "--seconds=0.001", "--threads=1", f"--out={tmp_path}"]
    assert cli.main(["bench", "libraries", *options]) == 0
    out = capsys.readouterr().out
    assert "ArcFace" in out and "items come repeatedly" in out
    with (tmp_path / "libraries.csv").open(newline="") as file:
        rows = {(row["operation"], row["contender"]): row for row in csv.DictReader(file)}
    assert set(rows) == {(op, name) for op, of in libraries.CONTENDERS.items() for name in of}
    assert all(float(row["median_seconds"]) > 0 and not row["note"] for row in rows.values())
    assert (tmp_path / "libraries.md").read_text().count("\n| 6, 6, 8 | 6 | ") == 2


def test_ours_over_all_classes_is_arcface():
    """By its formula: the target's angle grows by the margin."""
    input, rows, target = libraries.matrices(WIDE)
    cosines = F.normalize(input) @ F.normalize(rows).t()
    angle = cosines.gather(1, target[:, None]).acos()
    assert (angle + libraries.MARGIN < math.pi).all()
    logits = 64 * cosines.scatter(1, target[:, None], (angle + libraries.MARGIN).cos())
    ours = libraries.arcface_ours(WIDE, None)()[0]
    torch.testing.assert_close(ours, F.cross_entropy(logits, target), rtol=1e-5, atol=1e-5)


def test_sampled_arcface_has_a_sparse_gradient():
    gradient = libraries.arcface_ours(WIDE, WIDE.S)()[2]
    assert gradient.is_sparse and gradient._nnz() <= WIDE.S + WIDE.B


def test_what_differs_is_not_timed():
    right, wrong = libraries.in_batch_ours(PAIRS, False), libraries.in_batch_eager(PAIRS, True)
    with pytest.raises(Mismatch, match=r"eager at here: the loss differs from ours's by "):
        libraries.check("here", "in_batch", {"ours": right, "eager": wrong})
    libraries.check("here", "in_batch", {"ours": right, "eager": libraries.in_batch_eager(PAIRS, False)})


def test_what_is_not_installed_is_not_timed_and_said(monkeypatch):
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda name: None)
    plan = libraries.Plan(shapes=[WIDE], contenders=["ours", "metric_learning"], seconds=0.001)
    ours, theirs = libraries.measure(plan)
    assert ours.timing and theirs.timing is None
    assert theirs.note == "not installed (pip install pytorch-metric-learning)"
