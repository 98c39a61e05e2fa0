"""The loss kernel against the definition in float64, the limits it must keep, and the bits it must repeat."""

import random

import pytest
import torch
from fedss_kernels.reference import sampled_softmax_loss as reference_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from later import later
from loss_cases import BF16, F16, F32, F64, Case, assert_same, check, cpp_only, gpu_only
from tolerance import FLOOR, eager_loss, excess, with_features_reversed

import fedss_kernels
from fedss_kernels import sampled_softmax_loss

DTYPES = (F32, F64, BF16, F16)

# Every family draws its other sizes at random; sizes cross the kernel's edges (64 classes, 16 rows, 4
# registers, 16 of D).
FAMILIES = {
    "past a tile of classes": {"S": (63, 64, 65, 127, 129, 200, 321), "C": (130, 350)},
    "odd D": {"D": (3, 15, 17, 31, 33, 63, 65, 129)},
    "duplicates with accidental hits": {"distinct": (1, 2, 3, 5), "S": (2, 9, 70), "B": (5, 17, 33)},
    "strided": {"strided": (True,)},
    "none with random upstream": {"reduction": ("none",)},
    "nearly parallel": {"spread": (0.003, 0.03), "dtype": (BF16, F16, F64)},
    "mixed dtypes": {"dtype": (BF16, F16, F64), "weight_dtype": (F32,)},
    "everything at once": {"ignored": (0.3,), "zero_rows": (0.2,), "left_out": (0.3,), "bias": (True,)},
}


def random_case(seed: int, family: dict) -> Case:
    rng = random.Random(seed)
    fields = {
        "B": (1, 2, 5, 15, 16, 17, 33),
        "S": (0, 1, 2, 30, 64, 65, 150, None),
        "C": (1, 2, 17, 64, 65, 200),
        "D": (2, 3, 16, 17, 64, 100),
        "dtype": (F32, F32, F32, F64, BF16, F16),
        "similarity": ("cosine", "cosine", "dot"),
        "reduction": ("mean", "sum", "none"),
        "scale": (1.0, 20.0, 20.0, 100.0, -5.0),
        "bias": (False, True),
        "corrections": (0.0, 1.0, 4.0),
        "weight_norm": (0.01, 1.0, 30.0),
    } | family
    drawn = {name: rng.choice(choices) for name, choices in fields.items()}
    if drawn["similarity"] == "dot":  # keep logits in the range that the cosine has
        drawn["scale"] /= 3 * drawn["D"] ** 0.5 * drawn["weight_norm"]
    return Case(seed, **drawn)


@pytest.mark.parametrize("family", FAMILIES)
def test_within_tolerance_on_random_cases(family):
    for seed in range(110):
        check(random_case(seed, FAMILIES[family]))


# The same over the GPU kernels, with sizes that cross the edges of blocks of 16.
AROUND_16 = {
    "B": (1, 2, 15, 16, 17, 33),
    "S": (0, 1, 15, 16, 17, 33, 50, None),
    "C": (1, 2, 17, 40),
    "D": (2, 3, 15, 16, 17, 33),
}


@gpu_only
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seeds", [range(2), *later(range(2, 5))])
def test_gpu_kernels_within_tolerance_on_random_cases(family, seeds, sampled_softmax_loss):
    for seed in seeds:
        drawn = FAMILIES[family] | {name: sizes for name, sizes in AROUND_16.items() if name != "distinct"}
        check(random_case(seed, drawn), sampled_softmax_loss)


@pytest.mark.parametrize("seed", [*range(6), 11])
def test_small_nearly_parallel_float32_problems_on_a_gpu(seed, gpu_loss):
    """Differences that count are next to what rounding leaves, of a target above all."""
    drawn = FAMILIES["nearly parallel"] | AROUND_16 | {"dtype": (F32,)}
    check(random_case(seed, drawn), gpu_loss)


@pytest.mark.parametrize("S", [*later(None), 30])
@pytest.mark.parametrize("first_feature", [10.0, 100.0])
def test_one_large_feature_in_common(first_feature, S, sampled_softmax_loss):
    """All gradients are at right angles to it: what its products round off must not be in them."""
    check(Case(0, B=20, S=S, C=40, D=48, first_feature=first_feature), sampled_softmax_loss)


def test_nearly_parallel_rows_in_float32_are_as_exact_as_float32_allows():
    """All cancels: twice the error of plain PyTorch is a matter of its luck.

    Plain PyTorch itself, with the features in another order, is often past it.
    """
    excesses, of_plain = [], []
    for seed in range(30):
        case = Case(seed, B=64, S=90, C=100, D=64, spread=random.Random(seed).choice((0.003, 0.01, 0.03)))
        truth, plain = case.results(reference_loss, in_float64=True), case.results(eager_loss)
        for found, loss in ((excesses, sampled_softmax_loss), (of_plain, with_features_reversed(eager_loss))):
            results = case.results(loss)
            found.append(max(excess(results[name], truth[name], plain[name], F32) for name in results))
    assert max(excesses) < 2 < max(of_plain)
    assert sum(e > 1 for e in excesses) <= 1 < sum(e > 1 for e in of_plain)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.builds(
        Case,
        seed=st.integers(0, 2**32),
        B=st.integers(0, 40),
        S=st.none() | st.integers(0, 150),
        C=st.integers(1, 100),
        D=st.integers(2, 70),
        dtype=st.sampled_from(DTYPES),
        weight_dtype=st.none() | st.just(F32),
        reduction=st.sampled_from(("mean", "sum", "none")),
        scale=st.sampled_from((0.0, 0.5, 20.0, -20.0, 500.0)),
        bias=st.booleans(),
        left_out=st.sampled_from((0.0, 0.5, 1.0)),
        distinct=st.none() | st.integers(1, 5),
        ignored=st.sampled_from((0.0, 0.5, 1.0)),
        zero_rows=st.sampled_from((0.0, 0.3, 1.0)),
        strided=st.booleans(),
    )
)
def test_within_tolerance_on_any_problem(case):
    check(case)


