"""The round loop: against the reference, for its randomness, for what it writes and what it refuses."""

import contextlib
import csv
import dataclasses
import json
import math
import shutil
from html import escape

import pytest
import torch
from later import later
from tiny_federation import (
    CLASSES_HELD,
    IMAGES_OF_EACH,
    NUM_CLASSES,
    UNTRAINED,
    tiny_config,
    tiny_data,
    tiny_model,
)
from torch import nn
from torch.nn.functional import normalize

from fedss_kernels import reference
from fedss_kernels.federated import Config, ConfigError, Result, Stopped, TooFewClients, run
from fedss_kernels.federated.algorithms import METHODS
from fedss_kernels.federated.clients.player import Player, training_device
from fedss_kernels.federated.cohort import draw_cohort
from fedss_kernels.federated.fedavg_round import Simulation
from fedss_kernels.federated.files.run_folder import read_run
from fedss_kernels.federated.learning_rate import learning_rate
from fedss_kernels.federated.lock import InUse, Lock
from fedss_kernels.federated.metrics import retrieval
from fedss_kernels.federated.randomness import Purpose, generator, initial_rows
from fedss_kernels.federated.reports.remarks import remarks
from fedss_kernels.federated.reports.report import write_run_report
from fedss_kernels.federated.reports.reported_run import Run
from fedss_kernels.federated.server.tally import Tally


def train(model: nn.Module | None = None, **options) -> Result:
    return run(tiny_config(**options), data=tiny_data(), model=model or tiny_model())


def bits(result: Result) -> list[torch.Tensor]:
    return [result.weight, *result.extractor.state_dict().values()]


def same_bits(a: Result, b: Result) -> bool:
    return all(torch.equal(x, y) for x, y in zip(bits(a), bits(b), strict=True))


# ---- the reference -----------------------------------------------------------------------------------------


def class_set_of(method: str, positives: torch.Tensor, m: int, rng) -> tuple:
    """(class_ids, denominator, log_expected_count) as the table of methods writes it."""
    if method == "full_softmax":
        return torch.arange(NUM_CLASSES), None, None
    if method == "pos_only":
        return positives, None, None
    negatives = reference.draw_negatives(NUM_CLASSES, positives, m, rng)
    ids, is_negative, log_count = reference.class_set(NUM_CLASSES, positives, negatives)
    if method == "neg_only":
        return ids, is_negative.nonzero().flatten(), log_count[is_negative]
    return ids, None, log_count


def reference_client(config: Config, data, round: int, k: int) -> reference.ClientRound:
    """Client k's round with its negatives and batches drawn from the streams that belong to them."""
    rows, n = data.clients[k], len(data.clients[k])
    rng = generator(config.seed, round, 0, k, Purpose.NEGATIVES)
    ids, denominator, log_count = class_set_of(
        config.method, torch.tensor(CLASSES_HELD[k]), config.num_negatives, rng
    )
    shuffle = generator(config.seed, round, 0, k, Purpose.BATCHES)
    batches = []
    for _ in range(config.local_epochs):
        order = torch.from_numpy(shuffle.permutation(n))
        batches += [order[i : i + config.batch_size] for i in range(0, n, config.batch_size)]
    images = data.images[rows].double() / 255
    return reference.ClientRound(images, data.labels[rows], batches, ids, denominator, log_count)


def reference_run(config: Config, data, model: nn.Module) -> tuple[dict, torch.Tensor]:
    """The whole run in float64, by the reference's rounds."""
    model = model.double()
    phi = {name: value.detach() for name, value in model.named_parameters()}
    weight = initial_rows(
        config.seed, torch.arange(NUM_CLASSES), config.embedding_dim, config.weight_init_scale
    ).double()
    velocity = ({name: torch.zeros_like(value) for name, value in phi.items()}, torch.zeros_like(weight))
    for round in range(config.rounds):
        cohort = draw_cohort(config.seed, round, 0, len(data.clients), config.cohort)
        phi, weight, velocity = reference.federated_round(
            model,
            phi,
            weight,
            velocity,
            [reference_client(config, data, round, k) for k in cohort],
            lr=config.client_lr,
            scale=config.scale,
            server_lr=config.server_lr,
            server_momentum=config.server_momentum,
            denominator=config.denominator,
        )
    return phi, weight


