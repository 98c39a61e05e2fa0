"""What a secure sum does to numbers and moves, and the simulator's class sets that a cohort has in common."""

import itertools
import math

import numpy as np
import pytest
import torch
from test_every_method import bits, history
from tiny_federation import CLASSES_HELD, DIM, NUM_CLASSES, NUM_PARAMETERS, tiny_config, tiny_data, tiny_model

from fedss_kernels.class_sets import class_set_of
from fedss_kernels.federated import Config, ConfigError, Result, Stopped, TooFewClients, run, secure_sums
from fedss_kernels.federated.clients.common_classes import CommonClassSets
from fedss_kernels.federated.clients.player import Player
from fedss_kernels.federated.cohort import absence, draw_cohort
from fedss_kernels.federated.idle_settings import idle
from fedss_kernels.federated.messages import Update, norm, numbers
from fedss_kernels.federated.server.inspection import Inspection
from fedss_kernels.federated.server.mean import SumMean

STEP = 2 * secure_sums.RANGE / secure_sums.LEVELS


def shared(**options) -> Config:
    return tiny_config(**({"negatives": "shared", "num_negatives": 1} | options))


def train(**options) -> Result:
    given = {key: options.pop(key) for key in ("on_round", "stop", "resume") if key in options}
    return run(shared(**options), data=tiny_data(), model=tiny_model(), **given)


# ---- numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1.0, 0.3, 1 / 7])
def test_a_number_is_a_whole_level_less_than_a_step_away_and_itself_on_average(weight):
    numbers = torch.tensor([-8.0, -1.2345678, -1e-7, 0.0, 3e-6, 0.5, 7.9999, 8.0])
    rounded = torch.stack(
        [secure_sums.quantised(numbers, weight, np.random.default_rng(k)) for k in range(2000)]
    ).double()
    levels = (rounded * weight + secure_sums.RANGE) / STEP
    assert (levels - levels.round()).abs().max() < 0.05 / weight  # but for float32's own rounding
    assert levels.round().min() >= 0 and levels.round().max() <= secure_sums.LEVELS
    error = (rounded - numbers.double()) * weight
    assert error.abs().max() < 1.05 * STEP
    assert error.mean(0).abs().max() < 4 * 0.5 * STEP / math.sqrt(2000)
    assert rounded.std(0).max() > 0.2 * STEP / weight  # by chance at all


@pytest.mark.parametrize("weight", [1.0, 0.3, 1 / 7, 1e-3])
def test_the_integers_of_what_was_rounded_are_those_that_it_was_rounded_to(weight):
    drawn = torch.Generator().manual_seed(0)
    levels = torch.cat(
        [
            torch.randint(secure_sums.LEVELS + 1, (5000,), generator=drawn),
            torch.tensor([0, secure_sums.LEVELS]),
        ]
    )
    rounded = ((levels * STEP - secure_sums.RANGE) / weight).float()
    assert torch.equal(secure_sums.integers(rounded, weight), levels)