# Sizes that take the kernel's other road: classes in several chunks, logits computed again for the gradient.
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("B, S, C", [(3, 530_000, 540_000), (300, 9_000, 10_000), (70, None, 20_000)])
def test_within_tolerance_in_several_chunks(B, S, C, reduction):
    check(Case(0, B=B, S=S, C=C, D=5, reduction=reduction))


def test_hand_worked_example(sampled_softmax_loss):
    """Orthogonal unit rows, scale 2: o = 2 - 0.5 for the target, 0 - log 0.25 and 0 for the others."""
    loss = sampled_softmax_loss(
        torch.tensor([[3.0, 0.0, 0.0]]),
        torch.eye(3) * 5,
        torch.tensor([0]),
        torch.tensor([0, 1, 2]),  # 0 is an accidental hit: its correction must not matter
        torch.log(torch.tensor([0.125, 0.25, 1.0])),
        target_log_expected_count=torch.tensor([0.5]),
        scale=2.0,
    )
    e = torch.tensor([1.5, torch.log(torch.tensor(4.0)), 0.0], dtype=F64)
    assert loss.item() == pytest.approx((torch.logsumexp(e, 0) - e[0]).item(), rel=1e-6)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors, torch.ones_like(loss))


def problem(B=6, C=12, D=8, dtype=F32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, D, generator=g, dtype=dtype).requires_grad_()
    w = torch.randn(C, D, generator=g, dtype=dtype).requires_grad_()
    return x, w, torch.randint(C, (B,), generator=g)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_in_float64(reduction, sampled_softmax_loss):
    x, w, t = problem(B=3, C=8, D=5, dtype=F64)
    ids, counts = torch.tensor([0, 3, 3, 7]), torch.tensor([0.0, 0.5, -1.0, 0.2])
    scale = torch.tensor(3.0, dtype=F64, requires_grad=True)
    bias = torch.randn(len(w), dtype=F64, requires_grad=True)

    def loss(x, w, bias, scale):
        return sampled_softmax_loss(x, w, t, ids, counts, bias=bias, scale=scale, reduction=reduction)

    # the interpreter is slow: along random directions instead of every axis
    fast = sampled_softmax_loss is not fedss_kernels.sampled_softmax_loss
    assert torch.autograd.gradcheck(loss, (x, w, bias, scale), fast_mode=fast)


@pytest.mark.exhaustive
def test_a_class_that_starts_late_in_a_long_set(sampled_softmax_loss):
    """Its rows are added up from wherever they are: past those that a GPU program looks through at a time."""
    x, w, t = problem(B=6, C=40, D=8)
    ids = torch.arange(300) % 30
    ids[[270, 290]] = 35
    t[:2] = 35
    tensors = [v.detach().double().requires_grad_() for v in (x, w)]
    expected = torch.autograd.grad(reference_loss(*tensors, t, ids), tensors)
    found = torch.autograd.grad(sampled_softmax_loss(x, w, t, ids), (x, w))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_a_left_out_class_that_is_the_target_of_a_late_row(sampled_softmax_loss):
    """With every class in the set its row takes part for that one row alone."""
    x, w, t = problem(B=20, C=10, D=16)
    t = t % 9
    t[-1] = 9
    counts = torch.zeros(10)
    counts[9] = torch.inf
    tensors = [v.detach().double().requires_grad_() for v in (x, w)]
    expected = torch.autograd.grad(reference_loss(*tensors, t, None, counts.double()), tensors)
    found = torch.autograd.grad(sampled_softmax_loss(x, w, t, None, counts), (x, w))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-7)


@cpp_only
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize(
    "case",
    [
        Case(0, B=130, S=300, C=400, D=65, bias=True),
        Case(1, B=300, S=9000, C=9001, D=17, reduction="none", distinct=3000),
        Case(2, B=40, S=None, C=700, D=64, dtype=BF16),
        Case(3, B=40, S=300, C=700, D=65, bias=True, left_out=0.2, zero_rows=0.1),
        Case(4, B=150, S=None, C=20_000, D=8, ignored=0.1),
        Case(5, B=10, S=None, C=60_001, D=64, bias=True),
        Case(6, B=10, S=60_001, C=65_000, D=65, dtype=BF16, ignored=0.1),
    ],
    ids=[
        "one chunk",
        "many chunks",
        "full softmax",
        "one tile of rows",
        "one tile of rows a wave",
        "one tile of rows, many chunks",
        "one tile of rows, many chunks, in pairs",
    ],
)
def test_same_bits_for_any_number_of_threads(case, threads, set_threads, sampled_softmax_loss):
    set_threads(3)
    expected = case.results(sampled_softmax_loss)
    set_threads(threads)
    for _ in range(3):
        for name, result in case.results(sampled_softmax_loss).items():
            assert torch.equal(result, expected[name]), name