@pytest.mark.parametrize("denominator", ["cohort", "holders"])
@pytest.mark.parametrize("method", ["fedss", "neg_only", "pos_only", "full_softmax"])
def test_three_rounds_equal_the_reference(method, denominator):
    """Three rounds, so that momentum counts; two epochs and batches of 3, so that some batches are ragged."""
    options = {"method": method, "denominator": denominator, "local_epochs": 2, "server_lr": 0.7}
    result = train(**options)
    phi, weight = reference_run(result.config, tiny_data(), tiny_model())
    start = initial_rows(0, torch.arange(NUM_CLASSES), 4, 0.5)
    assert (result.weight - start).norm() > 0.2 * start.norm()  # it went somewhere
    # float32 against float64, over some 30 steps of SGD: a few hundred roundings of 6e-8
    torch.testing.assert_close(result.weight.double(), weight, rtol=2e-5, atol=2e-5)
    for name, value in phi.items():
        torch.testing.assert_close(result.extractor.state_dict()[name].double(), value, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("local_epochs", [1, 2])
def test_the_loss_is_the_mean_over_images_as_they_are_trained_on(local_epochs):
    """With a rate of almost 0 it is the reference's loss of all of the cohort's images, weighed alike."""
    result = train(method="fedss", rounds=1, cohort=5, client_lr=1e-9, local_epochs=local_epochs)
    data, model = tiny_data(), tiny_model()
    weight = initial_rows(0, torch.arange(NUM_CLASSES), 4, 0.5)
    total = 0.0
    for k in range(5):
        client = reference_client(result.config, data, 0, k)
        total += reference.sampled_softmax_loss(
            model(client.images.float()),
            weight[client.class_ids],
            torch.searchsorted(client.class_ids, client.labels),
            None,
            client.log_expected_count,
            scale=5.0,
            reduction="sum",
        ).item()
    images = sum(n * len(held) for n, held in zip(IMAGES_OF_EACH, CLASSES_HELD, strict=True))
    assert result.history[0].loss == pytest.approx(total / images, rel=1e-5)


def test_numbers_may_travel_as_bfloat16():
    """Both ways: a client of lr 0 sends back nothing, and everything that moved is a bfloat16."""
    exact, rounded = (train(method="fedss", wire_dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert not torch.equal(exact.weight, rounded.weight)
    torch.testing.assert_close(exact.weight, rounded.weight, rtol=0.05, atol=0.02)
    for a, b in zip(exact.history, rounded.history, strict=True):
        assert 2 * b.traffic.of("rows") == a.traffic.of("rows")
        assert 2 * b.traffic.of("extractor") == a.traffic.of("extractor")
        assert b.traffic.of("ids") == a.traffic.of("ids")
    assert rounded.summary.full_traffic.total * 2 == exact.summary.full_traffic.total


def test_what_arrives_is_what_was_sent_as_bfloat16(monkeypatch):
    config = tiny_config(wire_dtype="bfloat16")
    simulation = Simulation(config, Player(config, tiny_data(), tiny_model()))
    received, update = [], simulation.player.client.update

    def listen(k, round, attempt, request, phi, rows, *others):
        received.extend((phi, rows))
        return update(k, round, attempt, request, phi, rows, *others)

    def taken(tally, k, update):
        received.extend((update.rows, update.extractor))
        take(tally, k, update)

    take = Tally.take
    monkeypatch.setattr(simulation.player.client, "update", listen)
    monkeypatch.setattr(Tally, "take", taken)
    simulation.play(0)
    assert len(received) == 4 * config.cohort
    for numbers in received:
        assert numbers.dtype == torch.float32 and torch.equal(numbers, numbers.bfloat16().float())
    weight = simulation.server.weight[:]
    assert not torch.equal(weight, weight.bfloat16().float()), "the server's own numbers are not rounded"


def test_training_learns():
    result = train(method="full_softmax", rounds=60, cohort=5, client_lr=0.02, eval_every=60)
    assert result.history[-1].loss < 0.1 * result.history[0].loss
    # The classes are well apart, and class 6 is in nobody's data: 6 of the 7 are all that can be learned.
    assert result.summary.top1 >= 6 / 7


# ---- randomness --------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    first, again, other = train(), train(), train(seed=1)
    assert same_bits(first, again)
    assert [dataclasses.replace(m, seconds=0.0) for m in first.history] == [
        dataclasses.replace(m, seconds=0.0) for m in again.history
    ]
    assert not same_bits(first, other)


def test_a_model_that_draws_is_a_function_of_the_seed_and_leaves_the_callers_stream_alone():
    dropout = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), *tiny_model()[1:])
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = train(dropout)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert same_bits(first, train(dropout))
    assert not same_bits(first, train())


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        assert torch.get_default_dtype() == dtype
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "around",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: default_dtype(torch.float64),
        lambda: torch.device("meta"),
    ],
    ids=["no_grad", "inference_mode", "autocast", "float64", "device"],
)
def test_what_torch_is_told_around_a_run_changes_nothing(around):
    """As in a notebook, some cells before."""
    data, model, config = tiny_data(), tiny_model(), tiny_config(rounds=1)
    with around():
        found = run(config, data=data, model=model)
    assert same_bits(found, run(config, data=data, model=model))


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        seen = []
        run(
            tiny_config(rounds=1, threads=1),
            data=tiny_data(),
            model=tiny_model(),
            on_round=lambda metrics: seen.append(torch.get_num_threads()),
        )
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_cohort_is_distinct_clients_in_order():
    cohorts = [draw_cohort(0, t, 0, 20, 8) for t in range(500)]
    for cohort in cohorts:
        assert cohort == sorted(set(cohort)) and len(cohort) == 8 and 0 <= cohort[0] and cohort[-1] < 20
    counts = torch.bincount(torch.tensor(cohorts).flatten(), minlength=20)
    # Each client is in a cohort with probability 0.4: 200 times of 500, sd sqrt(500 * 0.4 * 0.6) = 11.
    assert (counts - 200).abs().max() < 5 * 11
    assert draw_cohort(0, 3, 0, 20, 20) == list(range(20))


