"""Measures of a net at several depths, beside its random init, and those that a run has."""

from dataclasses import replace

import pytest
import torch
from images_copied import Copied
from test_probes import Small, stripes

from fedss_kernels.federated.clients import extractor
from fedss_kernels.federated.data import FederatedData
from fedss_kernels.federated.measures import MEASURES, OF_FEATURES
from fedss_kernels.federated.metrics import retrieval
from fedss_kernels.federated.probes import (
    Probing,
    at_the_end,
    before_training,
    by_depth,
    features,
    knn,
    linear_probe,
    while_training,
)
from fedss_kernels.federated.probes.labelled import labelled


def striped_data(task: str = "classification", training: int = 60, test: int = 40) -> FederatedData:
    (images, labels), (test_images, test_labels) = stripes(training), stripes(test, seed=1)
    half = training // 2
    return FederatedData(
        name="stripes",
        images=images,
        labels=labels,
        clients=(torch.arange(half), torch.arange(half, training)),
        client_names=("a", "b"),
        test_images=test_images,
        test_labels=test_labels,
        num_classes=2,
        class_names=("rows", "columns"),
        task=task,
    )


def test_each_net_is_measured_at_each_depth():
    data, trained, begun = striped_data(), Small(), Small()
    with torch.no_grad():
        for p in begun.blocks.block2.parameters():
            p.zero_()  # of which nothing is left
    told = list[tuple[int, int]]()
    lines = by_depth(
        {"trained": trained, "random": begun},
        data,
        Probing(neighbours=3),
        on_measured=lambda done, total: told.append((done, total)),
    )
    assert [(line.weights, line.depth, line.features) for line in lines] == [
        ("trained", 1, 8), ("random", 1, 8), ("trained", 2, 8), ("random", 2, 8)
    ]  # fmt: skip
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert lines[0].measured == lines[1].measured
    assert lines[3].measured == {"probe": 0.5, "knn": 0.5} != lines[2].measured
    train, test = (features(trained, images, 2) for images in (data.images, data.test_images))
    rows = train, data.labels, test, data.test_labels
    assert lines[2].measured == {"probe": linear_probe(*rows), "knn": knn(*rows, k=3)}


def test_depths_of_ones_own_and_fine_tuning():
    (line,) = by_depth({"trained": Small()}, striped_data(), Probing(depths=(2,), epochs=12, batch_size=10))
    assert line.depth == 2 and line.measured["fine_tuned"] > 0.9
    with pytest.raises(ValueError, match=r"depth: expected one in \[0, 2\], got 3"):
        by_depth({"trained": Small()}, striped_data(), Probing(depths=(1, 3)))