def test_empty_class_set_costs_nothing(sampled_softmax_loss):
    x, w, t = problem()
    loss = sampled_softmax_loss(x, w, t, torch.empty(0, dtype=torch.int64))
    assert loss.item() == 0
    for gradient in gradients(loss, x, w):
        assert not gradient.any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("B", [0, 4])
def test_no_row_that_counts_costs_nothing(B, reduction, sampled_softmax_loss):
    x, w, _ = problem(B=B)
    loss = sampled_softmax_loss(x, w, torch.full((B,), -100), reduction=reduction)
    assert loss.sum().item() == 0 and loss.shape == ((B,) if reduction == "none" else ())
    for gradient in gradients(loss, x, w):
        assert not gradient.any()


def test_no_classes_at_all(sampled_softmax_loss):
    x = torch.randn(2, 3, requires_grad=True)
    loss = sampled_softmax_loss(x, torch.empty(0, 3), torch.full((2,), -100))
    assert loss.item() == 0 and not gradients(loss, x)[0].any()


def test_ignored_rows_do_not_count(sampled_softmax_loss):
    x, w, t = problem(B=6)
    t[[1, 4]] = 9
    counted = t != 9
    loss = sampled_softmax_loss(x, w, t, ignore_index=9)  # also a class: it wins
    expected = sampled_softmax_loss(x[counted], w, t[counted])
    assert_same(loss, expected, sampled_softmax_loss)
    gradient, expected_gradient = gradients(loss, x)[0], gradients(expected, x)[0]
    assert_same(gradient, expected_gradient, sampled_softmax_loss)
    assert not gradient[~counted].any()


def test_zero_rows_have_cosine_zero_and_pass_no_gradient(sampled_softmax_loss):
    x, w, t = problem()
    with torch.no_grad():
        x[2] = 1e-13
        w[t[0]] = 0
    loss = sampled_softmax_loss(x, w, t)
    for gradient, row in zip(gradients(loss, x, w), (2, t[0]), strict=True):
        assert gradient.isfinite().all() and not gradient[row].any() and gradient.any()


@pytest.mark.parametrize("listed", [False, True])
def test_left_out_entries_may_hold_anything(listed, sampled_softmax_loss):
    """A class that is left out (+inf) touches no loss and no gradient, whatever its row and bias hold."""
    x, w, t = problem(C=12)
    t.fill_(3)
    ids = torch.arange(12)
    counts, bias = torch.zeros(12), torch.zeros(12)
    counts[5] = torch.inf
    expected = sampled_softmax_loss(x, w, t, ids[ids != 5])
    expected_gradients = gradients(expected, x, w)
    with torch.no_grad():
        w[5] = torch.nan
        bias[5] = torch.inf
    loss = sampled_softmax_loss(x, w, t, ids if listed else None, counts, bias=bias)
    assert_same(loss, expected, sampled_softmax_loss)
    for a, b in zip(gradients(loss, x, w), expected_gradients, strict=True):
        assert_same(a, b, sampled_softmax_loss)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_infinite_upstream_leaves_zeros_alone(reduction, sampled_softmax_loss):
    """A gradient scaler may overflow: where there is no gradient, 0 must stay 0 and not become 0 * inf."""
    x, w, t = problem(B=6)
    with torch.no_grad():
        x[2] = 0
    t[4] = -100
    loss = sampled_softmax_loss(x, w, t, reduction=reduction)
    (gradient,) = torch.autograd.grad(loss, x, torch.full_like(loss, torch.inf))
    assert not gradient[[2, 4]].any() and not gradient[[0, 1, 3, 5]].isfinite().any()
    empty = sampled_softmax_loss(x, w, t, torch.empty(0, dtype=torch.int64), reduction=reduction)
    for gradient in torch.autograd.grad(empty, (x, w), torch.full_like(empty, torch.inf)):
        assert not gradient.any()


@cpp_only
def test_infinite_scale_leaves_zeros_alone(sampled_softmax_loss):
    """A learned scale may overflow: a zero row and a class that is left out have no gradient at any scale."""
    x, w, t = problem(C=12)
    t.fill_(3)
    counts = torch.zeros(12)
    counts[5] = torch.inf
    with torch.no_grad():
        w[7] = 0
    loss = sampled_softmax_loss(x, w, t, None, counts, scale=torch.tensor(torch.inf))
    (gradient,) = gradients(loss, w)
    assert not gradient[[5, 7]].any() and gradient[3].isnan().all()


def test_no_dimensions_at_all(sampled_softmax_loss):
    """D = 0: every cosine is 0, so the loss is the log of the number of terms."""
    x, w = torch.zeros(5, 0, requires_grad=True), torch.zeros(3, 0, requires_grad=True)
    for options in ({}, {"impl": "reference"}):
        loss = sampled_softmax_loss(x, w, torch.zeros(5, dtype=torch.int64), **options)
        assert loss.item() == pytest.approx(torch.log(torch.tensor(3.0)).item())
        assert gradients(loss, x)[0].shape == (5, 0)