def test_a_cohort_depends_on_seed_round_and_attempt():
    drawn = {tuple(draw_cohort(*key, 1000, 10)) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}
    assert len(drawn) == 4
    assert draw_cohort(0, 1, 0, 1000, 10) == draw_cohort(0, 1, 0, 1000, 10)


@pytest.mark.parametrize(
    "decay, expected",
    [
        ("constant", [1, 2, 3, 4, 4, 4, 4, 4]),
        ("linear", [1, 2, 3, 4, 4, 3, 2, 1]),
        ("cosine", [1, 2, 3, 4, 4, 2 + 2 * 0.5**0.5, 2, 2 - 2 * 0.5**0.5]),
    ],
)
def test_the_rate_rises_and_decays(decay, expected):
    """Four rounds of warm-up to 4, then quarters of the way down: cos(pi/4) = sqrt(1/2)."""
    config = Config(rounds=8, client_lr=4, warmup_rounds=4, lr_decay=decay)
    assert [learning_rate(config, t) for t in range(8)] == pytest.approx(expected)


@pytest.mark.parametrize(
    "rounds, warmup, expected",
    [
        (8, 0, [4, 4, 4, 4, 0.4, 0.4, 0.04, 0.04]),
        (7, 0, [4, 4, 4, 0.4, 0.4, 0.04, 0.04]),  # 3 is the half, 5 three quarters, rounded down
        (8, 2, [2, 4, 4, 4, 0.4, 0.4, 0.04, 0.04]),  # counted over all rounds, those of the warm-up too
        (8, 5, [0.8, 1.6, 2.4, 3.2, 4, 0.4, 0.04, 0.04]),  # which has no steps
    ],
)
def test_the_rate_falls_by_steps(rounds, warmup, expected):
    config = Config(rounds=rounds, client_lr=4, warmup_rounds=warmup, lr_decay="step")
    assert [learning_rate(config, t) for t in range(rounds)] == pytest.approx(expected)


