"""`negatives = "shared"` over Flower's messages: sums that the server has to open, and what it sees else."""

from dataclasses import replace

import pytest
import torch
from later import later
from tiny_federation import CLASSES_HELD, NUM_CLASSES

from fedss_kernels.federated import ConfigError, TooFewClients
from fedss_kernels.federated.clients.common_classes import CommonClassSets

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedss-kernels[flower]'")

from flwr.app import Error
from test_flower import (
    NODES,
    federated,
    grid_of,
    ledger,
    model_of,
    nobody_waits,
    only,
    outcomes,
    simulated,
    simulated_without,
    with_numbers,
    with_words,
)

from fedss_kernels.federated.flower.federate import Settings
from fedss_kernels.federated.flower.summing import SummingNodes
from fedss_kernels.federated.flower.wire import NUMBERS, WORDS, packed, unpacked

__all__ = ["nobody_waits"]  # for all of these too

SHARED = {"negatives": "shared", "num_negatives": 1, "min_clients": 3, "cohort": 4, "rounds": 2}
ALL = SHARED | {"cohort": NODES, "rounds": 1}


# ---- the same bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"rounds": 1},
        {"dropout_rate": 0.3, "min_holders": 2, "clip_norm": 0.05},
        *later({"cohort": 5, "dropout_rate": 0.3, "rounds": 6}),
        *later({"min_holders": 3, "server_optimizer": "adagrad"}),
        *later({"cohort": 2, "min_clients": 2, "client_momentum": 0.5}),
    ],
    ids=str,
)
def test_a_federation_has_the_bits_of_the_simulation(options, tmp_path):
    """Drawn drop-outs are in the first sum and not in the second, where the others take their masks out."""
    over_nodes, in_one_place = (made(tmp_path, **SHARED | options) for made in (federated, simulated))
    assert model_of(over_nodes) == model_of(in_one_place)
    assert [m.loss for m in over_nodes.history] == [m.loss for m in in_one_place.history]
    assert ledger(tmp_path / "federated") == ledger(tmp_path / "simulated")


@pytest.mark.exhaustive
def test_a_run_that_goes_on_has_the_bits_of_one_that_never_stopped(tmp_path):
    federated(tmp_path, **SHARED | {"rounds": 1, "checkpoint_every": 1, "lr_decay": "constant"})
    gone_on = federated(tmp_path, resume=True, **SHARED | {"checkpoint_every": 1, "lr_decay": "constant"})
    assert model_of(gone_on) == model_of(simulated(tmp_path, **SHARED))


# ---- what the server sees ----------------------------------------------------------------------------------


def test_a_node_says_nothing_of_its_classes_and_changes_but_behind_masks(tmp_path):
    grid, seen = grid_of(), {}

    def look(kind, reply):
        numbers = {n: (a.dtype, a.shape) for n, a in reply.content.get(NUMBERS, {}).items()}
        seen.setdefault(kind, []).append((set(reply.content[WORDS]), numbers, reply))
        return reply

    grid.spoil = dict.fromkeys(grid.nodes, look)
    federated(tmp_path, grid, **ALL)
    said = {kind: (answers[0][0], answers[0][1]) for kind, answers in seen.items()}
    rows = int(ledger(tmp_path / "federated")[0]["num_rows"])
    assert said == {
        "query.roll": ({"client", "images"}, {}),
        "query.keys": ({"keys"}, {}),
        "query.shares": ({"shares"}, {}),
        "query.union": (set(), {"masked": ("int32", (NUM_CLASSES,))}),
        "query.open": ({"shares"}, {}),
        "train": ({"images", "loss"}, {"masked": ("int32", (rows * 4 + 148,))}),
    }
    assert [len(answers) for answers in seen.values()] == [5, 5, 5, 5, 10, 5]
    for kind in ("query.union", "train"):  # where they would be 0, or all near 2^21
        sent = [unpacked(reply.content[NUMBERS]["masked"]) for _, _, reply in seen[kind]]
        numbers = torch.cat(sent)
        assert len(numbers.unique()) == len(numbers) and numbers.double().std() > 2**29


@pytest.mark.parametrize("min_holders", [1, *later(2)])
def test_the_first_sum_counts_holders_only_where_that_is_asked_for(min_holders, tmp_path, monkeypatch):
    counts = [sum(j in held for held in CLASSES_HELD) for j in range(NUM_CLASSES)]
    real, found = SummingNodes._common, []

    def noted(nodes, total, *others):
        found.extend(total.tolist())
        return real(nodes, total, *others)

    monkeypatch.setattr(SummingNodes, "_common", noted)
    federated(tmp_path, **ALL | {"min_holders": min_holders})
    if min_holders > 1:
        assert found == counts
    else:
        assert found[6] == 0 and min(found[:6]) > 2**10  # of a number below it the chance is 2^-22


