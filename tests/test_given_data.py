"""Data that are handed over in Python are as they are: options of data that say otherwise are told."""

import logging
import pickle
from dataclasses import replace

import pytest
from test_cli import SMALL
from test_report import page_of
from tiny_federation import UNTRAINED, tiny_config, tiny_data, tiny_model

from fedss_kernels.federated import Config, Stopped, cli, run
from fedss_kernels.federated.files.run_folder import read_config
from fedss_kernels.federated.loading import load_data
from fedss_kernels.federated.reports.report import write_run_report
from fedss_kernels.federated.reports.reported_run import Run

WHY = "has no effect: the data are handed over as they are"
CHOSEN = {"holdout": 0.3, "partition": "iid", "num_clients": 20, "images_per_client": 7, "data_seed": 3}
CHOSEN |= {"classes_per_client": 3, "dirichlet_alpha": 9.0, "skip_damaged": True, "task": "retrieval"}
CHOSEN |= {"test_share": 0.4, "glyph_classes": 9, "glyph_writers": 9}


def told(caplog, config, data, **options) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fedss_kernels.federated.idle_settings"):
        run(config, data=data, **{"model": tiny_model(), **options})
    return caplog.messages


@pytest.mark.parametrize("name, value", CHOSEN.items())
def test_an_option_of_the_data_is_told(name, value, caplog):
    config, data = tiny_config(data="cifar10", rounds=1, **{name: value}), tiny_data()
    assert told(caplog, config, data) == [f"{name} {value} {WHY}", UNTRAINED]
    assert told(caplog, tiny_config(data="cifar10", rounds=1), data) == [UNTRAINED]


def test_a_folder_of_own_data_is_told(caplog, tmp_path):
    assert told(caplog, tiny_config(data_dir=tmp_path), tiny_data())[0] == f"data_dir {tmp_path} {WHY}"


def test_the_report_says_what_the_data_are(tmp_path):
    found = run(tiny_config(data="glyphs", out=tmp_path, **CHOSEN), data=tiny_data(), model=tiny_model())
    write_run_report(tmp_path, Run(found.config, found.history, found.summary))
    text = page_of(tmp_path)
    assert "21 images that no client holds" in text and "images of clients who do not train" not in text
    settings = text.partition(" Settings ")[2]
    assert "data own the data set" in settings and "task classification" in settings
    assert not [name for name in CHOSEN if name != "task" and f" {name} " in settings]


def test_such_a_run_is_resumed(tmp_path, caplog):
    config, data = tiny_config(out=tmp_path, **CHOSEN), tiny_data()
    with pytest.raises(Stopped):
        run(config, data=data, model=tiny_model(), stop=lambda: True)
    assert told(caplog, config, data, resume=True)[-1] == UNTRAINED


def test_data_that_the_options_name_are_what_they_say(tmp_path, caplog):
    """Whoever has read them, and whatever was done to them since: a copy, others' notes."""
    config = Config(glyph_classes=12, glyph_writers=8, data_seed=1, holdout=0.3, rounds=1, cohort=2)
    data = load_data(config)
    for n, handed in enumerate((data, replace(data, notes=("mine",)), pickle.loads(pickle.dumps(data)))):
        out = tmp_path / str(n)
        assert not any(WHY in line for line in told(caplog, replace(config, out=out), handed, model=None))
        kept, _ = read_config(out)
        assert (kept.data, kept.glyph_classes, kept.data_seed, kept.holdout) == ("glyphs", 12, 1, 0.3)
    more = replace(config, rounds=2, out=tmp_path / "0")
    assert run(more, data=replace(data, notes=("mine",)), resume=True).summary.rounds == 2


def test_nor_are_those_of_the_command_line(tmp_path, capsys):
    assert cli.main(["run", *SMALL, "--rounds=1", "--holdout=0.3", f"--out={tmp_path}"]) == 0
    assert WHY not in "".join(capsys.readouterr())
    assert "images of clients who do not train" in page_of(tmp_path)