# ---- what comes out ----------------------------------------------------------------------------------------


def test_it_evaluates_every_few_rounds_and_at_the_end():
    history = train(rounds=5, eval_every=2).history
    assert [m.round for m in history] == [1, 2, 3, 4, 5]
    assert [m.round for m in history if m.top1 is not None] == [2, 4, 5]
    assert [m.round for m in history if m.map_at_10 is not None] == [5]


def test_a_retrieval_is_measured_by_map_alone():
    result = run(tiny_config(rounds=4), data=tiny_data("retrieval"), model=tiny_model())
    assert result.config.task == "retrieval"
    assert [m.round for m in result.history if m.map_at_10 is not None] == [2, 4]
    assert all(m.top1 is None for m in result.history)
    assert result.summary.accuracy == result.summary.map_at_10 is not None


def test_the_folder_says_what_the_result_says(tmp_path):
    result = train(out=tmp_path / "run")
    config, history, summary = read_run(tmp_path / "run")
    assert config == result.config and config.data == "own" and config.model == "own"
    assert history == result.history
    assert summary == result.summary


def test_the_saved_model_is_plain_torch(tmp_path):
    result = train(out=tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert set(saved) == {"extractor", "weight"}
    model, data = tiny_model(), tiny_data()
    model.load_state_dict(saved["extractor"])
    embeddings = normalize(model(data.test_images / 255), dim=1)
    predicted = (embeddings @ normalize(saved["weight"], dim=1).T).argmax(dim=1)
    assert (predicted == data.test_labels).double().mean().item() == pytest.approx(result.summary.top1)
    found = retrieval(embeddings, data.test_labels)
    assert found.map_at_r == pytest.approx(result.summary.map_at_10, abs=1e-6)
    assert found.recall_at_1 == pytest.approx(result.summary.recall_at_1, abs=1e-6)
    assert found.recall_at_r == pytest.approx(result.summary.recall_at_10, abs=1e-6)


def test_the_callers_model_is_not_touched():
    model = tiny_model()
    before = [p.clone() for p in model.parameters()]
    train(model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_frozen_parameters_stay_and_do_not_travel():
    model = tiny_model()
    model[1].bias.requires_grad_(False)
    result = train(model)
    assert torch.equal(result.extractor[1].bias, model[1].bias)
    assert not torch.equal(result.extractor[1].weight, model[1].weight)
    assert result.summary.num_parameters == model[1].weight.numel()


# ---- what is refused ---------------------------------------------------------------------------------------


class Counter(nn.Module):
    """A model with a buffer that training changes."""

    def __init__(self):
        super().__init__()
        self.net = tiny_model()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images):
        if self.training:
            self.calls += 1
        return self.net(images)


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 4)), "BatchNorm1d.*GroupNorm"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 5)), r"shape \(2, 4\) .* got \(2, 5\)"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 4).requires_grad_(False)), "parameters to train"),
        (Counter, "changed 'calls'"),
    ],
)
def test_a_model_that_cannot_be_averaged_is_refused(model, message):
    with pytest.raises(ValueError, match=f"^model: .*{message}"):
        train(model())


class HalfDouble(nn.Module):
    """Trains a float64 parameter next to float32 ones."""

    def __init__(self):
        super().__init__()
        self.net = tiny_model()
        self.shift = nn.Parameter(torch.zeros(4, dtype=torch.float64))

    def forward(self, images):
        return self.net(images) + self.shift.float()


