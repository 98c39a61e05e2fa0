"""Settings that take no effect, and a short warm-up, are worth a word."""

import logging

import pytest
import torch
from test_cli import SMALL
from tiny_federation import UNTRAINED, tiny_config, tiny_data, tiny_model

from fedss_kernels.federated import Config, cli, run
from fedss_kernels.federated.comparisons.compare import Comparison
from fedss_kernels.federated.defaults import PRESETS
from fedss_kernels.federated.idle_settings import RULES, idle, short_warmup


@pytest.mark.parametrize("name", PRESETS)
def test_defaults_are_not_worth_a_word(name):
    assert idle([Config(data=name, rounds=300, warmup_rounds=PRESETS[name]["warmup_rounds"])]) == []


@pytest.mark.parametrize(
    "options, line",
    [
        ({"latency_spread": 0.9}, "latency_spread 0.9 has no effect: there is no deadline"),
        ({"eval_every": 50, "rounds": 20}, "eval_every 50 has no effect: there are fewer rounds"),
        ({"checkpoint_every": 5}, "checkpoint_every 5 has no effect: there is no folder out"),
        (
            {"checkpoint_every": 400, "out": "a"},
            "checkpoint_every 400 has no effect: there are no more",
        ),
        ({"trim": 0.2}, "trim 0.2 has no effect: it is for the aggregation trimmed_mean"),
        (
            {"method": "pos_only", "num_negatives": 5},
            "num_negatives 5 has no effect: it is for fedss, neg_only and",
        ),
        ({"spreadout_margin": 0.5}, "spreadout_margin 0.5 has no effect: it is for fedaws"),
        ({"equal_pushes": True}, "equal_pushes True has no effect: it is for neg_only"),
        ({"trust_updates": True, "max_norm": 5.0}, "max_norm 5.0 has no effect: trust_updates is set"),
        ({"clip_norm": 2000.0}, "clip_norm 2000.0 has no effect: answers of a norm over max_norm are left"),
        ({"server_optimizer": "adagrad", "server_momentum": 0.5}, "server_momentum 0.5 has no effect"),
        ({"dirichlet_alpha": 0.1}, "dirichlet_alpha 0.1 has no effect: it is for the partition dirichlet"),
        (
            {"data": "cifar10", "images_per_client": 9},
            "images_per_client 9 has no effect: num_clients",
        ),
        (
            {"data": "omniglot", "glyph_classes": 9},
            "glyph_classes 9 has no effect: it is for the data glyphs",
        ),
        ({"method": "local_only", "server_lr": 0.5}, "server_lr 0.5 has no effect: clients share nothing"),
        (
            {"method": "local_only", "denominator": "holders"},
            "denominator holders has no effect: clients share nothing",
        ),
        (
            {"method": "fedrep", "denominator": "holders"},
            "denominator holders has no effect: no class row travels",
        ),
        (
            {"method": "full_softmax", "denominator": "holders"},
            "denominator holders has no effect: all clients have all class rows",
        ),
        ({"personalise_rate": 0.1}, "personalise_rate 0.1 has no effect: personalise_epochs is 0"),
        ({"method": "centralized", "deadline": 2.0}, "deadline 2.0 has no effect: the method has no clients"),
        (
            {"model": "own", "init_checkpoint": "a.pt"},
            "init_checkpoint a.pt has no effect: the net is",
        ),
        ({"rounds": 1, "lr_decay": "step"}, "lr_decay step has no effect: the only round after the warm-up"),
        ({"rounds": 3, "warmup_rounds": 2, "lr_decay": "linear"}, "lr_decay linear has no effect: the only"),
        (
            {"rounds": 10, "warmup_rounds": 20},
            "warmup_rounds 20 is more than the 10 rounds: the clients' rate comes to 0.025, not to",
        ),
        (
            {"aggregation": "trimmed_mean", "cohort": 9},
            "aggregation trimmed_mean is a plain mean: trim 0.1 of 9 answers is less than one",
        ),
        (
            {"method": "neg_only", "num_negatives": 0},
            "num_negatives 0: neg_only trains nothing, as it pushes",
        ),
    ],
)
def test_a_setting_without_effect_is_named_with_the_reason(options, line):
    lines = idle([Config(**options)])
    assert len(lines) == 1 and lines[0].startswith(line)


