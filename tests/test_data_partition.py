"""Partitions: every image once, the sizes and distributions that were asked for, equal by equal seeds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import each_once

from fedss_kernels.federated.data.partition import (
    Partition,
    by_classes,
    by_dirichlet,
    divide,
    iid,
)

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)


def labels_of(sizes, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 12), st.integers(0, 2**40))
def test_iid_and_dirichlet_give_every_client_as_many_images(sizes, clients, seed):
    labels = labels_of(sizes)
    clients = min(clients, len(labels))
    for holder in (iid(len(labels), clients, seed), by_dirichlet(labels, clients, 0.3, seed)):
        counts = np.bincount(holder, minlength=clients)
        assert len(counts) == clients and counts.max() - counts.min() <= 1 and counts.sum() == len(labels)


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(1, 8), st.integers(1, 6), st.integers(0, 2**40))
def test_by_classes_gives_exactly_so_many_classes_or_says_what_can_be(sizes, clients, classes, seed):
    labels = labels_of(sizes)
    possible = [n for n in range(1, 100) if _possible(sizes, clients, n)]
    if classes not in possible:
        with pytest.raises(ValueError, match="classes_per_client: .*expected a number from") as caught:
            by_classes(labels, clients, classes, seed)
        if possible:
            assert f"expected a number from {possible[0]} to {possible[-1]}, got" in str(caught.value)
        return
    holder = by_classes(labels, clients, classes, seed)
    for k in range(clients):
        assert len(np.unique(labels[holder == k])) == classes
    # Shards are parts of a class that differ by one; dealt from the largest to the smallest.
    of_shard = [np.bincount(holder[labels == c], minlength=clients) for c, size in enumerate(sizes) if size]
    parts = np.concatenate([counts[counts > 0] for counts in of_shard])
    assert all(counts[counts > 0].max() - counts[counts > 0].min() <= 1 for counts in of_shard)
    images = np.bincount(holder, minlength=clients)
    assert images.max() - images.min() <= parts.max() - parts.min() + 2 * classes


def _possible(sizes, clients, classes) -> bool:
    """Every class in one to min(its images, the clients) shards, so many for each client in all."""
    held = [size for size in sizes if size]
    return len(held) <= clients * classes <= sum(min(size, clients) for size in held)


def test_the_papers_clients_of_sop():
    """As many images and classes as SOP's training: 596 clients of 20 classes, of about 100 images."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 9, 11_318)
    while sizes.sum() != 59_551:
        c = rng.integers(11_318)
        sizes[c] = np.clip(sizes[c] + np.sign(59_551 - sizes.sum()), 2, 12)
    labels = labels_of(sizes)
    clients, names = divide(labels, Partition("classes", images_per_client=100, classes_per_client=20), 0)
    assert len(clients) == len(names) == 596 and each_once(clients, 59_551)
    counts = [len(held) for held in clients]
    assert 90 <= min(counts) and max(counts) <= 110
    assert {len(np.unique(labels[held])) for held in clients} == {20}


def test_which_classes_meet_in_a_client_is_drawn():
    """Among clients of 2 of 20 equal classes each pair should come about equally often over many seeds."""
    labels = labels_of([4] * 20)
    pairs = np.zeros((20, 20))
    for seed in range(300):
        holder = by_classes(labels, 10, 2, seed)
        for k in range(10):
            a, b = np.unique(labels[holder == k])
            pairs[a, b] += 1
    expected = 300 * 10 / 190  # 15.8, sd about 4
    found = pairs[np.triu_indices(20, 1)]
    assert found.sum() == 3000 and found.max() < expected + 6 * 4 and np.mean(found == 0) < 0.01


def test_dirichlets_first_client_has_the_distributions_second_moment():
    """q ~ Dirichlet(alpha * p), p uniform over C: E sum q^2 = (alpha / C + 1) / (alpha + 1).

    Of n draws from q, E sum of (n_c choose 2) / (n choose 2) is the same. The first client finds every class
    well stocked. 200 seeds; a client's own spread is below 0.3, so 4 sd of the mean are below 0.09.
    """
    C, n = 8, 50
    labels = np.repeat(np.arange(C), 200)
    for alpha in (0.1, 1.0, 100.0):
        same = []
        for seed in range(200):
            counts = np.bincount(
                labels[by_dirichlet(labels, len(labels) // n, alpha, seed) == 0], minlength=C
            )
            same.append((counts * (counts - 1)).sum() / (n * (n - 1)))
        assert abs(np.mean(same) - (alpha / C + 1) / (alpha + 1)) < 0.09, alpha


@pytest.mark.parametrize("alpha", [1e-9, 1e9])
def test_extremes_of_alpha(alpha):
    labels = labels_of([10] * 10)
    holder = by_dirichlet(labels, 10, alpha, 0)
    classes = [len(np.unique(labels[holder == k])) for k in range(10)]
    assert np.bincount(holder).tolist() == [10] * 10
    assert np.mean(classes) < 2.5 if alpha < 1 else np.mean(classes) > 5


def test_iid_is_drawn():
    """Of 2000 images the first half goes to client 0 as often as to client 1: 500, sd 16."""
    holder = iid(2000, 2, 3)
    assert abs(holder[:1000].sum() - 500) < 5 * 16


@pytest.mark.parametrize("kind", ["classes", "dirichlet", "iid"])
def test_a_seed_decides_all(kind):
    labels = labels_of([30] * 10)
    how = Partition(kind, num_clients=15, classes_per_client=4)
    first, again, other = (divide(labels, how, seed)[0] for seed in (1, 1, 2))
    assert all(map(torch.equal, first, again)) and not all(map(torch.equal, first, other))
    assert each_once(first, 300) and all(torch.equal(held, held.sort().values) for held in first)


def test_natural_clients_are_the_authors():
    owner = np.array([1, 0, 1, 2, 1])
    clients, names = divide(np.zeros(5, np.int64), Partition("natural"), 0, ["a", "b", "c"], owner)
    assert names == ("a", "b", "c") and [held.tolist() for held in clients] == [[1], [0, 2, 4], [3]]
    with pytest.raises(ValueError, match="num_clients: expected 0 for the natural .* the 3 authors, got 2"):
        divide(np.zeros(5, np.int64), Partition("natural", num_clients=2), 0, ["a", "b", "c"], owner)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "random"}, "partition: expected one of natural, classes, dirichlet, iid, got 'random'"),
        ({"num_clients": -1}, "num_clients: expected at least 0, got -1"),
        ({"images_per_client": 0}, "images_per_client: expected at least 1, got 0"),
        ({"classes_per_client": 0}, "classes_per_client: expected at least 1, got 0"),
        ({"alpha": float("nan")}, "dirichlet_alpha: expected a number greater than 0, got nan"),
        ({"kind": "natural"}, "partition: these images have no authors .*got 'natural'"),
        ({"kind": "iid", "num_clients": 5}, "num_clients: expected at most 4, the images there are, got 5"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        divide(np.array([0, 0, 1, 1]), Partition(**options), 0)
