"""Clients' own test images: cut by class among its holders, and those of clients who are held out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_glyphs import fields, small
from tiny_federation import tiny_data

from fedss_kernels.federated.clients.pooled import pooled
from fedss_kernels.federated.data import FederatedData
from fedss_kernels.federated.data.apportion import apportion
from fedss_kernels.federated.data.holdout import held_out
from fedss_kernels.federated.data.partition import Partition, divide, divide_test

KINDS = [
    Partition("classes", num_clients=6, classes_per_client=3),
    Partition("dirichlet", num_clients=7, alpha=0.3),
    Partition("iid", num_clients=5),
]


def labels_of(sizes, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))


TRAIN, TEST = labels_of([40, 31, 17, 22, 60, 9]), labels_of([11, 1, 0, 30, 12, 7], 1)


@pytest.mark.parametrize("how", KINDS, ids=lambda how: how.kind)
def test_each_class_test_images_are_cut_among_its_holders_as_the_training_images_are(how):
    clients, _ = divide(TRAIN, how, 3)
    found = divide_test(TRAIN, clients, TEST, how, "classification", 3)
    rows = torch.cat(found)
    assert len(found) == len(clients) and rows.dtype == torch.int64
    assert rows.sort().values.tolist() == list(range(len(TEST)))  # disjoint, and all of them
    for c in range(6):
        of_class = int((TEST == c).sum())
        for held, tested in zip(clients, found, strict=True):
            share = (TRAIN[held] == c).sum() / (TRAIN == c).sum()
            assert abs((TEST[tested] == c).sum() - share * of_class) < 1
            assert share > 0 or not (TEST[tested] == c).any()


@pytest.mark.parametrize("how", KINDS, ids=lambda how: how.kind)
def test_the_seed_of_the_data_decides_who_is_tested_on_what(how):
    clients, _ = divide(TRAIN, how, 3)
    first, again, other = (
        divide_test(TRAIN, clients, TEST, how, "classification", seed) for seed in (3, 3, 4)
    )
    assert all(map(torch.equal, first, again)) and not all(map(torch.equal, first, other))


def test_a_test_image_of_a_class_that_nobody_holds_is_nobodys():
    clients = (torch.tensor([0, 2]), torch.tensor([1, 3]))
    found = divide_test(
        np.array([0, 0, 1, 1]), clients, np.array([2, 0, 1, 0]), KINDS[2], "classification", 0
    )
    assert torch.cat(found).sort().values.tolist() == [1, 2, 3]


def test_authors_and_retrievals_have_none():
    clients, _ = divide(TRAIN, KINDS[2], 0)
    assert divide_test(TRAIN, clients, TEST, KINDS[2], "retrieval", 0) == ()
    assert divide_test(TRAIN, clients, TEST, Partition("natural"), "classification", 0) == ()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), min_size=1), st.integers(0, 2**40))
def test_a_total_is_cut_to_within_one_of_its_parts_and_none_is_lost(entries, seed):
    group, weights = np.array(entries).T
    totals = np.array([0, 1, 7, 1000])
    counts = apportion(totals, group, weights, np.random.default_rng(seed))
    for g, total in enumerate(totals):
        mine, of = counts[group == g], weights[group == g]
        assert mine.sum() == (total if of.sum() else 0)
        assert (abs(mine - total * of / max(1, of.sum())) < 1).all()
        if total <= of.sum():
            assert (mine <= of).all()


def test_the_loader_of_glyphs_has_them_where_its_clients_are_made(tmp_path):
    made = small(tmp_path, how=Partition("iid", num_clients=4))
    plain = small(tmp_path)
    assert torch.cat(made.test_clients).sort().values.tolist() == list(range(len(made.test_images)))
    assert plain.test_clients == () and torch.equal(made.test_images, plain.test_images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_clients": ([0],)}, "test_clients: expected one for each of the 2 clients, or none, got 1"),
        ({"test_clients": ([0], [4])}, r"test_clients\[1\]: expected rows in \[0, 4\), got values from 4 to"),
        ({"test_clients": ([0, 1], [1])}, "test_clients: expected every row once, got row 1 twice"),
        ({"test_clients": ([0], [0.5])}, r"test_clients\[1\]: expected a \(t_k,\) tensor of integers"),
        ({"test_clients": ([0], [[1]])}, r"test_clients\[1\]: expected a \(t_k,\) tensor of integers"),
        ({"newcomers": (([0],),)}, r"newcomers\[0\]: expected a pair, rows of images and of test_images"),
        ({"newcomers": (([4], [0]),)}, r"newcomers\[0\]\[0\]: expected rows in \[0, 4\)"),
        ({"newcomers": (([0], [4]),)}, r"newcomers\[0\]\[1\]: expected rows in \[0, 4\)"),
        ({"newcomers": (([], [1]),)}, r"newcomers\[0\]\[0\]: expected a non-empty"),
        ({"newcomers": (([1], [1]), ([2], [1]))}, "newcomers: expected every test row once, got row 1 twice"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        FederatedData(**fields(**changes))


def test_lists_become_tensors_and_a_client_may_have_no_test_image():
    data = FederatedData(**fields(test_clients=([], np.array([3, 1]))))
    assert [rows.tolist() for rows in data.test_clients] == [[], [3, 1]]
    assert all(rows.dtype == torch.int64 for rows in data.test_clients)
    assert FederatedData(**fields(test_clients=([], [1]), newcomers=[([0], [])])).newcomers[0][1].shape == (
        0,
    )


def test_pooled_data_have_one_client_and_no_clients_test_images():
    assert pooled(FederatedData(**fields(test_clients=([0], [1])))).test_clients == ()


# ---- held out


def many_images(*per_class_of_clients: tuple[int, ...]) -> FederatedData:
    """Clients with so many images of classes 0, 1, ..."""
    labels, clients = [], []
    for counts in per_class_of_clients:
        first = len(labels)
        labels += np.repeat(np.arange(len(counts)), counts).tolist()
        clients.append(list(range(first, len(labels))))
    images = torch.arange(len(labels)).to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    names = [f"client {k}" for k in range(len(clients))]
    classes = max(map(len, per_class_of_clients))
    return FederatedData(
        "own",
        images,
        labels,
        clients,
        names,
        images[:2],
        labels[:2],
        classes,
        ["c"] * classes,
        "classification",
        test_clients=([0], [1], *[[]] * (len(clients) - 2)),
    )


def test_newcomers_are_the_held_out_clients_a_sixth_of_each_class_for_the_test():
    data = many_images((12, 12), (12, 6), (6, 24), (30, 12), (18, 6))
    held = held_out(data, 0.6, seed=1)
    assert len(held.newcomers) == 3 and held.test_clients == ()
    tested = torch.cat([test for _, test in held.newcomers])
    assert len(tested.unique()) == len(tested)
    out = [rows for rows in data.clients if not any(torch.equal(rows, kept) for kept in held.clients)]
    for rows, (train, test) in zip(out, held.newcomers, strict=True):
        own = held.test_images[test][:, 0, 0, 0].tolist()  # the rows of `images`, of which they are copies
        assert sorted([*train.tolist(), *own]) == rows.tolist()
        for c in (0, 1):
            n = int((data.labels[rows] == c).sum())
            assert abs((held.test_labels[test] == c).sum() - n / 6) < 1
        assert len(test) == len(rows) // 6


@pytest.mark.parametrize(
    ("counts", "tested"), [((1, 1, 1), []), ((1,), []), ((2, 1, 1), [0]), ((3, *[1] * 9), [0, 0])]
)
def test_what_a_newcomer_is_tested_on_is_of_a_class_that_it_has_an_image_left_of(counts, tested):
    for seed in range(4):
        held = held_out(many_images(counts, counts), 0.5, seed)
        ((train, test),) = held.newcomers
        assert held.test_labels[test].tolist() == tested and len(train) == sum(counts) - len(tested)


def test_a_trial_is_tested_on_what_it_was_tested_on_before():
    """The bits of a trial's top-1: the same clients, and all their images in the same order."""
    data = tiny_data()
    held = held_out(data, 0.4, seed=3)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([3, 0x01DE])))
    out = sorted(rng.permutation(5)[:2].tolist())
    rows = torch.cat([data.clients[k] for k in out])
    assert torch.equal(held.test_images, data.images[rows])
    assert torch.equal(held.test_labels, data.labels[rows])
    assert held.images is data.images


