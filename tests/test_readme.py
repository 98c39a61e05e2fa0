"""The README's examples run as they stand, but for the number of rounds."""

import re
from pathlib import Path

from fedss_kernels.federated.algorithms import METHODS
from fedss_kernels.federated.reports.parts_in_words import place

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


def test_an_example_with_data_of_ones_own_prints_it_and_the_result_in_a_line_and_no_tensor(capsys):
    exec(BLOCKS[3], {})
    assert re.fullmatch(
        r"<FederatedData mine, classification: 4 classes, 40 training and 8 test images, 4 clients> "
        r"<Result of fedss on mine after round 2: top-1 \d+\.\d%>\n",
        capsys.readouterr().out,
    )


def test_the_table_of_methods_has_them_all_and_says_of_each_where_its_net_is():
    (table,) = re.findall(r"\| method \| the net \| class rows \|.*\n\| ---.*\n((?:\|.*\n)+)", README)
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    nets = {name: net for which, net, *_ in rows for name in re.findall(r"`([a-z_]+)`", which)}
    assert nets == {method.name: place(method).net for method in METHODS.values()}
