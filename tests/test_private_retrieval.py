"""Class rows from two servers: what each sees, what a client gets, what moves, and rounds that go by them."""

import math
import secrets
from collections import Counter
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from test_every_method import bits, history
from tiny_federation import DIM, NUM_CLASSES, NUM_PARAMETERS, tiny_config, tiny_data, tiny_model

from fedss_kernels.federated import (
    Config,
    ConfigError,
    Result,
    Stopped,
    private_retrieval,
    run,
    secure_sums,
    stopwatch,
)
from fedss_kernels.federated.algorithms import METHODS
from fedss_kernels.federated.cli import output
from fedss_kernels.federated.clients.player import Player
from fedss_kernels.federated.cohort import draw_cohort
from fedss_kernels.federated.idle_settings import idle
from fedss_kernels.federated.loading import dearer
from fedss_kernels.federated.stopwatch import Stopwatch
from fedss_kernels.xor_rows import xor_rows

STEP = 2 * secure_sums.RANGE / secure_sums.LEVELS


def private(**options) -> Config:
    return tiny_config(**({"requests": "pir"} | options))


def train(config: Config, **given) -> Result:
    return run(config, data=tiny_data(), model=tiny_model(), **given)


# ---- what is asked, and answered ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_classes", [1, 7, 8, 9, 100])
def test_the_rows_come_bit_for_bit(num_classes, dtype):
    g = torch.Generator().manual_seed(0)
    table = torch.randint(256, (num_classes, 5 * dtype.itemsize), dtype=torch.uint8, generator=g).view(dtype)
    class_ids = torch.arange(num_classes).repeat(2)  # one row may be asked for twice
    of_a, of_b = private_retrieval.queries(class_ids, num_classes)
    found = private_retrieval.opened(xor_rows(table, of_a), xor_rows(table, of_b))
    assert found.dtype == dtype and torch.equal(found.view(torch.uint8), table[class_ids].view(torch.uint8))


def test_who_wants_nothing_asks_for_nothing():
    asked = private_retrieval.queries(torch.empty(0, dtype=torch.int64), 9)
    assert all(vectors.shape == (0, 2) for vectors in asked)


@pytest.mark.parametrize("num_classes", [3, 8])
def test_a_server_sees_the_same_whatever_is_wanted(num_classes):
    """All 256 vectors that may be drawn: to either server each goes once, for every row that is wanted."""
    once = Counter(range(256))
    for wanted in range(num_classes):
        seen: tuple[list[int], list[int]] = [], []
        for drawn in range(256):
            asked = private_retrieval.queries(
                torch.tensor([wanted]), num_classes, lambda count, drawn=drawn: bytes([drawn] * count)
            )
            for to, vector in zip(seen, asked, strict=True):
                to.append(vector.item())
        assert Counter(seen[0]) == Counter(seen[1]) == once
        assert {a ^ b for a, b in zip(*seen, strict=True)} == {1 << wanted}  # only together do they tell


def test_what_a_server_sees_is_uniform_by_bits_and_by_bytes():
    """Chi-square over the 256 values of each byte of 20,000 draws, for a row that is always the same."""
    source, count = np.random.default_rng(0), 20_000
    asked = private_retrieval.queries(torch.full((count,), 11), 24, source.bytes)
    for seen in asked:
        for column in seen.numpy().T:
            counts = np.bincount(column, minlength=256)
            statistic = ((counts - count / 256) ** 2 / (count / 256)).sum()
            assert abs(statistic - 255) < 5 * math.sqrt(2 * 255)
    ones = (asked[0].numpy()[:, 1] >> 3 & 1) + (asked[1].numpy()[:, 1] >> 3 & 1)
    assert (ones == 1).all()  # the wanted bit, in one of the two


