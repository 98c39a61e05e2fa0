"""Differential privacy of a run: the mean that it noises, what is refused, and epsilon as it is counted."""

import importlib.util
import math

import numpy as np
import pytest
import torch
from test_every_method import bits
from tiny_federation import tiny_config, tiny_data, tiny_model

from fedss_kernels.federated import Config, ConfigError, Result, Stopped, privacy_budget, run
from fedss_kernels.federated.algorithms import METHODS
from fedss_kernels.federated.clients.player import Player
from fedss_kernels.federated.idle_settings import idle
from fedss_kernels.federated.measures import MEASURES
from fedss_kernels.federated.messages import Update, norm
from fedss_kernels.federated.server.gaussian import noisy
from fedss_kernels.federated.server.mean import PseudoGradient

PRIVATE = {"method": "full_softmax", "noise_multiplier": 1.0, "clip_norm": 0.01}


def private(**options) -> Config:
    return tiny_config(**(PRIVATE | options))


def train(**options) -> Result:
    given = {key: options.pop(key) for key in ("on_round", "stop", "resume") if key in options}
    return run(private(**options), data=tiny_data(), model=tiny_model(), **given)


def parameters(result: Result) -> torch.Tensor:
    net = [value.flatten() for value in result.extractor.state_dict().values()]
    return torch.cat([result.weight.flatten(), *net]).double()


def test_noise_has_its_deviation_on_every_number():
    rows, net = torch.full((300, 70), 2.0), torch.zeros(20_001)
    made = noisy(PseudoGradient(torch.arange(300), rows, net), 0.25, np.random.default_rng(0))
    for numbers, mean in ((made.rows, 2.0), (made.extractor, 0.0)):
        assert numbers.dtype == torch.float32
        assert numbers.mean().item() == pytest.approx(mean, abs=4 * 0.25 / math.sqrt(numbers.numel()))
        assert numbers.std().item() == pytest.approx(0.25, rel=0.02)
    nothing = noisy(PseudoGradient(torch.arange(0), torch.zeros(0, 0), net), 1.0, np.random.default_rng(0))
    assert nothing.rows.shape == (0, 0)


def test_clipped_changes_weigh_the_same_over_the_cohort_whoever_answers(monkeypatch):
    """With hardly any noise: sum of clipped changes / K, K the cohort, and 0 of those who never answer."""
    real, sent = Player.update, []

    def update(self, *given) -> Update:
        sent.append(real(self, *given))
        return sent[-1]

    monkeypatch.setattr(Player, "update", update)
    options = {"rounds": 1, "cohort": 5, "server_momentum": 0.0, "dropout_rate": 0.4}
    result = train(**options, noise_multiplier=1e-9)
    assert 0 < len(sent) < 5 and len({each.num_examples for each in sent}) > 1
    clipped = [each.rows.double() * min(1.0, 0.01 / norm(each)) for each in sent]
    before = Player(private(**options), tiny_data(), tiny_model()).known_rows(torch.arange(7)).double()
    expected = before - sum(clipped) / 5
    torch.testing.assert_close(result.weight.double(), expected, rtol=0, atol=2e-7)


def test_the_step_has_the_noise_that_epsilon_is_counted_for():
    """sigma S / K in each number, whatever the seed; the same round with hardly any is what it is around."""
    options = {"rounds": 1, "cohort": 4, "server_momentum": 0.0}
    noise = []
    for seed in range(12):
        still = parameters(train(**options, seed=seed, noise_multiplier=1e-9))
        noise.append(parameters(train(**options, seed=seed, noise_multiplier=3.0)) - still)
    assert torch.stack(noise).std().item() == pytest.approx(3.0 * 0.01 / 4, rel=0.06)


def test_a_run_stopped_and_resumed_has_the_same_noise(tmp_path):
    whole, seen = train(rounds=4), []
    with pytest.raises(Stopped):
        train(rounds=4, out=tmp_path, on_round=seen.append, stop=lambda: len(seen) == 2)
    resumed = train(rounds=4, out=tmp_path, resume=True)
    assert bits(resumed) == bits(whole)
    assert resumed.summary.measured["epsilon"] == whole.summary.measured["epsilon"] > 0
    assert "ε" in whole.summary.told and "epsilon" in (tmp_path / "metrics.csv").read_text().splitlines()[0]


def renyi_of_a_gaussian(multiplier: float, rounds: int, delta: float) -> float:
    """epsilon of the plain Gaussian mechanism, from its Renyi divergence a / (2 sigma^2)."""
    orders = np.concatenate([np.linspace(1.01, 20, 2000), np.arange(20, 5000)])
    divergence = rounds * orders / (2 * multiplier**2)
    found = divergence + np.log1p(-1 / orders) - (np.log(delta) + np.log(orders)) / (orders - 1)
    return float(found.min())


