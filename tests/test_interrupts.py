"""Signals that ask to stop: a run finishes its round and saves, and says how to go on."""

import contextlib
import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedss_kernels.federated import cli, disk, interrupts
from fedss_kernels.federated.reports import report

SMALL = ["--glyph-classes=12", "--glyph-writers=4", "--cohort=2", "--num-negatives=3", "--embedding-dim=8"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FEDSS_CACHE", str(tmp_path_factory.getbasetemp() / "glyph-cache"))


@pytest.fixture
def run_with(tmp_path, monkeypatch):
    """`fedss run` of four rounds, which gets these signals in its second; the exit code."""

    def run_with(*signals: signal.Signals, every: int = 0) -> int:
        real = cli.train.run

        def signalled(*arguments, on_round, **options):
            def then(metrics):
                on_round(metrics)
                if metrics.round == 2:
                    for number in signals:
                        signal.raise_signal(number)

            return real(*arguments, on_round=then, **options)

        with monkeypatch.context() as patch:
            patch.setattr(cli.train, "run", signalled)
            options = ["--rounds=4", f"--checkpoint-every={every}", f"--out={tmp_path}"]
            return cli.main(["run", *SMALL, *options])

    return run_with


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGHUP", 129)])
def test_the_round_is_finished_and_saved(name, code, run_with, tmp_path, capsys):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    assert run_with(number, number) == code  # twice in a moment is once
    assert signal.getsignal(number) == before
    assert capsys.readouterr().err.splitlines() == [
        "fedss run: finishing this round; SIGTERM or Ctrl-C now stops at once",
        f"fedss run: stopped after round 2 of 4; go on with: fedss run --resume {tmp_path}",
    ]
    assert cli.main(["run", "--resume", str(tmp_path)]) == 0


def test_a_second_signal_stops_at_once_and_what_is_saved_is_said(run_with, tmp_path, monkeypatch, capsys):
    """But not a second SIGHUP, which comes with the first."""
    monkeypatch.setattr(interrupts, "ECHO", -1.0)
    assert run_with(signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, every=1) == 143
    assert capsys.readouterr().err.splitlines()[1:] == [
        f"fedss run: stopped; saved up to round 1; go on with: fedss run --resume {tmp_path}"
    ]


@pytest.mark.exhaustive
def test_a_hang_up_that_is_ignored_stays_ignored(run_with, capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        assert run_with(signal.SIGHUP) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert capsys.readouterr().err == ""


def replaced(monkeypatch, main) -> None:
    monkeypatch.setitem(cli.COMMANDS, "run", dataclasses.replace(cli.COMMANDS["run"], main=main))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_while_the_report_is_made_says_that_the_run_is_finished(
    name, code, run_with, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        number = getattr(signal, name)
        patch.setattr(report, "write_run_report", lambda *_: signal.raise_signal(number))
        assert run_with(every=1) == code
    told = f"its report: fedss report {tmp_path}"
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"fedss run: stopped; the run is finished, and its results are in {tmp_path}; {told}"
    )
    assert cli.main(["run", "--resume", str(tmp_path)]) == 2
    assert f"for {told}" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path)]) == 0 and (tmp_path / "report.html").exists()


def test_outside_of_rounds_a_signal_stops_at_once(monkeypatch, capsys):
    replaced(monkeypatch, lambda arguments: signal.raise_signal(signal.SIGTERM))
    assert cli.main(["run"]) == 143
    assert capsys.readouterr() == ("", "fedss run: stopped\n")


@pytest.mark.parametrize(
    "every, what", [(2, "saved up to round 2; go on with"), (0, "no round is saved yet")]
)
def test_a_full_disk_is_one_line_with_what_is_saved(every, what, run_with, tmp_path, monkeypatch, capsys):
    real = disk.append

    def full_in_round_3(path, content):
        if path == tmp_path / "metrics.csv" and content.startswith(b"3,"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, content)

    monkeypatch.setattr("fedss_kernels.federated.files.record.append", full_in_round_3)
    assert run_with(every=every) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fedss run: No space left on device: {tmp_path / 'metrics.csv'}; {what}")


