"""Any number of processes play the clients to the same bits; one that is lost is an error."""

import csv
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from later import later
from tiny_federation import tiny_config, tiny_data, tiny_model

from fedss_kernels.federated import Config, ConfigError, WorkerLost, cli, run, workers
from fedss_kernels.federated.clients.player import EVALUATION_BATCH
from fedss_kernels.federated.files.round_metrics import RoundMetrics
from fedss_kernels.federated.workers import Team, divided


def train(workers: int, **options):
    settings = {"rounds": 4, "cohort": 4, "eval_every": 1, "workers": workers} | options
    data = tiny_data()
    data = replace(
        data, test_images=data.test_images.repeat(80, 1, 1, 1), test_labels=data.test_labels.repeat(80)
    )
    assert len(data.test_images) > 3 * EVALUATION_BATCH
    return run(tiny_config(**settings), data=data, model=tiny_model())


def history(result) -> list[RoundMetrics]:
    return [replace(metrics, seconds=0.0) for metrics in result.history]


@pytest.mark.parametrize(
    "options",
    [
        *later({}),
        {
            "method": "neg_only",
            "wire_dtype": "bfloat16",
            "dropout_rate": 0.5,
            "poison_rate": 0.3,
            "cohort": 5,
        },
    ],
)
def test_bits_do_not_depend_on_the_number_of_workers(options):
    """Three, in some rounds more than clients; test images for four batches of embeddings."""
    alone, together = train(1, **options), train(3, **options)
    assert torch.equal(together.weight, alone.weight) and history(together) == history(alone)
    for a, b in zip(together.extractor.parameters(), alone.extractor.parameters(), strict=True):
        assert torch.equal(a, b)


def kill_the_others(*given) -> None:
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)
        process.join()


@pytest.mark.exhaustive
def test_a_worker_that_dies_is_an_error_and_not_a_wait():
    killed = r"a worker was lost: rank 1 was ended by signal 9 \(SIGKILL: out of memory, or killed by hand\)"
    with pytest.raises(WorkerLost, match=killed):
        run(tiny_config(workers=2), data=tiny_data(), model=tiny_model(), on_round=kill_the_others)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    torch.distributed.destroy_process_group()  # nothing of it was left


@pytest.mark.exhaustive
@pytest.mark.parametrize("when", ["between rounds", *later("before an evaluation")])
def test_a_run_that_lost_a_worker_is_saved_and_goes_on_bit_for_bit(when, tmp_path, monkeypatch):
    """Three rounds are done, the last with its evaluation, for which there was only rank 0."""
    options = {"rounds": 5, "eval_every": 3, "checkpoint_every": 0, "out": tmp_path}
    with monkeypatch.context() as patch, pytest.raises(WorkerLost):
        if when == "between rounds":
            config, hook = tiny_config(workers=2, **options), lambda m: m.round == 3 and kill_the_others()
            run(config, data=tiny_data(), model=tiny_model(), on_round=hook)
        else:
            real = Team.embed
            patch.setattr(Team, "embed", lambda *given: kill_the_others() or real(*given))
            run(tiny_config(workers=2, **options), data=tiny_data(), model=tiny_model())
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-000003"]
    resumed = run(tiny_config(**options), data=tiny_data(), model=tiny_model(), resume=True)
    alone = run(tiny_config(**options | {"out": None}), data=tiny_data(), model=tiny_model())
    assert torch.equal(resumed.weight, alone.weight) and history(resumed) == history(alone)


class Fragile(torch.nn.Module):
    """A net that cannot be trained but in the process that made it."""

    def __init__(self):
        super().__init__()
        self.net, self.home = tiny_model(), os.getpid()

    def forward(self, x):
        if self.training and os.getpid() != self.home:
            raise RuntimeError("no such\nimage")
        return self.net(x)


@pytest.mark.exhaustive
def test_a_worker_that_fails_is_told_as_it_failed():
    with pytest.raises(WorkerLost, match="lost: rank 1 failed: RuntimeError: no such image") as lost:
        run(tiny_config(workers=2), data=tiny_data(), model=Fragile())
    assert "in forward" in str(lost.value.__cause__)  # where, there