def test_the_mean_has_its_bits_from_the_sum_of_the_integers_alone():
    """So a server that is told the sum comes to what one comes to that is told each of them."""
    ids, counts, most = torch.tensor([1, 4]), [3, 7, 5], 7
    drawn = torch.Generator().manual_seed(0)
    updates = []
    for k, n in enumerate(counts):
        rows, net = (torch.randn(size, generator=drawn) for size in ((2, 3), (5,)))
        rng = np.random.default_rng(k)
        rounded = [secure_sums.quantised(part, n / most, rng) for part in (rows, net)]
        updates.append(Update(k, ids, *rounded, n, 0.5))
    found = [SumMean(ids, counts, most) for _ in range(2)]
    for update in updates:
        found[0].add(update)
    for update in reversed(updates):
        found[1].add(update)
    first, second = (mean.gradient() for mean in found)
    total = sum(secure_sums.integers(u.rows, u.num_examples / most) for u in updates)
    assert torch.equal(first.rows, secure_sums.mean(total, 3, 15 / 7))
    assert torch.equal(first.rows, second.rows) and torch.equal(first.extractor, second.extractor)
    plain = sum(u.num_examples / 15 * u.rows.double() for u in updates)
    torch.testing.assert_close(first.rows.double(), plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("number, fits", [(8.0, True), (-8.0, True), (8.001, False), (math.nan, False)])
def test_what_is_outside_does_not_fit(number, fits):
    assert secure_sums.fits(torch.tensor([0.0, number])) is fits


def test_the_sum_of_as_many_terms_as_a_cohort_may_have_is_below_the_modulus():
    largest = secure_sums.MOST_CLIENTS * secure_sums.LEVELS
    assert largest < secure_sums.MODULUS <= largest + secure_sums.LEVELS


# ---- class sets --------------------------------------------------------------------------------------------


def test_all_clients_of_a_cohort_have_the_same_class_set():
    config, data = shared(cohort=3), tiny_data()
    player = Player(config, data, tiny_model())
    for round, attempt in itertools.product(range(6), range(2)):
        cohort = draw_cohort(0, round, attempt, 5, 3)
        first, *others = [player.request(round, attempt, k) for k in cohort]
        for other in others:
            assert torch.equal(other.class_ids, first.class_ids)
            assert torch.equal(other.log_expected_count, first.log_expected_count)
        held = sorted({j for k in cohort for j in CLASSES_HELD[k]})
        assert not first.sends_ids and set(held) < set(first.class_ids.tolist())
        assert len(first.class_ids) == len(held) + 1
        weighed = first.log_expected_count[[j not in held for j in first.class_ids.tolist()]]
        assert weighed.tolist() == [math.log(1 / (NUM_CLASSES - len(held)))]
        assert first.log_expected_count.count_nonzero() == (len(held) < NUM_CLASSES - 1)


def test_the_expected_denominator_is_the_one_over_all_classes_whatever_the_cohort_holds():
    logits = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for held in ([0, 1, 3], [2], [1, 2, 4, 5]):
        others = [j for j in range(7) if j not in held]
        sums = []
        for negatives in itertools.combinations(others, 2):
            drawn = class_set_of(7, torch.tensor(held), torch.tensor(negatives))
            sums.append((logits[drawn.class_ids] - drawn.log_expected_count).exp().sum())
        torch.testing.assert_close(torch.stack(sums).mean(), logits.exp().sum(), rtol=1e-12, atol=0)


def test_holders_are_counted_and_negatives_are_of_the_round():
    config = shared(cohort=3, num_negatives=2, dropout_rate=0.5)
    sets = CommonClassSets(config, NUM_CLASSES, 5, lambda k: torch.tensor(CLASSES_HELD[k]))
    drawn = set()
    for round in range(12):
        cohort, found = draw_cohort(0, round, 0, 5, 3), sets.of(round, 0)
        held = [j for k in cohort for j in CLASSES_HELD[k]]
        assert dict(zip(found.held.tolist(), found.holders.tolist(), strict=True)) == {
            j: held.count(j) for j in held
        }
        assert found.absent == sum(absence(config, round, 0, k) is not None for k in cohort)
        assert not set(found.negatives.tolist()) & set(held)
        drawn.add(tuple(found.negatives.tolist()))
    assert len(drawn) > 2


# ---- rounds ------------------------------------------------------------------------------------------------


def test_with_all_classes_it_is_full_softmax_to_the_rounding():
    options = {"rounds": 1, "server_momentum": 0.0, "cohort": 5, "num_negatives": NUM_CLASSES}
    ours = train(**options)
    full = run(tiny_config(method="full_softmax", **options), data=tiny_data(), model=tiny_model())
    weights = [len(held) for held in tiny_data().clients]
    bound = STEP * len(weights) * max(weights) / sum(weights)  # of the mean, where all err by a step
    for mine, theirs in [(ours.weight, full.weight), *zip(net(ours), net(full), strict=True)]:
        assert 0 < (mine - theirs).abs().max() < bound


def net(result: Result) -> list[torch.Tensor]:
    return list(result.extractor.state_dict().values())


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path):
    options = {"rounds": 4, "cohort": 4, "dropout_rate": 0.3}
    whole, seen = train(**options), []
    with pytest.raises(Stopped):
        train(**options, out=tmp_path, on_round=seen.append, stop=lambda: len(seen) == 2)
    assert bits(train(**options, out=tmp_path, resume=True)) == bits(whole)


@pytest.mark.exhaustive
def test_two_workers_play_the_same_bits():
    options = {"rounds": 4, "cohort": 4, "dropout_rate": 0.3}
    whole = train(**options)
    together = train(**options, workers=2)
    assert bits(together) == bits(whole) and history(together) == history(whole)


def test_below_the_threshold_the_round_is_tried_again():
    result = train(rounds=6, cohort=4, dropout_rate=0.5, min_clients=3)
    assert any(metrics.attempts > 1 for metrics in result.history)
    assert all(metrics.accepted >= 3 for metrics in result.history)


def test_rows_that_few_of_the_cohort_hold_are_neither_sent_nor_moved():
    options = {"rounds": 1, "cohort": 3, "num_negatives": NUM_CLASSES}
    cohort = draw_cohort(0, 0, 0, 5, 3)
    held = [j for k in cohort for j in CLASSES_HELD[k]]
    few = [j for j in set(held) if held.count(j) < 2]
    all_of_them, left = train(**options), train(**options, min_holders=2)
    before = Player(shared(**options), tiny_data(), tiny_model()).known_rows(torch.arange(NUM_CLASSES))
    assert few and torch.equal(left.weight[few], before[few])
    moved = [j for j in range(NUM_CLASSES) if j not in few]
    assert (left.weight[moved] != before[moved]).any(1).all()
    assert (all_of_them.weight != before).any(1).all()
    saved = all_of_them.summary.traffic["up_rows"] - left.summary.traffic["up_rows"]
    assert saved == 3 * 4 * DIM * len(few)


