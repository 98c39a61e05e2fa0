"""The byte ledger, with every number worked out by hand."""

import csv
from dataclasses import replace

import pytest
from tiny_federation import CLASSES_HELD, DIM, NUM_CLASSES, NUM_PARAMETERS, tiny_config, tiny_data, tiny_model

from fedss_kernels.federated import run
from fedss_kernels.federated.files.run_folder import faults, read_run
from fedss_kernels.federated.ledger import FLOWS, KINDS, Traffic, client_traffic, declare
from fedss_kernels.federated.reports.report import write_run_report
from fedss_kernels.federated.reports.reported_run import Run
from fedss_kernels.federated.server.inspection import BESIDE_OTHERS, explained


def moved(**counts: int) -> Traffic:
    return Traffic(counts)


def everything(down_extractor, down_rows, up_ids, up_extractor, up_rows) -> Traffic:
    return Traffic(dict(zip(FLOWS["travel"], locals().values(), strict=True)))


def test_a_client_of_the_paper():
    """Landmarks with 170 classes and 64 dimensions, and an extractor of 3 million parameters.

    phi: 4 * 3,000,000 = 12,000,000 each way; rows: 4 * 170 * 64 = 43,520 each way; ids: 8 * 170 = 1,360 up.
    """
    traffic = client_traffic(3_000_000, 170, 64)
    assert traffic == moved(
        down_extractor=12_000_000, down_rows=43_520, up_ids=1_360, up_extractor=12_000_000, up_rows=43_520
    )
    assert traffic.of("extractor") == 24_000_000
    assert traffic.of("rows") == 87_040
    assert traffic.classification == 88_400
    assert traffic.total == 24_088_400


def test_full_softmax_sends_no_ids_and_16_bit_numbers_halve():
    assert client_traffic(10, 5, 2, sends_ids=False) == everything(40, 40, 0, 40, 40)
    assert client_traffic(10, 5, 2, dtype="bfloat16") == everything(20, 20, 40, 20, 20)


def test_traffic_adds_kind_by_kind():
    total = everything(1, 2, 3, 4, 5) + everything(10, 20, 30, 40, 50)
    assert total == everything(11, 22, 33, 44, 55) and total.total == 165
    both = moved(down_seed=8, up_rows=1) + moved(up_rows=2, up_ids=3).times(2)
    assert both == moved(down_seed=8, up_rows=5, up_ids=6)
    assert (both.of("rows"), both.of("extractor"), both["down_rows"]) == (5, 0, 0)
    assert both.classification == 11 and both.total == 19, "a seed does not grow with the classes"
    assert [kind.name for kind in both.kinds] == ["rows", "ids", "seed"]
    assert Traffic.none(["up_rows"]) == moved(up_rows=0) and Traffic().total == 0


@pytest.mark.parametrize("flow", ["down_ids", "up_seed", "sideways_rows", "rows", "up_latent"])
def test_what_is_no_flow_is_refused(flow):
    with pytest.raises(ValueError, match=f"no such flow: {flow}; a direction and one of extractor, rows, id"):
        Traffic({flow: 1})


def test_rows_known_from_a_seed_cost_the_seed_and_those_at_home_nothing():
    """1000 numbers of the net each way; whatever the number of rows is."""
    for num_rows in (3, 10**6):
        of_seed = client_traffic(1000, num_rows, 64, rows="seed")
        assert of_seed == moved(down_extractor=4000, down_seed=8, up_extractor=4000)
        silent = client_traffic(1000, num_rows, 64, rows="seed", answers=False)
        assert silent == moved(down_extractor=4000, down_seed=8, up_extractor=0)
        at_home = client_traffic(1000, num_rows, 64, rows="home", dtype="bfloat16")
        assert at_home == moved(down_extractor=2000, up_extractor=2000)
        assert of_seed.classification == at_home.classification == 0
        assert client_traffic(0, num_rows, 64, rows="home").total == 0, "local training"
    with pytest.raises(ValueError, match="rows: expected one of travel, seed, home, none, got 'elsewhere'"):
        client_traffic(1, 1, 1, rows="elsewhere")


