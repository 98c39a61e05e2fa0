"""The README's examples run as they stand, but for the number of rounds."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_loss_examples():
    names: dict = {}
    for block in BLOCKS[:2]:
        exec(block, names)
    assert names["best"].indices.shape == (4, 5) and names["loss"].isfinite()


def test_federated_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(BLOCKS[2].replace("rounds=20", "rounds=1, cohort=2"), {})
    assert (tmp_path / "net.pt").exists() and len(capsys.readouterr().out.split()) == 3
