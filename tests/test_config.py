"""Config: defaults, bounds, presets, and its file."""

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from fedss_kernels.federated import Config, ConfigError
from fedss_kernels.federated.algorithms import METHODS
from fedss_kernels.federated.config import read_options
from fedss_kernels.federated.data import DATASETS
from fedss_kernels.federated.defaults import OWN, PRESETS
from fedss_kernels.federated.learning_rate import learning_rate


def test_the_contracts_server_is_the_default():
    config = Config()
    assert (config.server_lr, config.server_momentum, config.embedding_dim) == (1.0, 0.9, 64)
    assert (config.correction, config.denominator, config.method) == ("negatives", "cohort", "fedss")


@pytest.mark.parametrize("rounds, every", [(1, 1), (4, 1), (10, 2), (49, 9), (50, 10), (300, 10)])
def test_test_images_are_looked_at_five_times_at_least_where_nothing_else_is_said(rounds, every):
    assert Config(rounds=rounds).eval_every == every
    assert Config(rounds=rounds, eval_every=7).eval_every == 7
    with pytest.raises(ConfigError, match="^rounds: expected"):
        Config(rounds="ten")


def test_every_option_says_what_it_is():
    for field in dataclasses.fields(Config):
        assert len(field.metadata["help"]) > 10, field.name


def test_every_data_set_has_a_preset_and_all_presets_decide_the_same_options():
    assert {*DATASETS, OWN} == set(PRESETS)
    decided = {field.name for field in dataclasses.fields(Config) if field.name in PRESETS[OWN]}
    for preset in PRESETS.values():
        assert set(preset) == decided == set(PRESETS[OWN])


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_what_is_left_out_and_only_that(name):
    config = Config(data=name)
    for option, value in PRESETS[name].items():
        assert getattr(config, option) == value
    assert Config(data=name, rounds=7).rounds == 7


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rounds": 0}, "rounds: expected an integer of at least 1, got 0"),
        ({"rounds": 2.0}, "rounds: expected an integer of at least 1, got 2.0 of type float"),
        ({"rounds": True}, "rounds: expected an integer of at least 1, got True of type bool"),
        ({"num_negatives": -1}, "num_negatives: expected an integer of at least 0, got -1"),
        ({"client_lr": 0}, "client_lr: expected a finite number greater than 0, got 0.0"),
        (
            {"client_lr": "0.1"},
            "client_lr: expected a finite number greater than 0, got '0.1' of type str",
        ),
        (
            {"client_lr": torch.tensor(0.5)},
            "client_lr: expected a finite number greater than 0, got tensor(0.5000) of type Tensor",
        ),
        ({"client_lr": float("nan")}, "client_lr: expected a finite number greater than 0, got nan"),
        ({"server_lr": float("inf")}, "server_lr: expected a finite number greater than 0, got inf"),
        (
            {"server_momentum": 1},
            "server_momentum: expected a finite number of at least 0 and less than 1, got 1.0",
        ),
        (
            {"seed": "1"},
            "seed: expected an integer of at least 0 and less than 9223372036854775808, got '1' of type str",
        ),
        ({"overwrite": 1}, "overwrite: expected true or false, got 1 of type int"),
        ({"out": 3}, "out: expected a path, got 3 of type int"),
        (
            {"data": None},
            f"data: expected one of {', '.join(DATASETS)}, own, got None",
        ),
        (
            {"data": "glyph"},
            f"data: expected one of {', '.join(DATASETS)}, own, got 'glyph' (did you mean glyphs?)",
        ),
        ({"denominator": "all"}, "denominator: expected one of cohort, holders, got 'all'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options, message):
    with pytest.raises(ConfigError) as caught:
        Config(**options)
    assert str(caught.value) == message
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "option", ["data", "method", "model", "task", "correction", "denominator", "lr_decay"]
)
def test_an_unknown_name_is_refused(option):
    with pytest.raises(ConfigError, match=f"^{option}: expected one of .*, got 'nothing'"):
        Config(**{option: "nothing"})


def test_the_bounds_themselves_are_allowed():
    config = Config(rounds=1, num_negatives=0, server_momentum=0, warmup_rounds=0, seed=2**63 - 1)
    assert config.server_momentum == 0.0 and isinstance(config.server_momentum, float)
    for method in METHODS:
        assert Config(method=method).method == method


@pytest.mark.parametrize(
    "option", ["client_lr", "server_lr", "scale", "weight_init_scale", "personalise_rate"]
)
def test_what_float32_does_not_hold_is_refused(option):
    with pytest.raises(
        ConfigError, match=f"{option}: expected a finite number .*, got 1e.39; float32 holds 3e38"
    ):
        Config(**{option: 1e39})


def test_numpys_numbers_are_numbers():
    config = Config(client_lr=np.float64(0.1), rounds=np.int64(7), scale=np.float32(8), server_lr=np.int32(1))
    assert (config.client_lr, config.rounds, config.scale, config.server_lr) == (0.1, 7, 8.0, 1.0)
    assert type(config.rounds) is int and type(config.client_lr) is float
    assert Config(data=np.str_("omniglot"), overwrite=np.True_).overwrite is True
    json.dumps(config.to_dict())