@cpp_only
@pytest.mark.parametrize("threads", [1, 2])
def test_a_class_row_too_long_for_float32_is_noticed(threads, set_threads, sampled_softmax_loss):
    """Nobody's target, so that it is met where the other classes are."""
    set_threads(threads)
    x, w, t = problem(B=40, C=700, D=64)
    with torch.no_grad():
        w[600] *= 1e20
    options = {"similarity": "dot", "scale": 1e-20, "reduction": "none"}
    found = sampled_softmax_loss(x, w, t % 600, **options)
    exact = sampled_softmax_loss(x.double(), w.double(), t % 600, **options)
    assert torch.equal(found, exact.float())


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("B", [*later(16), 140])
def test_pulls_of_nearly_parallel_class_rows_keep_their_differences(B, dtype, sampled_softmax_loss):
    """A common direction of all class rows, beside rows of no length: plain PyTorch is NaN there."""
    case = Case(B, B=B, S=None, C=40, D=32, spread=0.3, dtype=dtype, learned_scale=False)
    tensors, options, _ = case.build()
    x, w = torch.randn(B, 32, generator=torch.Generator().manual_seed(0)).to(dtype), tensors["weight"]
    x[0] = 0
    x.requires_grad_()
    (found,) = gradients(sampled_softmax_loss(x, w, **options), x)
    exact = x.detach().double().requires_grad_()
    (truth,) = gradients(reference_loss(exact, w.double(), **options), exact)
    # bfloat16 has three bits fewer to pull with; on GPUs, in chunks, float16 pulls have 16 bits too
    allowed = FLOOR[dtype] * (
        1 if dtype == F16 and sampled_softmax_loss is fedss_kernels.sampled_softmax_loss else 4
    )
    assert (found.double() - truth).abs().max() <= allowed * truth.abs().max()