def test_parameters_of_another_dtype_are_refused():
    with pytest.raises(ValueError, match="float32 parameters, got torch.float64 in 'shift'"):
        train(HalfDouble())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_net_of_another_dtype_is_refused_before_it_is_tried(dtype):
    with pytest.raises(ValueError, match=f"^model: expected float32 parameters, got {dtype} in "):
        run(tiny_config(), data=tiny_data(), model=tiny_model().to(dtype))


def test_a_net_without_values_is_refused():
    with pytest.raises(
        ValueError, match="^model: expected parameters with values, got .* on the meta device"
    ):
        run(tiny_config(), data=tiny_data(), model=tiny_model().to("meta"))


def test_a_cohort_larger_than_the_federation_is_refused():
    with pytest.raises(ConfigError, match="cohort: expected at most 5, the clients there are, got 6"):
        train(cohort=6)


@pytest.mark.parametrize("option", ["data", "model"])
def test_own_means_handed_over(option):
    data = None if option == "data" else tiny_data()
    with pytest.raises(ConfigError, match=rf"^{option}: .* run\(config, {option}=\.\.\.\)"):
        run(Config(**{option: "own"}, cohort=1), data=data)


def test_a_folder_in_use_is_refused_and_only_an_earlier_runs_files_are_overwritten(tmp_path):
    out = tmp_path / "run"
    train(out=out)
    (out / "notes.txt").write_text("mine")
    before = (out / "metrics.csv").read_text()
    with pytest.raises(FileExistsError, match="is not empty: choose another, or replace it with --overwrite"):
        train(out=out)
    assert (out / "metrics.csv").read_text() == before
    train(out=out, rounds=1, overwrite=True)
    assert len((out / "metrics.csv").read_text().splitlines()) == 1 + 1
    assert (out / "notes.txt").read_text() == "mine"

    going_on, metrics = Lock(out / "config.json"), (out / "metrics.csv").read_text()
    with pytest.raises(InUse, match="another run is using"):
        train(out=out, overwrite=True)
    going_on.release()
    assert (out / "metrics.csv").read_text() == metrics
    (out / "section-noise.html").write_text("of the old model")
    train(out=out, rounds=1, overwrite=True)
    assert not (out / "section-noise.html").exists()

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("all of it")
    with pytest.raises(FileExistsError, match="holds no earlier results"):
        train(out=other, overwrite=True)
    with pytest.raises(FileExistsError, match="is a file"):
        train(out=other / "thesis.txt", overwrite=True)
    assert (other / "thesis.txt").read_text() == "all of it"


def test_another_programs_config_json_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.pt").write_text("weights")
    with pytest.raises(FileExistsError, match="holds no earlier results"):
        train(out=tmp_path, overwrite=True)
    assert (tmp_path / "model.pt").read_text() == "weights"


def test_embeddings_of_another_dtype_are_welcome():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny_model()

        def forward(self, images):
            return self.net(images).to(torch.bfloat16)

    assert train(Half(), rounds=2).summary.top1 is not None


def test_too_few_test_images_are_refused_before_the_training():
    data = tiny_data()
    first = {"test_images": data.test_images[:1], "test_labels": data.test_labels[:1]}
    few = dataclasses.replace(data, **first, test_clients=())
    with pytest.raises(ConfigError, match="data: expected at least 2 test images, got 1"):
        run(tiny_config(), data=few, model=tiny_model())


def test_a_buffer_that_changes_late_is_noticed():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny_model()
            self.register_buffer("seen", torch.zeros(1))
            self.calls = 0

        def forward(self, images):
            self.calls += self.training
            if self.calls > 20:
                self.seen += 1
            return self.net(images)

    with pytest.raises(ValueError, match="it changed 'seen'"):
        train(Late(), rounds=20)