NOISE = {"method": "full_softmax", "clip_norm": 2000.0, "noise_multiplier": 0.1}
SUMS = {"negatives": "shared", "clip_norm": 2000.0, "trust_updates": True}


@pytest.mark.parametrize(
    "options, name, other",
    [
        ({"aggregation": "median", "denominator": "holders"}, "denominator", "cohort"),
        ({"aggregation": "trimmed_mean", "trim": 0.4, "denominator": "holders"}, "denominator", "cohort"),
        ({"method": "full_softmax", "denominator": "holders"}, "denominator", "cohort"),
        (NOISE, "clip_norm", 1000.0),
        (SUMS, "clip_norm", 1000.0),
        (SUMS, "trust_updates", False),
    ],
)
def test_what_is_told_has_no_effect_and_what_has_one_is_not_told(options, name, other):
    options = {"cohort": 4, "num_negatives": 1, **options}
    told = any(line.startswith(f"{name} ") for line in idle([tiny_config(**options)]))

    def weight(**changed):
        config = tiny_config(**options | changed)
        return run(config, data=tiny_data(), model=tiny_model()).weight[:]

    assert torch.equal(weight(), weight(**{name: other})) == told


def test_every_rule_is_of_options_that_are():
    names = vars(Config())
    assert all(name in names for of, _, _ in RULES for name in of)


def test_what_has_an_effect_in_one_of_several_runs_has_one():
    few = [Config(method=method, num_negatives=5) for method in ("pos_only", "fedss")]
    assert idle(few) == [] and len(idle(few[:1])) == 1


def test_the_command_line_says_so_before_the_training(tmp_path, capsys):
    argv = ["run", *SMALL, "--rounds=10", "--latency-spread=0.9", f"--out={tmp_path}"]
    assert cli.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("glyphs: 12 classes, ") and lines[0].endswith(" clients")
    assert lines[1:3] == [
        "warmup_rounds 1, a tenth of the rounds: usually 20",
        "latency_spread 0.9 has no effect: there is no deadline",
    ]
    assert short_warmup(Config(rounds=300)) == short_warmup(Config(data="sop", rounds=10)) == []


@pytest.mark.exhaustive
def test_a_short_warm_up_that_was_asked_for_is_not_worth_a_word(tmp_path, capsys):
    """On the command line, or in a file."""
    argv = ["run", *SMALL, "--rounds=5"]
    assert cli.main([*argv, "--warmup-rounds=0", f"--out={tmp_path / 'a'}"]) == 0
    assert "usually" not in capsys.readouterr().out
    assert cli.main(["run", f"--config={tmp_path / 'a' / 'config.json'}", f"--out={tmp_path / 'b'}"]) == 0
    assert "usually" not in capsys.readouterr().out
    assert cli.main([*argv, f"--out={tmp_path / 'c'}"]) == 0
    assert "warmup_rounds 0, a tenth of the rounds: usually 20\n" in capsys.readouterr().out


def test_in_python_it_is_logged(caplog):
    with caplog.at_level(logging.WARNING):
        run(tiny_config(latency_spread=0.9), data=tiny_data(), model=tiny_model())
    assert caplog.messages == ["latency_spread 0.9 has no effect: there is no deadline", UNTRAINED]


def test_what_was_chosen_to_fit_was_nobodys_wish():
    settings = {"images_per_client": 10, "classes_per_client": 20, "num_clients": 3, "partition": "iid"}
    assert idle([Config(data="image_folder", **settings)]) == []


def test_an_option_that_a_comparison_overrules_is_named(tmp_path, capsys, monkeypatch):
    nothing = Comparison([], [], [], tmp_path)
    monkeypatch.setattr(
        "fedss_kernels.federated.comparisons.compare.compare", lambda *arguments, **options: nothing
    )
    argv = ["compare", *SMALL, "--counts=2,3", "--rates=0.1,0.2", "--client-lr=0.5", f"--out={tmp_path}/out"]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "--client-lr has no effect: --rates are taken instead",
        "--num-negatives has no effect: --counts are taken instead",
    ]