@pytest.mark.parametrize("B", [6, *later(140)])
def test_corrections_past_float32_beside_float64_rows(B, sampled_softmax_loss):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(B, 8, generator=g, dtype=F64, requires_grad=True)
    w = torch.randn(12, 8, generator=g, dtype=F64, requires_grad=True)
    options = torch.randint(12, (B,), generator=g), torch.arange(9), torch.full((9,), -1e39, dtype=F64)
    loss, truth = sampled_softmax_loss(x, w, *options), reference_loss(x, w, *options)
    for found, expected in zip(gradients(loss, x, w), gradients(truth, x, w), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("B", [64, 192])
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_a_sparse_gradient_of_16_bits_is_rounded_once(dtype, B, sampled_softmax_loss):
    """Entries of a class that nearly cancel, beside rows of float32."""
    g = torch.Generator().manual_seed(0)
    half = torch.randn(32, 16, generator=g)
    x = torch.cat([half, half + 0.01 * torch.randn(32, 16, generator=g)]).repeat(B // 64, 1)
    w = (torch.randn(3, 16, generator=g) * 0.01).to(dtype).requires_grad_()
    t, ids = (torch.arange(64) // 32).repeat(B // 64), torch.tensor([1, 0, 1])
    t[5] = -100
    options = {"scale": 1.0, "similarity": "dot"}
    (sparse,) = gradients(sampled_softmax_loss(x, w, t, ids, sparse_grad=True, **options), w)
    assert sparse.dtype == dtype and sparse.shape == w.shape
    dense = torch.zeros(3, 16, dtype=F64)
    dense.index_add_(0, sparse._indices()[0], sparse._values().double())
    exact = w.detach().double().requires_grad_()
    (truth,) = gradients(reference_loss(x.double(), exact, t, ids, **options), exact)
    assert (dense - truth).abs().max() <= FLOOR[dtype] * truth.abs().max()


@pytest.mark.parametrize("impl", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_gradients_of_16_bits_that_many_rows_add_to_are_rounded_once(similarity, dtype, impl):
    """Of a class row, a bias and a scale: 4,096 rows pull at three classes."""
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (4096, 8), "w": (3, 8), "bias": (3,), "scale": ()}
    given = {
        name: torch.randn(shape, generator=g).to(dtype).requires_grad_() for name, shape in shapes.items()
    }
    exact = {name: value.detach().double().requires_grad_() for name, value in given.items()}
    target = torch.zeros(4096, dtype=torch.int64)
    options = {"similarity": similarity, "reduction": "sum"}

    def pulls(loss, x, w, bias, scale, **more):
        return gradients(loss(x, w, target, bias=bias, scale=scale, **options, **more), x, w, bias, scale)

    found = pulls(sampled_softmax_loss, **given, impl=impl)
    for pull, truth in zip(found, pulls(reference_loss, **exact), strict=True):
        assert (pull.double() - truth).abs().max() <= FLOOR[dtype] * truth.abs().max()


@pytest.mark.parametrize("length", [1e-11, 1e150])
def test_float64_rows_of_many_lengths(length, sampled_softmax_loss):
    x, w, t = problem(dtype=F64)
    torch.testing.assert_close(
        sampled_softmax_loss(x * length, w, t), sampled_softmax_loss(x, w, t), rtol=1e-13, atol=0
    )


@cpp_only
@pytest.mark.parametrize("length", [1e155, 1e160, 1e168, 1e300])
@pytest.mark.parametrize(
    "options", [{}, {"cosine_margin": 0.2}, {"angular_margin": 0.3}, {"label_smoothing": 0.1}]
)
def test_float64_rows_of_any_length(length, options, sampled_softmax_loss):
    x, w, t = problem(dtype=F64)
    expected = sampled_softmax_loss(x, w, t, **options)
    right = gradients(expected, x, w)
    for rows in (x * length, w), (x, w * length):
        found = sampled_softmax_loss(*rows, t, **options)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
        torch.testing.assert_close(gradients(found, x, w), right, rtol=1e-11, atol=1e-13)


@cpp_only
def test_upstream_gradients_that_torch_negates_by_a_flag(sampled_softmax_loss):
    x, w, t = problem(dtype=F64)
    losses = sampled_softmax_loss(x, w, t, reduction="none")
    upstream = torch.view_as_complex(torch.rand(len(t), 2, dtype=F64)).conj().imag
    assert upstream.is_neg()
    found = torch.autograd.grad(losses, (x, w), upstream, retain_graph=True)
    right = torch.autograd.grad(losses, (x, w), upstream.resolve_neg())
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("scale", [1e4, 1e30, 1e300])
def test_large_logits_are_exact(scale, sampled_softmax_loss):
    """Orthogonal rows: the target leads by `scale` (loss 0) or trails by it (loss `scale`)."""
    w = torch.eye(3, dtype=F64)
    x = w[:1].clone().requires_grad_()
    assert sampled_softmax_loss(x, w, torch.tensor([0]), scale=scale).item() == 0
    loss = sampled_softmax_loss(x, w, torch.tensor([1]), torch.tensor([0]), scale=scale)
    assert loss.item() == scale and gradients(loss, x)[0].isfinite().all()


def test_a_logit_of_minus_infinity_leaves_a_class_out(sampled_softmax_loss):
    """By the bias, or a correction past float32's largest number; in a problem large enough for float32."""
    x, w, t = (*problem(B=20, C=60, D=64)[:2], torch.arange(20))
    bias, counts, without = torch.zeros(60), torch.zeros(60, dtype=F64), torch.zeros(60)
    bias[58], counts[59], without[58:] = -torch.inf, 1e39, torch.inf
    loss = sampled_softmax_loss(x, w, t, None, counts, bias=bias)
    expected = sampled_softmax_loss(x, w, t, None, without)
    pairs = zip((loss, *gradients(loss, x, w)), (expected, *gradients(expected, x, w)), strict=True)
    for result, right in pairs:
        torch.testing.assert_close(result, right, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # numpy's, under interpreted kernels
def test_a_nan_loss_has_no_gradients_of_zero(sampled_softmax_loss):
    """Products past float32's largest number, in a problem large enough for float32."""
    x, w, t = (*problem(B=20, C=60, D=64)[:2], torch.arange(20))
    loss = sampled_softmax_loss(x * 1e25, w * 1e25, t)
    for gradient in gradients(loss, x, w):
        assert loss.isfinite() or gradient.isnan().any()


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("scale", [1e23, -1e25, 1e28])
def test_logits_past_float32_are_exact(scale, dtype, sampled_softmax_loss):
    """Dot products up to 1e17 that the scale takes to 1e45: finite in differences, ties included."""
    x = torch.tensor([[1e8, 0], [0, 1e8], [1e8, 0]]).to(dtype).requires_grad_()
    w = torch.tensor([[1e9, 0], [1e8, 0], [1e9, 0], [0, 1e8]]).to(dtype).requires_grad_()
    s = torch.tensor(scale, requires_grad=True)
    best = torch.tensor([0, 3, 0] if scale > 0 else [3, 0, 3])
    losses = sampled_softmax_loss(x, w, best, scale=s, similarity="dot", reduction="none")
    tied = [2, 1, 2] if scale > 0 else [1, 3, 1]  # classes of the largest logit, the target among them
    torch.testing.assert_close(losses, torch.tensor(tied, dtype=losses.dtype).log())
    grad_x, grad_w, grad_scale = gradients(losses.sum(), x, w, s)
    assert grad_x.isfinite().all() and grad_w.isfinite().all() and grad_scale.isfinite()
    alone = [i for i, n in enumerate(tied) if n == 1]
    assert (grad_x[alone] == 0).all() and (grad_w != 0).any() and grad_scale == 0


@pytest.mark.parametrize("length", [1e-11, 1e20, 1e36])
def test_the_reference_knows_rows_of_any_length(length):
    """Their squares pass float32's largest number."""
    x, w, t = problem()
    options = {"impl": "reference", "reduction": "none"}
    expected = fedss_kernels.sampled_softmax_loss(x, w, t, **options)
    doubled = [(x.double() * size, w.double()) for size in (1e160, 1e200, 1e300)]
    for rows in ((x * length, w), (x, w * length), *doubled):
        found = fedss_kernels.sampled_softmax_loss(*rows, t, **options)
        torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-5, atol=1e-6)
    grad_x, grad_w = gradients(fedss_kernels.sampled_softmax_loss(x, w * length, t, **options), x, w)
    right_x, right_w = gradients(expected, x, w)
    torch.testing.assert_close(grad_x, right_x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_w.double(), right_w.double(), rtol=1e-4, atol=1e-5)


@cpp_only
def test_rows_of_any_length_have_a_cosine(sampled_softmax_loss):
    """The squares of 1e30 pass float32's largest number; the cosine does not care."""
    x, w, t = problem()
    expected = sampled_softmax_loss(x, w, t)
    loss = sampled_softmax_loss(x * 2.0**100, w * 2.0**-20, t)
    assert torch.equal(loss, expected)


@cpp_only
@pytest.mark.parametrize(
    "of_x, of_w, upstream", [(100, -20, 0), (-30, 61, 0), (-36, -36, 0), (0, 0, -100), (3, 0, 90)]
)
def test_powers_of_two_change_nothing_else(of_x, of_w, upstream, sampled_softmax_loss):
    """In a problem large enough for float32, rows and gradients in and out of its comfortable range."""
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 70, generator=g) for n in (40, 40))
    t = torch.randint(40, (40,), generator=g)

    def results(x, w, upstream):
        x, w = x.requires_grad_(), w.requires_grad_()
        losses = sampled_softmax_loss(x, w, t, reduction="none")
        return losses, *gradients((losses * upstream).sum(), x, w)

    expected = results(x.clone(), w.clone(), 1.0)
    loss, grad_x, grad_w = results(x * 2.0**of_x, w * 2.0**of_w, 2.0**upstream)
    got = loss, grad_x.double() * 2.0 ** (of_x - upstream), grad_w.double() * 2.0 ** (of_w - upstream)
    for result, right in zip(got, expected, strict=True):
        error = (result - right).abs().max() / right.abs().max()
        assert error < 1e-6


@pytest.mark.parametrize("name", ["input", "weight"])
def test_a_length_out_of_range_is_never_a_cosine_of_zero(name, sampled_softmax_loss):
    """On a GPU the squares of 1e30 are infinite: that is NaN, as a wrong number would be silent."""
    x, w, t = problem()
    expected = sampled_softmax_loss(x, w, t).item()
    loss = sampled_softmax_loss(x * 1e30 if name == "input" else x, w * 1e30 if name == "weight" else w, t)
    assert loss.isnan() or loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["input", "weight"])
