"""SampledSoftmaxLoss, the module, and the class sets it draws for its batches."""

import copy
import io
import pickle

import pytest
import torch

from fedss_kernels import SampledSoftmaxLoss, draw_batch_class_set, sampled_softmax_loss

C, D = 50, 8


def batch(B=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, D, generator=g), torch.randint(C, (B,), generator=g)


@pytest.mark.parametrize("how", ["eval", "num_sampled=None", "num_sampled=C"])
def test_full_softmax(how):
    num_sampled = {"eval": 5, "num_sampled=None": None, "num_sampled=C": C}[how]
    criterion = SampledSoftmaxLoss(C, D, num_sampled, bias=True)
    criterion.train(how != "eval")
    x, t = batch()
    expected = sampled_softmax_loss(x, criterion.weight, t, bias=criterion.bias)
    assert torch.equal(criterion(x, t), expected)


def test_training_draws_anew_each_time():
    criterion = SampledSoftmaxLoss(C, D, 5)
    x, t = batch()
    assert criterion(x, t) != criterion(x, t)


def test_generator_makes_it_repeatable():
    def run():
        criterion = SampledSoftmaxLoss(C, D, 5, generator=torch.Generator().manual_seed(3))
        return [criterion(*batch()).item() for _ in range(3)]

    first = run()
    torch.manual_seed(99)
    assert run() == first


def test_compiles_fullgraph_and_equals_eager():
    criterion = SampledSoftmaxLoss(C, D, 7, learn_scale=True)
    x, t = batch()
    t[3] = -100
    compiled = torch.compile(criterion, fullgraph=True)
    torch.manual_seed(1)
    eager = criterion(x, t)
    torch.manual_seed(1)
    assert torch.equal(compiled(x, t), eager)


def test_compiles_fullgraph_with_a_generator_and_equals_eager():
    """Two losses, so two draws, which a compiler must not take for one; a copy draws as the original does."""
    criterion = SampledSoftmaxLoss(C, D, 7, generator=torch.Generator().manual_seed(5))
    copied = copy.deepcopy(criterion)
    assert copied.generator.generator is not criterion.generator.generator
    x, t = batch()
    compiled = torch.compile(lambda x: (criterion(x, t), criterion(x, t)), fullgraph=True)
    for _ in range(2):
        first, second = compiled(x)
        assert torch.equal(first, copied(x, t)) and torch.equal(second, copied(x, t)) and first != second


def test_trains():
    """200 steps on 50 separable classes: from chance to every one right."""
    torch.manual_seed(0)
    means = torch.randn(C, D)
    criterion = SampledSoftmaxLoss(C, D, 10, learn_scale=True)
    optimizer = torch.optim.SGD(criterion.parameters(), lr=1.0)
    for _ in range(200):
        t = torch.randint(C, (64,))
        loss = criterion(means[t] + 0.05 * torch.randn(64, D), t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (criterion.topk(means, 1).indices[:, 0] == torch.arange(C)).all()


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("block_size", [1, 7, 50, 1000])
def test_topk_equals_sorting_all_logits(similarity, block_size):
    criterion = SampledSoftmaxLoss(C, D, similarity=similarity, bias=True, scale=3.0).double()
    torch.nn.init.normal_(criterion.bias)
    x = torch.randn(4, 3, D, dtype=torch.float64)
    rows, weight = x, criterion.weight
    if similarity == "cosine":
        rows, weight = (torch.nn.functional.normalize(r, dim=-1) for r in (rows, weight))
    expected = (3.0 * rows @ weight.T + criterion.bias).topk(9)
    values, indices = criterion.topk(x, 9, block_size)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(indices, expected.indices) and indices.shape == (4, 3, 9)


def test_topk_of_rows_of_any_length():
    criterion = SampledSoftmaxLoss(C, D)
    x = torch.randn(3, D)
    expected = criterion.topk(x, 4).indices
    for length in (1e25, 1e-9):
        assert torch.equal(criterion.topk(x * length, 4).indices, expected)
    assert not criterion.topk(x * 1e-14, 4).values.any()  # a zero row: cosine 0 with every class


def test_state_copies_and_saves():
    generator = torch.Generator().manual_seed(1)
    criterion = SampledSoftmaxLoss(C, D, 5, bias=True, learn_scale=True, generator=generator)
    x, t = batch()
    copied = pickle.loads(pickle.dumps(criterion)).eval()
    buffer = io.BytesIO()
    torch.save(criterion.state_dict(), buffer)
    buffer.seek(0)
    loaded = SampledSoftmaxLoss(C, D, 5, bias=True, learn_scale=True).eval()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(copied(x, t), loaded(x, t))


def test_representation_says_what_it_is():
    assert "50, 8, num_sampled=5, scale=20.0, similarity='cosine'" in repr(SampledSoftmaxLoss(C, D, 5))


# ---- draw_batch_class_set
# --------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [0, 1, 5, 46, 47, 60])
def test_batch_class_set_holds_positives_once_and_negatives_outside(m):
    target = torch.tensor([7, 3, 7, -100, 49, 3])
    ids, counts = draw_batch_class_set(target, C, m, torch.Generator().manual_seed(m))
    kept = counts != torch.inf
    positives, negatives = ids[:6][kept[:6]], ids[6:]
    assert positives.sort().values.tolist() == [3, 7, 49] and not counts[:6][kept[:6]].any()
    assert len(negatives) == m and not set(negatives.tolist()) & {3, 7, 49}
    if m:
        torch.testing.assert_close(counts[6:], torch.log(torch.tensor(m / 47)).expand(m))
    if m == 47:  # as many as there are: each of them once
        assert sorted(negatives.tolist()) == [j for j in range(C) if j not in (3, 7, 49)]


def test_every_other_class_is_expected_equally_often():
    """m / (C - |P|) draws of each: 20,000 sets of 9 among 47 give 3,830 a class, sd at most sqrt(that)."""
    g = torch.Generator().manual_seed(0)
    target, seen = torch.tensor([0, 25, 49]), torch.zeros(C)
    for _ in range(20_000):
        seen += torch.bincount(draw_batch_class_set(target, C, 9, g)[0][3:], minlength=C)
    others = torch.ones(C, dtype=torch.bool)
    others[target] = False
    expected = 20_000 * 9 / 47
    assert not seen[target].any()
    assert ((seen[others] - expected).abs() < 5 * expected**0.5).all()


def test_batch_that_holds_every_class_leaves_all_draws_out():
    ids, counts = draw_batch_class_set(torch.arange(4), 4, 3)
    assert ids.max() < 4 and (counts[4:] == torch.inf).all()
    x, w = torch.randn(4, D), torch.randn(4, D)
    loss = sampled_softmax_loss(x, w, torch.arange(4), ids, counts)
    assert torch.equal(loss, sampled_softmax_loss(x, w, torch.arange(4)))


def test_denominator_is_the_full_one_on_average():
    """What the correction is for: the mean over draws of the sampled denominator is the full one's, to 1%."""
    g = torch.Generator().manual_seed(0)
    w, target = torch.randn(C, D, generator=g), torch.tensor([4, 4, 11])
    exp_logits = torch.exp(w @ torch.randn(D, generator=g) / 3)
    total = 0.0
    for _ in range(4000):
        ids, counts = draw_batch_class_set(target, C, 10, g)
        total += (exp_logits[ids] * torch.exp(-counts)).sum().item() / 4000
    assert total == pytest.approx(exp_logits.sum().item(), rel=0.01)
