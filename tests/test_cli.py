"""The command line: what it generates, what it refuses in one line, and whole runs."""

import dataclasses
import errno
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from image_files import write_image
from rich.console import Console

from fedss_kernels import federated
from fedss_kernels.federated import Config, algorithms, cli
from fedss_kernels.federated.cli.options import GROUPS, flag
from fedss_kernels.federated.cli.output import show_tuned
from fedss_kernels.federated.comparisons.compare import Comparison
from fedss_kernels.federated.data import DATASETS
from fedss_kernels.federated.defaults import OWN, PRESETS
from fedss_kernels.federated.files.run_folder import faults, make_folder
from fedss_kernels.federated.fine_tuning import FineTuner
from fedss_kernels.federated.models import MODELS, build_model
from fedss_kernels.federated.plan import Plan, read_preset
from fedss_kernels.federated.reports import progress
from fedss_kernels.federated.reports.parts_in_words import cells as places
from fedss_kernels.federated.server.inspection import explained


def fails(capsys, *argv: str) -> str:
    """The one line on stderr of a mistake."""
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n") and err.count("\n") == 1
    return err.rstrip()


COMMANDS = (
    "run, compare, compositions, noise, confusion, personalise, probe, privacy, parameters, costs, invert, "
    "harden, report, flower, methods, bench, doctor"
)
METHODS = ", ".join(algorithms.METHODS)
FROM_OUTSIDE = " (--plugin FILE imports the file of a method of one's own, in Python register adds it)"
SMALL = ["--glyph-classes=12", "--glyph-writers=4", "--cohort=2", "--num-negatives=3", "--embedding-dim=8"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Glyphs are drawn once for all the tests here, and not where the user's are."""
    monkeypatch.setenv("FEDSS_CACHE", str(tmp_path_factory.getbasetemp() / "glyph-cache"))


@pytest.mark.parametrize(
    "argv, line",
    [
        (
            [],
            f"fedss: expected a command: {COMMANDS}; fedss --help explains them",
        ),
        (
            ["rum"],
            f"fedss: no such command 'rum' (did you mean run?): expected one of {COMMANDS}",
        ),
        (["run", "--roundz", "3"], "fedss run: no such option --roundz (did you mean --rounds?)"),
        (["run", "--roundz=3"], "fedss run: no such option --roundz (did you mean --rounds?)"),
        (["run", "--round", "3"], "fedss run: no such option --round (did you mean --rounds?)"),
        (["run", "fedss"], "fedss run: unexpected argument 'fedss'"),
        (
            ["run", "--lr", "1"],
            "fedss run: no such option --lr (did you mean --client-lr or --server-lr?)",
        ),
        (["run", "--hush"], "fedss run: no such option --hush"),
        (
            ["compare", "--model", "conv"],
            f"fedss compare: --model: expected one of {', '.join(MODELS)}, got 'conv' (did you mean conv4?)",
        ),
        (
            ["run", "--model", "conv4:depth=2"],
            "fedss run: --model: conv4: expected no settings, got 'depth=2'",
        ),
        (["run", "--rounds"], "fedss run: --rounds: expected one argument"),
        (["run", "--rounds", "ten"], "fedss run: --rounds: expected an integer of at least 1, got 'ten'"),
        (["run", "--rounds", "0"], "fedss run: --rounds: expected an integer of at least 1, got 0"),
        (
            ["run", "--num-negatives", "-1"],
            "fedss run: --num-negatives: expected an integer of at least 0, got -1",
        ),
        (
            ["run", "--server-momentum", "1.5"],
            "fedss run: --server-momentum: expected a finite number of at least 0 and less than 1, got 1.5",
        ),
        (
            ["run", "--data", "glyph"],
            f"fedss run: --data: expected one of {', '.join(DATASETS)}, got 'glyph' (did you mean glyphs?)",
        ),
        (
            ["run", "--method", "full"],
            f"fedss run: --method: expected one of {METHODS}, got 'full'{FROM_OUTSIDE}",
        ),
        (["run", "--data-dir", "/no/such"], "fedss run: --data-dir: no such folder: /no/such"),
        (
            ["run", "--data", "own"],
            "fedss run: --data: 'own' data is handed over in Python, as run(config, data=...)",
        ),
        (
            ["compare", "--model", "own"],
            "fedss compare: --model: 'own' model is handed over in Python, as run(config, model=...)",
        ),
        (
            ["run", "--threads", "99999999999"],
            "fedss run: --threads: expected an integer of at least 1 and less than 1025, got 99999999999",
        ),
        (
            ["run", "--config", "/no/c.json"],
            "fedss run: --config: cannot read /no/c.json: No such file or directory",
        ),
        (
            ["run", *SMALL[:2], "--cohort=9"],
            "fedss run: --cohort: expected at most 4, the clients there are, got 9",
        ),
        (
            ["compare", "--methods", "fedss,bar"],
            f"fedss compare: --methods: expected some of {METHODS}, got 'bar'{FROM_OUTSIDE}",
        ),
        (
            ["compare", "--methods=fedss,bar", "--rates=nan", "--rounds=0", "--counts=2,2"],
            f"fedss compare: --methods: expected some of {METHODS}, got 'bar'{FROM_OUTSIDE}; "
            "--rates: expected numbers greater than 0 with commas between, got 'nan'; "
            "--rounds: expected an integer of at least 1, got 0; "
            "--counts: expected at least one, each once, got 2, 2",
        ),
        (
            ["run", "--batch-size=1", "--method=simclr", "--class-store=store"],
            "fedss run: --class-store: expected none with simclr, without class rows, got store; "
            "--batch-size: expected at least 2 with simclr, as an image alone has no other to be told from, "
            "got 1",
        ),
        (
            ["run", "--method=mocosfl", "--half-checkpoint=half"],
            "fedss run: --half-checkpoint: expected --freeze-clients with it, as what clients' blocks resist "
            "is lost in training, got half",
        ),
        (
            ["run", *SMALL[:2], "--cohort=2", "--max-shift=28"],
            "fedss run: --max-shift: expected less than 28, the pixels on a side that the net sees, got 28",
        ),
        (
            ["compare", "--seeds", "0,-1"],
            "fedss compare: --seeds: expected integers of at least 0 with commas between, got '-1'",
        ),
        (
            ["run", "--resume", "runs/a", "--out", "runs/b"],
            "fedss run: --out: a run is resumed in its own folder, that of --resume",
        ),
        (
            ["compare", "--resume", "runs/a", "--rounds", "7"],
            "fedss compare: --rounds: a comparison is resumed with the options it began with",
        ),
        (["compare", "--jobs", "0"], "fedss compare: --jobs: expected an integer of at least 1, got '0'"),
        (
            ["compare", "--method", "fedss"],
            "fedss compare: no such option --method (did you mean --methods?)",
        ),
        (
            ["run", "--roundz=3", "--cohort", "two", "--hush", "1", "more", "--scale="],
            "fedss run: --cohort: expected an integer of at least 1, got 'two'; --scale: expected a finite "
            "number greater than 0, got ''; no such option --roundz (did you mean --rounds?); no such option "
            "--hush; unexpected argument 'more'",
        ),
        (
            ["compare", "--resume", "runs/a", "--rounds", "7", "--seeds=1"],
            "fedss compare: --rounds: a comparison is resumed with the options it began with; --seeds: a "
            "comparison is resumed with the options it began with",
        ),
        (
            ["run", "--method=fedss", "--spreadout-rows=3", "--head-epochs=2"],
            "fedss run: --spreadout-rows is for fedaws, not for fedss; --head-epochs is for fedrep, not for "
            "fedss",
        ),
    ],
)
def test_a_mistake_is_one_line(argv, line, capsys):
    assert fails(capsys, *argv) == line


def test_a_model_or_a_crop_that_does_not_fit_is_one_line(tmp_path, capsys):
    for i in range(20):
        write_image(tmp_path / f"data/class{i % 2}/{i}.png", i)
    options = ["--data=image_folder", f"--data-dir={tmp_path}/data", f"--cache-dir={tmp_path}/cache"]
    options += ["--image-size=32", "--num-clients=2", "--classes-per-client=2", "--cohort=2"]
    line = fails(capsys, "run", *options, "--crop-size=28", "--model=conv4")
    assert line.startswith("fedss run: --model: conv4 can't take images of 3x28x28")
    line = fails(capsys, "run", *options, "--crop-size=33", "--model=conv4_rgb")
    assert line == "fedss run: --crop-size: expected at most 32, the images' pixels, got 33"


def test_missing_data_are_one_line(tmp_path, capsys):
    assert fails(capsys, "run", "--data=omniglot", f"--data-dir={tmp_path}").startswith("fedss run: ")
    assert fails(capsys, "run", "--data=omniglot").startswith("fedss run: ")


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    for command in ("run", "compare"):
        line = fails(capsys, command, *SMALL, f"--out={tmp_path}/file/out")
        assert line.endswith("file/out cannot be written to: Not a directory")
    with pytest.raises(OSError, match="file cannot be written to: it is a file"):
        make_folder(tmp_path / "file")
    line = fails(capsys, "run", *SMALL, f"--out={'a' * 300}")
    assert line == f"fedss run: File name too long: {'a' * 300}"


def test_a_link_to_nothing_is_no_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(OSError, match="link cannot be written to: a link to what is not there"):
        make_folder(tmp_path / "link")


def test_an_option_is_spelled_as_it_is_typed(tmp_path, capsys):
    """Whoever finds what is wrong: not only what checks the options alone."""
    file, words = tmp_path / "file", "a file, not a folder"
    file.touch()
    options = [*SMALL, f"--out={tmp_path}/out"]
    line = fails(capsys, "run", *options, f"--class-store={file}")
    assert line == f"fedss run: --class-store: {file} is {words}"
    line = fails(capsys, "run", "--data=imagenet21k", f"--data-dir={tmp_path}", "--task=retrieval")
    assert line == "fedss run: --task: expected classification for imagenet21k, got 'retrieval'"
    folder = tmp_path / "data" / "client_lr"
    for i in range(20):
        write_image(folder / f"class{i % 2}/{i}.png", i)
    assert cli.main(["run", "--data=image_folder", f"--data-dir={folder}", f"--cache-dir={file}"]) == 2
    line = capsys.readouterr().err
    assert f"{file}: it is {words}; set --cache-dir, or FEDSS_CACHE, to a folder" in line
    (folder / "class0/0.png").unlink()
    (folder / "class0/0.png").symlink_to(tmp_path / "nothing")
    assert cli.main(["run", "--data=image_folder", f"--data-dir={folder}", f"--cache-dir={file}"]) == 2
    line = capsys.readouterr().err  # no option is a part of a path
    assert f"1 of 20 images are missing: {folder}/class0/0.png; get them" in line


def test_a_folder_in_use_is_one_line(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    for command in ("run", "compare"):
        line = fails(capsys, command, *SMALL, f"--out={tmp_path}")
        assert line.endswith(
            f"the folder {tmp_path} is not empty: choose another, or replace it with --overwrite"
        )


@pytest.mark.parametrize("command", ["run", "compare"])
def test_help_has_every_option_with_its_default(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    generated = {"run": (), "compare": ("method", "seed")}[command]
    for field in dataclasses.fields(Config):
        option = "--" + field.name.replace("_", "-")
        if field.name in generated:
            continue
        about = text.split(f" {option} ")[-1]
        assert field.metadata["help"].split()[0] in about, option
        default = about.split("(default: ")[1].split(")")[0]
        if field.name in PRESETS[OWN]:
            assert str(PRESETS["omniglot"][field.name]) in default, option
        elif field.default is None or isinstance(field.default, bool):
            assert default == {None: "none", False: "no", True: "yes"}[field.default], option
        else:
            assert default == str(field.default), option


def test_options_stand_in_groups_and_the_usage_is_short(capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: fedss run [OPTIONS]\n")
    for title, first in GROUPS.items():
        assert f"\n{title}:\n  {flag(first)} " in text


def test_methods_are_listed_with_their_papers_and_their_own_options(capsys):
    assert cli.main(["methods"]) == 0
    out = capsys.readouterr().out
    methods = algorithms.METHODS.values()
    for method in methods:
        assert f"{method.name} ({method.label}): {method.paper}\n" in out
        (of,) = (part for part in out.split("\n\n") if part.startswith(f"{method.name} ("))
        listed = re.findall(r"^    (--[a-z-]+): ", of, re.MULTILINE)
        assert sorted(listed) == sorted(map(flag, method.options)), method.name
        net, rows, moves = re.fullmatch(
            r".* net: (.*); class rows: (.*); what moves: (.*?)( of its own: .*)?", " ".join(of.split())
        ).groups()[:3]
        assert [net, rows, moves] == places(method)[1:]
    head_epochs = "--head-epochs: passes in which a client trains its class rows alone, before"
    assert head_epochs in out and all(len(line) <= 100 for line in out.splitlines() if line[:1] == " ")
    assert {option for method in methods for option in method.options} <= {
        field.name for field in dataclasses.fields(Config)
    }


def test_an_option_that_no_method_of_the_run_reads_is_refused(tmp_path, capsys):
    line = fails(capsys, "run", *SMALL, "--method=pos_only", "--num-negatives=3", f"--out={tmp_path / 'a'}")
    reading = algorithms.readers_in_words("num_negatives")
    assert reading.startswith("fedss, neg_only")
    assert line == f"fedss run: --num-negatives is for {reading}, not for pos_only"
    line = fails(capsys, "compare", *SMALL, "--methods=fedss,pos_only", "--spreadout-rows=3")
    assert line == "fedss compare: --spreadout-rows is for fedaws, not for fedss, pos_only"
    assert not (tmp_path / "a").exists()


ROUNDS, COHORT, CLASH = (
    "--rounds: expected an integer of at least 1, got 0",
    "--cohort: expected an integer of at least 1, got 'x'",
    "--min-clients: expected at most 2, the cohort, got 9",
)
CLASHING = ["--cohort=2", "--min-clients=9"]
UNREAD = f"--spreadout-rows is for {algorithms.readers_in_words('spreadout_rows')}, not for fedss"


@pytest.mark.parametrize(
    "argv, wrong",
    [
        (["run", "--rounds=0", *CLASHING], [ROUNDS, CLASH]),
        (["run", "--rounds=0", *CLASHING, "--spreadout-rows=3"], [ROUNDS, CLASH, UNREAD]),
        (["run", *CLASHING, "--spreadout-rows=3"], [CLASH, UNREAD]),
        (["run", "--min-clients=9", "--cohort=x"], [COHORT]),
        (["run", "--rond=3", *CLASHING], ["no such option --rond (did you mean --rounds?)", CLASH]),
        (["run", "--config={config}", *CLASHING, "--rounds=0"], [ROUNDS, CLASH]),
        (["compare", "--rounds=0", *CLASHING], [ROUNDS, CLASH]),
        (["compare", "--seeds=x", *CLASHING], ["--seeds: expected integers of .*, got 'x'", CLASH]),
        (["compare", "--preset=layerwise_omniglot", "--rounds=0", *CLASHING], [ROUNDS, CLASH]),
    ],
    ids=str,
)
def test_values_that_cannot_be_and_options_that_clash_are_told_together(argv, wrong, tmp_path, capsys):
    Config().save(tmp_path / "config.json")
    command, *options = (each.format(config=tmp_path / "config.json") for each in argv)
    line = fails(capsys, command, *options)
    exact = [re.escape(each) if "(" in each or ".*" not in each else each for each in wrong]
    assert re.fullmatch(f"fedss {command}: {'; '.join(exact)}", line), line


def test_options_of_other_data_than_the_runs_are_refused_together(tmp_path, capsys):
    Config().save(tmp_path / "config.json")
    line = fails(capsys, "noise", f"--run={tmp_path}", "--task=retrieval", "--data=sop")
    why = "the model of --run is measured as it was trained, on its own data"
    assert line == f"fedss noise: --data: {why}; --task: {why}"


def test_a_comparisons_help_says_how_a_rate_is_chosen(capsys):
    with pytest.raises(SystemExit):
        cli.main(["compare", "--help"])
    about = " ".join(capsys.readouterr().out.split()).split("--rates NUMBERS ")[1].split(" --jobs ")[0]
    for words in ("by what a run is judged by", "top-1", "MAP@10", "personalised", "who do not train then"):
        assert words in about, words


def test_the_overview_lists_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out and command.help in out for name, command in cli.COMMANDS.items())
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fedss-kernels ")


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "run", dataclasses.replace(cli.COMMANDS["run"], main=interrupted))
    assert cli.main(["run"]) == 130
    assert capsys.readouterr() == ("", "fedss run: stopped\n")


@pytest.mark.exhaustive
def test_ctrl_c_finishes_the_round_and_the_run_can_be_resumed(tmp_path, monkeypatch, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert cli.main(["run", *SMALL, "--rounds=4", f"--out={whole}"]) == 0
    real = cli.train.run

    def pressed_in_round_2(*arguments, on_round, **options):
        def press(metrics):
            on_round(metrics)
            if metrics.round == 2:
                signal.raise_signal(signal.SIGINT)

        return real(*arguments, on_round=press, **options)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(cli.train, "run", pressed_in_round_2)
        capsys.readouterr()
        assert cli.main(["run", *SMALL, "--rounds=4", f"--out={stopped}"]) == 130
    assert signal.getsignal(signal.SIGINT) == before
    assert capsys.readouterr().err.splitlines() == [
        "fedss run: finishing this round; Ctrl-C again stops at once",
        f"fedss run: stopped after round 2 of 4; go on with: fedss run --resume {stopped}",
    ]
    refused = fails(capsys, "run", "--resume", str(stopped), "--rounds=9", "--seed=9")
    assert refused.endswith("is of another configuration: --seed: 0 there, 9 here")
    assert cli.main(["run", "--resume", str(stopped)]) == 0
    assert "round 4/4" in capsys.readouterr().out and (stopped / "report.html").exists()
    a, b = (torch.load(folder / "model.pt", weights_only=True) for folder in (whole, stopped))
    assert torch.equal(a["weight"], b["weight"])
    finished = fails(capsys, "run", "--resume", str(stopped))
    assert finished == (
        f"fedss run: the run in {stopped} is finished: its 4 rounds are done; for more of them give a larger "
        f"number of rounds, for its report: fedss report {stopped}"
    )
    nothing = fails(capsys, "run", "--resume", str(tmp_path / "nothing"))
    assert nothing == f"fedss run: --resume: no run in {tmp_path / 'nothing'}"


def test_a_bug_is_not_called_a_mistake(monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr(cli.train, "run", broken)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["run", *SMALL, f"--out={tmp_path / 'run'}"])


@pytest.mark.parametrize(
    "missing, words",
    [
        (["matplotlib"], "matplotlib, which is not"),
        (["matplotlib", "rich"], "matplotlib and rich, which are not"),
    ],
)
@pytest.mark.parametrize("command, extra", [("run", "sim"), ("compare", "sim"), ("bench", "bench")])
def test_a_missing_extra_is_named(command, extra, missing, words, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in missing else found(name, *rest)
    )
    assert (
        fails(capsys, command)
        == f'fedss {command} needs {words} installed: pip install "fedss-kernels[{extra}]"'
    )


@pytest.mark.exhaustive
def test_the_command_line_starts_without_the_extras():
    """As python -m, in a process where nothing of the extra can be imported."""
    code = (
        "import runpy, sys\n"
        "for name in ('matplotlib', 'rich', 'tyro', 'safetensors', 'PIL'):\n"
        "    sys.modules[name] = None\n"
        "sys.argv = ['fedss', 'run', '--rounds', '1']\n"
        "runpy.run_module('fedss_kernels', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fedss run needs matplotlib, rich and safetensors, which are not")


def test_a_whole_run_and_another_from_its_config(tmp_path, capsys):
    first, second = tmp_path / "a", tmp_path / "b"
    assert cli.main(["run", *SMALL, "--rounds=2", "--seed=3", f"--out={first}"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "round 2/2, loss " in out and str(first / "report.html") in out
    assert len((first / "metrics.csv").read_text().splitlines()) == 1 + 2
    config = json.loads((first / "config.json").read_text())
    assert (config["data"], config["seed"], config["num_negatives"]) == ("glyphs", 3, 3)
    assert (first / "report.html").stat().st_size > 0

    assert cli.main(["run", f"--config={first / 'config.json'}", f"--out={second}"]) == 0

    def without_seconds(folder):
        return [line.rsplit(",", 1)[0] for line in (folder / "metrics.csv").read_text().splitlines()]

    assert without_seconds(first) == without_seconds(second)
    assert json.loads((second / "config.json").read_text()) == config | {"out": str(second)}


def test_a_whole_comparison(tmp_path, capsys):
    out = tmp_path / "c"
    small = [option for option in SMALL if option != "--num-negatives=3"]  # which pos_only does not read
    argv = ["compare", "--methods=pos_only", "--seeds=1", "--jobs=1", "--rounds=1", *small, f"--out={out}"]
    assert cli.main(argv) == 0
    text, err = capsys.readouterr()
    assert err == "" and "PosOnly" in text and str(out / "report.html") in text
    assert (out / "table.md").is_file() and (out / "pos_only-seed1" / "model.pt").is_file()


@pytest.mark.exhaustive
def test_an_encoding_without_the_tables_letters_loses_letters_and_no_results(tmp_path):
    command = [sys.executable, "-m", "fedss_kernels", "compare", *SMALL, "--rounds=1", "--methods=fedss"]
    command += ["--poison-rate=0.3"]  # nor is there a line for each answer that is left out
    result = subprocess.run(
        [*command, "--seeds=0,1", "--jobs=1", f"--out={tmp_path}/out"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (result.returncode, result.stderr) == (0, b"") and b" ? " in result.stdout


def test_what_is_given_wins_over_a_presets_own_and_that_over_a_methods_defaults(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "fedss_kernels.federated.comparisons.compare.compare",
        lambda plan, out, **options: seen.append(plan) or Comparison([], [], [], out),
    )
    own = {"fl_moco": {"rounds": 7, "batch_size": 5}, "faster": {"method": "fl_moco", "client_lr": 0.4}}
    preset = {"methods": ["pos_only", "fl_moco", "faster"], "seeds": [0], "own": own}
    (tmp_path / "own.json").write_text(json.dumps(preset | {"config": {"rounds": 3}}))
    small = [option for option in SMALL if "negatives" not in option]
    command = ["compare", *small, f"--preset={tmp_path / 'own.json'}", f"--out={tmp_path / 'out'}"]
    usual = Config().temperature
    for more, rounds, temperatures in (
        ([], [3, 7, 3], [usual, 0.1, 0.1]),
        (["--rounds=2", "--temperature=0.5"], [2, 2, 2], [0.5, 0.5, 0.5]),
    ):
        assert cli.main([*command, *more]) == 0
        runs = seen[-1].runs(tmp_path, {})
        assert [run.rounds for run in runs] == rounds
        assert [run.temperature for run in runs] == temperatures
        assert [run.batch_size for run in runs] == [10, 5, 10]
        assert [run.client_lr for run in runs] == [0.05, 0.05, 0.4]


PRIVATE = ["--noise-multiplier=1", "--clip-norm=1"]


@pytest.mark.parametrize(
    "argv",
    [
        ["--methods=fedbabu,full_softmax", *PRIVATE],
        ["--methods=fedbabu,full_softmax", "--config={file}"],
        ["--preset={preset}"],
        ["--preset={preset}", "--methods=fedbabu,private", *PRIVATE],
        ["--methods=layerwise", "--max-shift=500"],  # whose views are cut anew, where others shift an image
    ],
    ids=str,
)
def test_what_clashes_with_a_method_that_is_not_compared_is_no_mistake(argv, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "fedss_kernels.federated.comparisons.compare.compare",
        lambda plan, out, **options: seen.append(plan) or Comparison([], [], [], out),
    )
    noise = {"noise_multiplier": 1.0}
    (tmp_path / "config.json").write_text(json.dumps(noise | {"clip_norm": 1.0}))
    preset = {"methods": ["private"], "own": {"private": {"method": "fedbabu", "clip_norm": 1}}}
    (tmp_path / "preset.json").write_text(json.dumps(preset | {"config": noise}))
    files = {"file": tmp_path / "config.json", "preset": tmp_path / "preset.json"}
    small = [option for option in SMALL if "negatives" not in option]
    net = ["--model=isotropic:depth=2", "--embedding-dim=32"]
    argv = [each.format(**files) for each in argv]
    assert cli.main(["compare", *small, *net, *argv, f"--out={tmp_path / 'out'}"]) == 0
    assert len(seen) == 1


def test_what_clashes_names_the_methods_that_are_compared_beside_other_mistakes(tmp_path, capsys):
    argv = ["compare", "--methods=fedbabu,pos_only,local_only", *PRIVATE]
    wrong = "--noise-multiplier: expected 0 with pos_only, whose .*; "
    wrong += "--noise-multiplier: expected 0 with local_only, whose .*, got 1"
    assert re.fullmatch(f"fedss compare: {wrong}", fails(capsys, *argv))
    rounds = "--rounds: expected an integer of at least 1, got 0"
    line = fails(capsys, *argv, "--rounds=0")
    assert re.fullmatch(f"fedss compare: {rounds}; {wrong}", line)
    seeds = "--seeds: expected integers of at least 0 with commas between, got 'x'"
    assert re.fullmatch(f"fedss compare: {seeds}; {wrong}", fails(capsys, *argv, "--seeds=x"))
    line = fails(capsys, "compositions", "--noise-multiplier=1", "--seeds=x")
    assert re.fullmatch(f"fedss compositions: {seeds}; .* with fedss, .* with neg_only, .*, got 1", line)
    line = fails(capsys, "compare", "--methods=nobody", *PRIVATE)
    assert "--noise-multiplier" not in line and "--methods: expected some of" in line
    line = fails(capsys, "compare", "--methods=fedbabu", "--class-store=a", "--rounds=0")
    assert line == f"fedss compare: {rounds}"


@pytest.mark.parametrize(
    "typed", ["simclr,layer-wise, budget 6", "simclr, layer-wise-budget-6", "simclr,layer-wise budget 6"]
)
@pytest.mark.parametrize("preset", ["layerwise_omniglot", "{file}"])
def test_a_presets_own_methods_are_chosen_by_name_or_as_their_folders_are_called(
    typed, preset, tmp_path, monkeypatch
):
    seen = []
    monkeypatch.setattr(
        "fedss_kernels.federated.comparisons.compare.compare",
        lambda plan, out, **options: seen.append(plan) or Comparison([], [], [], out),
    )
    monkeypatch.setattr("fedss_kernels.federated.cli.train.read_data", lambda *arguments: None)
    (tmp_path / "own.json").write_text(json.dumps(read_preset("layerwise_omniglot")))
    preset = preset.format(file=tmp_path / "own.json")
    assert cli.main(["compare", "--methods", typed, "--preset", preset, f"--out={tmp_path / 'out'}"]) == 0
    (plan,) = seen
    assert plan.methods == ["simclr", "layer-wise, budget 6"]
    assert [config.depth_budget for config in plan.runs(tmp_path, {})[:2]][1] == 6


def test_names_that_a_preset_does_not_have_are_told_with_those_that_it_has(capsys):
    line = fails(
        capsys, "compare", "--methods=simclr,layer-wise", "--preset=layerwise_omniglot", "--rounds=0"
    )
    assert re.fullmatch(
        "fedss compare: --methods: expected some of fedss, .*, layer-wise, budget 6, .*, got "
        "'layer-wise' .*; "
        "--rounds: .*",
        line,
    )


def test_compositions_can_be_resumed(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        "fedss_kernels.federated.comparisons.compare.compare",
        lambda plan, out, **options: seen.append((plan, options["resume"])) or Comparison([], [], [], out),
    )
    out = tmp_path / "out"
    assert cli.main(["compositions", *SMALL, f"--out={out}"]) == 0
    (plan, _), *_ = seen
    assert list(plan.methods) == ["fedss", "neg_only"] and plan.config.equal_pushes
    out.mkdir(exist_ok=True)
    plan.save(out)
    assert cli.main(["compositions", f"--resume={out}"]) == 0
    assert seen[1][1] and list(seen[1][0].methods) == ["fedss", "neg_only"]
    assert cli.main(["compositions", f"--resume={out}", f"--cache-dir={tmp_path}"]) == 0
    assert seen[2][0].config.cache_dir == tmp_path
    capsys.readouterr()
    error = fails(capsys, "compositions", f"--resume={out}", "--rounds=3")
    assert error.endswith("--rounds: a comparison is resumed with the options it began with")
    assert "--seeds" not in fails(capsys, "compare", *SMALL, "--rates=inf", f"--out={tmp_path / 'other'}")
    error = fails(capsys, "noise", "--run=nowhere", "--glyph-classes=3")
    assert error.endswith(
        "--glyph-classes: the model of --run is measured as it was trained, on its own data"
    )


def test_a_run_that_is_ruined_says_when_and_has_no_result(tmp_path, capsys):
    """Rubbish that is trusted: a line in the round where it happens, one at the end, exit code 1."""
    rubbish = ["--trust-updates", "--poison-rate=0.9", "--rounds=4", "--eval-every=1", "--cohort=4"]
    assert cli.main(["run", *SMALL[:2], "--embedding-dim=8", *rubbish, f"--out={tmp_path / 'run'}"]) == 1
    out, err = capsys.readouterr()
    there, last = err.splitlines()
    assert re.fullmatch("fedss: after round [1-4] the model has numbers that are not finite, .*", there)
    assert last == there.replace("fedss:", "fedss run:")
    assert "top-1 –, MAP@10 –, recall@1 –, " in out and "round 4/4, loss nan, –, " in out


@pytest.mark.parametrize("large", ["--client-lr=1e6", "--scale=1e6"])
def test_a_run_that_does_not_train_says_why_in_one_line(large, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["run", *SMALL, large, "--warmup-rounds=0", f"--out={out}"]) == 1
    printed, err = capsys.readouterr()
    assert printed.startswith("glyphs: 12 classes, ") and printed.count("\n") == 1  # what the data are
    assert err == (
        "fedss run: round 1: of 24 cohorts of 2 none had 1 answer that counted: 48 left out: norm over "
        f"--max-norm: is --client-lr or --scale too high?; what was done is in {out}\n"
    )
    assert len((out / "ledger.csv").read_text().splitlines()) == 1 + 48


def test_what_is_left_out_is_said_with_the_reasons(tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["run", *SMALL, "--rounds=6", "--cohort=4", "--poison-rate=0.4", f"--out={out}"]) == 0
    assert f"rejected ({explained(faults(out))})" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["confusion"], ["noise", "--run"]])
def test_a_folder_without_a_run_is_named_as_that(argv, tmp_path, capsys):
    line = fails(capsys, *argv, str(tmp_path))
    assert line == f"fedss {argv[0]}: no run in {tmp_path}: no config.json, no checkpoint"


def test_a_comparison_of_which_a_run_failed_on_a_full_disk_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    lost = Comparison(
        [], [], ["FedSS, seed 0 failed: OSError: No space left on device"], tmp_path, go_on=True
    )
    monkeypatch.setattr("fedss_kernels.federated.comparisons.compare.compare", lambda *a, **options: lost)
    out = tmp_path / "out"
    assert cli.main(["compare", *SMALL, f"--out={out}"]) == 1
    err = capsys.readouterr().err
    way = f"fedss compare: once the reason is gone go on with: fedss compare --resume {out}"
    assert err.splitlines()[-1] == way

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(out / "comparison.json"))

    monkeypatch.setattr("fedss_kernels.federated.comparisons.compare.compare", full)
    assert cli.main(["compare", *SMALL, f"--out={out}"]) == 1
    words = f"No space left on device: {out / 'comparison.json'}; no run has begun: start again"
    assert capsys.readouterr().err == f"fedss compare: {words}\n"


def broken_plots(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("fedss_kernels.federated.reports.plots._png", broken)


def test_a_run_outlives_its_report(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        broken_plots(patch)
        assert cli.main(["run", *SMALL, "--rounds=2", f"--out={out}"]) == 1
    said, err = capsys.readouterr()
    assert said.splitlines()[-1].endswith(f"MB moved: {out}") and err == (
        f"fedss run: the results are in {out}, but their report could not be made (RuntimeError: no fonts); "
        f"to try again: fedss report {out}\n"
    )
    assert (out / "summary.json").exists() and (out / "model.pt").exists()
    assert cli.main(["report", str(out)]) == 0 and (out / "report.html").stat().st_size > 0


@pytest.mark.exhaustive
def test_so_does_a_comparison_and_its_report_is_made_again(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def in_this_process(configs, jobs, on_round, resume, stop):
        for config in configs:
            federated.run(config)
        return {}

    monkeypatch.setattr("fedss_kernels.federated.comparisons.jobs.run_all", in_this_process)
    with monkeypatch.context() as patch:
        broken_plots(patch)
        argv = [*SMALL, "--methods=pos_only,fedss", "--seeds=1", "--rounds=1", f"--out={out}"]
        assert cli.main(["compare", *argv, "--lr-decay=constant"]) == 1
    said, err = capsys.readouterr()
    assert "PosOnly" in said and err.startswith(f"fedss compare: the results are in {out}, but their report")
    assert said.splitlines()[-1] == f"the table: {out / 'table.md'}" and (out / "table.md").exists()
    assert cli.main(["report", str(out)]) == 0
    assert capsys.readouterr() == (f"the report: {out / 'report.html'}\n", "")
    assert (out / "accuracy_by_round.png").exists() and (out / "report.html").exists()

    shutil.rmtree(out / "fedss-seed1" / "record")
    (out / "fedss-seed1" / "metrics.csv").unlink()
    assert cli.main(["report", str(out)]) == 0
    words = (
        f"FedSS, seed 1 is left out: no run in {out / 'fedss-seed1'}: metrics.csv: No such file or directory"
    )
    assert capsys.readouterr().err == f"fedss report: {words}\n"
    assert words in (out / "report.html").read_text(encoding="utf-8")
    assert cli.main(["run", f"--resume={out / 'pos_only-seed1'}", "--rounds=2"]) == 0
    capsys.readouterr()
    line = fails(capsys, "report", str(out))
    assert line.startswith(
        f"fedss report: no run of the comparison in {out} is done: PosOnly, seed 1 is left out: 2 rounds are "
        "done, of a comparison of 1; FedSS"
    )


@pytest.mark.exhaustive
def test_a_comparison_stopped_at_its_beginning_says_of_each_run_how_far_it_came(tmp_path, capsys):
    out = tmp_path / "out"
    config = Config(glyph_classes=12, glyph_writers=4, cohort=2, num_negatives=3, embedding_dim=8, rounds=2)
    out.mkdir()
    Plan(config, ["fedss", "pos_only"], [0]).save(out)
    short = [*SMALL, "--rounds=1", f"--out={out / 'fedss-seed0'}"]
    assert cli.main(["run", *short]) == 0
    capsys.readouterr()
    assert fails(capsys, "report", str(out)) == (
        f"fedss report: no run of the comparison in {out} is done: FedSS, seed 0 is left out: 1 round is "
        "done, of a comparison of 2; PosOnly, seed 0 is left out: not begun: "
        f"there is no {out / 'pos_only-seed0'}"
    )
    assert "is finished: its 1 round is done;" in fails(capsys, "run", f"--resume={out / 'fedss-seed0'}")


@pytest.mark.parametrize("command", ["noise", "parameters"])
def test_figures_outlive_their_plot(command, tmp_path, monkeypatch, capsys):
    def broken(*arguments):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(f"fedss_kernels.federated.figures.{command}._plot", broken)
    options = {"noise": [*SMALL, "--batches=1", "--draws=1", "--counts=2"], "parameters": ["--model=conv4"]}
    assert cli.main([command, *options[command], f"--out={tmp_path}"]) == 1
    there = f"{command}.csv, {command}.md, report.html"
    said, table = capsys.readouterr(), (tmp_path / f"{command}.md").read_text()
    line = f"fedss {command}: written to {tmp_path}: {there}; not {command}.png: RuntimeError: no fonts"
    assert said.err.splitlines()[-1] == line and said.out.endswith(table)
    assert len((tmp_path / f"{command}.csv").read_text().splitlines()) > 1
    assert "<table" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("room, there", [(100, []), (2000, ["parameters.csv", "parameters.md"])])
def test_the_table_is_told_whatever_can_be_written(room, there, tmp_path, capsys, room_for_files_of):
    argv = ["parameters", "--model=conv4", "--dims=64", f"--out={tmp_path}"]
    assert cli.main(argv) == 0
    table = (tmp_path / "parameters.md").read_text()
    for path in tmp_path.iterdir():
        path.unlink()
    capsys.readouterr()
    with room_for_files_of(room):
        assert cli.main(argv) == 1
    files = ["parameters.csv", "parameters.md", "parameters.png", "report.html"]
    lost = [file for file in files if file not in there]
    said = capsys.readouterr()
    assert said.out == table and said.err == (
        f"fedss parameters: written to {tmp_path}: {', '.join(there) or 'nothing'}; not {', '.join(lost)}: "
        f"File too large: {tmp_path / lost[0]}-unfinished\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == there


@pytest.mark.exhaustive
def test_more_rounds_of_a_finished_run_whose_table_was_edited(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["run", *SMALL, "--lr-decay=constant", "--rounds=2", f"--out={out}"]) == 0
    capsys.readouterr()
    fewer = fails(capsys, "run", f"--resume={out}", "--rounds=1")
    assert fewer == "fedss run: --rounds: 2 are done, expected at least 3, got 1"
    table = out / "metrics.csv"
    table.write_text(table.read_text().replace(",", ";"))
    assert cli.main(["run", f"--resume={out}", "--rounds=3"]) == 0
    said, err = capsys.readouterr()
    assert "round 3/3" in said and err.splitlines() == [
        f"fedss run: {table} was changed by another program: that is now metrics-changed.csv, and the table "
        "is as the run wrote it"
    ]
    assert json.loads((out / "config.json").read_text())["rounds"] == 3


def test_none_is_a_value_of_options_that_may_have_none(tmp_path, monkeypatch):
    """As their help says: it takes back what a file gives, and is no folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSS_CACHE", str(tmp_path / "cache"))
    given = {"method": "fedaws", "deadline": 2.0, "class_store": "store", "rounds": 1}
    (tmp_path / "given.json").write_text(json.dumps(given))
    small = ["--glyph-classes=12", "--glyph-writers=4", "--cohort=2", "--embedding-dim=8"]
    none = ["--spreadout-rows=none", "--spreadout-neighbours=none", "--deadline=none", "--class-store=none"]
    assert cli.main(["run", "--config=given.json", *small, *none, "--out=out"]) == 0
    config = Config.load(tmp_path / "out" / "config.json")
    assert (
        config.spreadout_rows is config.spreadout_neighbours is config.deadline is config.class_store is None
    )
    assert not (tmp_path / "none").exists() and not (tmp_path / "store").exists()


def test_what_is_wrong_with_a_config_file_is_said_of_the_file(tmp_path, capsys):
    file, later = tmp_path / "config.json", ", in this version: did a later one write the file?"
    for text, words in {
        '{"zip_code": 3}': f"in {file}: zip_code: no such option{later}",
        '{"roundz": 3}': f"in {file}: roundz: no such option (did you mean rounds?){later}",
        '{"rounds": "3"}': f"in {file}: rounds: expected an integer of at least 1, got '3' of type str",
        '{"rounds": null, "seed": null}': f"in {file}: seed: expected an integer of at least 0 and less than "
        "9223372036854775808, got None",
        "": f"{file} is not JSON: Expecting value: line 1 column 1 (char 0)",
    }.items():
        file.write_text(text)
        assert fails(capsys, "run", f"--config={file}") == f"fedss run: --config: {words}"
    file.write_text('{"rounds": "3"}')
    given = fails(capsys, "run", f"--config={file}", "--rounds=0")
    assert given == "fedss run: --rounds: expected an integer of at least 1, got 0"
    file.write_text('{"config": {"zip_code": 3}}')
    line = fails(capsys, "compare", f"--preset={file}")
    assert line == f"fedss compare: --config: in {file}: zip_code: no such option{later}"
    file.write_text('{"rounds": 3, "zip_code": 1}')
    line = fails(capsys, "run", *SMALL, f"--out={tmp_path}", "--overwrite")
    assert (
        f"holds no earlier results (in {file}: zip_code: no such option{later}): it is not overwritten"
        in line
    )


# ---- while data are read


@pytest.mark.exhaustive
def test_what_goes_on_elsewhere_asks_for_the_data_again(tmp_path, capsys, monkeypatch):
    """A run that began with a relative --data-dir, then whatever reads its config.json in another folder."""
    for i in range(12):
        write_image(tmp_path / "photos" / f"class{i % 3}" / f"{i}.png", i)
    monkeypatch.chdir(tmp_path)
    argv = [
        "--data=image_folder",
        "--data-dir=photos",
        f"--cache-dir={tmp_path / 'cache'}",
        "--image-size=32",
    ]
    argv += ["--crop-size=0", "--model=conv4_rgb", "--num-clients=2", "--cohort=2", "--classes-per-client=2"]
    argv += ["--num-negatives=1", "--lr-decay=constant"]
    assert cli.main(["run", *argv, "--rounds=1", f"--out={tmp_path / 'out'}"]) == 0
    (tmp_path / "compared").mkdir()
    Plan(Config.load(tmp_path / "out" / "config.json"), ["fedss"], [0]).save(tmp_path / "compared")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    lost = "--data-dir: no such folder: photos, relative to where the run began; "
    for command in ("run --resume ../out --rounds 2", "compare --resume ../compared", "noise --run ../out"):
        line = fails(capsys, *command.split())
        assert line == f"fedss {command.split()[0]}: {lost}give --data-dir again"
    moved = "if the folder was moved, put a link to it in its place"
    for command in ("confusion", "probe", "personalise"):
        line = fails(capsys, command, "../out")
        assert line == f"fedss {command}: {lost}start this there, or, {moved}"
    assert cli.main(["run", "--resume=../out", "--rounds=2", "--data-dir=../photos"]) == 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("absolute", [False, True])
def test_a_link_in_the_place_of_data_that_were_moved_will_do(absolute, tmp_path, capsys, monkeypatch):
    """For what has no --data-dir; what has one takes it, or the link."""
    for i in range(12):
        write_image(tmp_path / "photos" / f"class{i % 3}" / f"{i}.png", i)
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "photos" if absolute else "photos"
    argv = ["--data=image_folder", f"--data-dir={place}", "--cache-dir=cache", "--image-size=32"]
    argv += ["--crop-size=0", "--model=conv4_rgb", "--num-clients=2", "--cohort=2", "--classes-per-client=3"]
    argv += ["--num-negatives=1", "--lr-decay=constant", "--rounds=1"]
    assert cli.main(["run", *argv, "--out=out"]) == 0
    (tmp_path / "photos").rename(tmp_path / "moved")
    capsys.readouterr()
    lost = f"--data-dir: no such folder: {place}" + ", relative to where the run began" * (not absolute)
    link = (
        "start this there, or, " * (not absolute) + "if the folder was moved, put a link to it in its place"
    )
    measured = ("confusion", "probe", "personalise")
    for command in measured:
        assert fails(capsys, command, "out") == f"fedss {command}: {lost}; {link}"
    for command in ("run --resume out --rounds 2", "noise --run out"):
        assert fails(capsys, *command.split()) == f"fedss {command.split()[0]}: {lost}; give --data-dir again"
    (tmp_path / "photos").symlink_to("moved")
    for command in measured:
        assert cli.main([command, "out", f"--out={command}"]) == 0
    (tmp_path / "photos").unlink()
    assert cli.main(["noise", "--run=out", "--data-dir=moved", "--batches=1", "--out=noise"]) == 0
    assert cli.main(["run", "--resume=out", "--rounds=2", "--data-dir=moved"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for command in measured:
        assert cli.main([command, "../out", f"--out={command}"]) == 0


@pytest.mark.exhaustive
def test_what_measures_a_finished_run_does_without_the_net_that_it_began_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(build_model("conv4", 8, seed=5).state_dict(), "net.pt")
    options = ["--init-checkpoint=net.pt", "--holdout=0.5", "--rounds=1"]
    assert cli.main(["run", *SMALL, *options, "--out=out"]) == 0
    (tmp_path / "net.pt").unlink()
    for command in ("confusion", "probe", "personalise"):
        assert cli.main([command, "out", f"--out={command}"]) == 0
    assert cli.main(["noise", "--run=out", "--batches=1", "--out=noise"]) == 0


@pytest.mark.exhaustive
def test_so_it_does_for_a_net_and_a_class_store(tmp_path, capsys, monkeypatch):
    """Which were given relative to another folder; then it goes on from them as if there were no move."""
    torch.save(build_model("conv4", 8, seed=5).state_dict(), tmp_path / "net.pt")
    monkeypatch.chdir(tmp_path)
    argv = [*SMALL, "--init-checkpoint=net.pt", "--class-store=store", "--lr-decay=constant", "--rounds=1"]
    assert cli.main(["run", *argv, "--out=out"]) == 0
    (tmp_path / "compared" / "fedss-seed0" / "checkpoint-000001").mkdir(parents=True)
    Plan(Config.load(tmp_path / "out" / "config.json"), ["fedss"], [0]).save(tmp_path / "compared")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    again = "relative to where the run began; give {} again"
    no_net = f"--init-checkpoint: no such file: net.pt, {again.format('--init-checkpoint')}"
    no_store = f"--class-store: no such folder: store, {again.format('--class-store')}"
    places = ["--resume=../out", "--rounds=2", "--init-checkpoint=../net.pt", "--class-store=../store"]
    for command in (["run", "--resume=../out", "--rounds=2"], ["compare", "--resume=../compared"]):
        line = fails(capsys, *command)
        assert line == f"fedss {command[0]}: {no_net}; {no_store}"
        command.append("--init-checkpoint=../net.pt")
        assert fails(capsys, *command) == f"fedss {command[0]}: {no_store}"
    assert cli.main(["run", *places]) == 0
    capsys.readouterr()
    torch.save(build_model("conv4", 8, seed=6).state_dict(), tmp_path / "net.pt")
    line = fails(capsys, "run", *places, "--rounds=3")
    assert "the net" in line, line


@pytest.mark.parametrize("terminal", [False, True])
def test_how_far_the_reading_is(terminal, monkeypatch):
    """A bar, or plain lines: none where it is quick, then one every 20 seconds."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with progress.ReadingProgress(Console(file=out, force_terminal=terminal, width=100)) as reading:
        for seconds, done in ((0, 0), (0.4, 100), (0.6, 1200), (20.5, 2000), (20.7, 2500)):
            now[0] = 100.0 + seconds
            reading("sop: decoding images", done, 120_053)
        reading.bars.refresh()
        if terminal:
            assert "sop: decoding images" in out.getvalue() and "2500/120053" in out.getvalue()
        else:
            lines = [f"sop: decoding images: {done} of 120,053\n" for done in ("1,200", "2,500")]
            assert out.getvalue() == "".join(lines)


@pytest.mark.exhaustive
def test_a_run_on_image_files_some_damaged(tmp_path, capsys, monkeypatch):
    """One line that says how to go on; then progress, and what was left out."""
    monkeypatch.setattr(progress, "QUICK_SECONDS", 0)
    for i in range(12):
        write_image(tmp_path / "data" / f"class{i % 3}" / f"{i}.png", i)
    (tmp_path / "data" / "class1" / "4.png").write_bytes(b"")
    argv = [
        "run",
        "--data=image_folder",
        f"--data-dir={tmp_path / 'data'}",
        f"--cache-dir={tmp_path / 'cache'}",
    ]
    argv += ["--image-size=32", "--crop-size=0", "--model=conv4_rgb", "--num-clients=2", "--cohort=2"]
    argv += ["--classes-per-client=2", "--num-negatives=1", "--rounds=1", f"--out={tmp_path / 'out'}"]
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert (
        err.count("\n") == 1
        and "1 of 12 images are damaged: " in err
        and "without them: --skip-damaged" in err
    )
    assert cli.main([*argv, "--skip-damaged"]) == 0
    said, err = capsys.readouterr()
    assert "image_folder: decoding images: 0 of 11\n" not in said, "they are kept"
    (listing,) = (tmp_path / "cache").glob("*-damaged.txt")
    left_out = f"left out 1 image that could not be read: class1 1, listed in {listing}"
    assert err == f"fedss run: image_folder: {left_out}\n"
    without = "image_folder: without what cannot be read: 3 classes, "
    (line,) = [line for line in said.splitlines() if line.startswith(without)]
    assert "8 training and 3 test images" in line and "left out" not in said, "it is said on stderr"
    assert left_out in json.loads((tmp_path / "out" / "summary.json").read_text())["notes"]
    assert f"Of the data: {left_out}" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["skip_damaged"] is True


def test_a_comparison_says_which_of_its_methods_have_no_class_store(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "fedss_kernels.federated.comparisons.compare.compare",
        lambda plan, out, **options: Comparison([], [], [], out),
    )
    argv = ["compare", *SMALL, f"--class-store={tmp_path / 'rows'}", f"--out={tmp_path / 'out'}"]
    assert cli.main([*argv, "--methods=fedss,fedbabu"]) == 0
    line = "class_store is not for fedbabu, whose class rows are drawn where they are needed"
    assert line in capsys.readouterr().out.splitlines()
    assert cli.main([*argv, "--methods=fedss"]) == 0
    assert "class_store" not in capsys.readouterr().out


# ---- while clients fine-tune


TUNED = [*SMALL, "--partition=classes", "--num-clients=3", "--classes-per-client=4", "--rounds=2"]


@pytest.fixture
def slow_tuning(monkeypatch):
    """Every client takes 15 seconds, by the clock that lines are said by."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    measure = FineTuner.measure

    def slowly(tuner, client):
        now[0] += 15.0
        return measure(tuner, client)

    monkeypatch.setattr(FineTuner, "measure", slowly)


def test_how_many_clients_have_fine_tuned_after_the_last_round(tmp_path, capsys, slow_tuning):
    assert cli.main(["run", *TUNED, "--personalise-epochs=1", f"--out={tmp_path / 'out'}"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fedss:")]
    assert lines[0] == "fedss: fine-tuning clients: 2 of 3"
    assert lines[1].startswith("fedss: round 2/2, loss ") and len(lines) == 2


def test_a_quick_fine_tuning_has_no_line_of_its_own(tmp_path, capsys):
    assert cli.main(["run", *TUNED, "--personalise-epochs=1", f"--out={tmp_path / 'out'}"]) == 0
    assert "fine-tuning clients" not in capsys.readouterr().out
    assert cli.main(["personalise", str(tmp_path / "out"), f"--out={tmp_path / 'more'}"]) == 0
    assert capsys.readouterr().err.count("\n") == 1


def test_the_bar_of_a_run_says_how_many_clients_have_fine_tuned():
    out = io.StringIO()
    with progress.RunProgress(["fedss"], 4, Console(file=out, force_terminal=True, width=120)) as bars:
        show_tuned(bars, 0, 2, 3)
        bars.bars.refresh()
    assert "fine-tuning clients: 2 of 3" in out.getvalue()


def test_how_many_clients_have_fine_tuned_each_run_of_personalise(tmp_path, capsys, slow_tuning):
    trained = tmp_path / "out"
    assert cli.main(["run", *TUNED, f"--out={trained}"]) == 0
    capsys.readouterr()
    assert cli.main(["personalise", str(trained), "--rate=0.1,0.2", f"--out={tmp_path / 'more'}"]) == 0
    lines = capsys.readouterr().err.splitlines()
    of = [f"{trained}, rate {rate}" for rate in (0.1, 0.2)]
    assert [line for line in lines if "fine-tun" in line] == [
        f"fedss personalise: {run}: fine-tuning clients: 2 of 3" for run in of
    ]


@pytest.mark.exhaustive
def test_how_many_clients_have_fine_tuned_in_a_comparison(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0)
    argv = ["compare", *TUNED, "--personalise-epochs=1", "--methods=fedss,fedper", "--seeds=0", "--jobs=1"]
    assert cli.main([*argv, f"--out={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr().out
    for method in ("FedSS", "FedPer"):
        assert f"{method}, seed 0: fine-tuning clients: 2 of 3" in said
