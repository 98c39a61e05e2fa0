"""A method whose parts are others from round to round: of a growing net the last block is trained."""

import csv
import dataclasses

import pytest
import torch
from layered_net import BLOCK, SIZES, STEM, layered_net
from tiny_federation import DIM, NUM_CLASSES, tiny_config, tiny_data
from torch import Tensor

from fedss_kernels.federated import ConfigError, Stopped, run
from fedss_kernels.federated.algorithms import METHODS
from fedss_kernels.federated.algorithms.parts import Part, Parts
from fedss_kernels.federated.clients.player import Player
from fedss_kernels.federated.fedavg_round import Simulation

ROUNDS_EACH = 2
ROUNDS = 6


class Growing:
    """Two rounds for each block, the stem's with the first's. Client 2 does without the first."""

    def __init__(self, settings, num_blocks: int) -> None:
        assert settings.rounds == ROUNDS and num_blocks == len(SIZES)

    def stage(self, round: int) -> int:
        return round // ROUNDS_EACH

    def whole(self, round: int) -> Parts:
        last = 1 + round // ROUNDS_EACH
        first = 0 if last == 1 else last
        parts = [Part.FROZEN if i < first else Part.TRAINED if i <= last else Part.ABSENT for i in range(4)]
        return Parts(parts, Part.TRAINED)

    def parts(self, round: int, attempt: int, client: int) -> Parts:
        whole = self.whole(round)
        if client != 2 or whole.blocks[1] is not Part.FROZEN:
            return whole
        return Parts((whole.blocks[0], Part.ABSENT, *whole.blocks[2:]), Part.TRAINED)


@pytest.fixture(autouse=True)
def growing(monkeypatch):
    method = dataclasses.replace(METHODS["full_softmax"], name="growing", by_block=True, by_round=Growing)
    monkeypatch.setitem(METHODS, "growing", method)


def config(**options):
    return tiny_config(**({"method": "growing", "rounds": ROUNDS, "cohort": 5} | options))


def train(model=None, **options):
    model = model or layered_net()
    stop_after, seen, resume = options.pop("stop_after", None), [], options.pop("resume", False)
    return run(
        config(**options),
        data=tiny_data(),
        model=model,
        on_round=seen.append,
        resume=resume,
        stop=None if stop_after is None else lambda: seen[-1].round == stop_after,
    )


def bits(result) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in [result.weight, *result.extractor.state_dict().values()]]


def moved(before: Tensor, after: Tensor) -> list[bool]:
    """Of each block whether its numbers are others."""
    pairs = zip(before.split(SIZES), after.split(SIZES), strict=True)
    return [not torch.equal(a, b) for a, b in pairs]


@pytest.mark.parametrize("options", [{}, {"aggregation": "median"}, {"server_optimizer": "adagrad"}])
def test_a_round_trains_its_blocks_and_what_was_frozen_never_moves_again(options):
    simulation = Simulation(config(**options), Player(config(**options), tiny_data(), layered_net()))
    for round in range(ROUNDS):
        before = simulation.server.extractor.clone()
        simulation.play(round)
        last = 1 + round // ROUNDS_EACH
        expected = [i == last or (i == 0 and last == 1) for i in range(4)]
        assert moved(before, simulation.server.extractor) == expected


def test_what_is_absent_is_not_read():
    player = Player(config(), tiny_data(), layered_net())
    phi = player.extractor.flat.clone()
    for round, client, absent in ((0, 0, {2, 3}), (2, 0, {3}), (4, 0, set()), (4, 2, {1})):
        request = player.request(round, 0, client)
        rows = player.known_rows(request.class_ids).flatten()
        without = torch.cat([p * torch.nan if i in absent else p for i, p in enumerate(phi.split(SIZES))])
        found = player.update(round, 0, client, request, without, rows)
        same = player.update(round, 0, client, request, phi, rows)
        assert torch.equal(found.extractor, same.extractor) and found.extractor.isfinite().all()
        assert len(found.extractor) == (STEM + BLOCK if round == 0 else BLOCK)