@pytest.mark.parametrize("multiplier, rounds", [(4.0, 1), (10.0, 50), (60.0, 400)])
def test_with_everybody_in_each_round_epsilon_is_that_of_gaussians(multiplier, rounds):
    config = private(cohort=5, noise_multiplier=multiplier, delta=1e-5, rounds=rounds)
    expected = renyi_of_a_gaussian(multiplier / 2, rounds, 1e-5)  # replaced data move the sum by 2 S
    assert privacy_budget.epsilon(config, 5, rounds) == pytest.approx(expected, rel=0.02)


@pytest.mark.exhaustive
def test_epsilon_grows_with_rounds_and_cohort_and_falls_with_noise():
    def epsilon(rounds=100, cohort=10, **options) -> float:
        return privacy_budget.epsilon(private(rounds=rounds, cohort=cohort, **options), 1000, rounds)

    usual = epsilon()
    assert 0 < usual < epsilon(rounds=200) and usual < epsilon(cohort=50) < epsilon(cohort=1000)
    assert epsilon(noise_multiplier=2.0) < usual < epsilon(delta=1e-9) and epsilon(rounds=0 + 1) < usual
    assert privacy_budget.epsilon(private(), 1000, 0) == 0
    assert privacy_budget.delta_of(private(), 1000) == 1000**-1.1 < 1 / 1000
    assert not MEASURES["epsilon"].more_is_better


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("layerwise",)])
def test_noise_is_for_methods_whose_clients_tell_nothing_but_by_their_changes(method):
    fit = {"full_softmax", "fedavg", "fedbabu", "fedbabu_ss", "fedper", "fedrep", "simclr", "fl_moco"}
    if method in fit:
        private(method=method)
        return
    with pytest.raises(ConfigError, match=f"noise_multiplier: expected 0 with {method}, whose clients"):
        private(method=method)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"clip_norm": None},
            "clip_norm: expected a number with noise, which hides changes up to it",
        ),
        ({"aggregation": "median"}, "aggregation: expected mean with noise, got median"),
        ({"noise_multiplier": -1.0}, "noise_multiplier: expected a finite number of at least 0"),
        ({"delta": 1.0}, "delta: expected a finite number greater than 0 and less than 1"),
    ],
)
def test_what_would_claim_more_than_holds_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        private(**options)


def test_an_answer_that_is_not_finite_is_left_out_even_where_all_are_trusted(monkeypatch):
    real = Player.update

    def update(self, round, attempt, client, *given) -> Update:
        made = real(self, round, attempt, client, *given)
        if client == 2:
            made.rows[0, 0] = torch.nan
        return made

    monkeypatch.setattr(Player, "update", update)
    result = train(rounds=4, cohort=5, trust_updates=True, max_norm_ratio=1.0)
    assert result.summary.rejected == 4 and result.summary.accepted == 16  # none for its norm beside others'
    assert result.summary.not_finite_since is None


def test_without_the_library_that_counts_a_run_says_what_to_install_before_it_trains(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(privacy_budget, "find_spec", lambda name: None if "dp_" in name else real(name))
    with pytest.raises(ConfigError, match="noise_multiplier: needs dp-accounting.*fedss-kernels\\[dp\\]"):
        train()


def test_what_has_no_effect_beside_noise_is_said():
    found = idle([private(denominator="holders", max_norm_ratio=2.0, trust_updates=True)])
    assert found[1:] == [  # after a word on full_softmax
        "denominator holders has no effect: all clients have all class rows",
        "trust_updates True has no effect: with noise each answer is looked at by itself",
        "max_norm_ratio 2.0 has no effect: with noise each answer is looked at by itself",
    ]
    assert idle([tiny_config(delta=0.1)]) == ["delta 0.1 has no effect: noise_multiplier is 0"]


@pytest.mark.parametrize(
    "multiplier, expected",
    [
        (1e-160, "expected 0, or at least 1e-12"),
        (1e30, "expected a finite number of at least 0 and less than 1000000"),
    ],
)
def test_noise_of_which_no_epsilon_can_be_computed_is_refused(multiplier, expected):
    with pytest.raises(ConfigError, match=f"noise_multiplier: {expected}"):
        private(noise_multiplier=multiplier)
    assert math.isfinite(privacy_budget.epsilon(private(noise_multiplier=1e-12), 1000, 100_000))