def test_nan_in_gives_nan_out(name, sampled_softmax_loss):
    x, w, t = problem()
    with torch.no_grad():
        (x if name == "input" else w)[0, 0] = torch.nan
    assert sampled_softmax_loss(x, w, t).isnan()


def test_repeated_classes_equal_a_smaller_expected_count(sampled_softmax_loss):
    """k copies of a class are k terms: the same as one with log_expected_count - log k."""
    x, w, t = problem(dtype=F64)
    twice = sampled_softmax_loss(x, w, t, torch.tensor([1, 2, 2]), torch.tensor([0.1, 0.2, 0.2], dtype=F64))
    once_counts = torch.tensor([0.1, 0.2 - torch.log(torch.tensor(2.0, dtype=F64))], dtype=F64)
    once = sampled_softmax_loss(x, w, t, torch.tensor([1, 2]), once_counts)
    torch.testing.assert_close(twice, once, rtol=1e-14, atol=0)


def test_a_target_count_of_scale_times_the_margin_is_cosface(sampled_softmax_loss):
    """Wang et al. 2018, Eq. 4: the target's cosine less m, before the scale."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(4, 8, generator=g), torch.randn(9, 8, generator=g)
    t, scale, m = torch.tensor([0, 8, 3, 3]), 16.0, 0.35
    cosines = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(w).T
    logits = scale * (cosines - m * torch.nn.functional.one_hot(t, 9))
    found = sampled_softmax_loss(x, w, t, target_log_expected_count=torch.full((4,), scale * m), scale=scale)
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(logits, t), rtol=1e-5, atol=1e-6)


@cpp_only
def test_order_of_the_class_set_changes_no_bit(sampled_softmax_loss):
    x, w, t = problem()
    ids, counts = torch.tensor([5, 1, 8, 3]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    order = torch.tensor([2, 0, 3, 1])
    one = sampled_softmax_loss(x, w, t, ids, counts)
    other = sampled_softmax_loss(x, w, t, ids[order], counts[order])
    assert torch.equal(one, other)
    for a, b in zip(gradients(one, x, w), gradients(other, x, w), strict=True):
        assert torch.equal(a, b)


def test_all_classes_listed_equal_none(sampled_softmax_loss):
    x, w, t = problem()
    full, listed = (sampled_softmax_loss(x, w, t, ids) for ids in (None, torch.arange(len(w))))
    assert_same(full, listed, sampled_softmax_loss)
    for a, b in zip(gradients(full, x, w), gradients(listed, x, w), strict=True):
        assert_same(a, b, sampled_softmax_loss)


def test_leading_dimensions_are_flattened(sampled_softmax_loss):
    x, w, t = problem(B=6)
    flat = sampled_softmax_loss(x, w, t, reduction="none")
    counts = torch.zeros(2, 3)
    shaped = sampled_softmax_loss(
        x.view(2, 3, -1), w, t.view(2, 3), target_log_expected_count=counts, reduction="none"
    )
    assert shaped.shape == (2, 3) and torch.equal(shaped.flatten(), flat)
    assert_same(sampled_softmax_loss(x[0], w, t[0], reduction="none"), flat[0], sampled_softmax_loss)


@pytest.mark.parametrize("class_ids", [None, torch.tensor([7, 2, 2, 11])])
def test_sparse_gradient_holds_the_touched_rows(class_ids, sampled_softmax_loss):
    x, w, t = problem()
    dense = gradients(sampled_softmax_loss(x, w, t, class_ids), w)[0]
    sparse = gradients(sampled_softmax_loss(x, w, t, class_ids, sparse_grad=True), w)[0]
    assert sparse.layout == torch.sparse_coo
    assert_same(sparse.to_dense(), dense, sampled_softmax_loss)
    touched = torch.arange(len(w)) if class_ids is None else torch.cat([class_ids, t])
    by_cpu = sampled_softmax_loss is fedss_kernels.sampled_softmax_loss
    assert torch.equal(sparse._indices()[0], touched.unique() if by_cpu else touched)


# target, class_ids, log_expected_count; the classes that take part; where none does, those that CUDA lists
LEFT_OUT = {
    "some of each": ([3, -100, 3, 7], [0, 5, 6, 5], [torch.inf, 0.0, torch.inf, 0.5], {3, 5, 7}, set()),
    "a target's entry": ([3, -100], [3, 5], [torch.inf, torch.inf], {3}, set()),
    "every entry": ([7, -100], [3, 5], [torch.inf, torch.inf], {7}, set()),
    "every class": ([3, -100], None, [torch.inf] * 5 + [0.0] * 7, {3, *range(5, 12)}, set()),
    "all rows ignored": ([-100, -100], [0, 5], [torch.inf, 0.0], {5}, set()),
    "no rows": ([], [0, 5], [torch.inf, 0.0], {5}, set()),
    "nothing": ([-100, -100], [4, 5], [torch.inf, torch.inf], set(), {4}),
    "no class set": ([3, -100], [], [], {3}, set()),
}


@pytest.mark.parametrize("dtype", [F32, *later(BF16)])
@pytest.mark.parametrize("options", [{}, {"cosine_margin": 0.1}], ids=["", "margin"])
@pytest.mark.parametrize("which", LEFT_OUT)
def test_sparse_gradients_list_only_what_takes_part(which, options, dtype, sampled_softmax_loss):
    """Not what is left out by +inf, nor a class that stands for an ignored target."""
    *lists, taking_part, drawn = LEFT_OUT[which]
    t, ids = (None if of is None else torch.tensor(of, dtype=torch.int64) for of in lists[:2])
    x, w, _ = problem(B=len(t))
    w = w.detach().to(dtype).requires_grad_()
    bias = torch.linspace(-1, 1, len(w)).to(dtype).requires_grad_()

    def results(sparse_grad):
        counts = torch.tensor(lists[2])
        loss = sampled_softmax_loss(x, w, t, ids, counts, bias=bias, sparse_grad=sparse_grad, **options)
        return gradients(loss, w, bias)

    for sparse, dense in zip(results(True), results(False), strict=True):
        assert sparse.layout == torch.sparse_coo and sparse.sparse_dim() == 1 and sparse.shape == dense.shape
        listed = sparse._indices()[0].tolist()
        if sampled_softmax_loss is fedss_kernels.sampled_softmax_loss:
            assert listed == sorted(taking_part) and sparse.is_coalesced()
        else:
            assert set(listed) == (taking_part or drawn)
        rounding = {"rtol": 1e-5, "atol": 1e-6} if dtype == F32 else {"rtol": 0.02, "atol": 0.002}
        torch.testing.assert_close(sparse.to_dense(), dense, **rounding)


@pytest.mark.parametrize("options", [{}, {"cosine_margin": 0.1}], ids=["", "margin"])
def test_a_class_that_labels_leave_out_of_every_row_takes_part(options, sampled_softmax_loss):
    """It is listed with zeros: which rows leave it out only the logits' size of work would tell."""
    x, w, _ = problem(B=2)
    options = options | {"entry_labels": torch.tensor([0, 9, 6]), "target_labels": torch.tensor([9, 9])}
    ids = torch.tensor([0, 5, 6])
    loss = sampled_softmax_loss(x, w, torch.tensor([3, 7]), ids, sparse_grad=True, **options)
    (grad,) = gradients(loss, w)
    assert set(grad._indices()[0].tolist()) == {0, 3, 5, 6, 7}
    assert grad.to_dense().any(1).nonzero()[:, 0].tolist() == [0, 3, 6, 7]