def test_alone_the_held_out_clients_train_on_what_newcomers_would_be_tuned_on():
    data = many_images((12, 12), (12, 6), (6, 24), (30, 12), (18, 6))
    others, alone = held_out(data, 0.6, seed=1), held_out(data, 0.6, seed=1, alone=True)
    assert all(
        torch.equal(rows, train) for rows, (train, _) in zip(alone.clients, others.newcomers, strict=True)
    )
    pairs = zip(alone.test_clients, others.newcomers, strict=True)
    assert all(torch.equal(rows, test) for rows, (_, test) in pairs)
    assert torch.equal(alone.test_images, others.test_images) and alone.newcomers == ()
    assert set(alone.client_names).isdisjoint(others.client_names) and len(alone.client_names) == 3
    assert held_out(data, 0.6, seed=1).newcomers[0][0].tolist() == others.newcomers[0][0].tolist()


@pytest.mark.parametrize("empty", [[], (), np.array([]), torch.tensor([]), torch.zeros(0, dtype=torch.bool)])
def test_what_is_empty_is_of_any_type(empty):
    data = replace(tiny_data(), test_clients=[[3], empty, [1], empty, [2]])
    assert [rows.tolist() for rows in data.test_clients] == [[3], [], [1], [], [2]]
    assert {rows.dtype for rows in data.test_clients} == {torch.int64}
    with pytest.raises(ValueError, match=r"clients\[0\]: expected a non-empty \(n_k,\) tensor of int"):
        replace(tiny_data(), clients=[empty] * 5)