def test_in_another_command_a_full_disk_is_one_line_too(monkeypatch, capsys):
    def full(arguments):
        raise OSError(errno.EDQUOT, "Disk quota exceeded", "runs/noise/noise.csv")

    replaced(monkeypatch, full)
    assert cli.main(["run"]) == 1
    assert capsys.readouterr() == ("", "fedss run: Disk quota exceeded: runs/noise/noise.csv\n")


# ---- processes ---------------------------------------------------------------------------------------------


def wait_until(holds, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def members(group: int) -> list[str]:
    """Processes of a group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of, *_ = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(of) == group and state != "Z":
            found.append(stat.parent.name)
    return found


def signalled_group(command: list[str], tmp_path: Path, ready) -> tuple[int, str]:
    """(exit code, stderr) of a command that gets SIGTERM once it is ready, as do all processes it started."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "fedss_kernels", *command],
        env=os.environ | {"TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: ready() or process.poll() is not None)
        os.killpg(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=120)
        wait_until(lambda: not members(process.pid))
        assert not list(scratch.iterdir())
        return process.returncode, err
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def rounds_in(folder: Path) -> int:
    table = folder / "metrics.csv"
    return table.read_bytes().count(b"\n") - 1 if table.exists() else 0


@pytest.mark.exhaustive
def test_workers_stay_until_the_round_is_done_where_all_get_the_signal(tmp_path):
    """As in a Slurm step. Nothing is left of them, nor of their files."""
    out = tmp_path / "run"
    options = [*SMALL, "--rounds=100000", "--eval-every=100000", "--checkpoint-every=0", "--workers=2"]
    code, err = signalled_group(["run", *options, f"--out={out}"], tmp_path, lambda: rounds_in(out) > 2)
    assert code == 143, err
    assert err.splitlines()[0] == "fedss run: finishing this round; SIGTERM or Ctrl-C now stops at once"
    done = rounds_in(out)
    assert err.splitlines()[1:] == [
        f"fedss run: stopped after round {done} of 100000; go on with: fedss run --resume {out}"
    ]
    assert (out / f"checkpoint-{done:06}").is_dir()


@pytest.mark.exhaustive
def test_so_do_the_runs_of_a_comparison(tmp_path):
    out = tmp_path / "compared"
    options = [*SMALL, "--rounds=100000", "--eval-every=100000", "--checkpoint-every=0", "--jobs=2"]
    options += ["--methods=fedss,pos_only", "--seeds=0", f"--out={out}"]
    folders = [out / "fedss-seed0", out / "pos_only-seed0"]
    code, err = signalled_group(
        ["compare", *options], tmp_path, lambda: all(rounds_in(folder) > 2 for folder in folders)
    )
    assert code == 143, err
    assert err.splitlines() == [
        "fedss compare: finishing the rounds of the runs; SIGTERM or Ctrl-C now stops at once",
        f"fedss compare: stopped; go on with: fedss compare --resume {out}",
    ]
    for folder in folders:
        assert (folder / f"checkpoint-{rounds_in(folder):06}").is_dir()
        assert not (folder / "error.txt").exists()


def test_a_process_that_is_started_deaf_hears_nothing_and_its_parent_all_of_it():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with interrupts.deaf():
            code = "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []) >= {1, 2, 15})"
            child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
            signal.raise_signal(signal.SIGTERM)
            assert not heard
        assert heard == [signal.SIGTERM] and child.communicate()[0] == "True\n"
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.exhaustive
def test_a_terminal_that_is_closed_is_a_signal_and_words_that_nobody_reads(tmp_path):
    options = [*SMALL, "--rounds=100000", "--eval-every=100000", "--checkpoint-every=0"]
    command = [sys.executable, "-m", "fedss_kernels", "run", *options, f"--out={tmp_path}"]
    ours, theirs = os.openpty()
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        os.set_blocking(ours, False)

        def begun() -> bool:
            with contextlib.suppress(BlockingIOError):
                os.read(ours, 2**16)  # so that it does not wait for a reader
            return rounds_in(tmp_path) > 2 or process.poll() is not None

        try:
            wait_until(begun)
            os.close(ours)
            process.send_signal(signal.SIGHUP)
            assert process.wait(timeout=120) == 129
        finally:
            process.kill()  # else a failure would wait for the last round
    assert (tmp_path / f"checkpoint-{rounds_in(tmp_path):06}").is_dir()
