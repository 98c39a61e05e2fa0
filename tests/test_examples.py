"""The examples, as their users start them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SHARDED = str(Path(__file__).parents[1] / "examples" / "sharded_classes.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
PATIENCE = 100  # seconds


def output(*arguments: str) -> str:
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        text, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.terminate()  # torchrun ends its processes first
        process.wait()
    assert process.returncode == 0, text
    return text


@pytest.mark.exhaustive
def test_two_processes_learn_as_one_does():
    """Their first rows and negatives are others, so that losses are near each other and not the same."""
    steps = ("--steps", "200")
    alone, together = (output(*command, SHARDED, *steps) for command in ((), TORCHRUN))
    losses = [[float(n) for n in re.findall(r"loss ([\d.]+)", text)] for text in (alone, together)]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=0.15)
    for text, each in zip((alone, together), losses, strict=True):
        assert each[-1] < 0.7 * each[0]
        assert float(re.search(r"top-1 over 540 classes: ([\d.]+)", text)[1]) > 0.15  # chance is 0.002