def test_the_net_of_a_round_is_measured(monkeypatch):
    """Without blocks that are still to come, and with those that a client did without."""
    net, images = layered_net(), tiny_data().test_images
    player = Player(config(), tiny_data(), layered_net())
    with torch.no_grad():
        for round in range(ROUNDS):
            expected = net.blocks[: 2 + round // ROUNDS_EACH](images / 255)
            found = torch.cat(player.embed(player.extractor.flat.clone(), round))
            torch.testing.assert_close(found, expected)


def test_the_ledger_has_what_comes_and_what_goes_back(tmp_path):
    train(out=tmp_path, dropout_rate=0.2)
    with (tmp_path / "ledger.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert any(line["outcome"] == "dropped" for line in lines)
    for line in lines:
        stage, client = (int(line["round"]) - 1) // ROUNDS_EACH, int(line["client"])
        frozen = [0, STEM + BLOCK * (client != 2), STEM + BLOCK + BLOCK * (client != 2)][stage]
        trained = STEM + BLOCK if stage == 0 else BLOCK
        assert int(line["down_frozen"]) == 4 * frozen
        assert int(line["down_extractor"]) == 4 * trained
        assert int(line["up_extractor"]) == 4 * trained * (line["outcome"] == "accepted")
        assert int(line["down_rows"]) == 4 * NUM_CLASSES * DIM


def test_an_answer_of_another_rounds_length_is_left_out(monkeypatch):
    update = Player.update

    def of_the_round_before(self, round, attempt, client, request, phi, given):
        return update(self, max(round - 1, 0) if client == 1 else round, attempt, client, request, phi, given)

    monkeypatch.setattr(Player, "update", of_the_round_before)
    history = train().history
    assert [metrics.rejected for metrics in history] == [0, 0, 1, 0, 0, 0]  # later blocks are of one size


@pytest.mark.parametrize("stop_after", [2, 3])
def test_a_run_goes_on_in_the_middle_and_where_another_block_begins(stop_after, tmp_path):
    whole = train()
    with pytest.raises(Stopped):
        train(out=tmp_path, stop_after=stop_after)
    assert bits(train(out=tmp_path, resume=True)) == bits(whole)


# ---- one that was edited between a stop and a resume -------------------------------------------------------

T, F, A = Part.TRAINED, Part.FROZEN, Part.ABSENT


@dataclasses.dataclass
class Edited:
    """Of a net of five blocks one is trained in each round, and some clients do without others."""

    trained: object
    without: object = lambda round, attempt, client: False
    stages: object = lambda round: round

    def stage(self, round: int) -> int:
        return self.stages(round)

    def whole(self, round: int) -> Parts:
        return Parts([T if i == self.trained(round) else F for i in range(5)], Part.TRAINED)

    def parts(self, round: int, attempt: int, client: int) -> Parts:
        whole = self.whole(round)
        if not self.without(round, attempt, client):
            return whole
        return Parts([A if part is F and i else part for i, part in enumerate(whole.blocks)], Part.TRAINED)


def only(place, round):
    """The last block in all rounds but this one."""
    return lambda asked: place if asked == round else 3


EDITS = {
    "who does without": [{"without": lambda r, a, c: c % 2 == 1}, {"without": lambda r, a, c: c % 4 == 1}],
    "at another attempt": [{"without": lambda r, a, c: a == 0}, {"without": lambda r, a, c: True}],
    "who does without late": [{}, {"without": lambda r, a, c: r == 191}],
    "an odd round of many": [{"trained": only(0, 67)}, {"trained": only(1, 67)}],
    "a round that is no third": [{"trained": only(0, 151)}, {"trained": only(1, 151)}],
    "of this number of blocks": [
        {"trained": lambda round: [0, 1, 2, 3][round % 4]},
        {"trained": lambda round: [3, 1, 2, 0][round % 4]},
    ],
    "the stage": [{}, {"stages": lambda round: 2 * round}],
}


@pytest.mark.parametrize("edit", EDITS)
def test_one_that_was_edited_is_not_gone_on_with(edit, tmp_path, monkeypatch):
    def go_on(schedule, **options):
        def by_round(config, num_blocks):
            assert num_blocks == 5  # as one that was written for this net
            return Edited(**{"trained": lambda round: 3} | schedule)

        edited = dataclasses.replace(METHODS["growing"], by_round=by_round)
        monkeypatch.setitem(METHODS, "growing", edited)
        return train(rounds=200, cohort=2, eval_every=200, out=tmp_path, model=layered_net(4), **options)

    before, after = EDITS[edit]
    with pytest.raises(Stopped):
        go_on(before, stop_after=1)
    words = "another method: not as it was: what the method computes$"
    with pytest.raises(ValueError, match=words):
        go_on(after, resume=True, stop_after=2)
    with pytest.raises(Stopped):
        go_on(before, resume=True, stop_after=2)


def test_what_is_wrong_for_one_client_alone_is_refused_before_the_first_round(monkeypatch, tmp_path):
    class Wrong(Growing):
        def parts(self, round: int, attempt: int, client: int) -> Parts:
            return Parts([T] * 4, Part.TRAINED) if (round, client) == (5, 3) else self.whole(round)

    wrong = dataclasses.replace(METHODS["growing"], by_round=Wrong)
    monkeypatch.setitem(METHODS, "growing", wrong)
    with pytest.raises(
        ConfigError, match=r"by_round of growing: parts\(5, 0, 3\): expected blocks as in whole"
    ):
        train(out=tmp_path)
    assert not [*tmp_path.glob("*.csv")]
