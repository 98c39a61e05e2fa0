"""torch.vmap over the loss: the bits of calls one by one, without a warning, on CPUs and GPUs."""

from functools import partial

import pytest
import torch
from later import later
from loss_cases import BF16, F32, blocks_of_16
from test_triton_kernels import DEVICE, counted_launches

from fedss_kernels import SampledSoftmaxLoss, draw_batch_class_set, sampled_softmax_loss, vmapped
from fedss_kernels.triton_kernels.configurations import forced

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


def problems(K, B=6, C=12, D=8, S=5, dtype=F32):
    g = torch.Generator().manual_seed(K)
    x, w = (torch.randn(K, n, D, generator=g).to(dtype).requires_grad_() for n in (B, C))
    target, ids = (torch.randint(C, (K, n), generator=g) for n in (B, S))
    return x, w, target, ids, torch.randn(K, S, generator=g)


@pytest.mark.parametrize(
    ("K", "reduction"),
    [
        (1, "mean"),
        (1, "none"),
        (3, "mean"),
        (3, "none"),
        *later((64, "mean")),
    ],
)
def test_the_bits_of_calls_one_by_one(K, reduction, impl, monkeypatch):
    """And on GPUs in one launch a kernel, however many they are."""
    tensors = problems(K)

    def loss(*given):
        return sampled_softmax_loss(*given, reduction=reduction, impl=impl)

    with counted_launches(monkeypatch) as names:
        together = torch.vmap(loss)(*tensors)
        upstream = torch.linspace(-1, 1, together.numel()).view(together.shape)
        found = torch.autograd.grad(together, tensors[:2], upstream)
    kernels = ["partial_terms", "merge_splits", "small_tiles", "small_results"]
    assert names == (kernels if impl == "triton" else [])
    alone = torch.stack([loss(*one) for one in zip(*tensors, strict=True)])
    assert torch.equal(together, alone)
    for a, b in zip(found, torch.autograd.grad(alone, tensors[:2], upstream), strict=True):
        assert torch.equal(a, b)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "S, reduction",
    [(None, "none"), *later((35, "none"), (35, "sum"))],
)
def test_stacks_that_cross_the_edges_of_blocks(S, reduction, monkeypatch):
    """Whatever lies between: rows of a wider stack, a matrix that all share, scales on the device."""
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 3, 40, generator=g)[..., 4:37].to(DEVICE) for n in (20, 44))
    x, w = x.movedim(1, 0).requires_grad_(), w[:, 0].requires_grad_()
    t, ids = (torch.randint(44, (3, n), generator=g).to(DEVICE) for n in (20, 35))
    t[0, 3], bias = -100, torch.randn(3, 44, generator=g).to(DEVICE).requires_grad_()
    scale = torch.tensor([1.0, 10, 20], device=DEVICE, requires_grad=True)
    options = {"reduction": reduction, "impl": "triton"}

    def loss(x, t, ids, bias, scale):
        return sampled_softmax_loss(x, w, t, ids if S else None, bias=bias, scale=scale, **options)

    stacks = (x, t, ids, bias, scale)
    with forced(partial(blocks_of_16, True)):
        with counted_launches(monkeypatch) as names:
            together = torch.vmap(loss)(*stacks)
            assert len(names) == 2
        alone = torch.stack([loss(*one) for one in zip(*stacks, strict=True)])
        assert torch.equal(together, alone)
        upstream, wanted = torch.linspace(-1, 1, alone.numel(), device=DEVICE), (x, bias, scale, w)
        found, right = (
            torch.autograd.grad(each, wanted, upstream.view(each.shape)) for each in (together, alone)
        )
    for a, b in zip(found[:3], right[:3], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(found[3], right[3], rtol=1e-5, atol=1e-6)  # their sum, in another order


def test_as_many_problems_at_once_as_memory_is_for(monkeypatch):
    from fedss_kernels.triton_kernels import stacked

    x, w, target, ids, counts = (t.detach().to(DEVICE) for t in problems(5))
    loss = torch.vmap(partial(sampled_softmax_loss, impl="triton"))
    expected = loss(x, w, target, ids, counts)
    monkeypatch.setattr(stacked, "BUDGET", 4 * 6 * 8 * 2)  # two problems' tiles
    with counted_launches(monkeypatch) as names:
        assert torch.equal(loss(x, w, target, ids, counts), expected)
    assert len(names) == 3 * 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction):
    x, w, target, ids, counts = (t.detach().to(DEVICE).requires_grad_(t.requires_grad) for t in problems(2))
    scale = torch.tensor(20.0, device=DEVICE, requires_grad=True)
    arguments = (x, w[0].detach().requires_grad_(), target, ids, counts, None, None, scale)
    stacked = [True, False, True, True, True, False, False, False]
    options = ("cosine", -100, reduction, False, "triton", [False] * 4, None)
    torch.library.opcheck(vmapped.sampled_softmax_losses.default, (2, stacked, *arguments, *options))
    arguments = [t if t is None else t.detach() for t in arguments]
    losses, kept = vmapped.sampled_softmax_losses(2, stacked, *arguments, *options)
    backward = (torch.ones_like(losses), kept, [True, True, False, True], 2, stacked, *arguments, *options)
    torch.library.opcheck(vmapped.sampled_softmax_losses_backward.default, backward)


