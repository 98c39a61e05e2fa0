"""What every method with clients stands: a stop, a crash, processes, drop-outs, rubbish, a class store."""

import csv
import dataclasses
from pathlib import Path

import pytest
import torch
from layered_net import layered_net
from tiny_federation import NUM_PARAMETERS, tiny_config, tiny_data, tiny_model
from torch.nn.functional import cross_entropy, normalize

from fedss_kernels.federated import ConfigError, Result, Stopped, cli, run
from fedss_kernels.federated.algorithms import METHODS
from fedss_kernels.federated.algorithms.parts import Part
from fedss_kernels.federated.clients.client import Client
from fedss_kernels.federated.clients.player import Player
from fedss_kernels.federated.cohort import draw_cohort
from fedss_kernels.federated.files.round_metrics import RoundMetrics
from fedss_kernels.federated.fine_tuning import Tuning, measures, personalise
from fedss_kernels.federated.randomness import Purpose, generator
from fedss_kernels.federated.reports.remarks import remarks
from fedss_kernels.federated.testing import bits, history

FEDERATED = [name for name, method in METHODS.items() if not (method.pooled or method.split)]
# One for each place where class rows and the net can stand between two rounds; the others take minutes.
KINDS = ["fedss", "fedbabu_ss", "fedrep", "local_only", "simclr"]


def quickly(names):
    """Every method, those not among `names` in the exhaustive tests."""
    return [pytest.param(name, marks=[] if name in names else pytest.mark.exhaustive) for name in FEDERATED]


SOME, ONE = quickly(KINDS), quickly(KINDS[:1])


def train(method: str, **options) -> Result:
    resume, seen = options.pop("resume", False), []
    stop_after, on_round = options.pop("stop_after", None), options.pop("on_round", seen.append)
    return run(
        tiny_config(**({"rounds": 6, "local_epochs": 2, "method": method} | options)),
        data=tiny_data(),
        model=layered_net() if METHODS[method].by_round else tiny_model(),
        on_round=on_round,
        resume=resume,
        stop=None if stop_after is None else lambda: seen[-1].round == stop_after,
    )


