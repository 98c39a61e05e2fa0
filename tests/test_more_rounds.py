"""A run goes on to another number of rounds than it began with: to the bits of one that began with that."""

import csv
import json

import pytest
import torch
from tiny_federation import tiny_config, tiny_data, tiny_model

from fedss_kernels.federated import CheckpointError, Stopped, run
from fedss_kernels.federated.files.run_folder import read_config, read_run


def train(folder, rounds, *, store=False, resume=False, stop_after=None, **options):
    seen = []
    rows = folder / "rows" if store else None
    config = tiny_config(rounds=rounds, out=folder / "run", class_store=rows, checkpoint_every=3, **options)
    stop = None if stop_after is None else lambda: seen[-1].round == stop_after
    return run(config, data=tiny_data(), model=tiny_model(), on_round=seen.append, resume=resume, stop=stop)


def bits(result) -> list[bytes]:
    tensors = [result.table[:], *result.extractor.state_dict().values()]
    return [tensor.numpy().tobytes() for tensor in tensors]


def trained_in(folder) -> list[list[str]]:
    """The ledger, and of the metrics what training decides: an end is measured wherever it was."""
    with (folder / "run/ledger.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    with (folder / "run/metrics.csv").open(newline="") as file:
        metrics = list(csv.DictReader(file))
    keys = [
        key
        for key in metrics[0]
        if key not in ("top1", "map_at_10", "recall_at_1", "recall_at_10", "seconds")
    ]
    return lines + [[line[key] for key in keys] for line in metrics]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"store": True},
        {"store": True, "method": "fedaws", "spreadout_margin": 2.0},
        {"server_optimizer": "adagrad"},
        {"method": "centralized"},
        {"warmup_rounds": 6},
        {"warmup_rounds": 5, "lr_decay": "cosine"},  # it does not decay before
        {"warmup_rounds": 4, "lr_decay": "step"},
    ],
)
def test_a_finished_run_goes_on_bit_for_bit(options, tmp_path):
    whole = train(tmp_path / "whole", 7, **options)
    first = train(tmp_path / "more", 4, **options)
    more = train(tmp_path / "more", 7, resume=True, **options)
    assert [metrics.round for metrics in more.history] == [1, 2, 3, 4, 5, 6, 7]
    assert bits(more) == bits(whole) != bits(first)
    assert trained_in(tmp_path / "more") == trained_in(tmp_path / "whole")
    config, history, summary = read_run(tmp_path / "more/run")
    assert (config.rounds, summary.rounds, len(history)) == (7, 7, 7)
    assert summary.top1 == whole.summary.top1 and summary.full_traffic == whole.summary.full_traffic


@pytest.mark.parametrize("rounds", [3, 9])
def test_so_does_one_that_was_stopped(rounds, tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path / "stopped", 6, stop_after=2)
    assert bits(train(tmp_path / "stopped", rounds, resume=True)) == bits(train(tmp_path / "whole", rounds))


def test_stopped_on_the_way_to_more_it_is_not_finished_and_goes_on(tmp_path):
    """Before its first checkpoint on the way only its config.json has the new number."""
    train(tmp_path, 4)
    config = tmp_path / "run/config.json"
    config.write_text(config.read_text().replace('"rounds": 4', '"rounds": 7'))
    (tmp_path / "run/summary.json").unlink()
    assert read_run(tmp_path / "run")[0].rounds == 7
    with pytest.raises(Stopped):
        train(tmp_path, 7, resume=True, stop_after=5)
    assert not (tmp_path / "run/summary.json").exists() and json.loads(config.read_text())["rounds"] == 7
    with pytest.raises(CheckpointError, match="rounds: 5 are done, expected at least 6, got 5"):
        train(tmp_path, 5, resume=True)
    assert bits(train(tmp_path, 7, resume=True)) == bits(train(tmp_path / "whole", 7))


def test_rounds_that_are_done_cannot_be_undone_nor_have_had_other_rates(tmp_path):
    train(tmp_path, 4, lr_decay="cosine", warmup_rounds=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for rounds, words in {
        3: "rounds: 4 are done, expected at least 5, got 3",
        # cos(pi/3) = 1/2 and cos(pi/6) = sqrt(3)/2, of a rate of 0.2
        7: "rounds: 4 there, 7 here: as lr_decay is cosine, round 3, which is done, had a rate of 0.15 and "
        "would have had 0.186603; the run of 4 is finished: start a run of 7 anew",
    }.items():
        with pytest.raises(CheckpointError) as refused:
            train(tmp_path, rounds, resume=True, lr_decay="cosine", warmup_rounds=1)
        assert str(refused.value) == words
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_with_steps_there_may_be_more_until_the_first(tmp_path):
    """Half of 7 rounds, rounded down, are at the full rate, so 3 of them may be of a run of 9."""
    for done, name in ((3, "before"), (4, "after")):
        with pytest.raises(Stopped):
            train(tmp_path / name, 7, stop_after=done, lr_decay="step")
    more = train(tmp_path / "before", 9, resume=True, lr_decay="step")
    assert bits(more) == bits(train(tmp_path / "whole", 9, lr_decay="step"))
    words = "is step, round 4, which is done, had a rate of 0.02 and would have had 0.2; go on with 7, or"
    with pytest.raises(CheckpointError, match=words):
        train(tmp_path / "after", 9, resume=True, lr_decay="step")


def test_where_something_is_in_the_way_of_more_rounds_it_stays_finished(tmp_path):
    """Here the class store, which is opened last."""
    train(tmp_path, 4, store=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "rows").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="holds no class store"):
        train(tmp_path, 7, store=True, resume=True)
    (tmp_path / "elsewhere").rename(tmp_path / "rows")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_that_was_killed_after_its_last_checkpoint_is_finished_by_resuming_it(tmp_path):
    whole = train(tmp_path, 4)
    model = (tmp_path / "run/model.pt").read_bytes()
    for name in ("summary.json", "model.pt"):
        (tmp_path / "run" / name).unlink()
    assert bits(train(tmp_path, 4, resume=True)) == bits(whole)
    found = torch.load(tmp_path / "run/model.pt", weights_only=True)
    assert (
        torch.equal(found["weight"], whole.weight)
        and len(model) == (tmp_path / "run/model.pt").stat().st_size
    )


def test_where_it_was_resumed_from_other_places_is_kept(tmp_path):
    """For what measures the run later; to as many rounds as before, or to more."""
    with pytest.raises(Stopped):
        train(tmp_path, 5, stop_after=3, data_dir=tmp_path / "old")
    for rounds, place in ((5, "new"), (6, "newer")):
        train(tmp_path, rounds, resume=True, data_dir=tmp_path / place)
        assert read_config(tmp_path / "run")[0].data_dir == tmp_path / place