def test_a_buffer_that_is_not_a_number_has_not_changed():
    class Unknown(Counter):
        def forward(self, images):
            return self.net(images)

    model = Unknown()
    model.calls += torch.nan
    assert train(model, rounds=1).summary.top1 is not None


# ---- what is not finite ------------------------------------------------------------------------------------


def test_a_run_of_before_there_were_such_columns_can_be_read(tmp_path):
    result = train(out=tmp_path)
    shutil.rmtree(tmp_path / "record")  # there was none either
    with (tmp_path / "metrics.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(
            file, [name for name in lines[0] if "finite" not in name], extrasaction="ignore"
        )
        writer.writeheader()
        writer.writerows(lines)
    summary = {name: value for name, value in result.summary.to_dict().items() if "finite" not in name}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    _, history, found = read_run(tmp_path)
    assert found == without_not_finite(result.summary)
    assert history == [without_not_finite(metrics) for metrics in result.history]


def without_not_finite(run):
    measured = {name: value for name, value in run.measured.items() if name != "not_finite"}
    return dataclasses.replace(run, measured=measured)


class Standardised(nn.Module):
    """An image divided by its spread: by 0, where it has one colour."""

    def __init__(self):
        super().__init__()
        self.net = tiny_model()

    def forward(self, images):
        flat = images.flatten(1)
        return self.net((flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True))


def test_a_blank_test_image_is_a_miss_that_is_counted_and_said(tmp_path, caplog):
    """21 test images: with the first one blank the measures are those of the other 20, and a miss."""
    data = tiny_data()
    blank = data.test_images.clone()
    blank[0] = 7
    data_of = {
        "blank": dataclasses.replace(data, test_images=blank),
        "others": dataclasses.replace(data, test_images=blank[1:], test_labels=data.test_labels[1:]),
    }
    found = {
        name: run(tiny_config(out=tmp_path / name), data=these, model=Standardised())
        for name, these in data_of.items()
    }
    of = {name: result.summary for name, result in found.items()}
    assert (of["blank"].not_finite, of["others"].not_finite) == (1, 0)
    for measure in ("top1", "map_at_10", "recall_at_1", "recall_at_10"):
        assert getattr(of["blank"], measure) == pytest.approx(getattr(of["others"], measure) * 20 / 21)
    assert of["others"].top1 > 0.3 and torch.equal(found["blank"].weight, found["others"].weight)
    untrained = UNTRAINED.replace("21", "20")  # of the others
    assert set(caplog.messages) == {UNTRAINED, untrained, "1 of 21 embeddings are not finite: misses"}
    _, history, summary = read_run(tmp_path / "blank")
    assert [metrics.not_finite for metrics in history] == [None, 1, 1] and summary.not_finite == 1
    (line,) = remarks(summary)
    assert line == (
        "test images whose embedding is not finite: 1; they are misses (if they are most, is --client-lr, "
        "--server-lr or --scale too high? if few, does the net divide by 0, as for an image of one colour?)"
    )
    assert escape(line) in report_of(tmp_path / "blank") and remarks(of["others"]) == []


def report_of(folder) -> str:
    write_run_report(folder, Run(*read_run(folder)))
    return (folder / "report.html").read_text(encoding="utf-8")


def poisoned_from_round_3(monkeypatch, number: float) -> None:
    """One number of one answer, in round 3 alone."""
    real = Player.update

    def update(self, round, attempt, client, *rest):
        found = real(self, round, attempt, client, *rest)
        if round == 2:
            found.rows[0, 0] = number
        return found

    monkeypatch.setattr(Player, "update", update)


