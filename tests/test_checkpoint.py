"""A run that was stopped anywhere goes on to the bits of one that never was."""

import csv
import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny_federation import tiny_config, tiny_data, tiny_model

from fedss_kernels.federated import CheckpointError, Config, ConfigError, Stopped, run
from fedss_kernels.federated.lock import InUse, Lock

ROUNDS = 6


def train(out: Path | None, *, resume=False, stop_after=None, **options):
    config = tiny_config(**({"rounds": ROUNDS, "checkpoint_every": 1, "out": out} | options))
    seen = []
    return run(
        config,
        data=tiny_data(),
        model=tiny_model(),
        on_round=seen.append,
        resume=resume,
        stop=None if stop_after is None else lambda: seen[-1].round == stop_after,
    )


def files(out: Path) -> dict[str, object]:
    """What a run leaves, but for its times."""
    found: dict[str, object] = {}
    for name in ("metrics.csv", "ledger.csv"):
        with (out / name).open(newline="") as file:
            lines = list(csv.DictReader(file))
        found[name] = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    found["summary"] = {
        k: v for k, v in json.loads((out / "summary.json").read_text()).items() if k != "seconds"
    }
    found["config"] = {k: v for k, v in json.loads((out / "config.json").read_text()).items() if k != "out"}
    model = torch.load(out / "model.pt", weights_only=True)
    tensors = {"weight": model["weight"], **model["extractor"]}
    found["model"] = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    found["names"] = sorted(path.name for path in out.iterdir())
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    train(out)
    return files(out)


@pytest.mark.parametrize("stop_after", [1, 4])
@pytest.mark.parametrize("every", [0, 1, 3])
def test_a_run_that_is_stopped_goes_on_bit_for_bit(every, stop_after, tmp_path, undisturbed):
    with pytest.raises(Stopped, match=f"after round {stop_after}") as stopped:
        train(tmp_path, stop_after=stop_after, checkpoint_every=every)
    assert stopped.value.folder == tmp_path
    assert [path.name for path in tmp_path.glob("checkpoint*")] == [f"checkpoint-{stop_after:06}"]
    result = train(tmp_path, resume=True, checkpoint_every=1)
    assert [metrics.round for metrics in result.history] == list(range(1, ROUNDS + 1))
    found = files(tmp_path)
    assert found.pop("config")["checkpoint_every"] == every
    assert found == {name: value for name, value in undisturbed.items() if name != "config"}


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16"])
def test_so_does_one_with_other_settings(optimizer, wire_dtype, tmp_path):
    options = {"server_optimizer": optimizer, "wire_dtype": wire_dtype, "method": "neg_only"}
    train(tmp_path / "a", **options)
    with pytest.raises(Stopped):
        train(tmp_path / "b", stop_after=3, **options)
    train(tmp_path / "b", resume=True, **options)
    assert files(tmp_path / "a") == files(tmp_path / "b")


class Crash(BaseException):
    """Stands for the end of the process: nothing catches it."""


def operations(monkeypatch, crash_at: int | None) -> list[str]:
    """Notes what a checkpoint does to the disk; dies at one of these, before it or half-way."""
    done: list[str] = []

    def watched(name, real):
        def operation(*arguments, **options):
            done.append(name)
            if len(done) - 1 == crash_at:
                raise Crash
            return real(*arguments, **options)

        return operation

    monkeypatch.setattr(os, "fsync", watched("fsync", lambda descriptor: None))  # a disk may take its time
    monkeypatch.setattr(os, "rename", watched("rename", os.rename))
    monkeypatch.setattr(shutil, "rmtree", watched("rmtree", shutil.rmtree))
    return done


@pytest.mark.exhaustive
def test_a_crash_at_any_moment_of_a_checkpoint_hurts_nothing(tmp_path, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        done = operations(patch, None)
        train(tmp_path / "whole")
        count = len(done)
    assert count > 5 * 8  # of five checkpoints
    crashed = 0
    for at in range(count):
        out = tmp_path / str(at)
        with monkeypatch.context() as patch:
            operations(patch, at)
            try:
                train(out)
            except Crash:
                crashed += 1
        if not list(out.glob("checkpoint-0*")):
            continue  # before the first was whole there is nothing to go on from
        if not (out / "summary.json").exists():
            train(out, resume=True)
        assert files(out) == undisturbed, at
    assert crashed == count


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path, stop_after=3)
    return tmp_path


def test_another_configuration_is_refused_with_what_differs(stopped):
    with pytest.raises(CheckpointError) as refused:
        train(stopped, resume=True, rounds=9, client_lr=0.1)
    assert "checkpoint-000003 is of another configuration: " in str(refused.value)
    assert "rounds" not in str(refused.value), "of which there may be more"
    assert "client_lr: 0.2 there, 0.1 here" in str(refused.value)
    train(stopped, resume=True)


def test_another_version_is_refused(stopped, monkeypatch):
    monkeypatch.setattr("fedss_kernels.federated.files.checkpoint.FORMAT", 9)
    with pytest.raises(CheckpointError, match="is of format 4, this version reads 9: go on with the version"):
        train(stopped, resume=True)


