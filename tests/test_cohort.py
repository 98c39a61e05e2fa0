"""Who takes part: drop-outs and deadlines, rounds that are tried again, and what moved all the same."""

import csv
import math
from statistics import NormalDist

import pytest
import torch
from tiny_federation import CLASSES_HELD, tiny_config, tiny_data, tiny_model

from fedss_kernels.federated import ConfigError, TooFewClients, run
from fedss_kernels.federated.any_round import Played
from fedss_kernels.federated.cohort import absence, draw_cohort
from fedss_kernels.federated.fedavg_round import HOPELESS_ANSWERS


def train(**options):
    settings = {"rounds": 6, "cohort": 4, "eval_every": 6} | options
    return run(tiny_config(**settings), data=tiny_data(), model=tiny_model())


def rate(config, reason: str, clients: int = 4000) -> float:
    return sum(absence(config, 3, 0, k) == reason for k in range(clients)) / clients


def test_clients_drop_out_at_the_rate_asked_for():
    assert rate(tiny_config(), "dropped") == 0
    four_sigma = 4 * math.sqrt(0.3 * 0.7 / 4000)
    assert rate(tiny_config(dropout_rate=0.3), "dropped") == pytest.approx(0.3, abs=four_sigma)


def test_clients_are_late_as_often_as_a_log_normal_time_passes_the_deadline():
    config = tiny_config(deadline=1.5, latency_spread=0.8)
    expected = 1 - NormalDist(0, 0.8).cdf(math.log(1.5))
    assert rate(config, "late") == pytest.approx(expected, abs=4 * math.sqrt(expected / 4000))
    both = tiny_config(deadline=1.5, latency_spread=0.8, dropout_rate=0.5)
    assert rate(both, "late") == pytest.approx(expected / 2, abs=4 * math.sqrt(expected / 4000))
    assert rate(tiny_config(deadline=1.0001, latency_spread=0.0), "late") == 0
    assert rate(tiny_config(deadline=0.9999, latency_spread=0.0), "late") == 1