def test_bits_are_the_systems_and_leave_the_runs_generators_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert private_retrieval.queries.__defaults__ == (secrets.token_bytes,)
    first, second = (private_retrieval.queries(torch.arange(40), 1000)[0] for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


# ---- bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_classes, num_rows, up, down",
    [(2028, 110, 55_880, 56_320), (11_318, 100, 283_000, 51_200)],  # Landmarks, SOP; D = 64
)
def test_bytes_by_the_closed_form(num_classes, num_rows, up, down):
    """Two bit vectors up and two rows down for each row: of 56 + 56 and 283 + 51 KB within 5%."""
    moved = private_retrieval.traffic(num_classes, num_rows, 64)
    assert moved.bytes == {"up_queries": up, "down_answers": down}
    assert up == 2 * num_rows * math.ceil(num_classes / 8) and down == 2 * num_rows * 64 * 4
    half = private_retrieval.traffic(num_classes, num_rows, 64, "bfloat16")
    assert half.bytes == {"up_queries": up, "down_answers": down // 2}


def test_what_moves_is_counted_by_kind():
    config = private(rounds=1, cohort=3)
    result, player = train(config), Player(config, tiny_data(), tiny_model())
    rows = sum(len(player.request(0, 0, k).class_ids) for k in draw_cohort(0, 0, 0, 5, 3))
    key, encrypted, of_seed = 215, 612, 52
    assert result.summary.traffic.bytes == {
        "down_extractor": 3 * 4 * NUM_PARAMETERS,
        "up_extractor": 3 * 4 * NUM_PARAMETERS,
        "up_rows": 3 * 4 * NUM_CLASSES * DIM,
        "up_queries": 2 * rows,
        "down_answers": 2 * rows * 4 * DIM,
        "down_shares": 3 * 2 * (2 * key + encrypted),
        "up_shares": 3 * (2 * key + 2 * encrypted + 3 * of_seed),
    }
    assert result.seconds["answers"] > 0


def test_who_never_answers_asks_and_adds_nothing():
    """Of the cohort as many as are absent have shares of their keys opened by the others."""
    result = train(private(rounds=6, cohort=4, dropout_rate=0.5))
    absent = [metrics for metrics in result.history if metrics.dropped == 2 and metrics.attempts == 1]
    assert absent
    for metrics in absent:
        assert metrics.traffic["up_rows"] == 2 * 4 * NUM_CLASSES * DIM
        assert metrics.traffic["up_shares"] == 4 * (2 * 215 + 3 * 612) + 2 * (2 * 52 + 2 * 324)
        assert metrics.traffic["up_queries"] == 2 * metrics.mean_class_set * 4


def test_a_stage_inside_another_is_counted_once(monkeypatch):
    """Begun at 0 and 1, ended at 3 and 7; then another from 8 to 9."""
    watch = Stopwatch()
    monkeypatch.setattr(stopwatch.time, "perf_counter", iter([0.0, 1.0, 3.0, 7.0, 8.0, 9.0]).__next__)
    with watch("select"), watch("answers"):
        pass
    with watch("files"):
        pass
    seconds = {stage: spent for stage, spent in watch.seconds.items() if spent}
    assert seconds == {"select": 5.0, "answers": 2.0, "files": 1.0}


# ---- rounds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedss", "pos_only", "neg_only", "fedaws"])
def test_but_for_the_rounding_a_run_is_the_plain_one_bit_for_bit(method):
    """Rows that coast, drop-outs and all: with sums that round nothing there is no difference."""
    options = {"method": method, "rounds": 5, "cohort": 4, "dropout_rate": 0.3}
    with mock.patch.object(secure_sums, "quantised", lambda numbers, weight, rng: numbers):
        ours = train(private(**options))
    plain = train(tiny_config(**options))
    assert bits(ours) == bits(plain)
    losses = [[metrics.loss for metrics in result.history] for result in (ours, plain)]
    assert losses[0] == losses[1]


def test_a_round_is_the_plain_one_to_the_rounding():
    options = {"rounds": 1, "server_momentum": 0.0, "cohort": 5}
    ours, plain = train(private(**options)), train(tiny_config(**options))
    counts = [len(held) for held in tiny_data().clients]
    bound = STEP * len(counts) * max(counts) / sum(counts)  # of the mean, where all err by a step
    nets = (list(of.extractor.state_dict().values()) for of in (ours, plain))
    for mine, theirs in [(ours.weight, plain.weight), *zip(*nets, strict=True)]:
        assert 0 < (mine - theirs).abs().max() < bound


def test_rows_that_nobody_asked_for_are_not_moved():
    """The sum is 0 there: it is the union of what the cohort asked for that the server sees."""
    config = private(rounds=1, cohort=2, num_negatives=1)
    player = Player(config, tiny_data(), tiny_model())
    asked = {j for k in draw_cohort(0, 0, 0, 5, 2) for j in player.request(0, 0, k).class_ids.tolist()}
    before = player.known_rows(torch.arange(NUM_CLASSES))
    moved = (train(config).weight != before).any(1)
    assert moved.nonzero()[:, 0].tolist() == sorted(asked) and len(asked) < NUM_CLASSES


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path):
    options = {"rounds": 4, "cohort": 4, "dropout_rate": 0.3}
    whole, seen = train(private(**options)), []
    with pytest.raises(Stopped):
        train(private(**options, out=tmp_path), on_round=seen.append, stop=lambda: len(seen) == 2)
    assert bits(train(private(**options, out=tmp_path), resume=True)) == bits(whole)


