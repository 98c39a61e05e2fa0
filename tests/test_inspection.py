"""Updates from outside: what is wrong with one is named, and it counts for nothing."""

import csv
import dataclasses
import logging
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_federation import UNTRAINED, tiny_config, tiny_data, tiny_model

from fedss_kernels.federated import run
from fedss_kernels.federated.clients.poison import poisoned
from fedss_kernels.federated.messages import Update, clipped, norm
from fedss_kernels.federated.randomness import Purpose, generator
from fedss_kernels.federated.server.inspection import Inspection

ASKED = torch.tensor([1, 4, 6])
INSPECTION = Inspection(
    num_parameters=5, embedding_dim=2, max_examples=10, max_norm=100.0, max_norm_ratio=8.0
)


def fault(update: Update) -> str:
    return INSPECTION.faults([update], [ASKED])[0]


def update(**changes) -> Update:
    good = Update(3, ASKED.clone(), torch.ones(3, 2), torch.ones(5), num_examples=10, loss=0.5)
    return dataclasses.replace(good, **changes)


def with_entry(value: float, size: int = 6) -> torch.Tensor:
    numbers = torch.ones(size)
    numbers[size // 2] = value
    return numbers


FAULTS = {
    "dtype": [
        {"rows": torch.ones(3, 2).double()},
        {"rows": torch.ones(3, 2).numpy()},
        {"rows": torch.ones(3, 2).to_sparse()},
        {"extractor": torch.ones(5).bfloat16()},
        {"class_ids": ASKED.int()},
        {"class_ids": [1, 4, 6]},
        {"rows": torch.ones(3, 2, requires_grad=True)},
        {"rows": torch.nn.Parameter(torch.ones(3, 2))},
        {"rows": torch.ones(3, 2, device="meta")},
    ],
    "shape": [
        {"rows": torch.ones(3, 3)},
        {"rows": torch.ones(2, 2)},
        {"rows": torch.ones(6)},
        {"extractor": torch.ones(4)},
        {"extractor": torch.ones(5, 1)},
        {"class_ids": ASKED[:2]},
        {"class_ids": ASKED[:, None]},
    ],
    "ids": [
        {"class_ids": torch.tensor([1, 4, 5])},
        {"class_ids": torch.tensor([1, 6, 4])},
        {"class_ids": torch.tensor([1, 4, 4])},
        {"class_ids": torch.tensor([1, 4, 10**9])},
        {"class_ids": torch.tensor([-1, 4, 6])},
    ],
    "examples": [{"num_examples": n} for n in (0, -1, 11, 10**30, 2.0, True, None)],
    "loss": [{"loss": loss} for loss in (math.nan, math.inf, 1e300, None, torch.tensor(1.0))],
    "not finite": [
        *({"rows": with_entry(value).view(3, 2)} for value in (math.nan, math.inf, -math.inf)),
        {"extractor": with_entry(math.nan, 5)},
    ],
    "norm": [
        {"rows": torch.full((3, 2), 60.0)},
        {"extractor": with_entry(-101.0, 5)},
        {"extractor": with_entry(3e38, 5)},
    ],
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found_and_named(name):
    for changes in FAULTS[name]:
        assert INSPECTION.faults([update(**changes)], [ASKED]) == [name], changes


@pytest.mark.parametrize("sent", [None, {}, 7, "update"])
def test_what_is_no_update_is_left_out(sent):
    assert INSPECTION.faults([sent, update()], [ASKED] * 2) == ["dtype", ""]


def test_what_is_right_passes_up_to_the_bounds():
    at_the_bound = torch.zeros(5)
    at_the_bound[2] = 100.0
    for changes in ({}, {"num_examples": 1}, {"rows": torch.zeros(3, 2), "extractor": at_the_bound}):
        assert fault(update(**changes)) == ""


def test_a_norm_is_held_against_the_median_of_the_rounds_whatever_its_size():
    """As the rate falls so do norms: a million times 1e-6 is small, and still no right update."""
    sizes = [1e-7, 2e-7, 1.59e-6, 1.61e-6, 0.1, 3e-7, math.nan]
    of_size = [update(rows=torch.zeros(3, 2), extractor=torch.tensor([s, 0, 0, 0, 0])) for s in sizes]
    short = update(class_ids=ASKED[:2], rows=torch.zeros(2, 2))
    faults = INSPECTION.faults([*of_size, short], [ASKED] * 8)
    # the lower median of the finite ones is 3e-7, times 8: 2.4e-6
    assert faults == ["", "", "", "", "norm", "", "not finite", "shape"]
    assert INSPECTION.faults(of_size[:1] + of_size[4:5], [ASKED] * 2) == ["", "norm"]
    nothing = update(rows=torch.zeros(3, 2), extractor=torch.zeros(5))
    assert INSPECTION.faults([nothing, nothing, update()], [ASKED] * 3) == ["", "", ""]
    assert INSPECTION.faults([], []) == []


def test_what_hardly_moves_the_net_is_not_held_against_those_that_move_less():
    """Up to a hundredth of the net's norm, of 10 here; and never more than --max-norm."""
    sizes = [1e-7, 2e-7, 1e-6, 0.099, 0.101]
    of_size = [update(rows=torch.zeros(3, 2), extractor=torch.tensor([s, 0, 0, 0, 0])) for s in sizes]
    assert INSPECTION.faults(of_size, [ASKED] * 5, 10.0) == ["", "", "", "", "norm"]
    assert INSPECTION.faults([*of_size[:3], update()], [ASKED] * 4, 1e9) == ["", "", "", ""]
    large = update(extractor=torch.full((5,), 100.0))
    assert INSPECTION.faults([*of_size[:3], large], [ASKED] * 4, 1e9) == ["", "", "", "norm"]
    for nobodys in (math.nan, 0.0):
        assert INSPECTION.faults(of_size, [ASKED] * 5, nobodys) == ["", "", "", "norm", "norm"]


def test_so_it_is_in_a_run(monkeypatch):
    """Of the net as the clients get it."""
    seen, verdicts = [], Inspection.verdicts

    def watched(inspection, findings, net_norm):
        seen.append(net_norm)
        return verdicts(inspection, findings, net_norm)

    monkeypatch.setattr(Inspection, "verdicts", watched)
    train(rounds=2)
    first = torch.cat([p.detach().flatten() for p in tiny_model().parameters()]).norm().item()
    assert seen[0] == pytest.approx(first) and len(set(seen)) == 2


@settings(deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_clipping_keeps_the_direction_and_bounds_the_norm(size, bound):
    each = update(rows=torch.randn(3, 2) * size, extractor=torch.randn(5) * size)
    found, before = clipped(each, bound), norm(each)
    assert norm(found) == pytest.approx(min(before, bound), rel=1e-6)
    factor = min(1.0, bound / before)
    torch.testing.assert_close(found.rows, each.rows * factor)
    torch.testing.assert_close(found.extractor, each.extractor * factor)


# ---- in a run ----------------------------------------------------------------------------------------------


def train(**options):
    settings = {"rounds": 8, "cohort": 5, "eval_every": 8, "method": "fedss"} | options
    return run(tiny_config(**settings), data=tiny_data(), model=tiny_model())


def poison_drawn(rounds: int, rate: float) -> set[tuple[int, int]]:
    """(round, client) of every poisoned answer of a run in which all five clients play."""
    return {
        (round, k)
        for round in range(rounds)
        for k in range(5)
        if generator(0, round, 0, k, Purpose.POISON).random() < rate
    }


def test_every_poisoned_update_is_left_out_counted_and_named(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "fedss_kernels.federated"):
        result = train(poison_rate=0.4, out=tmp_path / "run")
    expected = poison_drawn(8, 0.4)
    assert 8 <= len(expected) <= 24
    assert result.summary.rejected == len(expected) and result.summary.accepted == 40 - len(expected)
    with (tmp_path / "run/ledger.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    rejected = {(int(line["round"]) - 1, int(line["client"])): line for line in lines if line["fault"]}
    assert set(rejected) == expected
    assert {line["outcome"] for line in rejected.values()} == {"rejected"}
    assert set(Counter(line["fault"] for line in rejected.values())) == {"ids", "not finite", "norm"}
    for metrics in result.history:
        assert metrics.rejected == sum(round == metrics.round - 1 for round, _ in expected)
    said = [line for line in caplog.messages if line != UNTRAINED]
    assert len(said) == len(expected)
    assert all("client" in line and "left out" in line for line in said)


def test_a_round_goes_on_with_the_rest_as_if_the_others_had_not_been_there(monkeypatch):
    """The same run, with the poisoned clients' weight in the average put to nothing by hand."""
    poisoned_run = train(poison_rate=0.4)
    absent = poison_drawn(8, 0.4)
    monkeypatch.setattr(
        "fedss_kernels.federated.fedavg_round.absence",
        lambda config, round, attempt, k: "dropped" if (round, k) in absent else None,
    )
    without = train()
    assert torch.equal(poisoned_run.weight, without.weight)
    for a, b in zip(poisoned_run.extractor.parameters(), without.extractor.parameters(), strict=True):
        assert torch.equal(a, b)


def test_without_the_checks_the_same_run_is_ruined():
    ruined = train(poison_rate=0.4, trust_updates=True)
    assert ruined.summary.rejected == 0 and not ruined.weight.isfinite().all()


def test_every_kind_of_poison_is_one_that_is_found():
    faults = Counter(fault(poisoned(update(), 7, generator(0, 0, 0, k, Purpose.POISON))) for k in range(60))
    assert set(faults) == {"ids", "not finite", "norm"} and min(faults.values()) >= 8


def test_clipped_updates_move_the_model_no_further_than_the_bound():
    """One round, plain SGD on the server: the mean of updates of norm 1e-3 at most is no longer."""
    start = train(rounds=1, client_lr=1e-30)
    moved = train(rounds=1, clip_norm=1e-3)
    change = torch.cat(
        [(moved.weight - start.weight).flatten()]
        + [
            (a - b).flatten()
            for a, b in zip(moved.extractor.parameters(), start.extractor.parameters(), strict=True)
        ]
    )
    assert 2e-4 < change.norm() <= 1e-3 * (1 + 1e-4)