def test_every_draw_has_its_own_arguments():
    config = tiny_config(dropout_rate=0.5)
    draws = {key: absence(config, *key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
    patterns = {
        tuple(absence(config, round, attempt, k) for k in range(64)) for round in (0, 1) for attempt in (0, 1)
    }
    assert len(patterns) == 4 and draws == {key: absence(config, *key) for key in draws}


def test_what_the_absent_ask_for_moves_and_nothing_comes_back(tmp_path):
    result = train(dropout_rate=0.4, deadline=1.5, out=tmp_path)
    with (tmp_path / "ledger.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    outcomes = {name: [line for line in lines if line["outcome"] == name] for name in ("dropped", "late")}
    assert all(outcomes.values())
    for line in lines:
        came = int(line["up_extractor"]) + int(line["up_rows"])
        assert int(line["down_extractor"]) > 0 and int(line["up_ids"]) == 8 * int(line["num_rows"])
        assert (came == 0) == (line["outcome"] in outcomes)
    s = result.summary
    assert (s.dropped, s.late) == tuple(len(outcomes[name]) for name in ("dropped", "late"))
    assert s.accepted + s.dropped + s.late == len(lines) == 24 and s.rejected == 0
    assert s.full_traffic["up_rows"] * 24 == s.full_traffic["down_rows"] * s.accepted
    for metrics in result.history:
        mine = [line["outcome"] for line in lines if int(line["round"]) == metrics.round]
        assert [metrics.accepted, metrics.dropped, metrics.late] == [
            mine.count(name) for name in ("accepted", "dropped", "late")
        ]


def test_too_few_answers_and_the_round_is_tried_again_with_other_clients(tmp_path):
    config = tiny_config(cohort=4, min_clients=3, dropout_rate=0.4)
    result = train(min_clients=3, dropout_rate=0.4, out=tmp_path)
    with (tmp_path / "ledger.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    for metrics in result.history:
        tried = [line for line in lines if int(line["round"]) == metrics.round]
        for attempt in range(metrics.attempts):
            mine = [line for line in tried if int(line["attempt"]) == attempt]
            cohort = draw_cohort(0, metrics.round - 1, attempt, len(CLASSES_HELD), 4)
            answered = [k for k in cohort if absence(config, metrics.round - 1, attempt, k) is None]
            assert [int(line["client"]) for line in mine] == cohort
            outcome = "accepted" if attempt == metrics.attempts - 1 else "discarded"
            assert [int(line["client"]) for line in mine if line["outcome"] == outcome] == answered
            assert (len(answered) >= 3) == (attempt == metrics.attempts - 1)
        assert len(tried) == 4 * metrics.attempts
        assert metrics.accepted + metrics.discarded + metrics.dropped == len(tried)
        assert metrics.accepted >= 3
    assert max(metrics.attempts for metrics in result.history) > 1


def test_of_a_cohort_of_too_few_nothing_is_applied(monkeypatch):
    """Attempt 0 fails in every round: the run is one whose cohorts are those of attempt 1."""
    monkeypatch.setattr(
        "fedss_kernels.federated.fedavg_round.absence",
        lambda config, round, attempt, k: None if attempt == 1 or k == 2 else "dropped",
    )
    retried = train(min_clients=4)
    assert {metrics.attempts for metrics in retried.history} == {2}
    applied = []

    def always_attempt_one(self, round):
        tally, entries = self._attempt(round, 1)
        updates = list(tally.counted().values())
        applied.append(len(updates))
        self.server.step(tally.gradient())
        return Played(entries, 0.0, 1)

    monkeypatch.setattr("fedss_kernels.federated.fedavg_round.Simulation.play", always_attempt_one)
    assert torch.equal(train().weight, retried.weight) and applied == [4] * 6


def test_a_round_that_nobody_can_make_says_so():
    words = "round 1: of 100 cohorts of 4 none had 4 answers that counted: 400 late, after --deadline"
    with pytest.raises(TooFewClients, match=f"^{words}$"):
        train(min_clients=4, deadline=1e-9)
    with pytest.raises(ConfigError, match="min_clients: expected at most 4, the cohort, got 5"):
        train(min_clients=5)


@pytest.mark.parametrize("every", [0, 1, 2])
def test_rounds_before_one_that_nobody_makes_are_not_lost(every, tmp_path, monkeypatch):
    """Round 4 fails; with clients that answer again the run goes on to the bits of one that never failed."""
    options = {"min_clients": 4, "checkpoint_every": every}
    monkeypatch.setattr(
        "fedss_kernels.federated.fedavg_round.absence",
        lambda config, round, *_: "dropped" if round == 3 else None,
    )
    with pytest.raises(TooFewClients, match="round 4"):
        train(out=tmp_path, **options)
    monkeypatch.setattr("fedss_kernels.federated.fedavg_round.absence", lambda *_: None)
    config = tiny_config(rounds=6, cohort=4, eval_every=6, out=tmp_path, **options)
    resumed = run(config, data=tiny_data(), model=tiny_model(), resume=True)
    assert torch.equal(resumed.weight, train(**options).weight)


FEW = HOPELESS_ANSWERS // 4  # cohorts of 4, in which nobody's answer counts


def test_a_round_in_which_all_answers_are_left_out_is_soon_given_up_with_the_reasons(tmp_path, monkeypatch):
    """The first round is made, and then the rate rises. Resumed it fails again, to the same files."""
    rates = {0: 0.1, 1: 1e6}
    monkeypatch.setattr("fedss_kernels.federated.clients.player.learning_rate", lambda _, round: rates[round])
    words = f"round 2: of {FEW} cohorts of 4 none had 1 answer that counted: {4 * FEW} left out: norm over "
    with pytest.raises(TooFewClients, match=f"^{words}--max-norm: is --client-lr or --scale too high.$"):
        train(out=tmp_path)
    left = [(tmp_path / name).read_text() for name in ("metrics.csv", "ledger.csv")]
    lines = list(csv.DictReader(left[1].splitlines()))
    assert [line["round"] for line in lines] == ["1"] * 4 + ["2"] * 4 * FEW
    assert {(line["outcome"], line["fault"]) for line in lines[4:]} == {("rejected", "norm")}
    assert len(left[0].splitlines()) == 1 + 1 and (tmp_path / "checkpoint-000001").is_dir()
    config = tiny_config(rounds=6, cohort=4, eval_every=6, out=tmp_path)
    with pytest.raises(TooFewClients, match="round 2"):
        run(config, data=tiny_data(), model=tiny_model(), resume=True)
    assert [(tmp_path / name).read_text() for name in ("metrics.csv", "ledger.csv")] == left


class NotANumber(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = tiny_model()

    def forward(self, images):
        return self.net(images) / torch.zeros(())


@pytest.mark.parametrize(
    "options, model, reason",
    [
        (
            {"scale": 1e38},
            tiny_model,
            "48 left out: a loss not finite or over 1e30: .* or --scale too h",
        ),
        (
            {},
            NotANumber,
            "48 left out: a loss not finite or over 1e30: .* or does the net or an own loss give NaN.$",
        ),
        ({"client_lr": 1e38}, tiny_model, "left out: changes not finite: is --client-lr, --server-lr or"),
    ],
)
def test_why_no_answer_counts_is_said(options, model, reason):
    with pytest.raises(TooFewClients, match=f"round 1: of {FEW} cohorts .*{reason}"):
        run(tiny_config(rounds=1, cohort=4, **options), data=tiny_data(), model=model())


def test_absences_and_answers_that_would_count_are_waited_for(monkeypatch):
    """Of 30 cohorts nobody answers; of 60 a few do, of which one is right: too few. Then all are."""
    monkeypatch.setattr(
        "fedss_kernels.federated.fedavg_round.absence",
        lambda config, round, attempt, k: "dropped" if attempt < 30 or (attempt < 90 and k % 2) else None,
    )
    monkeypatch.setattr(
        "fedss_kernels.federated.fedavg_round.Inspection.verdicts",
        lambda self, findings, net_norm: ["", *["norm" if len(findings) < 4 else ""] * 3][: len(findings)],
    )
    (metrics,) = train(rounds=1, min_clients=4).history
    assert metrics.attempts == 91 and metrics.rejected > HOPELESS_ANSWERS and metrics.dropped > 120


def test_all_reasons_are_said_the_most_frequent_first(monkeypatch):
    monkeypatch.setattr(
        "fedss_kernels.federated.fedavg_round.Inspection.verdicts",
        lambda self, findings, net_norm: ["", "", "norm", "norm"],
    )
    monkeypatch.setattr(
        "fedss_kernels.federated.fedavg_round.absence",
        lambda config, round, attempt, k: "dropped" if k == 4 else None,
    )
    with pytest.raises(TooFewClients) as caught:
        train(rounds=1, cohort=5, min_clients=5)
    assert str(caught.value).endswith(
        ": 200 nothing wrong with, but too few in their cohorts; 200 left out: norm over --max-norm or "
        "--max-norm-ratio: is --client-lr or --scale too high? if not, give larger bounds; 100 dropped out"
    )
    assert len(caught.value.entries) == 500
