"""Gradient noise against its definition, by autograd through the whole model."""

import csv
import math

import pytest
import torch
from tiny_federation import NUM_CLASSES, tiny_config, tiny_data, tiny_model

from fedss_kernels import reference
from fedss_kernels.class_sets import draw_class_set
from fedss_kernels.federated import cli
from fedss_kernels.federated.figures import noise
from fedss_kernels.federated.randomness import Purpose, generator, initial_rows


def config(**options):
    return tiny_config(model="conv4", cohort=3, **options)


@pytest.fixture
def linear_model(monkeypatch):
    monkeypatch.setattr("fedss_kernels.federated.clients.player._build_model", lambda config: tiny_model())


def by_definition(settings, count: int, batch: int, draw: int) -> float:
    """|| g_full - mean over clients of g_FedSS ||, each gradient by itself, in float64."""
    data, model = tiny_data(), tiny_model().double()
    weight = initial_rows(0, torch.arange(NUM_CLASSES), 4, 0.5).double().requires_grad_()
    rng = generator(0, batch, 0, 0, Purpose.NOISE)
    held = data.clients[int(rng.integers(5))]
    chosen = held[torch.from_numpy(rng.permutation(len(held))[: settings.batch_size])]
    images, labels = data.images[chosen].double() / 255, data.labels[chosen]

    def gradient(ids, log_count) -> torch.Tensor:
        embeddings = model(images)
        loss = reference.sampled_softmax_loss(
            embeddings, weight, labels, ids, log_count, scale=settings.scale
        )
        parts = torch.autograd.grad(loss, [*model.parameters(), weight])
        return torch.cat([part.flatten() for part in parts])

    difference = gradient(None, None)
    for client in range(3):
        rng = generator(0, batch, draw, client, Purpose.NEGATIVES)
        drawn = draw_class_set(NUM_CLASSES, labels.unique(), count, rng)
        difference = difference - gradient(drawn.class_ids, drawn.log_expected_count) / 3
    return difference.norm().item()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_it_is_the_norm_of_the_difference_of_mean_gradients(count, linear_model):
    settings = config()
    (line,) = noise.measure(settings, tiny_data(), [count], batches=3, draws=2)
    found = [by_definition(settings, count, batch, draw) for batch in range(3) for draw in range(2)]
    assert line.noise == pytest.approx(sum(found) / 6, rel=1e-4) and line.instances == 6
    assert line.noise_sd == pytest.approx(torch.tensor(found).std().item(), rel=1e-3, abs=1e-7)


