"""A comparison's folder is one process's while it is played, and nothing lies in it for that."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from fedss_kernels.federated import CheckpointError, Config, cli
from fedss_kernels.federated.comparisons import hold
from fedss_kernels.federated.comparisons.compare import COMPARISON_FILES
from fedss_kernels.federated.comparisons.hold import beginning, going_on
from fedss_kernels.federated.lock import InUse, Lock
from fedss_kernels.federated.plan import FILE, Plan

FIRST, SECOND = (Plan(Config(overwrite=True), ["fedss"], [seed]) for seed in (1, 2))


def begun(out: Path, plan: Plan = FIRST):
    return beginning(out, plan, COMPARISON_FILES)


def test_nobody_else_has_the_folder_while_it_is_used(tmp_path):
    out, words = tmp_path / "out", f"^another comparison is using {tmp_path / 'out'}$"
    (tmp_path / "out").mkdir()
    for use in (lambda: begun(out), lambda: begun(out), lambda: going_on(out, FIRST)):
        with use():
            (out / "table.csv").write_text("mine")
            for other in (begun(out, SECOND), going_on(out, FIRST)):
                with pytest.raises(InUse, match=words), other:
                    pass
            assert Plan.read(out).seeds == FIRST.seeds and (out / "table.csv").read_text() == "mine"
    with begun(out, SECOND):
        assert Plan.read(out).seeds == SECOND.seeds and os.listdir(out) == [FILE]


def test_it_is_free_after_whatever_ended_it(tmp_path):
    for use in (begun, lambda out: going_on(out, FIRST)):
        with pytest.raises(KeyboardInterrupt), use(tmp_path):
            raise KeyboardInterrupt
    with pytest.raises(CheckpointError, match="is another"), going_on(tmp_path, SECOND):
        pass
    with going_on(tmp_path, FIRST):
        pass
    with pytest.raises(CheckpointError, match="no comparison to go on with"), going_on(tmp_path / "a", FIRST):
        pass


def test_a_folder_in_which_nothing_could_begin_is_as_it_was(tmp_path, monkeypatch):
    """An empty comparison.json would be taken for another program's, and never be replaced."""

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hold, "replacing", full)
        with pytest.raises(OSError, match="No space"), begun(tmp_path):
            pass
        assert os.listdir(tmp_path) == []
    with begun(tmp_path):
        pass
    with monkeypatch.context() as patch:
        patch.setattr(hold, "replacing", full)
        with pytest.raises(OSError, match="No space"), begun(tmp_path, SECOND):
            pass
    assert Plan.read(tmp_path).seeds == FIRST.seeds


def test_of_two_that_begin_at_once_one_does(tmp_path, monkeypatch):
    """The other had found the folder empty."""
    check, once, others = hold.check_folder, [], []
    plain = Plan(Config(), ["fedss"], [0])

    def then_another(out, files, **options):
        check(out, files, **options)
        if not once:
            once.append(True)
            others.append(begun(out, FIRST))
            others[0].__enter__()

    monkeypatch.setattr(hold, "check_folder", then_another)
    with pytest.raises(InUse), begun(tmp_path, plain):
        pass
    others[0].__exit__(None, None, None)
    once.clear()
    other = tmp_path / "other"

    def then_another_that_ends(out, files, **options):
        check(out, files, **options)
        if not once:
            once.append(True)
            with begun(out, FIRST):
                pass

    monkeypatch.setattr(hold, "check_folder", then_another_that_ends)
    with pytest.raises(FileExistsError, match="is not empty"), begun(other, plain):
        pass
    assert Plan.read(other).seeds == FIRST.seeds


def test_where_there_are_no_locks_it_is_said_once_and_goes_on(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    words = f"{tmp_path} cannot be locked .*: nothing keeps another comparison out of it"
    for use in (lambda: begun(tmp_path, SECOND), lambda: going_on(tmp_path, SECOND)):
        with pytest.warns(UserWarning, match=words) as said, use():
            assert Plan.read(tmp_path).seeds == SECOND.seeds
        assert len(said) == 1


def test_who_waited_for_a_file_that_was_replaced_locks_the_new_one(tmp_path, monkeypatch):
    opened = []

    class Late(Lock):
        def __init__(self, path, who):
            super().__init__(path, who)
            opened.append(path)
            if len(opened) == 1:  # the one that was opened is no more the one of this name
                (tmp_path / "new").touch()
                os.replace(tmp_path / "new", path)

    with begun(tmp_path):
        pass
    monkeypatch.setattr(hold, "Lock", Late)
    (tmp_path / FILE).touch()
    lock = hold._locked(tmp_path / FILE)
    assert len(opened) == 2 and lock.is_on(tmp_path / FILE)
    lock.release()
    assert not lock.is_on(tmp_path / FILE)


@pytest.mark.exhaustive
def test_on_the_command_line_it_is_a_mistake_and_a_report_can_be_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FEDSS_CACHE", str(tmp_path / "cache"))
    out, small = tmp_path / "out", ["--glyph-classes=12", "--glyph-writers=4", "--cohort=2", "--rounds=1"]
    argv = ["compare", *small, "--embedding-dim=8", "--methods=pos_only", "--seeds=0", "--jobs=1"]
    assert cli.main([*argv, f"--out={out}"]) == 0
    plan, words = Plan.read(out), f"fedss compare: another comparison is using {out}\n"
    with going_on(out, plan):
        for command in ([*argv, f"--out={out}", "--overwrite"], ["compare", f"--resume={out}"]):
            capsys.readouterr()
            assert cli.main(command) == 2
            assert capsys.readouterr().err == words
        assert cli.main(["report", str(out)]) == 0
    assert cli.main(["compare", f"--resume={out}"]) == 0