def test_sparse_gradients_of_no_classes_list_nothing(sampled_softmax_loss):
    x, w, b = torch.randn(3, 4), torch.randn(0, 4, requires_grad=True), torch.randn(0, requires_grad=True)
    target, class_ids = torch.full((3,), -100), torch.empty(0, dtype=torch.int64)
    loss = sampled_softmax_loss(x, w, target, class_ids, bias=b, sparse_grad=True)
    for parameter, gradient in zip((w, b), torch.autograd.grad(loss, (w, b)), strict=True):
        assert gradient._nnz() == 0 and gradient.shape == parameter.shape and "nnz=0" in repr(gradient)
        assert torch.equal(gradient.to_dense(), torch.zeros_like(parameter))


def test_sparse_gradient_of_the_bias_alone(sampled_softmax_loss):
    x, w, t = problem()
    bias = torch.zeros(len(w), requires_grad=True)
    options = {"class_ids": torch.tensor([7, 2]), "bias": bias, "sparse_grad": True}
    found = gradients(sampled_softmax_loss(x, w.detach(), t, **options), bias)[0]
    expected = gradients(sampled_softmax_loss(x, w, t, **options), bias)[0]
    assert found.is_sparse and torch.equal(found.to_dense(), expected.to_dense())


@cpp_only
def test_torch_takes_a_sparse_gradient_of_the_bias(sampled_softmax_loss):
    """AccumulateGrad, twice; SparseAdam, which refuses dense ones."""
    x, w, t = problem()
    bias = torch.zeros(len(w), requires_grad=True)
    before = w.detach().clone()
    optimizer = torch.optim.SparseAdam([w, bias])
    for ids in ([7, 2], [2, 4]):
        sampled_softmax_loss(x, w, t, torch.tensor(ids), bias=bias, sparse_grad=True).backward()
    optimizer.step()
    moved = torch.zeros(len(w), dtype=torch.bool)
    moved[[7, 2, 4, *t.tolist()]] = True
    assert torch.equal(bias != 0, moved) and torch.equal((w != before).any(1), moved)