def test_changes_are_clipped_before_they_are_rounded():
    """The server sees none that it could clip."""
    bound = 0.01
    player = Player(shared(cohort=3, clip_norm=bound), tiny_data(), tiny_model())
    k = draw_cohort(0, 0, 0, 5, 3)[0]
    request = player.request(0, 0, k)
    rows = player.known_rows(request.class_ids)
    sent = player.update(0, 0, k, request, player.extractor.flat.clone(), rows.flatten())
    size, weight = len(sent.rows.flatten()) + NUM_PARAMETERS, sent.num_examples / player.most_images
    assert abs(norm(sent) - bound) < STEP * math.sqrt(size) / weight
    for part in numbers(sent):
        levels = (part.double() * weight + secure_sums.RANGE) / STEP
        assert (levels - levels.round()).abs().max() < 0.05 / weight


def test_what_moves_is_counted_by_kind():
    result = train(rounds=1, cohort=3, dropout_rate=0.0)
    player = Player(shared(cohort=3), tiny_data(), tiny_model())
    rows = len(player.request(0, 0, 0).class_ids)
    key, encrypted, of_seed = 215, 612, 52
    assert result.summary.traffic.bytes == {
        "down_extractor": 3 * 4 * NUM_PARAMETERS,
        "down_rows": 3 * 4 * rows * DIM,
        "up_extractor": 3 * 4 * NUM_PARAMETERS,
        "up_rows": 3 * 4 * rows * DIM,
        "down_union": 3 * 8 * rows,
        "up_union": 3 * 4 * NUM_CLASSES,
        "down_shares": 3 * 2 * 2 * (2 * key + encrypted),
        "up_shares": 3 * 2 * (2 * key + 2 * encrypted + 3 * of_seed),
    }


def test_shares_of_the_keys_of_those_who_never_answer_are_sent_too():
    whole = secure_sums.traffic(10, 4, 5, 0, answers=True)
    two_absent = secure_sums.traffic(10, 4, 5, 2, answers=True)
    gone = secure_sums.traffic(10, 4, 5, 2, answers=False)
    assert two_absent["up_shares"] - whole["up_shares"] == 2 * (324 - 52)
    assert whole["up_shares"] - gone["up_shares"] == 5 * 52
    assert gone["down_shares"] == whole["down_shares"] and gone["up_union"] == 40


def test_a_change_that_does_not_fit_is_left_out_by_name(caplog):
    """Of the net or of class rows: rounding would clip it. A server told to trust sees none to trust."""
    update = Update(0, torch.tensor([2]), torch.zeros(1, 4), torch.zeros(6), 3, 0.5)
    inspection = Inspection(6, 4, 10, 1000.0, math.inf, largest=8.0)
    assert inspection.look(update, update.class_ids).fault == ""
    for name in ("rows", "extractor"):
        getattr(update, name).view(-1)[1] = 8.5
        assert inspection.look(update, update.class_ids).fault == "range"
        getattr(update, name).zero_()
    with pytest.raises(TooFewClients, match="no secure sum takes: is --client-lr or --scale too high"):
        train(client_lr=1e4, trust_updates=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"aggregation": "median"}, "aggregation: expected mean with shared negatives"),
        ({"poison_rate": 0.1}, "poison_rate: expected 0 with shared negatives"),
        ({"wire_dtype": "bfloat16"}, "wire_dtype: expected float32 with shared negatives"),
        ({"cohort": 1024}, "cohort: expected at most 1,023 with shared negatives"),
        (
            {"method": "neg_only"},
            "negatives: expected one of fresh, sticky, mixed with neg_only, got",
        ),
        ({"method": "fedbabu_ss"}, "negatives: expected one of fresh, sticky, mixed with fedbabu_ss"),
    ],
)
def test_what_secure_sums_cannot_do_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        shared(**options)
    if "method" not in options:
        shared(**options, method="full_softmax")  # which has no negatives


def test_what_has_no_effect_beside_them_is_said():
    beside = idle([shared(denominator="holders", trust_updates=True, max_norm_ratio=3.0)])
    assert beside == [
        "trust_updates True has no effect: the server sees no client's changes, but their sum",
        "max_norm_ratio 3.0 has no effect: the server sees no client's changes, but their sum",
        "denominator holders has no effect: all of a cohort have the same class rows",
    ]
    assert idle([tiny_config(min_holders=2)]) == ["min_holders 2 has no effect: negatives are not shared"]