@pytest.mark.parametrize(
    "options", [{"rounds": np.True_}, {"client_lr": True}, {"client_lr": np.True_}, {"rounds": np.float64(2)}]
)
def test_truth_values_are_no_numbers_and_fractions_no_counts(options):
    with pytest.raises(ConfigError, match=r"expected an? (integer|finite number) .*, got (True|2\.0)"):
        Config(**options)


def test_all_that_cannot_be_is_said_at_once():
    with pytest.raises(ConfigError) as caught:
        Config(rounds=0, cohort="2", scale=-1.0)
    assert str(caught.value).count("; ") == 2
    assert [option for option, _ in caught.value.mistakes] == ["rounds", "cohort", "scale"]
    assert (caught.value.option, caught.value.message) == caught.value.mistakes[0]
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_all_options_that_cannot_be_beside_others_are_said_at_once():
    with pytest.raises(ConfigError) as caught:
        Config(method="fedaws", similarity="dot", cohort=2, min_clients=3)
    assert [option for option, _ in caught.value.mistakes] == ["min_clients", "similarity"]


@pytest.mark.parametrize("rounds, warmup", [(1, 0), (10, 1), (199, 19), (200, 20), (250, 20), (800, 20)])
def test_the_warm_up_is_by_default_at_most_a_tenth_of_the_rounds(rounds, warmup):
    assert Config(rounds=rounds).warmup_rounds == warmup
    assert Config(rounds=rounds, warmup_rounds=20).warmup_rounds == 20
    assert Config(data="sop", rounds=rounds).warmup_rounds == 0
    highest = max(learning_rate(Config(rounds=rounds), round) for round in range(rounds))
    assert highest == Config().client_lr


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine", "step"])
@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 5, 20])
def test_the_first_round_is_at_the_full_rate_however_few_there_are(rounds, decay):
    config = Config(rounds=rounds, lr_decay=decay, warmup_rounds=0, client_lr=0.2)
    rates = [learning_rate(config, round) for round in range(rounds)]
    assert rates[0] == 0.2 and rates == sorted(rates, reverse=True) and rates[-1] > 0


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().rounds = 3


def test_the_file_gives_the_same_config_back(tmp_path):
    config = Config(data="omniglot", rounds=12, client_lr=0.1, out=Path("a/b"), overwrite=True)
    config.save(tmp_path / "config.json")
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["rounds"] == 12 and saved["cohort"] == PRESETS["omniglot"]["cohort"]  # resolved
    assert saved["out"] == str(Path("a/b"))
    assert "overwrite" not in saved  # or a second run from this file would replace the first's results
    assert Config.load(tmp_path / "config.json") == dataclasses.replace(config, overwrite=False)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"roundz": 3}', "roundz: no such option (did you mean rounds?)"),
        ("[1]", "config: expected an object of options in .*, got list"),
        ("{", "config: .* is not JSON: "),
        ('{"rounds": "3"}', "rounds: expected an integer of at least 1, got '3'"),
    ],
)
def test_a_bad_file_is_refused(text, message, tmp_path):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace("?)", r"\?\)")):
        Config.load(tmp_path / "c.json")


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_a_file_that_an_editor_saved(coding, tmp_path):
    (tmp_path / "c.json").write_text('{"rounds": 3}', encoding=coding)
    assert Config.load(tmp_path / "c.json").rounds == 3


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read .*c.json: No such file"):
        read_options(tmp_path / "c.json")


def test_all_that_is_wrong_in_a_file_is_said_at_once(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"cohort": "five", "roundz": 3, "scale": -1, "zip_code": 1}))
    with pytest.raises(ConfigError) as said:
        Config.load(tmp_path / "c.json")
    for name in ("cohort: expected ", "roundz: no such ", "scale: expected ", "zip_code: no such "):
        assert str(said.value).count(name) == 1


@pytest.mark.parametrize(
    "options, said",
    [
        ({"rounds": 0, "cohort": 4, "min_clients": 9}, ["rounds", "min_clients"]),
        ({"cohort": 0, "min_clients": 9}, ["cohort"]),
        ({"cohort": 4, "min_clients": 3, "negatives": "shared", "min_holders": 5}, ["min_holders"]),
        (
            {"method": "nope", "cohort": 4, "min_clients": 9, "noise_multiplier": 1.0},
            ["method", "min_clients"],
        ),
        ({"data": "nope", "rounds": 0, "cohort": 4, "min_clients": 9}, ["data", "rounds", "min_clients"]),
        ({"data": "nope", "method": "simclr", "batch_size": 1}, ["data", "batch_size"]),
        ({"negatives": "shared", "rounds": 0, "aggregation": "median"}, ["rounds", "aggregation"]),
        ({"negatives": "nope", "aggregation": "median"}, ["negatives"]),
    ],
    ids=str,
)
def test_clashes_are_told_beside_values_that_cannot_be(options, said):
    """But none that such a value has part in."""
    with pytest.raises(ConfigError) as refused:
        Config(**options)
    assert [option for option, _ in refused.value.mistakes] == said