def test_a_kind_is_declared_once():
    assert declare(KINDS["rows"]) == KINDS["rows"]
    with pytest.raises(ValueError, match="there is a kind rows already"):
        declare(replace(KINDS["rows"], label="others"))


@pytest.mark.parametrize("method", ["fedss", "neg_only", "pos_only", "full_softmax"])
def test_a_run_counts_what_each_client_moved(method, tmp_path):
    """Every client plays every round; |S_k| is |P|, |P| + 2, or all 7 classes."""
    rounds, held = 2, [len(classes) for classes in CLASSES_HELD]
    config = tiny_config(
        method=method, rounds=rounds, cohort=len(held), num_negatives=2, out=tmp_path / "run"
    )
    result = run(config, data=tiny_data(), model=tiny_model())
    sizes = {
        "fedss": [p + 2 for p in held],
        "neg_only": [p + 2 for p in held],
        "pos_only": held,
        "full_softmax": [NUM_CLASSES] * len(held),
    }[method]
    phi = rounds * len(held) * NUM_PARAMETERS * 4
    rows = rounds * sum(sizes) * DIM * 4
    ids = 0 if method == "full_softmax" else rounds * sum(sizes) * 8
    assert result.summary.traffic == everything(phi, rows, ids, phi, rows)
    full_rows = rounds * len(held) * NUM_CLASSES * DIM * 4
    assert result.summary.full_traffic == everything(phi, full_rows, 0, phi, full_rows)
    assert result.summary.mean_class_set == sum(sizes) / len(sizes)
    assert result.history[-1].bytes_so_far == 2 * phi + 2 * rows + ids

    with (tmp_path / "run" / "ledger.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(int(line["round"]), int(line["client"])) for line in lines] == [
        (t, k) for t in (1, 2) for k in range(len(held))
    ]
    assert [int(line["num_rows"]) for line in lines] == sizes * rounds
    for kind in ("down_extractor", "down_rows", "up_ids", "up_extractor", "up_rows"):
        assert sum(int(line[kind]) for line in lines) == result.summary.traffic[kind]


@pytest.mark.parametrize("method", ["fedbabu", "fedbabu_ss"])
def test_of_a_head_that_is_known_from_the_seed_the_seed_alone_moves(method, tmp_path):
    """8 bytes down for each client of each round, and the net both ways; there is no column for rows."""
    held, rounds = len(CLASSES_HELD), 2
    config = tiny_config(method=method, rounds=rounds, cohort=held, out=tmp_path / "run")
    result = run(config, data=tiny_data(), model=tiny_model())
    phi = rounds * held * NUM_PARAMETERS * 4
    traffic = moved(down_extractor=phi, down_seed=rounds * held * 8, up_extractor=phi)
    assert result.summary.traffic == traffic and traffic.classification == 0
    full_rows = rounds * held * NUM_CLASSES * DIM * 4
    assert result.summary.full_traffic == everything(phi, full_rows, 0, phi, full_rows)
    with (tmp_path / "run/ledger.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0])[6:] == ["down_extractor", "down_seed", "up_extractor"]
    assert {line["down_seed"] for line in lines} == {"8"} and len(lines) == rounds * held
    assert read_run(tmp_path / "run") == (result.config, result.history, result.summary)
    write_run_report(tmp_path, Run(*read_run(tmp_path / "run")))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<td>the seed of the class rows, down</td><td>0.008</td>" in page


def test_faults_are_counted_the_most_frequent_first(tmp_path):
    config = tiny_config(rounds=8, cohort=5, poison_rate=0.4, out=tmp_path)
    summary = run(config, data=tiny_data(), model=tiny_model()).summary
    with (tmp_path / "ledger.csv").open(newline="") as file:
        kinds = [line["fault"] for line in csv.DictReader(file) if line["outcome"] == "rejected"]
    said = faults(tmp_path)
    assert dict(said) == {kind: kinds.count(kind) for kind in set(kinds)}
    assert sum(count for _, count in said) == summary.rejected > 8
    assert [count for _, count in said] == sorted((count for _, count in said), reverse=True)
    words = explained(said)
    assert all(f"{count} {BESIDE_OTHERS[kind]}" in words for kind, count in said)
