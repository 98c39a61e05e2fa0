"""A run's record: what is edited beside it costs the run nothing, and what was in it is not lost."""

import codecs
import json
import re

import pytest
import torch
from tiny_federation import tiny_config, tiny_data, tiny_model

from fedss_kernels.federated import ConfigError, Stopped, run
from fedss_kernels.federated.config import Config
from fedss_kernels.federated.files.run_folder import read_config, read_model, read_run

ROUNDS = 5


def train(out, *, resume=False, stop_after=None, on_round=None, **options):
    seen = []

    def note(metrics):
        seen.append(metrics)
        if on_round:
            on_round(metrics)

    return run(
        tiny_config(**({"rounds": ROUNDS, "out": out, "checkpoint_every": 2} | options)),
        data=tiny_data(),
        model=tiny_model(),
        on_round=note,
        resume=resume,
        stop=None if stop_after is None else lambda: seen[-1].round == stop_after,
    )


def of_files(caplog) -> list[str]:
    """What is said of a run's files."""
    files = "fedss_kernels.federated.files"
    return [record.getMessage() for record in caplog.records if record.name.startswith(files)]


@pytest.fixture
def stopped(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path / "run", stop_after=3)
    return tmp_path / "run"


def semicolons(content: bytes) -> bytes:
    """As a German spreadsheet saves it."""
    return b"\xef\xbb\xbf" + content.replace(b",", b";").replace(b".", b",")


EDITS = {
    "semicolons": semicolons,
    "line ends": lambda content: content.replace(b"\r\n", b"\n"),
    "a column": lambda content: content.replace(b"\r\n", b",note\r\n"),
    "rows sorted": lambda content: b"".join(sorted(content.splitlines(keepends=True))),
}


@pytest.mark.parametrize("name", ["metrics.csv", "ledger.csv"])
@pytest.mark.parametrize("edit", EDITS)
def test_a_table_that_a_spreadsheet_saved_is_written_anew(edit, name, stopped, caplog):
    whole = (stopped / name).read_bytes()
    edited = EDITS[edit](whole)
    assert edited != whole
    (stopped / name).write_bytes(edited)
    train(stopped, resume=True)
    aside = stopped / name.replace(".csv", "-changed.csv")
    assert (stopped / name).read_bytes().startswith(whole)
    assert (stopped / name).read_bytes() == (stopped / "record" / name).read_bytes()
    assert aside.read_bytes() == edited
    assert of_files(caplog) == [
        f"{stopped / name} was changed by another program: that is now {aside.name}, and the table is as the "
        "run wrote it"
    ]


def test_a_byte_order_mark_is_no_part_of_what_is_read(tmp_path):
    run = tmp_path / "run"
    expected = [metrics.top1 for metrics in train(run).history]
    for name in ("metrics.csv", "summary.json"):  # which are read where there is no record
        (run / "record" / name.replace("summary", "facts")).unlink()
        (run / name).write_bytes(codecs.BOM_UTF8 + (run / name).read_bytes())
    _, history, _ = read_run(run)
    assert [metrics.top1 for metrics in history] == expected


def test_one_that_is_gone_or_was_cut_is_written_anew_without_a_word(stopped, caplog):
    whole = (stopped / "metrics.csv").read_bytes()
    (stopped / "metrics.csv").write_bytes(whole[:-10])
    (stopped / "ledger.csv").unlink()
    train(stopped, resume=True)
    for name in ("metrics.csv", "ledger.csv"):
        assert (stopped / name).read_bytes() == (stopped / "record" / name).read_bytes()
    assert not of_files(caplog)


def test_the_record_itself_is_had_again_from_the_tables(stopped):
    record = stopped / "record"
    (record / "metrics.csv").write_text("rubbish")
    for name in ("ledger.csv", "facts.json"):
        (record / name).unlink()
    expected = [metrics.top1 for metrics in train(stopped.parent / "whole").history]
    resumed = train(stopped, resume=True)
    assert [metrics.top1 for metrics in resumed.history] == expected
    (stopped / "summary.json").write_text("edited")
    assert read_run(stopped)[2] == resumed.summary


def test_a_table_that_is_saved_while_the_run_goes_on_is_whole_at_the_end(tmp_path, caplog):
    table = tmp_path / "run/metrics.csv"

    def save(metrics):
        if metrics.round == 2:
            table.write_bytes(semicolons(table.read_bytes()))

    result = train(tmp_path / "run", on_round=save)
    assert read_run(tmp_path / "run")[1] == result.history
    assert table.read_bytes() == (tmp_path / "run/record/metrics.csv").read_bytes()
    assert "was changed by another program" in caplog.text


def test_what_is_read_of_a_run_is_not_what_was_edited(tmp_path):
    result = train(tmp_path)
    for name in ("metrics.csv", "summary.json"):
        (tmp_path / name).write_text("edited")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"cohort": 2}))
    assert read_run(tmp_path) == (result.config, result.history, result.summary)