def same_content(damaged: bytearray, whole: bytes) -> bool:
    """1e-05 and 1E-05 are one number, and so may two last digits of seventeen be."""
    try:
        return json.loads(damaged) == json.loads(whole)
    except ValueError:
        return False


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["state.safetensors", "checkpoint.json"])
def test_a_flipped_bit_is_an_error_wherever_it_is(name, stopped):
    path = stopped / "checkpoint-000003" / name
    whole = path.read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 150)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        if name.endswith(".json") and same_content(damaged, whole):
            continue
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged|of format"):
            train(stopped, resume=True)
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            train(stopped, resume=True)
    path.write_bytes(whole)
    train(stopped, resume=True)


@pytest.mark.parametrize("name", ["state.safetensors", "checkpoint.json"])
def test_what_cannot_be_read_is_not_called_damaged(name, stopped, tmp_path):
    path = stopped / "checkpoint-000003" / name
    path.rename(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"checkpoint-000003 is damaged: it has no {name}$"):
        train(stopped, resume=True)
    path.mkdir()  # which nobody can read as a file, root neither
    with pytest.raises(CheckpointError, match=f"checkpoint-000003 cannot be read: Is a directory: .*{name}$"):
        train(stopped, resume=True)
    path.rmdir()
    (tmp_path / name).rename(path)
    train(stopped, resume=True)


def test_there_must_be_something_to_go_on_from(stopped, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        train(tmp_path / "nothing", resume=True)
    with pytest.raises(ConfigError, match="out: expected the folder of the run to resume, got none"):
        train(None, resume=True)
    for name in ("metrics.csv", "ledger.csv"):
        tables = stopped / name, stopped / "record" / name
        whole = tables[0].read_bytes()
        for damaged in (whole.replace(b",3,", b",4,", 1), whole[:-1], b"", None):
            for table in tables:
                table.unlink() if damaged is None else table.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=f"neither .*record/{name} nor .*{name} is what"):
                train(stopped, resume=True)
        for table in tables:
            table.write_bytes(whole + b"what a run that was killed wrote after its checkpoint\n")
    train(stopped, resume=True)


def test_other_data_and_another_net_are_refused(stopped):
    data, config = tiny_data(), tiny_config(rounds=ROUNDS, checkpoint_every=1, out=stopped)
    others = [
        {"data": dataclasses.replace(data, images=255 - data.images), "model": tiny_model()},
        {"data": dataclasses.replace(data, clients=data.clients[::-1]), "model": tiny_model()},
        {"data": data, "model": torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 4, bias=False))},
    ]
    for other in others:
        with pytest.raises(CheckpointError, match="began with other data, another net or another method"):
            run(config, resume=True, **other)
    train(stopped, resume=True)


def test_a_folder_is_used_by_one_run_at_a_time(stopped):
    lock = Lock(stopped / "config.json")
    with pytest.raises(InUse, match="another run is using"):
        train(stopped, resume=True)
    lock.release()
    train(stopped, resume=True)


def test_a_finished_run_is_not_resumed_and_leaves_its_last_checkpoint(tmp_path):
    train(tmp_path / "kept", checkpoint_every=4)
    assert [path.name for path in tmp_path.glob("kept/checkpoint*")] == ["checkpoint-000006"]
    with pytest.raises(CheckpointError, match="is finished: its 6 rounds are done; for more of them"):
        train(tmp_path / "kept", checkpoint_every=4, resume=True)
    train(tmp_path / "none", checkpoint_every=0)
    assert not list(tmp_path.glob("none/checkpoint*"))
    with pytest.raises(CheckpointError, match="is finished, and kept no checkpoint that more rounds could"):
        train(tmp_path / "none", rounds=ROUNDS + 1, resume=True)


def test_a_new_run_in_the_folder_of_a_stopped_one_leaves_nothing_of_it(stopped, undisturbed):
    with pytest.raises(FileExistsError, match="choose another, go on with it with --resume, or replace it"):
        train(stopped)
    config = tiny_config(rounds=ROUNDS, checkpoint_every=1, out=stopped, overwrite=True)
    run(config, data=tiny_data(), model=tiny_model())
    assert files(stopped) == undisturbed


def test_without_a_folder_nothing_is_written_and_a_stop_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Stopped) as stopped:
        train(None, stop_after=2)
    assert stopped.value.folder is None and not list(tmp_path.iterdir())


def test_options_that_change_no_bit_may_differ():
    from fedss_kernels.federated.files.checkpoint import MAY_DIFFER, differences

    here, there = Config().to_dict(), Config(checkpoint_every=3, out=Path("elsewhere")).to_dict()
    assert differences(there, here) == [] and {"checkpoint_every", "out"} <= set(MAY_DIFFER)
    assert differences({**here, "old": 1}, here) == ["old: 1 there, 'no such option' here"]


def test_more_rounds_with_another_default_are_told_what_to_give(tmp_path):
    def of(rounds: int, **options) -> None:
        config = Config(rounds=rounds, cohort=2, lr_decay="constant", out=tmp_path, max_norm=1e9, **options)
        run(config, data=tiny_data(), model=tiny_model(), resume=rounds > 5)

    options = {"embedding_dim": 4, "warmup_rounds": 0}
    of(5, **options)
    with pytest.raises(CheckpointError) as refused:
        of(20, **options)
    advice = "left out it follows the number of rounds: give eval_every 1, as the run began"
    assert str(refused.value).endswith(f"eval_every: 1 there, 4 here; {advice}")
    of(20, **options, eval_every=1)