def test_the_bias_is_what_is_left_in_the_mean_over_draws(linear_model, monkeypatch):
    """Differences that are given: a vector b and noise around it, in many draws."""
    b, draws = torch.tensor([3.0, -4.0], dtype=torch.float64), 400
    around = torch.randn(draws, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 20
    monkeypatch.setattr(noise._Batch, "_difference", lambda self, count, draw: (b, around[draw]))
    monkeypatch.setattr(
        noise._Batch, "_norm", lambda self, first, second: (first + second[: len(first)]).norm().item()
    )
    monkeypatch.setattr(noise._Batch, "_gradient", lambda self, *of: (torch.zeros(2).double(),) * 2)
    (line,) = noise.measure(config(), tiny_data(), [1], batches=1, draws=draws)
    drawn = (b + around).double()
    mean, spread = drawn.mean(0), drawn.var(0).sum()
    assert line.bias == pytest.approx(math.sqrt((mean.square().sum() - spread / draws).item()))
    assert 2 < line.bias < 8 < line.noise
    (one,) = noise.measure(config(), tiny_data(), [1], batches=1, draws=1)
    assert one.bias is None


def test_shared_negatives_are_one_draw_for_a_cohort_with_the_classes_of_others(linear_model):
    settings = config(negatives="shared")
    batch = noise._Batch(noise.Player(settings, tiny_data()), torch.zeros(NUM_CLASSES, 4), 0)
    for draw in range(5):
        ((held, negatives),) = batch._class_sets(2, draw)
        assert torch.isin(batch.positives, held).all() and not torch.isin(negatives, held).any()
        assert len(held) > len(batch.positives) and len(negatives) == min(2, NUM_CLASSES - len(held))
    (line,) = noise.measure(settings, tiny_data(), [NUM_CLASSES], batches=2, draws=2)
    assert line.noise < 1e-12 * line.full_norm and line.bias < 1e-12 * line.full_norm


@pytest.mark.exhaustive
def test_it_falls_with_more_negatives_to_nothing_with_all(linear_model):
    lines = noise.measure(config(), tiny_data(), [1, 2, 3, 4, 6, 7], batches=40, draws=6)
    means = [line.noise for line in lines]
    assert all(after < before for before, after in zip(means[:4], means[1:5], strict=True))
    assert means[4] < 1e-12 * lines[0].full_norm and means[5] < 1e-12 * lines[0].full_norm


def test_five_doublings_and_all():
    assert noise.default_counts(659) == [10, 20, 41, 82, 164, 329, 659]
    assert noise.default_counts(7) == [1, 3, 7]


@pytest.mark.exhaustive
def test_the_command_measures_a_finished_run_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FEDSS_CACHE", str(tmp_path / "cache"))
    small = ["--glyph-classes=12", "--glyph-writers=4", "--cohort=2", "--embedding-dim=8"]
    assert cli.main(["run", *small, "--rounds=2", f"--out={tmp_path / 'run'}"]) == 0
    new, trained = tmp_path / "new", tmp_path / "trained"
    assert cli.main(["noise", *small, "--batches=2", "--draws=2", "--counts=1,4", f"--out={new}"]) == 0
    of_run = ["noise", f"--run={tmp_path / 'run'}", "--batches=2", "--counts=1,4", f"--out={trained}"]
    assert cli.main(of_run) == 0
    tables = []
    for out in (new, trained):
        with (out / "noise.csv").open(newline="") as file:
            tables.append(list(csv.DictReader(file)))
        assert (out / "noise.png").read_bytes().startswith(b"\x89PNG")
        assert (out / "noise.md").read_text() in capsys.readouterr().out or out == trained
    assert [line["num_negatives"] for line in tables[0]] == ["1", "4"]
    assert tables[0][0]["full_norm"] != tables[1][0]["full_norm"]
    assert cli.main(["noise", f"--run={tmp_path / 'nowhere'}"]) == 2
    capsys.readouterr()
    assert cli.main([*of_run, "--similarity=dot", "--method=fedaws"]) == 2
    why = "the model of --run is measured as it was trained, on its own data"
    assert capsys.readouterr().err == f"fedss noise: --method: {why}; --similarity: {why}\n"
    (tmp_path / "linear.json").write_text('{"similarity": "dot"}')
    assert cli.main([*of_run, f"--config={tmp_path / 'linear.json'}"]) == 2
    assert capsys.readouterr().err.endswith("linear.json: similarity is another than that of --run\n")
    own = ["--method=fedper", "--partition=iid", "--num-clients=4", "--rounds=1"]
    assert cli.main(["run", *small, *own, f"--out={tmp_path / 'own'}"]) == 0
    capsys.readouterr()
    assert cli.main(["noise", f"--run={tmp_path / 'own'}"]) == 2
    assert capsys.readouterr().err == (
        "fedss noise: --run: expected a run with one model for all, got one of fedper\n"
    )


def test_the_noise_of_a_model_that_is_not_finite_is_no_number(linear_model, tmp_path):
    """One class row: the batches and draws that have it are NaN, and so is every mean over them."""
    data, weight = tiny_data(), initial_rows(0, torch.arange(NUM_CLASSES), 4, 0.5)
    weight[2, 1] = torch.nan
    net = tiny_model().state_dict()
    lines = noise.measure(config(), data, [1, 7], batches=4, draws=2, model=(net, weight))
    for line in lines:
        assert math.isnan(line.noise) and math.isnan(line.noise_sd) and math.isnan(line.full_norm)
    assert noise.write(tmp_path, lines, NUM_CLASSES).count("| nan | nan | nan% |") == 2


@pytest.mark.parametrize(
    "share, text", [(1.0, "100%"), (0.9951, "100%"), (12.345, "1,234%"), (0.994, "99%"), (0.00123, "0.12%")]
)
def test_a_share_is_said_in_percent_without_exponents(share, text, tmp_path):
    assert f"| {text} |" in noise.write(tmp_path, [noise.Line(3, share, 0.0, 1.0, 2)], NUM_CLASSES)


def test_a_noise_that_is_no_number_is_a_failure(monkeypatch, tmp_path, capsys):
    line = noise.Line(3, math.nan, math.nan, 1.0, 2)
    monkeypatch.setattr(noise, "measure", lambda *arguments, on_line, **options: on_line(line))
    monkeypatch.setenv("FEDSS_CACHE", str(tmp_path / "cache"))
    small = ["--glyph-classes=12", "--glyph-writers=4", "--cohort=2"]
    assert cli.main(["noise", *small, f"--out={tmp_path / 'out'}"]) == 1
    assert "fedss noise: the model's gradients are not finite" in capsys.readouterr().err


def test_what_the_noise_does_not_depend_on_is_said(monkeypatch, tmp_path, capsys):
    line = noise.Line(3, 1.0, 0.0, 1.0, 2)
    monkeypatch.setattr(noise, "measure", lambda *arguments, on_line, **options: on_line(line))
    monkeypatch.setenv("FEDSS_CACHE", str(tmp_path / "cache"))
    argv = ["noise", "--glyph-classes=12", "--glyph-writers=4", "--cohort=2", f"--out={tmp_path / 'out'}"]
    lines = [
        "--num-negatives has no effect: --counts are taken",
        "--method has no effect on what is measured: that is FedSS' gradient",
    ]
    assert cli.main([*argv, "--num-negatives=3", "--method=fedaws"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == lines
    assert cli.main([*argv, "--method=fedss"]) == 0
    assert "has no effect" not in capsys.readouterr().out


def test_a_linear_heads_noise_vanishes_with_all_negatives(linear_model):
    settings = config(method="fedss", similarity="dot", scale=None, weight_init_scale=None)
    few, all_of_them = noise.measure(settings, tiny_data(), [1, NUM_CLASSES], batches=2, draws=2)
    assert few.noise > 1e-3 * few.full_norm and all_of_them.noise < 1e-12 * all_of_them.full_norm


def test_of_one_draw_there_is_no_sd(linear_model, tmp_path):
    (line,) = noise.measure(config(), tiny_data(), [1], batches=1, draws=1)
    assert line.noise_sd is None
    assert "| – |" in noise.write(tmp_path, [line], NUM_CLASSES)


def test_more_negatives_than_classes_are_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FEDSS_CACHE", str(tmp_path / "cache"))
    small = ["--glyph-classes=12", "--glyph-writers=4", "--cohort=2", f"--out={tmp_path / 'out'}"]
    assert cli.main(["noise", *small, "--counts=3,20"]) == 2
    words = "fedss noise: --counts: expected at most 12, all the classes, got 20\n"
    assert capsys.readouterr().err == words and not (tmp_path / "out").exists()


def test_lines_that_are_done_when_a_signal_comes_are_written(monkeypatch, tmp_path, capsys):
    def measure(*arguments, on_line, **options):
        on_line(noise.Line(3, 0.5, 0.0, 1.0, 2))
        raise KeyboardInterrupt

    monkeypatch.setattr(noise, "measure", measure)
    monkeypatch.setenv("FEDSS_CACHE", str(tmp_path / "cache"))
    small = ["--glyph-classes=12", "--glyph-writers=4", "--cohort=2", f"--out={tmp_path / 'out'}"]
    assert cli.main(["noise", *small, "--counts=3,6"]) == 130
    left_out, stopped = capsys.readouterr().err.splitlines()[-2:]
    assert left_out == "fedss noise: stopped: what is not there was not measured"
    assert stopped == "fedss noise: stopped"
    with (tmp_path / "out" / "noise.csv").open(newline="") as file:
        assert [line["num_negatives"] for line in csv.DictReader(file)] == ["3"]