@pytest.mark.exhaustive
def test_on_the_command_line_a_lost_worker_is_one_line(tmp_path, monkeypatch, capsys):
    real, out = cli.train.run, tmp_path / "run"

    def killed(*arguments, on_round, **options):
        def then(metrics):
            on_round(metrics)
            if metrics.round == 2:
                kill_the_others()

        return real(*arguments, on_round=then, **options)

    monkeypatch.setattr(cli.train, "run", killed)
    options = ["--glyph-classes=12", "--glyph-writers=4", "--cohort=2", "--num-negatives=3", "--rounds=4"]
    options += [f"--cache-dir={tmp_path}", "--workers=2", f"--out={out}"]
    assert cli.main(["run", *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fedss run: a worker was lost: rank 1 was ended by signal 9")
    assert line.endswith(f"; saved up to round 2; go on with: fedss run --resume {out}")


@pytest.mark.exhaustive
def test_a_worker_that_cannot_start_is_an_error_and_not_a_wait(monkeypatch):
    monkeypatch.setattr("fedss_kernels.federated.workers._work", _fails)
    with pytest.raises(WorkerLost, match="a worker ended before the run began"):
        train(2)


def _fails(*given):
    raise SystemExit(3)


def test_a_worker_whose_server_is_gone_ends_without_a_traceback(tmp_path, monkeypatch):
    receiver, sender = multiprocessing.Pipe(duplex=False)
    receiver.close()
    for name in ("ignore", "give_back", "_end_with"):
        monkeypatch.setattr(workers, name, lambda *given: None)
    with pytest.raises(SystemExit):
        workers._work(tmp_path / "gone", 1, 2, 0, sender)


@pytest.mark.exhaustive
def test_an_error_in_the_middle_of_a_call_is_an_error_and_not_a_wait(monkeypatch):
    """Rank 0 fails where the other waits for class rows."""

    def fail(self, class_ids):
        raise RuntimeError("the server broke")

    monkeypatch.setattr("fedss_kernels.federated.server.server.Server.select", fail)
    with pytest.raises(RuntimeError, match="the server broke"):
        train(2)
    assert not multiprocessing.active_children()


@pytest.mark.exhaustive
def test_a_script_that_cannot_be_spawned_from_is_told_why(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from fedss_kernels.federated import Config, run\n"
        "run(Config(glyph_classes=20, glyph_writers=12, rounds=1, cohort=2, workers=2))\n"
    )
    environment = os.environ | {"FEDSS_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 1 and 'needs if __name__ == "__main__":' in done.stderr


@pytest.mark.exhaustive
def test_workers_end_with_the_process_that_started_them(tmp_path):
    """Killed as soon as there is one, long before they have met."""
    command = [
        "run",
        "--glyph-classes=20",
        "--glyph-writers=12",
        "--rounds=9999",
        "--cohort=2",
        "--workers=3",
    ]
    parent = subprocess.Popen(
        [sys.executable, "-m", "fedss_kernels", *command, f"--out={tmp_path / 'run'}"],
        env=os.environ | {"FEDSS_CACHE": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def children() -> list[str]:
        listed = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        return listed.read_text().split() if listed.exists() else []

    _wait_until(lambda: len(children()) >= 2)
    started = children()
    parent.kill()
    parent.wait()
    _wait_until(lambda: not any(_runs(pid) for pid in started))


def _wait_until(holds, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@given(st.dictionaries(st.integers(0, 99), st.integers(1, 50), max_size=12), st.integers(1, 5))
def test_shares_are_all_the_clients_and_no_share_is_much_larger(sizes, parts):
    shares = divided(list(sizes), sizes.__getitem__, parts)
    assert sorted(k for share in shares for k in share) == sorted(sizes)
    assert all(share == sorted(share) for share in shares) and len(shares) == parts
    burdens = [sum(sizes[k] for k in share) for share in shares]
    assert max(burdens) - min(burdens) <= max(sizes.values(), default=0)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.mark.exhaustive
def test_torchrun_gives_the_workers(tmp_path):
    """The same command under torchrun and alone: the same results, written once."""
    options = ["--data", "glyphs", "--glyph-classes", "20", "--glyph-writers", "12", "--rounds", "2"]
    options += ["--cohort", "3", "--num-negatives", "4", "--cache-dir", str(tmp_path / "cache")]
    assert cli.main(["run", *options, "--out", str(tmp_path / "alone")]) == 0
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command = [*torchrun, "-m", "fedss_kernels", "run", *options, "--out", str(tmp_path / "together")]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    models = [torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("alone", "together")]
    assert torch.equal(models[0]["weight"], models[1]["weight"])
    assert _ledger(tmp_path / "alone") == _ledger(tmp_path / "together")


def _ledger(folder: Path) -> list[list[str]]:
    with (folder / "ledger.csv").open(newline="") as file:
        return list(csv.reader(file))


def test_more_workers_than_torchrun_started_are_refused(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="workers: expected 2, as many as torchrun started, got 3"):
        train(3)


def test_workers_change_no_bit_so_a_run_may_be_resumed_with_others():
    from fedss_kernels.federated.files.checkpoint import differences

    assert differences(Config(workers=2).to_dict(), Config().to_dict()) == []