def test_ragged_problems_are_padded(impl):
    """Rows that are ignored, entries that are left out: the loss and gradients of the smaller problem."""
    x, w, target, ids, counts = problems(2)
    target[1, 4:], counts[1, 3:] = -100, torch.inf
    together = torch.vmap(lambda *given: sampled_softmax_loss(*given, impl=impl))(x, w, target, ids, counts)
    alone = sampled_softmax_loss(x[1, :4], w[1], target[1, :4], ids[1, :3], counts[1, :3], impl=impl)
    torch.testing.assert_close(together[1], alone)
    (found,), (right,) = (torch.autograd.grad(loss, w) for loss in (together[1], alone))
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("dims", [(1, 0, 1), (None, 0, None), *later(((0, None, 0),))])
def test_other_dimensions_and_what_all_problems_share(dims, impl):
    x, w, target, *_ = problems(3, dtype=BF16)
    given = [v[0] if dim is None else v.movedim(0, dim) for v, dim in zip((x, w, target), dims, strict=True)]
    scale = torch.tensor(20.0, requires_grad=True)

    def loss(x, w, target):
        return sampled_softmax_loss(x, w, target, scale=scale, impl=impl)

    together = torch.vmap(loss, dims)(*given)
    each = [v.unbind(dim) if dim is not None else [v] * 3 for v, dim in zip(given, dims, strict=True)]
    alone = torch.stack([loss(*one) for one in zip(*each, strict=True)])
    assert torch.equal(together, alone)
    found = torch.autograd.grad(together.sum(), (x, w, scale))
    of_each = [torch.autograd.grad(one, (x, w, scale), retain_graph=True) for one in alone]
    for a, parts in zip(found, zip(*of_each, strict=True), strict=True):  # rounded in each sum, or in the end
        parts = torch.stack(parts).double()
        assert ((a - parts.sum(0)).abs() <= torch.finfo(a.dtype).eps * parts.abs().sum(0)).all()