def test_a_line_that_is_half_written_is_no_round(stopped):
    table = stopped / "record/metrics.csv"
    table.write_bytes(table.read_bytes() + b"4,0.5,0.2")
    _, history, summary = read_run(stopped)
    assert [metrics.round for metrics in history] == [1, 2, 3] and summary.rounds == 3
    assert summary.top1 == history[1].top1 is not None  # the last that was measured


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda text: text.replace('"cohort": 3', '"cohort": 2'), "was changed (cohort: 3 there, 2 here)"),
        (
            lambda text: text.replace("{", '{"unheard_of": 1,'),
            "unheard_of: no such option, in this version: did a later one",
        ),
        (lambda text: text[:40], "is not JSON"),
        (lambda text: "", "is not JSON"),
        (lambda text: "[]", "expected an object of options"),
        (lambda text: None, "cannot read"),
    ],
)
def test_a_config_that_was_edited_is_as_the_run_began_again(edit, words, stopped, caplog):
    file = stopped / "config.json"
    whole = file.read_text()
    edited = edit(whole)
    file.unlink() if edited is None else file.write_text(edited)
    config, changed = read_config(stopped)
    assert config == Config.from_dict(json.loads(whole)) and words in changed and str(file) in changed
    train(stopped, resume=True)
    assert json.loads(file.read_text()) == json.loads(whole)
    (line,) = of_files(caplog)
    assert words in line and line.endswith(": it is as the run began again")


def test_what_may_change_is_read_from_the_config_and_another_layout_is_no_change(stopped, caplog):
    file = stopped / "config.json"
    values = json.loads(file.read_text()) | {"rounds": 9, "data_dir": "/moved", "checkpoint_every": 7}
    file.write_text(json.dumps(values, sort_keys=True))
    config, changed = read_config(stopped)
    assert (config.rounds, str(config.data_dir), config.checkpoint_every, changed) == (9, "/moved", 7, "")


def test_without_a_checkpoint_the_config_has_the_word(tmp_path):
    train(tmp_path, checkpoint_every=0)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace("{", '{"unheard_of": 1,'))
    with pytest.raises(
        ConfigError, match="^config: in .*config.json: unheard_of: no such option, in this version"
    ):
        read_config(tmp_path)


def test_a_run_of_an_earlier_version_is_read_from_what_it_left(tmp_path):
    result = train(tmp_path, checkpoint_every=0)
    for path in (tmp_path / "record").iterdir():
        path.unlink()
    assert read_run(tmp_path) == (result.config, result.history, result.summary)
    for text, words in (
        ("{}", "summary.json is not as a run wrote it"),
        (None, "no finished run in .*summary.json"),
    ):
        (tmp_path / "summary.json").unlink() if text is None else (tmp_path / "summary.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            read_run(tmp_path)
    (tmp_path / "metrics.csv").write_bytes(semicolons((tmp_path / "metrics.csv").read_bytes()))
    with pytest.raises(ValueError, match="metrics.csv in .* is not as a run wrote it"):
        read_run(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "1", '{"data": "own"}', None])
def test_a_record_that_is_damaged_is_not_an_earlier_versions(content, tmp_path):
    run(tiny_config(out=tmp_path), data=tiny_data(), model=tiny_model())
    facts = tmp_path / "record/facts.json"
    facts.unlink()
    if content is None:
        facts.mkdir()
        words = f"the record of the run in {tmp_path} cannot be read: Is a directory: {facts}"
    else:
        facts.write_text(content)
        words = f"facts.json in {tmp_path / 'record'} is not as a run wrote it: "
    with pytest.raises(ValueError, match=re.escape(words)):
        read_run(tmp_path)


def test_a_model_that_is_damaged_or_another_programs_is_said(tmp_path):
    train(tmp_path)
    whole = (tmp_path / "model.pt").read_bytes()
    assert len(read_model(tmp_path)[1]) == 7
    torch.save([1], tmp_path / "list.pt")
    for content in (b"", b"abc", whole[:-9], whole[: len(whole) // 2], (tmp_path / "list.pt").read_bytes()):
        (tmp_path / "model.pt").write_bytes(content)
        with pytest.raises(ValueError, match="model.pt is damaged, or no run wrote it"):
            read_model(tmp_path)
    (tmp_path / "summary.json").unlink()
    with pytest.raises(ValueError, match="no finished run in .*: no summary.json"):
        read_model(tmp_path)


def test_other_versions_are_said(stopped, monkeypatch, caplog):
    def others():
        return {"fedss-kernels": "9", "torch": "9.9", "instruction set": "other"}

    monkeypatch.setattr("fedss_kernels.federated.files.checkpoint.versions", others)
    train(stopped, resume=True)
    (line,) = of_files(caplog)
    assert (
        "was written with fedss-kernels " in line
        and "torch 2." in line
        and line.endswith("bits may be others")
    )