def test_a_retrieval_is_measured_on_the_test_images_alone():
    data = replace(striped_data("retrieval"), test_labels=torch.arange(40) // 4)
    lines = by_depth({"trained": Small()}, data, Probing())
    found = retrieval(features(Small(), data.test_images, 2), data.test_labels).measured
    assert lines[-1].measured == found and list(found) == ["map_at_10", "recall_at_1", "recall_at_10"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": 0.0}, "labels: expected a share greater than 0 and at most 1, got 0"),
        ({"labels": 1.5}, "labels: expected a share greater than 0 and at most 1, got 1.5"),
        ({"neighbours": 0}, "neighbours: expected at least 1, got 0"),
        ({"epochs": -1}, "epochs: expected at least 0, got -1"),
        ({"rate": 0.0}, "rate: expected a finite number greater than 0, got 0"),
        ({"temperature": -1.0}, "temperature: expected a finite number greater than 0, got -1"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Probing(**options)


# ---- some of the labels


def test_a_share_of_the_labels_is_of_each_class_and_of_the_seed():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 3)
    rows = labelled(labels, 0.1, seed=0)
    assert labels[rows].tolist() == [0] * 5 + [1] * 3 + [2] and torch.equal(rows, rows.unique())
    assert torch.equal(rows, labelled(labels, 0.1, seed=0))
    assert not torch.equal(rows, labelled(labels, 0.1, seed=1))
    assert torch.equal(labelled(labels, 1.0, seed=0), torch.arange(83))  # all


def test_with_few_labels_their_images_alone_are_looked_at():
    data, few = striped_data(), Probing(labels=0.2, epochs=1, neighbours=3)
    rows, kept = labelled(data.labels, 0.2, seed=0), (torch.arange(6), torch.arange(6, 12))
    alone = replace(data, images=data.images[rows], labels=data.labels[rows], clients=kept)
    found = by_depth({"": Small()}, data, few)
    assert found == by_depth({"": Small()}, alone, replace(few, labels=1.0))
    assert found != by_depth({"": Small()}, data, replace(few, labels=1.0))


# ---- of a run


@pytest.mark.parametrize("task", ["classification", "retrieval"])
def test_a_run_has_the_measures_that_it_says(task):
    data, net = striped_data(task), Small()
    while_going = while_training(net, data, 1, seed=0)
    at_end, before = at_the_end(net, data), before_training(net, data)
    measures = OF_FEATURES[task]
    assert {*while_going, *at_end, *before} == {*measures.names} <= MEASURES.keys()
    assert measures.headline in at_end and {*measures.shown, *measures.told} <= {*measures.names}
    same = {"classification": "probe", "retrieval": "map_at_10"}[task]
    assert before[f"random_{same}"] == at_end[same]
    assert all(MEASURES[name].compared for name in measures.shown)
    meanwhile = next(measure.name for measure in measures.alike if measure.name in while_going)
    assert meanwhile == {"classification": "knn", "retrieval": "map_at_10"}[task]  # what a plot shows
    assert at_end["not_finite"] == 0


def test_a_run_is_probed_at_the_first_block_a_quarter_a_half_and_all():
    data, net = striped_data(), Small()  # of two blocks
    found = at_the_end(net, data)
    first, last = (line.measured["probe"] for line in by_depth({"": net}, data, Probing()))
    names = ("probe_first", "probe_quarter", "probe_half", "probe")
    assert [found[name] for name in names] == [first, first, first, last] and first != last


def with_others(data: FederatedData) -> FederatedData:
    """Beside its images the test's, that no client has: as of clients who are held out."""
    rows = torch.cat([torch.arange(17, 60), torch.arange(17)])  # not as they stand
    images, labels = torch.cat([data.test_images, data.images]), torch.cat([data.test_labels, data.labels])
    return replace(data, images=images, labels=labels, clients=tuple((rows + 40).split(30)))


def test_images_of_no_client_are_not_learned_from():
    data, net = striped_data(), Small()
    more = with_others(data)
    for few in (Probing(neighbours=3, epochs=1), Probing(neighbours=3, labels=0.2)):
        assert by_depth({"": net}, more, few) == by_depth({"": net}, data, few)
    for found in (at_the_end, before_training):
        assert found(net, more) == found(net, data)
    assert while_training(net, more, 1, seed=0) == while_training(net, data, 1, seed=0)


def test_images_beside_those_of_no_client_are_read_a_batch_at_a_time(monkeypatch):
    data, net = with_others(striped_data()), Small()
    monkeypatch.setattr(extractor, "EMBEDDED_NUMBERS", 10 * 8 * 8)
    with Copied() as copied:
        by_depth({"": net}, data, Probing(depths=(1,), labels=0.9, epochs=1, batch_size=10))
        before_training(net, data)
        while_training(net, data, 1, seed=0)
    assert copied.most == 10


def test_while_training_few_of_the_images_are_looked_at():
    data, net = striped_data(training=4_100, test=1_600), Small()
    seen = list[int]()
    net.blocks.stem.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    found = while_training(net, data, 1, seed=0)
    assert sum(seen) == 4_000 + 1_500
    assert found == while_training(net, data, 1, seed=0) and 0.5 < found["knn"] <= 1


def test_a_net_whose_features_are_not_finite_is_measured_all_the_same():
    data, net = striped_data(), Small()
    with torch.no_grad():
        net.blocks.block2[1].bias[0] = torch.nan
    assert at_the_end(net, data)["not_finite"] == 40 and at_the_end(net, data)["probe"] == 0.0