def test_learned_scales_and_biases_of_their_own(impl):
    x, w, target, *_ = problems(3)
    bias, scale = torch.randn(3, 12, requires_grad=True), torch.tensor([1.0, 10, 20], requires_grad=True)

    def loss(x, w, target, bias, scale):
        return sampled_softmax_loss(x, w, target, bias=bias, scale=scale, impl=impl)

    together = torch.vmap(loss)(x, w, target, bias, scale)
    alone = torch.stack([loss(*one) for one in zip(x, w, target, bias, scale, strict=True)])
    assert torch.equal(together, alone)
    for a, b in zip(
        torch.autograd.grad(together.sum(), (bias, scale)),
        torch.autograd.grad(alone.sum(), (bias, scale)),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_vmap_in_vmap(impl):
    x, w, target, *_ = problems(4)
    x, w, target = (v.unflatten(0, (2, 2)) for v in (x, w, target))
    loss = torch.vmap(torch.vmap(lambda *given: sampled_softmax_loss(*given, impl=impl)))
    found = loss(x, w, target)
    for i in range(2):
        for j in range(2):
            assert torch.equal(found[i, j], sampled_softmax_loss(x[i, j], w[i, j], target[i, j], impl=impl))


def test_a_class_that_one_problem_does_not_have():
    x, w, target, *_ = problems(3)
    target[1, 2] = 12
    with pytest.raises(IndexError, match=r"target\[2\] = 12, expected a class in \[0, 12\)"):
        torch.vmap(sampled_softmax_loss)(x, w, target)


@pytest.mark.parametrize("options", [{}, {"angular_margin": 0.5, "label_smoothing": 0.1}], ids=str)
def test_gradients_inside_by_the_reference(options):
    """As what refuses them for the kernels says."""
    x, w, target, ids, _ = problems(3)

    def loss(x, w, target, impl="reference"):
        return sampled_softmax_loss(x, w, target, ids[0], **options, impl=impl)

    with pytest.raises(RuntimeError, match='torch.func.grad with impl="reference"'):
        torch.vmap(torch.func.grad(lambda *given: loss(*given, impl="auto")))(x, w, target)
    found = torch.vmap(torch.func.grad(loss))(x, w, target)
    losses = torch.stack([loss(*one) for one in zip(x, w, target, strict=True)])
    torch.testing.assert_close(found, torch.autograd.grad(losses.sum(), x)[0])
    for bad in (-3, 12):
        target[1, 2] = bad
        place = 1 * target.shape[1] + 2  # of all problems together
        with pytest.raises(IndexError, match=rf"target\[{place}\] = {bad}, expected a class in \[0, 12\)"):
            torch.vmap(torch.func.grad(loss))(x, w, target)


def test_a_class_weight_of_one_problem_that_is_none():
    x, w, target, *_ = problems(3)
    weights = torch.rand(3, 12)
    weights[2, 5] = -1.0
    target[target == 5] = -100
    target[2, 4] = 5

    def loss(x, w, target, weights):
        return sampled_softmax_loss(x, w, target, class_weight=weights)

    with pytest.raises(ValueError, match=rf"class_weight\[target\]\[{2 * 6 + 4}\] = -1.0, expected a finite"):
        torch.vmap(loss)(x, w, target, weights)
    target[2, 4] = -100
    torch.vmap(loss)(x, w, target, weights)  # of no row


def test_a_class_that_one_problem_does_not_have_is_not_drawn_for():
    targets, generator = torch.tensor([[1, 2], [3, 12]]), torch.Generator().manual_seed(0)
    before = generator.get_state()
    with pytest.raises(IndexError, match=r"target\[3\] = 12, expected a class in \[0, 12\)"):
        torch.vmap(lambda t: draw_batch_class_set(t, 12, 3, generator), randomness="different")(targets)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("own_targets", [False, True])
def test_a_generator_draws_for_each_problem_as_randomness_says(own_targets):
    """As torch's own operations do with a generator."""
    x, target = torch.randn(1, 2, 8).expand(4, 2, 8), torch.tensor([1, 2])
    targets = target.expand(4, 2) if own_targets else target

    def losses(randomness):
        criterion = SampledSoftmaxLoss(1000, 8, 3, generator=torch.Generator().manual_seed(0))
        dims = (0, 0 if own_targets else None)
        return torch.vmap(criterion, dims, randomness=randomness)(x, targets), criterion

    assert len(losses("different")[0].unique()) == 4
    same, criterion = losses("same")
    assert len(same.unique()) == 1
    twin = SampledSoftmaxLoss(1000, 8, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(same[0], twin(x[0], target))
    assert torch.equal(criterion.generator.get_state(), twin.generator.get_state())
    with pytest.raises(RuntimeError, match="randomness error mode"):
        losses("error")


def test_no_problems():
    x, w, target, *_ = problems(3)
    with pytest.raises(ValueError, match="at least 1 problem, got 0"):
        torch.vmap(sampled_softmax_loss)(x[:0], w[:0], target[:0])


def test_sparse_gradients():
    x, w, target, ids, _ = problems(3)

    def loss(x, w, target, ids):
        return sampled_softmax_loss(x, w, target, ids, sparse_grad=True)

    (sparse,) = torch.autograd.grad(torch.vmap(loss)(x, w, target, ids).sum(), w)
    (dense,) = torch.autograd.grad(torch.vmap(sampled_softmax_loss)(x, w, target, ids).sum(), w)
    assert torch.equal(sparse.to_dense(), dense)