@pytest.mark.parametrize("aggregation", ["mean", *later("median")])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_model_that_is_not_finite_says_so_once_and_is_not_measured(
    number, aggregation, monkeypatch, tmp_path, caplog
):
    """Clients of whom all are trusted: a robust average has no other value either."""
    poisoned_from_round_3(monkeypatch, number)
    options = {"rounds": 5, "eval_every": 1, "trust_updates": True, "aggregation": aggregation}
    result = train(**options, out=tmp_path / "whole")
    assert [metrics.top1 is None for metrics in result.history] == [False] * 2 + [True] * 3
    assert [metrics.not_finite_since for metrics in result.history] == [None] * 2 + [3] * 3
    s = result.summary
    assert s.accuracy is s.top1 is s.map_at_10 is s.recall_at_1 is s.recall_at_10 is None
    said = [record.message for record in caplog.records if "model" in record.message]
    assert said == ["round 3: from here on the model has numbers that are not finite"]
    written = read_run(tmp_path / "whole")  # by their text, as no NaN equals itself: the losses are such
    assert str(written) == str((result.config, result.history, s)) and math.isnan(written[1][-1].loss)
    (line,) = remarks(s)
    assert line.startswith("after round 3 the model has numbers that are not finite, so nothing is measured")
    assert escape(line) in report_of(tmp_path / "whole")

    def stopped() -> bool:
        return len(seen) == 4

    seen, config = [], tiny_config(**options, out=tmp_path / "stopped")
    with pytest.raises(Stopped):
        run(config, data=tiny_data(), model=tiny_model(), on_round=seen.append, stop=stopped)
    resumed = run(config, data=tiny_data(), model=tiny_model(), resume=True)
    assert dataclasses.replace(resumed.summary, seconds=0) == dataclasses.replace(s, seconds=0)


def test_a_training_that_overflows_is_not_measured():
    """Where all images are in one place nobody asks what comes back."""
    summary = train(method="centralized", client_lr=1e38, rounds=3).summary
    assert summary.not_finite_since in (1, 2, 3) and summary.accuracy is None


def test_a_server_that_overflows_is_not_taken_for_the_clients_fault():
    with pytest.raises(
        TooFewClients, match="round 2: .*; the model .* since round 1: is --server-lr too high"
    ):
        train(server_lr=2.9e38, client_lr=20.0)
    summary = train(server_lr=2.9e38, client_lr=20.0, rounds=1).summary
    assert summary.not_finite_since == 1 and summary.accuracy is None


def test_another_attempt_at_a_round_is_another_draw_of_everything():
    """The same client and round: other negatives and, at a rate of its own batches, another update."""
    config = tiny_config(num_negatives=1, batch_size=1)
    player = Player(config, tiny_data(), tiny_model())
    phi = player.extractor.flat.clone()
    requests = [player.request(2, attempt, 1) for attempt in range(12)]
    assert len({tuple(request.class_ids.tolist()) for request in requests}) > 1
    rows = initial_rows(0, requests[0].class_ids, 4, 0.5)
    moved = [player.update(2, attempt, 1, requests[0], phi, rows).extractor for attempt in range(6)]
    assert len({tuple(each.tolist()) for each in moved}) > 1
    assert torch.equal(moved[0], player.update(2, 0, 1, requests[0], phi, rows).extractor)


# ---- GPUs --------------------------------------------------------------------------------------------------


def test_a_gpu_is_not_asked_for_in_vain(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device: expected cpu, as torch finds no GPU here, got 'cuda'"):
        train(device="cuda")


def test_workers_share_the_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    config = tiny_config(device="cuda")
    assert [str(training_device(config, rank)) for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert str(training_device(tiny_config(), 1)) == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "1")  # of torchrun, where the rank counts other machines' too
    assert str(training_device(config, 4)) == "cuda:1"


@pytest.mark.gpu
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.rowless])
def test_training_on_a_gpu_is_training(method):
    """The same as on a CPU but for rounding; everything that comes back is in main memory."""
    there, here = train(method=method, max_shift=1, device="cuda"), train(method=method, max_shift=1)
    assert there.weight.device == next(there.extractor.parameters()).device == torch.device("cpu")
    for x, y in zip(bits(there), bits(here), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
    assert there.summary.top1 == pytest.approx(here.summary.top1, abs=0.1)
