"""Client-driven class sets: membership, uniformity, correction, cost."""

import math

import numpy as np
import pytest
import torch
from fedss_kernels.reference import class_set as reference_class_set
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fedss_kernels import draw_class_set, draw_negatives, sampled_softmax_loss

# (C, P): a number of classes and some of them
SIZES = st.integers(1, 60).flatmap(lambda C: st.tuples(st.just(C), st.sets(st.integers(0, C - 1))))


def rng(seed=0):
    return np.random.default_rng(seed)


@given(SIZES, st.integers(0, 70))
def test_negatives_are_distinct_ascending_and_outside_the_positives(sizes, m):
    C, P = sizes
    positives = torch.tensor(sorted(P, reverse=True), dtype=torch.int64)
    negatives = draw_negatives(C, positives, m, rng(m)).tolist()
    assert negatives == sorted(set(negatives)) and len(negatives) == min(m, C - len(P))
    assert not set(negatives) & P and all(0 <= j < C for j in negatives)


@given(SIZES, st.integers(0, 70))
def test_class_set_equals_the_definition(sizes, m):
    C, P = sizes
    positives = torch.tensor(sorted(P), dtype=torch.int64)
    got = draw_class_set(C, positives, m, rng(m))
    expected = reference_class_set(C, positives, draw_negatives(C, positives, m, rng(m)))
    for a, b in zip((got.class_ids, got.is_negative, got.log_expected_count), expected, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


def test_correction_by_hand():
    """C = 10, P = {2, 5}, m = 4: a negative is in the set with probability 4 / 8."""
    drawn = draw_class_set(10, torch.tensor([5, 2]), 4, rng())
    assert drawn.class_ids[~drawn.is_negative].tolist() == [2, 5]
    assert drawn.log_expected_count[drawn.is_negative].tolist() == [math.log(0.5)] * 4
    assert not drawn.log_expected_count[~drawn.is_negative].any()
    assert not draw_class_set(10, torch.tensor([5, 2]), 4, rng(), correction="none").log_expected_count.any()


def test_all_the_others_need_no_correction():
    drawn = draw_class_set(10, torch.tensor([5, 2]), 100, rng())
    assert torch.equal(drawn.class_ids, torch.arange(10)) and not drawn.log_expected_count.any()


@pytest.mark.parametrize("C, m", [(40, 7), (20_000, 30)])
def test_uniform_over_the_classes_that_are_not_held(C, m):
    """Pearson's chi-square over 37 equal groups of others: 36 degrees of freedom pass 68 once in 1,000."""
    positives = torch.tensor([0, C // 2, C - 1])
    others = np.setdiff1d(np.arange(C), positives.numpy())
    group = np.full(C, -1)
    group[others] = np.arange(len(others)) * 37 // len(others)
    seen = np.zeros(37)
    generator, draws = rng(1), 3000
    for _ in range(draws):
        seen += np.bincount(group[draw_negatives(C, positives, m, generator).numpy()], minlength=37)
    expected = np.bincount(group[others], minlength=37) * draws * m / len(others)
    assert ((seen - expected) ** 2 / expected).sum() < 68


def test_cost_does_not_grow_with_the_classes():
    """A hundred million million classes: anything of size C would not fit."""
    C = 10**14
    negatives = draw_negatives(C, torch.arange(0, C, 10**12), 1000, rng())
    assert len(negatives.unique()) == 1000 and negatives.max() > C // 2


@pytest.mark.parametrize(
    "C, positives, m, message",
    [
        (5, [5], 1, r"positives: expected classes in \[0, 5\), got 5"),
        (5, [-1, 2], 1, r"positives: expected classes in \[0, 5\), got -1"),
        (5, [3, 1, 3], 1, "positives: expected each class once, got 3 twice"),
        (5, [3], -1, "num_negatives: expected at least 0, got -1"),
    ],
)
def test_bad_arguments(C, positives, m, message):
    with pytest.raises(ValueError, match=message):
        draw_negatives(C, torch.tensor(positives), m, rng())


def test_unknown_correction():
    with pytest.raises(ValueError, match="""correction: expected "negatives" or "none", got 'all'"""):
        draw_class_set(5, torch.tensor([1]), 2, rng(), correction="all")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((5, torch.tensor([]), 2), "positives: expected int64, got float32"),
        ((5, [1], 2), "positives: expected a tensor, got list"),
        ((5.0, torch.tensor([1]), 2), "num_classes: expected an integer, got float"),
        ((5, torch.tensor([1]), 2.5), "num_negatives: expected an integer, got float"),
    ],
)
def test_wrong_types(arguments, message):
    with pytest.raises(TypeError, match=message):
        draw_class_set(*arguments, rng())
    with pytest.raises(TypeError, match="rng: expected a numpy.random.Generator, got int"):
        draw_class_set(5, torch.tensor([1]), 2, 0)


def test_what_is_run_again_in_the_backward_pass_draws_nothing_else():
    """torch.utils.checkpoint does not restore NumPy's generators: gradients would be those of another set."""
    rng, P = np.random.default_rng(0), torch.tensor([1, 2, 3])
    embeddings, weight = torch.randn(3, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)

    def loss(embeddings):
        drawn = draw_class_set(50, P, 5, rng)
        return sampled_softmax_loss(embeddings, weight, P, drawn.class_ids, drawn.log_expected_count)

    checkpointed = checkpoint(loss, embeddings, use_reentrant=False)
    with pytest.raises(
        RuntimeError, match="rng: expected a class set to be drawn in the forward pass.*or draw"
    ):
        checkpointed.backward()
    loss(embeddings).backward()
