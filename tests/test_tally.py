"""What a round holds of what comes back: one sum, to the bits that it has where all updates are kept."""

import weakref
from dataclasses import replace

import pytest
import torch
from tiny_federation import tiny_config, tiny_data, tiny_model

from fedss_kernels.federated import run, workers
from fedss_kernels.federated.clients.client import Client
from fedss_kernels.federated.clients.player import Player
from fedss_kernels.federated.messages import Update
from fedss_kernels.federated.server.inspection import Inspection
from fedss_kernels.federated.server.robust import median
from fedss_kernels.federated.server.row_table import SGD
from fedss_kernels.federated.server.server import Server
from fedss_kernels.federated.server.tally import Tally

CLASSES, DIM, PARAMETERS = 9, 3, 5
ASKED = {k: torch.tensor(sorted({0, k, (3 * k) % CLASSES, 8})) for k in (1, 2, 4, 5, 7)}
COUNTS = {1: 3, 2: 5, 4: 2, 5: 11, 7: 7}
INSPECTION = Inspection(PARAMETERS, DIM, max_examples=20, max_norm=1e6, max_norm_ratio=10.0)


def server(**options) -> Server:
    return Server(
        torch.zeros(PARAMETERS),
        CLASSES,
        DIM,
        initial_rows=lambda ids: torch.zeros(len(ids), DIM),
        optimizer=SGD(1.0, 0.5),
        **options,
    )


def updates(**changes) -> dict[int, Update]:
    """changes: what client 4 sends in place of what is right."""
    torch.manual_seed(0)
    found = {
        k: Update(k, ids, torch.randn(len(ids), DIM), torch.randn(PARAMETERS), COUNTS[k], loss=1.0)
        for k, ids in ASKED.items()
    }
    return found | {4: replace(found[4], **changes)}


def tally(made: Server, *, keeps: bool, clip_norm=None) -> Tally:
    return Tally(made, ASKED, COUNTS, INSPECTION, clip_norm, keeps)


def taken(into: Tally, given: dict[int, Update]) -> Tally:
    for k in into.asked:
        into.take(k, given[k])
    return into


def same(a, b) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("class_ids", "rows", "extractor"))


@pytest.mark.parametrize("denominator", ["cohort", "holders"])
@pytest.mark.parametrize("clip_norm", [None, 2.0])
def test_where_all_count_the_sum_is_that_of_the_kept(denominator, clip_norm):
    given, made = updates(), server(denominator=denominator)
    kept = taken(tally(made, keeps=True, clip_norm=clip_norm), given).gradient()
    assert same(taken(tally(made, keeps=False, clip_norm=clip_norm), given).gradient(), kept)


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({"rows": torch.full((len(ASKED[4]), DIM), 1e4)}, "norm"),  # over the ratio: known at the end alone
        ({"rows": torch.full((len(ASKED[4]), DIM), 1e7)}, "norm"),
        ({"rows": torch.full((len(ASKED[4]), DIM), torch.nan)}, "not finite"),
        ({"extractor": torch.zeros(2)}, "shape"),
        ({"num_examples": 19}, ""),  # not what the server knows of it, and may be true
    ],
)
@pytest.mark.parametrize("denominator", ["cohort", "holders"])
def test_where_one_does_not_count_the_others_are_added_up_once_more(denominator, changes, fault):
    given, made = updates(**changes), server(denominator=denominator)
    first = taken(tally(made, keeps=False), given)
    assert first.faults() == dict.fromkeys(ASKED, "") | {4: fault} and first.gradient() is None
    again = taken(first.again(), given)
    assert list(again.asked) == [k for k in ASKED if k != 4 or not fault]
    assert same(again.gradient(), taken(tally(made, keeps=True), given).gradient())
    assert same(again.gradient(), made.aggregate([given[k] for k in again.asked]))


def test_an_update_is_gone_once_it_is_taken_and_is_known_by_its_images_and_its_loss():
    into, given = tally(server(), keeps=False), updates()
    alive = []
    for k in ASKED:
        update = given.pop(k)
        alive += [weakref.ref(update), weakref.ref(update.rows), weakref.ref(update.extractor)]
        into.take(k, update)
        del update
        assert not any(found() is not None for found in alive)
    assert {k: (u.num_examples, u.loss) for k, u in into.counted().items()} == {
        k: (COUNTS[k], 1.0) for k in ASKED
    }


def test_a_median_has_all_of_them():
    made, given = server(statistic=median), updates()
    assert same(taken(tally(made, keeps=True), given).gradient(), made.aggregate(list(given.values())))


# ---- whole runs --------------------------------------------------------------------------------------------


def train(**options):
    settings = {"rounds": 4, "cohort": 4, "max_norm_ratio": 5.0} | options
    return run(tiny_config(**settings), data=tiny_data(), model=tiny_model())


@pytest.mark.parametrize("options", [{}, {"denominator": "holders", "clip_norm": 0.5, "dropout_rate": 0.2}])
def test_a_run_in_which_some_do_not_count_has_the_bits_of_one_that_keeps_all(options, monkeypatch):
    real, played = Client.update, []

    def wrong(self, client, round, *given):
        played.append(client)
        update = real(self, client, round, *given)
        return replace(update, rows=update.rows * 100) if client == 2 and round % 2 else update

    monkeypatch.setattr(Client, "update", wrong)
    kept = train(**options, rounds=8, poison_rate=1e-300)  # nobody is, and all is kept
    in_one_go = len(played)
    added = train(**options, rounds=8)
    assert sum(m.rejected for m in added.history) >= 1 and len(played) > 2 * in_one_go
    assert torch.equal(added.weight, kept.weight)
    assert [(m.loss, m.rejected) for m in added.history] == [(m.loss, m.rejected) for m in kept.history]
    for a, b in zip(added.extractor.parameters(), kept.extractor.parameters(), strict=True):
        assert torch.equal(a, b)


def test_clients_come_together_as_long_as_they_have_few_numbers(monkeypatch):
    monkeypatch.setattr(workers, "TOGETHER", 10)
    assert list(workers._together([5, 6, 7, 8, 9, 10], [3, 7, 1, 11, 4, 6])) == [[5, 6], [7], [8], [9, 10]]
    assert list(workers._together([], [])) == []


@pytest.mark.parametrize("most, together", [(0, 1), (2**20, 4)])
def test_rows_are_selected_when_a_clients_turn_comes_and_are_gone_before_the_next(
    most, together, monkeypatch
):
    """One client at a time, or as many as have few numbers."""
    monkeypatch.setattr(workers, "TOGETHER", most)
    select, update = Server.select, Player.update
    events, rows_alive = [], []

    def selecting(self, class_ids):
        assert events[-1:] == ["select"] or not any(found() is not None for found in rows_alive)
        phi, rows = select(self, class_ids)
        rows_alive.append(weakref.ref(rows))
        events.append("select")
        return phi, rows

    def updating(self, *given):
        events.append("update")
        made = update(self, *given)
        rows_alive.append(weakref.ref(made.rows))
        return made

    monkeypatch.setattr(Server, "select", selecting)
    monkeypatch.setattr(Player, "update", updating)
    train(rounds=2)
    assert events == (["select"] * together + ["update"] * together) * (8 // together)