@pytest.mark.exhaustive
def test_nodes_are_told_who_is_few_where_rows_of_few_stay(tmp_path):
    grid, told = grid_of(), {}

    class Listening(type(grid)):
        def push_messages(self, messages):
            for message in messages:
                if message.metadata.message_type == "train":
                    told.update({n: a.shape[0] for n, a in message.content[NUMBERS].items()})
            return super().push_messages(messages)

    grid.__class__ = Listening
    federated(tmp_path, grid, **ALL | {"min_holders": 2})
    counts = [sum(j in held for held in CLASSES_HELD) for j in range(NUM_CLASSES)]
    assert (told["held"], told["few"], told["negatives"]) == (6, counts.count(1), 1)


# ---- who drops out -----------------------------------------------------------------------------------------


def simulated_among(clients, tmp_path):
    """One round in which the others are gone before anybody knows their classes."""
    among = CommonClassSets.among
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            CommonClassSets,
            "among",
            lambda sets, cohort, round, attempt: among(sets, clients, round, attempt),
        )
        patch.setattr(
            "fedss_kernels.federated.fedavg_round.absence",
            lambda config, round, attempt, k: None if k in clients else "dropped",
        )
        return simulated(tmp_path, **ALL)


GONE = {
    "an error": (lambda reply: Error(5, "Error: Node Unavailable"), "dropped"),
    "nothing": (lambda reply: None, "late"),
    "a refusal": (lambda reply: with_words(refused="no disk")(reply), "dropped"),
}


@pytest.mark.parametrize(
    "kind, how",
    [
        ("query.union", "an error"),
        *later(
            *(
                (kind, how)
                for kind in ("query.keys", "query.shares", "query.union")
                for how in GONE
                if (kind, how) != ("query.union", "an error")
            )
        ),
    ],
)
def test_a_node_that_is_gone_before_the_class_set_is_there_is_as_if_it_had_not_been_drawn(
    kind, how, tmp_path
):
    change, outcome = GONE[how]
    grid = grid_of()
    grid.spoil[900 - 7 * 2] = only(kind, change)  # client 2
    result = federated(tmp_path, grid, **ALL)
    assert outcomes(tmp_path / "federated", 2) == [(outcome, "")]
    assert result.summary.accepted == NODES - 1
    assert model_of(result) == model_of(simulated_among([0, 1, 3, 4], tmp_path))


@pytest.mark.parametrize(
    "how",
    ["an error", *later("nothing", "a refusal")],
)
def test_a_node_that_never_sends_its_changes_costs_these_alone(how, tmp_path):
    change, outcome = GONE[how]
    grid = grid_of()
    grid.spoil[900 - 7 * 2] = only("train", change)
    result = federated(tmp_path, grid, **ALL)
    assert outcomes(tmp_path / "federated", 2) == [(outcome, "")]
    assert model_of(result) == model_of(simulated_by_all_but(2, tmp_path))