def files(folder: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for name in ("metrics.csv", "ledger.csv"):
        with (folder / name).open(newline="") as file:
            found[name] = [{k: v for k, v in line.items() if k != "seconds"} for line in csv.DictReader(file)]
    return found


@pytest.mark.parametrize("method", SOME)
def test_a_run_that_was_stopped_and_one_that_crashed_go_on_bit_for_bit(method, tmp_path):
    whole = train(method, out=tmp_path / "whole")
    with pytest.raises(Stopped):
        train(method, out=tmp_path / "stopped", stop_after=3)
    stopped = train(method, out=tmp_path / "stopped", resume=True)

    def crash(metrics: RoundMetrics) -> None:
        if metrics.round == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(method, out=tmp_path / "crashed", checkpoint_every=2, on_round=crash)
    crashed = train(method, out=tmp_path / "crashed", checkpoint_every=2, resume=True)
    for result, name in ((stopped, "stopped"), (crashed, "crashed")):
        assert bits(result) == bits(whole) and files(tmp_path / name) == files(tmp_path / "whole")


@pytest.mark.parametrize("method", ONE)
@pytest.mark.exhaustive
def test_two_workers_play_the_same_bits(method):
    options = {"rounds": 3, "eval_every": 1, "wire_dtype": "bfloat16", "dropout_rate": 0.3, "cohort": 4}
    alone, together = train(method, **options), train(method, workers=2, **options)
    assert bits(together) == bits(alone) and history(together) == history(alone)


@pytest.mark.parametrize("method", SOME)
def test_the_rounds_go_on_without_those_who_drop_out_or_are_late(method):
    options = {"dropout_rate": 0.4, "deadline": 1.2, "min_clients": 2, "cohort": 4, "rounds": 8}
    result = train(method, **options)
    lost = sum(metrics.dropped + metrics.late for metrics in result.history)
    assert lost > 0 and any(metrics.attempts > 1 for metrics in result.history)
    assert all(metrics.accepted >= 2 for metrics in result.history)
    assert bits(result) == bits(train(method, **options))


@pytest.mark.parametrize("method", [each for each in SOME if each.values != ("local_only",)])
def test_rubbish_is_left_out(method):
    result = train(method, poison_rate=0.4, cohort=4, rounds=8)
    assert sum(metrics.rejected for metrics in result.history) > 0
    assert result.summary.not_finite_since is None
    assert all(part.isfinite().all() for part in result.extractor.state_dict().values())


@pytest.mark.parametrize("method", SOME)
def test_rubbish_that_is_trusted_ends_no_run(method):
    result = train(method, poison_rate=0.9, trust_updates=True, cohort=4, rounds=4)
    assert result.summary.rejected == 0
    assert (result.summary.not_finite_since is None) == (method == "local_only")  # which sends nothing


@pytest.mark.parametrize("method", SOME)
def test_what_travels_as_bfloat16_is_rounded_and_nothing_else(method):
    whole, rounded = train(method), train(method, wire_dtype="bfloat16")
    same = bits(whole) == bits(rounded)
    assert same == (method == "local_only")
    if METHODS[method].rows is Part.KNOWN:
        assert torch.equal(whole.weight, rounded.weight)


@pytest.mark.parametrize("method", SOME)
def test_a_class_store_changes_no_bit(method, tmp_path):
    if not METHODS[method].stores:
        with pytest.raises(ConfigError, match="class_store: expected none"):
            train(method, class_store=tmp_path / "store")
        return
    whole = train(method)
    options = {"out": tmp_path / "run", "class_store": tmp_path / "store", "checkpoint_every": 2}
    with pytest.raises(Stopped):
        train(method, stop_after=3, **options)
    stored = train(method, resume=True, **options)
    assert history(stored) == history(whole)
    if METHODS[method].personal:
        assert bits(stored) == bits(whole)
    else:
        assert torch.equal(stored.table[:], whole.weight)


# ---- what clients have at home -----------------------------------------------------------------------------


def players(result: Result) -> set[int]:
    config = result.config
    return {k for r in range(config.rounds) for k in draw_cohort(config.seed, r, 0, 5, config.cohort)}


def test_a_head_at_home_is_nobody_elses_and_no_traffic():
    result = train("fedper", rounds=1)
    heads = [result.homes.model(k)[1] for k in range(5)]
    assert all(torch.equal(head, result.weight) != (k in players(result)) for k, head in enumerate(heads))
    assert len({head.numpy().tobytes() for head in heads}) == 4  # two took no part
    assert {*result.summary.traffic.bytes} == {"down_extractor", "up_extractor"}
    assert result.summary.traffic.total == 3 * 2 * 4 * NUM_PARAMETERS


def test_a_head_goes_on_where_the_clients_last_round_left_it(monkeypatch):
    """Each client's head as it is given is what it had after the last of its rounds that counted."""
    given, update = [], Player.update

    def watch(self, round, attempt, client, request, phi, numbers):
        found = update(self, round, attempt, client, request, phi, numbers)
        given.append((client, numbers.clone(), found.kept))
        return found

    monkeypatch.setattr(Player, "update", watch)
    result = train("fedper", rounds=4)
    last = {k: result.weight.flatten() for k in range(5)}
    for client, before, after in given:
        assert torch.equal(before, last[client]) and not torch.equal(before, after)
        last[client] = after
    assert all(torch.equal(result.homes.read(k), head) for k, head in last.items())


def test_an_answer_that_does_not_count_changes_nothing_at_home(monkeypatch):
    monkeypatch.setattr("fedss_kernels.federated.server.inspection.Inspection.verdicts", _refuse_the_first)
    result = train("fedper", rounds=1)
    first, *others = sorted(players(result))
    assert torch.equal(result.homes.model(first)[1], result.weight)
    assert not any(torch.equal(result.homes.model(k)[1], result.weight) for k in others)


def _refuse_the_first(self, findings, net_norm):
    return ["norm", *(finding.fault for finding in findings[1:])]


def test_a_client_by_itself_sends_nothing_and_trains_its_own_net():
    result = train("local_only", cohort=5, rounds=2)
    assert result.summary.traffic.total == 0
    nets = [result.homes.model(k)[0] for k in range(5)]
    assert len({net.numpy().tobytes() for net in nets}) == 5
    first = tiny_model().state_dict()  # the one that they began with is still what the server has
    assert all(torch.equal(value, first[name]) for name, value in result.extractor.state_dict().items())


def test_two_rounds_by_itself_are_sgd_on_its_own_images():
    """Against plain autograd: whatever the others do, a client's net is that of its own steps."""
    result = train("local_only", cohort=5, rounds=2, local_epochs=1)
    data, k = tiny_data(), 2
    net, rows = tiny_model(), result.weight.clone().requires_grad_()
    for round in range(2):
        order = generator(0, round, 0, k, Purpose.BATCHES).permutation(len(data.clients[k]))
        for batch in data.clients[k][torch.from_numpy(order)].split(3):
            embeddings = normalize(net(data.images[batch] / 255), dim=1)
            loss = cross_entropy(5.0 * embeddings @ normalize(rows, dim=1).T, data.labels[batch])
            moved = [*net.parameters(), rows]
            with torch.no_grad():
                for p, gradient in zip(moved, torch.autograd.grad(loss, moved), strict=True):
                    p -= 0.2 * gradient
    phi, head = result.homes.model(k)
    expected = torch.cat([p.detach().flatten() for p in net.parameters()])
    torch.testing.assert_close(phi, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head, rows.detach(), rtol=1e-4, atol=1e-5)


def test_one_body_epoch_of_fedrep_is_a_round_of_fedbabu():
    fedrep = train("fedrep", head_epochs=0, local_epochs=1, rounds=1)
    fedbabu = train("fedbabu", local_epochs=1, rounds=1)
    assert bits(fedrep)[:-1] == bits(fedbabu)
    assert all(torch.equal(fedrep.homes.model(k)[1], fedrep.weight) for k in range(5))


def test_in_a_head_epoch_of_fedrep_the_net_rests_and_in_a_body_epoch_the_head(monkeypatch):
    seen, step = [], Client._step

    def watch(self, images, target, objective, *others):
        before = self.extractor.flat.clone(), objective.rows.detach().clone()
        loss = step(self, images, target, objective, *others)
        after = self.extractor.flat, objective.rows.detach()
        seen.append(tuple(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))
        return loss

    monkeypatch.setattr(Client, "_step", watch)
    train("fedrep", head_epochs=2, local_epochs=1, rounds=1, cohort=1, client_momentum=0.9)
    assert {*seen} == {(False, True), (True, False)}
    head_steps = seen.count((False, True))
    assert head_steps == 2 * seen.count((True, False)) and all(not net for net, _ in seen[:head_steps])


def test_what_clients_keep_is_in_the_runs_model(tmp_path):
    result = train("local_only", rounds=1, out=tmp_path)
    found = torch.load(tmp_path / "model.pt", weights_only=True)
    assert {*found["clients"].tolist()} == players(result)
    for k, head, body in zip(found["clients"].tolist(), found["heads"], found["bodies"], strict=True):
        phi, rows = result.homes.model(k)
        assert torch.equal(head, rows) and torch.equal(body, phi)


@pytest.mark.parametrize("method", [name for name in FEDERATED if METHODS[name].personal])
def test_each_client_is_tested_with_its_own_model(method):
    result = train(method, rounds=40, cohort=5, client_lr=0.2)
    assert result.summary.own_top1 > 0.8  # of two or three classes each, which training tells apart


# ---- what the model is worth to each client ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedbabu", "fedper", "local_only"])
def test_a_run_measures_what_its_model_is_worth_to_each_client(method, tmp_path):
    result = train(method, personalise_epochs=3, personalise_rate=0.1, out=tmp_path)
    people = personalise(
        result.config,
        tiny_data(),
        (result.extractor, result.weight),
        Tuning(epochs=(3,), rate=0.1),
        own=result.homes and result.homes.model,
    )
    assert result.summary.personal_top1 == pytest.approx(measures(people)["personalised"])
    assert result.summary.accuracy == result.summary.personal_top1
    if result.homes:
        assert result.summary.initial_top1 == pytest.approx(result.summary.own_top1)
    last = files(tmp_path)["metrics.csv"][-1]
    assert float(last["restricted_top1"]) == result.summary.restricted_top1


@pytest.mark.parametrize(
    "options, words",
    [
        ([], "--method: nobody knows which test images of glyphs are whose"),
        (
            ["--partition=iid", "--num-clients=4", "--rates=0.1,0.2"],
            "--personalise-epochs: expected at least 1 with fedper and a holdout",
        ),
    ],
)
def test_a_comparison_in_which_a_method_cannot_be_measured_is_refused_in_a_line(
    options, words, tmp_path, capsys
):
    small = [
        "--glyph-classes=12",
        "--glyph-writers=4",
        "--cohort=2",
        f"--cache-dir={tmp_path / 'cache'}",
        *options,
    ]
    out = tmp_path / "out"
    assert cli.main(["compare", "--methods=fedavg,fedper", *small, f"--out={out}"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"fedss compare: {words}") and not list(out.glob("*"))


def test_fine_tuning_that_runs_away_is_said():
    options = {"method": "fedavg", "personalise_epochs": 1, "personalise_part": "full"}
    for rate in (0.01, 1e38):
        result = train(personalise_rate=rate, client_lr=0.01, similarity="dot", **options)
        lost = result.summary.personal_not_finite
        assert (lost > 0) == (rate == 1e38)
        said = [line for line in remarks(result.summary) if f"not finite for {lost} clients" in line]
        assert bool(said) == bool(lost) and all("--personalise-rate too high?" in line for line in said)


def test_where_it_cannot_be_measured_the_run_is_refused():
    nobody = dataclasses.replace(tiny_data(), test_clients=())
    for options, option in (
        ({"method": "fedper"}, "method"),
        ({"personalise_epochs": 2}, "personalise_epochs"),
    ):
        with pytest.raises(ConfigError, match=f"{option}: nobody knows which test images of tiny are whose"):
            run(tiny_config(**options), data=nobody, model=tiny_model())
    held_out = dataclasses.replace(nobody, newcomers=((torch.tensor([0, 1]), torch.tensor([0])),))
    with pytest.raises(
        ConfigError, match="personalise_epochs: expected at least 1 with fedper and a holdout"
    ):
        run(tiny_config(method="fedper"), data=held_out, model=tiny_model())
    result = run(tiny_config(method="fedper", personalise_epochs=2), data=held_out, model=tiny_model())
    assert result.summary.own_top1 is None and result.summary.personal_top1 in (0.0, 1.0)


@pytest.mark.parametrize(
    "options", [{"method": "fedper"}, {"method": "local_only"}, {"personalise_epochs": 1}]
)
def test_a_run_that_is_judged_by_test_images_of_clients_that_have_none_is_refused(options):
    data = dataclasses.replace(tiny_data(), test_clients=[[]] * 5)
    words = "test_clients: expected test images of some of the 5 clients, got none"
    with pytest.raises(ConfigError, match=words):
        run(tiny_config(**options), data=data, model=tiny_model())
    newcomers = dataclasses.replace(data, newcomers=[([0, 1], [2])])
    if "method" in options:
        with pytest.raises(ConfigError, match="personalise_epochs: expected at least 1 with .* holdout"):
            run(tiny_config(**options), data=newcomers, model=tiny_model())
    result = run(tiny_config(**options | {"personalise_epochs": 1}), data=newcomers, model=tiny_model())
    assert result.summary.accuracy is not None