def test_only_the_gradients_asked_for_are_made(sampled_softmax_loss):
    x, w, t = problem()
    loss = sampled_softmax_loss(x.detach(), w, t)
    assert gradients(loss, w)[0].any()
    assert not sampled_softmax_loss(x.detach(), w.detach(), t).requires_grad


def test_small_float16_gradient_survives_a_grad_scaler(sampled_softmax_loss):
    """Upstream 65536 meets the gradient in float32: 65536 * 2e-9 is a float16 number, 2e-9 is not."""
    x, w, t = problem(dtype=F16)
    sampled_softmax_loss(x, w, t, scale=1e-7).backward()
    assert 0 < x.grad.float().abs().max() < 1e-7 or not x.grad.any()
    x.grad = None
    (sampled_softmax_loss(x, w, t, scale=1e-7) * 65536).backward()
    xd, wd = (v.detach().double().requires_grad_() for v in (x, w))
    expected = gradients(reference_loss(xd, wd, t, scale=1e-7) * 65536, xd)[0]
    torch.testing.assert_close(x.grad.double(), expected, rtol=2e-3, atol=2.0**-24)


@pytest.mark.exhaustive
def test_memory_stays_far_below_the_logits(peak_memory):
    """Allowed: gradients (5 MiB, twice), a block of logits (8 MiB), O(B D + S). B x S would be 128 MiB."""
    setup = """
        import torch
        from fedss_kernels import sampled_softmax_loss
        B, S, C, D = 512, 65536, 4194304, 16
        x = torch.randn(B, D, requires_grad=True)
        weight = torch.ones(C, D).requires_grad_()  # 256 MiB: a copy would show
        ids, target = torch.arange(S) * 3, torch.randint(C, (B,))
        sampled_softmax_loss(x[:2], weight, target[:2], ids[:2], sparse_grad=True).backward()  # warm up
        weight.grad = None
    """
    run = "sampled_softmax_loss(x, weight, target, ids, sparse_grad=True).backward()"
    assert peak_memory(setup, run) < 40 * 2**20


def test_memory_stays_near_the_gradients_for_few_rows_and_many_classes(peak_memory):
    """Allowed: the gradient (24.4 MiB), a block of logits (3.2 MiB), O(S). The packed half of W is 16 MiB."""
    setup = """
        import torch
        from fedss_kernels import sampled_softmax_loss
        x, weight = torch.randn(10, 64, requires_grad=True), torch.randn(100_000, 64, requires_grad=True)
        target = torch.arange(10)
        sampled_softmax_loss(x, weight[:10], target).sum()  # warm up
    """
    assert peak_memory(setup, "sampled_softmax_loss(x, weight, target).backward()") < 36 * 2**20


@pytest.mark.exhaustive
def test_memory_stays_bounded_for_many_rows_and_few_classes(peak_memory):
    """A block of logits is 8 MiB whatever its shape; the gradient of x is 4 MiB, a row 64 bytes."""
    setup = """
        import torch
        from fedss_kernels import sampled_softmax_loss
        x, weight = torch.randn(500_000, 2, requires_grad=True), torch.randn(2, 2, requires_grad=True)
        target = torch.zeros(500_000, dtype=torch.int64)
        sampled_softmax_loss(x[:2], weight, target[:2]).backward()
    """
    assert peak_memory(setup, "sampled_softmax_loss(x, weight, target).backward()") < 64 * 2**20


def test_offsets_past_two_to_the_31(sampled_softmax_loss):
    """C * D elements past 2^31, in memory that is only mapped where it is touched."""
    C, D = 2**25 + 3, 65
    weight = torch.zeros(1).expand(C, D)  # refuses nothing: strides of zero are strides
    rows = torch.empty((C, D), dtype=BF16)  # 4.4 GB of address space, a few pages of it used
    ids = torch.tensor([0, C - 2, C - 1])
    rows[ids] = torch.randn(3, D).to(BF16)
    x = torch.randn(4, D, requires_grad=True)
    t = torch.tensor([C - 1, C - 2, C - 1, 0])
    small = rows[ids].clone()
    expected = sampled_softmax_loss(x, small, torch.tensor([2, 1, 2, 0]))
    loss = sampled_softmax_loss(x, rows, t, ids)
    assert_same(loss, expected, sampled_softmax_loss)
    assert_same(gradients(loss, x)[0], gradients(expected, x)[0], sampled_softmax_loss)
    of_equals = torch.log(torch.tensor(3.0)).item()
    assert sampled_softmax_loss(x, weight, t, ids).item() == pytest.approx(of_equals)