def simulated_by_all_but(client, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_flower.simulated", lambda path, **options: simulated(path, **ALL | options))
        return simulated_without(client, tmp_path)


@pytest.mark.exhaustive
def test_a_node_that_is_gone_once_its_changes_are_there_costs_nothing(tmp_path):
    grid, opened = grid_of(), []

    def late(kind, reply):
        opened.append(kind)
        return None if kind == "query.open" and "train" in opened else reply

    grid.spoil[900 - 7 * 2] = late
    result = federated(tmp_path, grid, **ALL)
    assert result.summary.accepted == NODES
    assert model_of(result) == model_of(simulated(tmp_path, **ALL))


def test_below_the_threshold_the_round_is_tried_again_with_new_keys(tmp_path, caplog):
    grid = grid_of()
    for client in (0, 1, 2):
        asked_of = []

        def fails(kind, reply, asked_of=asked_of):
            asked_of.append(kind)
            return Error(1, "out of memory") if kind == "train" and asked_of.count(kind) == 1 else reply

        grid.spoil[900 - 7 * client] = fails
    result = federated(tmp_path, grid, **ALL)
    assert "a secure sum was lost: 2 clients are left, and 3 are needed" in caplog.text
    assert outcomes(tmp_path / "federated", 1) == [("dropped", ""), ("accepted", "")]
    assert outcomes(tmp_path / "federated", 3) == [("discarded", ""), ("accepted", "")]
    assert result.history[0].attempts == 2 and result.summary.accepted == NODES
    assert [kind for node, kind in grid.sent if node == 900].count("query.keys") == 2
    first, second = (line for line in ledger(tmp_path / "federated") if line["client"] == "3")
    assert first["up_rows"] == second["up_rows"] != "0"  # it came, in vain


@pytest.mark.exhaustive
def test_a_node_that_is_started_again_has_no_part_in_the_attempt_and_one_in_the_next(tmp_path, caplog):
    grid = grid_of()

    def restarted(kind, reply):
        if kind == "query.shares":
            grid.states.pop(900 - 7 * 2, None)  # what client 2 kept
        return reply

    grid.spoil[900] = restarted
    options = ALL | {"rounds": 2}
    federated(tmp_path, grid, **options)
    assert "client 2 does not answer: it refused: no keys of round 1, attempt 0" in caplog.text
    assert outcomes(tmp_path / "federated", 2)[0] == ("dropped", "")


# ---- who lies ----------------------------------------------------------------------------------------------

SPOILT = {
    "changes of another shape": (
        with_numbers(masked=packed(torch.zeros(3, dtype=torch.int32))),
        "shape",
    ),
    "changes in the clear": (with_numbers(masked=packed(torch.zeros(176))), "dtype"),
    "a loss that is NaN": (with_words(loss=float("nan")), "loss"),
    "images that no client has": (with_words(images=10**9), "examples"),
    "its own word": (with_words(fault="range"), "range"),
    "a word of its own": (with_words(fault="because"), "shares"),
    "no word": (with_words(fault="", loss=float("nan")), "shares"),
    "words": (with_words(fault=["range"]), "shares"),
}


@pytest.mark.parametrize(
    "name",
    [
        "a loss that is NaN",
        *later(*(name for name in SPOILT if name[:6] != "a loss")),
    ],
)
def test_what_a_node_says_wrong_is_left_out_by_name_and_taken_out_of_the_sum(name, tmp_path):
    change, fault = SPOILT[name]
    grid = grid_of()
    grid.spoil[900 - 7 * 2] = only("train", change)
    result = federated(tmp_path, grid, **ALL)
    assert outcomes(tmp_path / "federated", 2) == [("rejected", fault)]
    assert model_of(result) == model_of(simulated_by_all_but(2, tmp_path))


@pytest.mark.exhaustive
def test_changes_that_do_not_fit_are_left_out_by_the_node_itself(tmp_path):
    for made in (federated, simulated):
        with pytest.raises(TooFewClients, match="no secure sum takes: is --client-lr or --scale too high"):
            made(tmp_path, **SHARED | {"client_lr": 1e4})


@pytest.mark.exhaustive
def test_numbers_that_are_no_changes_lose_the_sum_and_the_round_is_tried_again(tmp_path, caplog):
    grid, asked = grid_of(), []

    def rubbish(kind, reply):
        asked.append(kind)
        if kind == "train" and asked.count(kind) == 1:
            size = reply.content[NUMBERS]["masked"].shape
            reply.content[NUMBERS]["masked"] = packed(torch.ones(size, dtype=torch.int32))
        return reply

    grid.spoil[900] = rubbish
    result = federated(tmp_path, grid, **ALL)
    assert "some client's changes are no numbers that can be added" in caplog.text
    assert result.history[0].attempts == 2 and result.summary.accepted == NODES


def test_by_whom_a_sum_is_lost_is_not_asked_again(tmp_path):
    grid = grid_of()

    def garbled(kind, reply):
        if kind == "query.shares":
            reply.content[WORDS]["shares"] = [share[::-1] for share in reply.content[WORDS]["shares"]]
        return reply

    grid.spoil[900 - 7 * 2] = garbled
    result = federated(tmp_path, grid, **ALL | {"rounds": 2})
    assert outcomes(tmp_path / "federated", 2) == [("rejected", "shares")] * 3  # of them one was lost
    assert outcomes(tmp_path / "federated", 3)[0] == ("discarded", "")
    assert result.summary.accepted == 2 * (NODES - 1)
    assert [kind for node, kind in grid.sent if node == 900 - 7 * 2].count("query.keys") == 1


@pytest.mark.exhaustive
def test_a_server_that_leaves_out_a_nodes_classes_gets_no_changes_of_it(tmp_path, monkeypatch):
    real = SummingNodes._common

    def without_the_first(nodes, *arguments):
        common = real(nodes, *arguments)
        return replace(common, held=common.held[1:], holders=common.holders[1:])

    monkeypatch.setattr(SummingNodes, "_common", without_the_first)
    federated(tmp_path, **ALL)
    of_all = [outcomes(tmp_path / "federated", k)[0][0] for k in range(NODES)]
    assert of_all == ["dropped" if 0 in held else "accepted" for held in CLASSES_HELD]


# ---- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, least",
    [({}, 3), ({"min-clients": 2}, 3), ({"cohort": 5, "min-clients": 2}, 3), ({"cohort": 1}, 2)],
)
def test_a_threshold_is_more_than_half_of_the_cohort(options, least):
    settings = {"nodes": 5, "out": "runs/mine", "cohort": 4, "negatives": "shared"} | options
    words = f"min_clients: expected at least {least}, more than half of the cohort, with shared negatives"
    with pytest.raises(ConfigError, match=words):
        Settings.of(settings)
    if least <= settings["cohort"]:
        Settings.of(settings | {"min-clients": least})