@pytest.mark.exhaustive
def test_two_workers_play_the_same_bits():
    options = {"rounds": 4, "cohort": 4, "dropout_rate": 0.3}
    whole, together = train(private(**options)), train(private(**options, workers=2))
    assert bits(together) == bits(whole) and history(together) == history(whole)


# ---- what cannot be ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"negatives": "shared"}, "requests: expected plain with shared negatives, where a cohort has one"),
        ({"denominator": "holders"}, "denominator: expected cohort with pir requests, where nobody knows"),
        (
            {"class_store": "rows"},
            "class_store: expected none with pir requests, whose servers read all rows",
        ),
        ({"aggregation": "median"}, "aggregation: expected mean with pir requests"),
        ({"poison_rate": 0.1}, "poison_rate: expected 0 with pir requests"),
        ({"wire_dtype": "bfloat16"}, "wire_dtype: expected float32 with pir requests"),
        ({"cohort": 1024}, "cohort: expected at most 1,023 with pir requests"),
        ({"requests": "PIR"}, "requests: expected one of plain, pir, got 'PIR'"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        private(**options)


def test_what_has_no_effect_is_said():
    assert idle([private(trust_updates=True, min_holders=2)]) == [
        "trust_updates True has no effect: the server sees no client's changes, but their sum",
        "min_holders 2 has no effect: negatives are not shared",
    ]
    for method in ("full_softmax", "fedbabu", "fedbabu_ss", "fedper", "simclr", "centralized"):
        config = tiny_config(method=method, requests="pir")
        assert not config.private and not config.sums
        words = "requests pir has no effect: what clients ask for says nothing of what they hold"
        assert words in idle([config]), method


def test_where_all_rows_are_fewer_bytes_a_line_says_so(caplog):
    """7 rows of 4 numbers are 112 bytes; each in private 2 (1 + 16) = 34, so it is so from 3.3 rows on.

    Clients hold 2, 3, 2, 2 and 3 classes: 2.4 on average, and 3.4 with one more, 3.8 with |P| - 1 more.
    """
    data = tiny_data()
    assert not dearer(tiny_config(num_negatives=7), data)
    assert not dearer(private(method="pos_only"), data) and not dearer(private(num_negatives=0), data)
    assert dearer(private(num_negatives=1), data)
    equal = {"method": "neg_only", "num_negatives": 0}
    assert not dearer(private(**equal), data) and dearer(private(**equal, equal_pushes=True), data)
    train(private(num_negatives=2, rounds=1))
    said = "requests pir: 4 of 7 rows from two servers are 0 KB for a client and round, all rows 0 KB: "
    assert said + "full_softmax moves less and tells no more" in caplog.text


def test_commands_say_it_once(capsys, monkeypatch):
    def load_data(config, on_found, on_progress):
        on_found(tiny_data().found)
        return tiny_data()

    monkeypatch.setattr(output, "load_data", load_data)
    config = private(num_negatives=7, model="own")
    output.read_data(config, [config, replace(config, seed=1)])
    assert capsys.readouterr().out.count("glyphs: requests pir: 7 of 7 rows from two servers") == 1


def test_it_is_for_the_methods_whose_requests_tell():
    told = [name for name in METHODS if tiny_config(method=name, requests="pir").private]
    assert told == ["fedss", "pos_only", "neg_only", "fedaws"]
