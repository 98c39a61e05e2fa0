"""The benchmark of margins on sampled classes, at a size that takes a second."""

import csv

import numpy as np
import pytest
import torch
from fedss_kernels.bench import margins
from fedss_kernels.bench.margins import CLASSES, MARGINS, SETTINGS, Setting

from fedss_kernels import SampledSoftmaxLoss
from fedss_kernels.federated.data.drawings import Drawings, partition

ALPHABETS, CHARACTERS, DRAWERS = 5, 3, 20


@pytest.fixture
def data():
    """Every drawing's first pixels say its character and its drawer; the others are noise."""
    character, drawer = np.divmod(np.arange(ALPHABETS * CHARACTERS * DRAWERS), DRAWERS)
    images = np.random.default_rng(0).integers(0, 256, (len(character), 28, 28), dtype=np.uint8)
    images[:, 0, 0], images[:, 0, 1] = character, drawer + 1
    drawings = Drawings(
        images=images,
        character=character,
        person=drawer + 1,
        in_test=drawer >= 16,
        character_names=tuple(f"{c // CHARACTERS}/{c}" for c in range(ALPHABETS * CHARACTERS)),
        alphabet=np.arange(ALPHABETS * CHARACTERS) // CHARACTERS,
        alphabet_names=tuple(map(str, range(ALPHABETS))),
    )
    return partition("omniglot", drawings, "retrieval", 0, 0.25)


@pytest.mark.parametrize("split", [margins.split_validation, margins.split_test])
def test_nobody_trains_on_what_is_measured(split, data):
    made = split(data)
    trained = set(made.images[:, 0, 0, 0].tolist())
    assert len(trained) == made.num_classes and len(made.images) == 16 * made.num_classes
    assert made.images[:, 0, 0, 1].max() == 16 and made.unseen[0][:, 0, 0, 1].min() == 17
    assert set(made.unseen[0][:, 0, 0, 0].tolist()) == trained
    held_out = set(made.held_out[0][:, 0, 0, 0].tolist())
    assert held_out and not {c // CHARACTERS for c in held_out} & {c // CHARACTERS for c in trained}
    ascending = sorted(trained)
    for images, labels in [(made.images, made.labels), made.unseen]:
        assert [ascending[i] for i in labels.tolist()] == images[:, 0, 0, 0].tolist()


def test_rates_are_chosen_without_the_alphabets_that_the_result_is_of(data):
    tested = set(margins.split_test(data).held_out[0][:, 0, 0, 0].tolist())
    validation = margins.split_validation(data)
    for images in (validation.images, validation.unseen[0], validation.held_out[0]):
        assert not tested & set(images[:, 0, 0, 0].tolist())


def batch():
    g = torch.Generator().manual_seed(0)
    return torch.randn(6, 8, generator=g), torch.randn(50, 8, generator=g), torch.tensor([1, 1, 7, 3, 0, 49])


def test_losses_are_the_modules_and_without_the_correction_every_class_counts_once():
    x, weight, labels = batch()
    generators = [torch.Generator().manual_seed(3) for _ in range(3)]
    corrected, uncorrected = (
        margins.loss_of(Setting("softmax", classes), x, weight, labels, g)
        for classes, g in zip(CLASSES[1:], generators, strict=False)
    )
    criterion = SampledSoftmaxLoss(50, 8, 5, scale=margins.SCALE)
    criterion.weight.data.copy_(weight)
    criterion.generator = generators[2].manual_seed(3)
    assert torch.equal(corrected, criterion(x, labels))
    everything = margins.loss_of(Setting("softmax", "all"), x, weight, labels, generators[2])
    assert torch.equal(everything, criterion.eval()(x, labels))
    ids, counts = margins.draw_batch_class_set(labels, 50, 5, torch.Generator().manual_seed(3))
    there = ids[counts < torch.inf]
    logits = margins.SCALE * torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(weight[there]).T
    own = (there == labels[:, None]).int().argmax(1)
    torch.testing.assert_close(uncorrected, torch.nn.functional.cross_entropy(logits, own))


def test_margins_make_the_target_harder():
    x, weight, labels = batch()
    losses = {
        margin: margins.loss_of(Setting(margin, "all"), x, weight, labels, torch.Generator())
        for margin in MARGINS
    }
    assert losses["softmax"] < min(losses["CosFace"], losses["ArcFace"])


@pytest.mark.exhaustive
def test_every_setting_is_measured_once_and_read_after(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(margins, "load", lambda *_, **__: data)
    monkeypatch.setattr(margins, "RATES", (0.01, 0.001))
    arguments = ["--data-dir", "", "--out", str(tmp_path), "--seeds", "4", "5", "--epochs", "1"]
    margins.main(arguments)
    text = capsys.readouterr().out
    with (tmp_path / "margins.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["on"] for line in lines] == ["validation"] * 18 + ["test"] * 18
    assert all(0 <= float(line["recall_at_1"]) <= 1 for line in lines)
    assert text.count("\n") == 2 + len(SETTINGS) + 1 and "±" in text
    assert (tmp_path / "margins.png").exists() and (tmp_path / "margins.md").read_text() + "\n" == text
    best = max(lines[:2], key=lambda line: float(line["recall_at_1"]))
    assert lines[18]["rate"] == best["rate"]
    monkeypatch.setattr(margins, "train", None)
    margins.main(arguments)
    assert capsys.readouterr().out == text
