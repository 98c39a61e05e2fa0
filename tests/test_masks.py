"""What the server of a secure sum sees: every way that chance can fall is tried, modulo 2 and 3."""

import itertools

import numpy as np
import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedss-kernels[flower]'")

from fedss_kernels.federated.flower.masks import marks, masked, opened, stream


def all_ways(modulus: int, *sizes: int) -> list[np.ndarray]:
    """For numbers in such groups, each with every other: (ways, size) of each group."""
    ways = np.indices((modulus,) * sum(sizes)).reshape(sum(sizes), -1).T
    return np.split(ways, np.cumsum(sizes)[:-1], axis=1)


def transcript(vectors: list[np.ndarray], own, pairs, absent: set[int], modulus: int):
    """(ways, numbers): all that the server sees, with the vectors that come too late."""
    clients = range(len(vectors))
    of = {frozenset(pair): mask for pair, mask in zip(itertools.combinations(clients, 2), pairs, strict=True)}
    sent = [
        masked(vectors[k], k, own[k], [(l, of[frozenset((k, l))]) for l in clients if l != k], modulus)
        for k in clients
    ]
    active = [k for k in clients if k not in absent]
    left = [(k, d, of[frozenset((k, d))]) for k in active for d in absent]
    total = opened([sent[k] for k in active], [own[k] for k in active], left, modulus)
    expected = sum(vectors[k] for k in active) % modulus
    assert (total == expected).all()
    known = [of[pair] for pair in of if pair & absent]  # the key of one who is absent tells all of them
    return np.concatenate(np.broadcast_arrays(*sent, *[own[k] for k in active], *known), axis=1)


def chances(seen: np.ndarray, modulus: int) -> dict[int, float]:
    """Of each that can be seen, as the digits of one number."""
    found, counts = np.unique(seen @ modulus ** np.arange(seen.shape[1]), return_counts=True)
    return dict(zip(found.tolist(), (counts / len(seen)).tolist(), strict=True))


def of_classes(held: list[list[int]], absent: set[int], modulus: int, num_classes: int, *, counted=False):
    clients = len(held)
    pairs = clients * (clients - 1) // 2
    drawn = [0 if counted else len(each) for each in held]
    *masks, numbers = all_ways(modulus, *[num_classes] * (clients + pairs), sum(drawn))
    drawn_by = np.split(numbers, np.cumsum(drawn)[:-1], axis=1)
    vectors = [
        marks(np.array(each), num_classes, np.ones((len(numbers), len(each)), int) if counted else mine)
        for each, mine in zip(held, drawn_by, strict=True)
    ]
    return chances(transcript(vectors, masks[:clients], masks[clients:], absent, modulus), modulus)


TWO = [[[0], [1]], [[0, 1], [1]], [[0, 1], [0, 1]]]
THREE = [[[0], [1], [1]], [[0, 1], [0], [0]], [[1], [0, 1], [0, 1]]]


@pytest.mark.parametrize(
    "cohorts, absent, modulus",
    [(TWO, set(), 3), (TWO, set(), 2), (THREE, set(), 2), (THREE, {2}, 2)],
    ids=["two modulo 3", "two modulo 2", "three", "three, and one drops out"],
)
def test_with_one_union_the_server_sees_the_same_with_the_same_chances_whoever_holds_what(
    cohorts, absent, modulus
):
    first, *others = [of_classes(held, absent, modulus, 2) for held in cohorts]
    assert all(other == first for other in others)
    assert of_classes([[0] for _ in cohorts[0]], absent, modulus, 2) != first  # another union


@pytest.mark.parametrize("holders", [1, 2, 3])
def test_a_class_is_missed_with_one_chance_however_many_hold_it(holders):
    """1 / modulus: here 1 / 3, and 2^-32 in a federation."""
    ways = all_ways(3, *[1] * holders)
    total = sum(marks(np.array([0]), 1, mine) for mine in ways) % 3
    assert [(total == each).mean() for each in range(3)] == pytest.approx([1 / 3] * 3, rel=1e-12)


def test_ones_tell_how_many_hold_a_class():
    assert of_classes(TWO[0], set(), 3, 2, counted=True) != of_classes(TWO[1], set(), 3, 2, counted=True)


def of_changes(numbers: list[int], absent: set[int]):
    clients = len(numbers)
    *masks, _ = all_ways(3, *[1] * (clients + clients * (clients - 1) // 2), 0)
    vectors = [np.full((1, 1), each) for each in numbers]
    return chances(transcript(vectors, masks[:clients], masks[clients:], absent, 3), 3)


@pytest.mark.parametrize(
    "absent, one, another, of_another_sum",
    [
        (set(), [0, 1, 2], [1, 1, 1], [1, 1, 2]),
        ({1}, [0, 1, 2], [1, 0, 1], [0, 1, 1]),
        ({0}, [2, 2, 0], [1, 1, 1], [2, 2, 2]),
    ],
)
def test_of_changes_the_server_sees_nothing_but_the_sum_of_those_who_answer(
    absent, one, another, of_another_sum
):
    """Late ones, of clients whose key is known by then, too: their own mask hides them."""
    assert of_changes(one, absent) == of_changes(another, absent)
    assert of_changes(one, absent) != of_changes(of_another_sum, absent)


def test_without_a_mask_of_its_own_who_is_late_would_be_seen():
    def late(number: int):
        ways = all_ways(3, 1, 1, 1)
        nothing = [np.zeros_like(ways[0])] * 3
        return chances(transcript([np.full((1, 1), n) for n in (0, number, 0)], nothing, ways, {1}, 3), 3)

    assert late(0) != late(1)


def test_a_stream_is_aes_256_in_counter_mode():
    """The first block is AES-256 of zeros under zeros, which NIST has."""
    found = stream(bytes(32), 5)
    block = bytes.fromhex("dc95c078a2408989ad48a21492842087")
    assert found[:4].tolist() == np.frombuffer(block, "<u4").tolist()
    assert found.dtype == np.int64 and len(found) == 5
    many = stream(bytes(31) + b"1", 100_000)
    assert 0 <= many.min() < 2**18 and 2**32 - 2**18 < many.max() < 2**32
    assert abs(many.mean() / 2**31 - 1) < 0.01
