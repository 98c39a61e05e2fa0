"""Margins, label smoothing, class weights, lse, labels: against the definition, and the limits they keep."""

import dataclasses
import math
import random

import pytest
import torch
import torch.nn.functional as F
from compilers import COMPILERS
from fedss_kernels.reference import sampled_softmax_loss as reference_loss
from later import later
from loss_cases import BF16, F16, F32, F64, Case, cpp_only, gpu_only
from pytorch_metric_learning.losses import ArcFaceLoss, CosFaceLoss
from tolerance import eager_loss, excess, with_features_reversed, with_rows_longer
from torch.utils.flop_counter import FlopCounterMode

from fedss_kernels import SampledSoftmaxLoss, ShardedSampledSoftmaxLoss, draw_batch_class_set, smoothing
from fedss_kernels import sampled_softmax_loss as loss_function
from fedss_kernels.class_table import ClassTable

EPS = 0.1


def random_mix(seed: int) -> tuple[Case, dict]:
    """A problem, and some of the arguments."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    B, C, S = rng.choice((1, 5, 17)), rng.choice((3, 17, 40)), rng.choice((0, 2, 17, 33, None))
    similarity = rng.choice(("cosine", "cosine", "dot"))
    case = Case(
        seed,
        B=B,
        C=C,
        S=S,
        D=rng.choice((2, 16, 33)),
        dtype=rng.choice((F32, F32, F64, BF16, F16)),
        similarity=similarity,
        scale=20.0 if similarity == "cosine" else 1.0,
        reduction=rng.choice(("mean", "sum", "none")),
        bias=rng.random() < 0.5,
        left_out=rng.choice((0.0, 0.3)),
        ignored=rng.choice((0.0, 0.3)),
        distinct=rng.choice((None, 3)),
    )
    among, n = rng.choice((2, 5, 40)), C if S is None else S
    extra = {
        "angular_margin": rng.choice((0.5, -0.2, torch.rand(B, generator=g))),
        "cosine_margin": rng.choice((0.35, torch.rand(B, generator=g))),
        "label_smoothing": rng.choice((EPS, 1.0)),
        "class_weight": torch.rand(C, generator=g),
        "return_lse": True,
        "entry_labels": torch.randint(among, (n,), generator=g),
        "target_labels": torch.randint(among, (B,), generator=g),
    }
    margins = ("angular_margin", "cosine_margin") if similarity == "dot" else ()
    return case, {name: v for name, v in extra.items() if name not in margins and rng.random() < 0.4}


def results(case: Case, extra: dict, function, in_float64: bool = False) -> dict[str, torch.Tensor]:
    """The loss, its lse and every gradient of both, by name."""
    tensors, options, upstream = case.build()
    wanted = {name: t for name, t in tensors.items() if t is not None}
    if in_float64:
        wanted = {name: t.detach().double().requires_grad_() for name, t in wanted.items()}
    found = function(**wanted, **options, **extra)
    loss, lse = found if extra.get("return_lse") else (found, None)
    total = (loss * upstream).sum()
    if lse is not None:
        total = total + (lse * torch.linspace(-1, 1, case.B)).sum()
    gradients = torch.autograd.grad(total, list(wanted.values()))
    values = {"loss": loss.detach()} | ({} if lse is None else {"lse": lse.detach()})
    return values | dict(zip(wanted, gradients, strict=True))


def check_mix(seed: int, function, **changes) -> None:
    case, extra = random_mix(seed)
    case = dataclasses.replace(case, **changes)
    found, truth = results(case, extra, function), results(case, extra, reference_loss, in_float64=True)
    # Two columns reversed add up to the same, so plain PyTorch's luck is drawn anew by other roundings: where
    # a gradient is almost 0 it may come to 0 itself, and all errors are large beside that.
    longer = [with_rows_longer(eager_loss, factor) for factor in (1.125, 1.375, 1.625)]
    ways = (eager_loss, with_features_reversed(eager_loss), *(longer if case.D == 2 else ()))
    plains = [results(case, extra, plain) for plain in ways]
    for name, result in found.items():
        dtype = case.dtype if name in ("loss", "lse", "scale") else result.dtype
        over = min(excess(result, truth[name], plain[name], dtype) for plain in plains)
        assert over <= 1, f"{name}: {over:.3g} times the tolerance in {case} with {extra}"


def by_reference(*arguments, **options):
    return loss_function(*arguments, impl="reference", **options)


FEW, MANY = range(25), range(25, 300)


@pytest.mark.parametrize("seeds", [FEW, *later(MANY)])
def test_within_tolerance_in_random_mixes(seeds):
    for seed in seeds:
        check_mix(seed, loss_function)


@pytest.mark.parametrize("seeds", [range(245, 270), *later(range(163, 500))])
def test_a_gradient_of_16_bits_is_rounded_once(seeds):
    """Of several parts, in the random mixes; in number 162 a gradient is 0, of two terms that cancel."""
    for seed in seeds:
        check_mix(seed, loss_function, dtype=F32, weight_dtype=(F16, BF16)[seed % 2])


@pytest.mark.parametrize("seeds", [FEW, *later(MANY)])
def test_the_reference_in_random_mixes(seeds):
    """In float64, as in fewer digits it is one draw of plain PyTorch's own error."""
    for seed in seeds:
        check_mix(seed, by_reference, dtype=F64)


@gpu_only
@pytest.mark.parametrize("seeds", [range(4), *later(range(4, 80))])
def test_gpu_kernels_within_tolerance_in_random_mixes(seeds, sampled_softmax_loss):
    """Interpreted, and so few of them: about each pair of arguments, sizes and dtypes is among these."""
    for seed in seeds:
        check_mix(seed, sampled_softmax_loss)


def problem(B=6, C=12, D=8, dtype=F32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(n, D, generator=g, dtype=F64).to(dtype).requires_grad_() for n in (B, C))
    return x, w, torch.randint(C, (B,), generator=g)


def assert_equal_with_gradients(a, b, tensors, **tolerance):
    torch.testing.assert_close(a, b, **tolerance)
    for of_a, of_b in zip(*(torch.autograd.grad(loss.sum(), tensors) for loss in (a, b)), strict=True):
        torch.testing.assert_close(of_a, of_b, **tolerance)


# ---- margins ----


@pytest.mark.parametrize("kind", [ArcFaceLoss, CosFaceLoss])
def test_equals_pytorch_metric_learning_with_all_classes(kind, sampled_softmax_loss):
    x, w, t = problem(B=20, D=16)
    with torch.no_grad():
        x[0] = -w[t[0]]  # past pi
    theirs = kind(12, 16)
    theirs.W.data = w.detach().T.clone()
    margin = {"angular_margin": theirs.margin} if kind is ArcFaceLoss else {"cosine_margin": theirs.margin}
    right = theirs(x, t)
    found = sampled_softmax_loss(x, w, t, scale=float(theirs.scale), **margin)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    (right_x,), right_w = (
        torch.autograd.grad(right, x, retain_graph=True),
        torch.autograd.grad(right, theirs.W)[0].T,
    )
    of_x, of_w = torch.autograd.grad(found, (x, w))
    torch.testing.assert_close(of_x[1:], right_x[1:], rtol=1e-4, atol=1e-5)
    others = [c for c in range(12) if c != t[0]]
    torch.testing.assert_close(of_w[others], right_w[others], rtol=1e-4, atol=1e-5)


def test_margins_of_zero_are_none_bit_for_bit(sampled_softmax_loss):
    x, w, t = problem()
    for zero in (0, 0.0, torch.tensor(0.0)):
        losses = (
            sampled_softmax_loss(x, w, t),
            sampled_softmax_loss(x, w, t, angular_margin=zero, cosine_margin=zero),
        )
        assert torch.equal(*losses)
        for a, b in zip(*(torch.autograd.grad(loss, (x, w)) for loss in losses), strict=True):
            assert torch.equal(a, b)


@cpp_only
@pytest.mark.parametrize("angular", [0.5, -0.3, 2.0])
def test_gradcheck_of_margins(angular, sampled_softmax_loss):
    x, w, t = problem(dtype=F64)

    def loss(x, w, scale):
        margins = {"angular_margin": angular, "cosine_margin": 0.2}
        return sampled_softmax_loss(x, w, t, scale=scale, reduction="none", **margins)

    assert torch.autograd.gradcheck(loss, (x, w, torch.tensor(5.0, dtype=F64, requires_grad=True)))


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_target_on_its_class_or_opposite_has_finite_gradients(sign, dtype, sampled_softmax_loss):
    _, w, t = problem(dtype=dtype)
    x = (sign * w[t]).detach().requires_grad_()
    loss = sampled_softmax_loss(x, w, t, angular_margin=0.5)
    assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, w)))


def test_a_margin_tensor_of_zeros_is_none_but_for_rounding(sampled_softmax_loss):
    x, w, t = problem()
    losses = (sampled_softmax_loss(x, w, t), sampled_softmax_loss(x, w, t, angular_margin=torch.zeros(6)))
    assert_equal_with_gradients(*losses, (x, w), rtol=1e-5, atol=1e-6)


def test_a_row_has_its_own_margins(sampled_softmax_loss):
    """As AdaFace and MagFace have."""
    x, w, t = problem(dtype=F64)
    angular, cosine = torch.linspace(0, 1, 6), torch.linspace(0.5, 0, 6)
    found = sampled_softmax_loss(x, w, t, angular_margin=angular, cosine_margin=cosine, reduction="none")
    for i in range(6):
        margins = {"angular_margin": angular[i].item(), "cosine_margin": cosine[i].item()}
        torch.testing.assert_close(found[i], sampled_softmax_loss(x[i : i + 1], w, t[i : i + 1], **margins))


# ---- smoothing and class weights ----


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_cross_entropy(reduction, sampled_softmax_loss):
    x, w, t = problem()
    t[2] = -100
    logits = 20 * F.normalize(x) @ F.normalize(w).T
    for options, theirs in (
        ({"label_smoothing": EPS}, {"label_smoothing": EPS}),
        *[({"class_weight": torch.linspace(0, 2, 12)}, {"weight": torch.linspace(0, 2, 12)})],
    ):
        found = sampled_softmax_loss(x, w, t, reduction=reduction, **options)
        right = F.cross_entropy(logits, t, reduction=reduction, **theirs)
        assert_equal_with_gradients(found, right, (x, w), rtol=1e-4, atol=1e-5)
        logits = 20 * F.normalize(x) @ F.normalize(w).T


@pytest.mark.parametrize("weights", [None, torch.zeros(12)])
def test_nothing_that_counts_costs_nothing(weights, sampled_softmax_loss):
    x, w, t = problem()
    t = t if weights is not None else torch.full_like(t, -100)
    loss, lse = sampled_softmax_loss(
        x, w, t, class_weight=weights, label_smoothing=EPS, angular_margin=0.5, return_lse=True
    )
    assert loss == 0 and (weights is not None or (lse == 0).all())
    assert not any(g.any() for g in torch.autograd.grad(loss, (x, w)))


@pytest.mark.exhaustive
@cpp_only
def test_the_smoothed_mean_is_unbiased(sampled_softmax_loss):
    """Over draws the smoothed part differs from that of all classes by no more than its standard error."""
    C, S = 40, 10
    x, w, t = problem(B=3, C=C, dtype=F64)
    g = torch.Generator().manual_seed(1)

    def mean(ids, counts):  # lse - the smoothed loss, of e = 1
        options = {"return_lse": True, "reduction": "none", "label_smoothing": 1.0, "scale": 5.0}
        loss, lse = sampled_softmax_loss(x.detach(), w.detach(), t, ids, counts, **options)
        return lse - loss

    log_count = torch.full((S,), S / C).log()
    draws = torch.stack([mean(torch.randperm(C, generator=g)[:S], log_count) for _ in range(4000)])
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - mean(None, None)).abs() < 4 * error).all()


@pytest.mark.parametrize("where", ["some", "all"])
def test_smoothing_reads_no_row_that_is_left_out(where, monkeypatch):
    """A sparse gradient would list it on a GPU, where what takes part is not cut out."""
    read, rows = [], ClassTable.rows

    def recorded(table, classes, *arguments):
        read.extend(classes.tolist())
        return rows(table, classes, *arguments)

    monkeypatch.setattr(ClassTable, "rows", recorded)
    x, w, _ = problem(B=3, C=40)
    bias, t = torch.zeros(40, requires_grad=True), torch.tensor([7, 7, -100])
    ids, counts = torch.tensor([0, 7, 9, 0]), torch.tensor([torch.inf, 0.0, 0.5, torch.inf])
    counts = counts if where == "some" else torch.full((4,), torch.inf)
    options = {"bias": bias, "label_smoothing": EPS, "sparse_grad": True, "impl": "triton"}
    loss_function(x, w, t, ids, counts, **options).backward()
    assert set(read) <= {7, 9}


def test_smoothing_takes_a_column_of_targets(gpu_loss):
    """torch warns of what its search makes a copy of; here a warning is an error."""
    x, w, t = problem(B=3, C=40)
    column = torch.stack([t, t], 1)[:, 0]
    for loss in (loss_function, gpu_loss):
        assert torch.equal(loss(x, w, column, label_smoothing=EPS), loss(x, w, t, label_smoothing=EPS))


@gpu_only
def test_negative_counts_of_16_bits_take_part(sampled_softmax_loss):
    """As in float32, in what a sparse gradient lists too."""
    x, w, _ = problem(B=2, C=5)
    t, ids, counts = torch.tensor([0, 1]), torch.tensor([1, 1, 0]), torch.tensor([-1.0, 0.5, -1.5])
    found = []
    for given in (counts, counts.bfloat16()):
        loss = sampled_softmax_loss(x, w, t, ids, given, sparse_grad=True)
        found.append(torch.autograd.grad(loss, w)[0].to_dense())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 13])
def test_the_sums_of_others_in_one_order(n):
    """On GPUs under deterministic algorithms torch cumulates no floats."""
    values = torch.randn(n, 5, dtype=F64, requires_grad=True)
    torch.testing.assert_close(smoothing._sums_up_to(values), values.cumsum(0), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(smoothing._sums_up_to, values)


@pytest.mark.gpu
def test_smoothing_under_deterministic_algorithms(gpu_loss):
    x, w, t = problem(B=5, C=40)
    plain = gpu_loss(x, w, t, label_smoothing=EPS)
    torch.use_deterministic_algorithms(True)
    try:
        same = gpu_loss(x, w, t, label_smoothing=EPS)
        assert all(g.isfinite().all() for g in torch.autograd.grad(same, (x, w)))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(same, plain)


@pytest.mark.parametrize("dtype, within", [(F32, 1e-6), (F64, 1e-12)])
@pytest.mark.parametrize("log_count", [-10.0, -25.0, -60.0])
def test_a_hit_of_a_rare_class_leaves_the_mean_of_the_others_as_it_is(log_count, dtype, within):
    """Its term of the mean, z / count, would be larger than theirs by e^10, e^25, e^60."""
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 16, generator=g, dtype=dtype).requires_grad_() for n in (8, 1000))
    t, ids = (torch.randint(1000, (n,), generator=g) for n in (8, 50))
    rare, left_out = torch.zeros(2, 50, dtype=dtype)
    ids[3], rare[3], left_out[3] = t[0], log_count, torch.inf  # the same to row 0, whose own class it is
    options = {"label_smoothing": EPS, "reduction": "none"}
    found = loss_function(x, w, t, ids, rare, **options)[0]
    truth = reference_loss(x, w, t, ids, left_out, **options, dtype=F64)[0]
    torch.testing.assert_close(found.double(), truth, rtol=within, atol=0)
    gradients = [torch.autograd.grad(loss, (x, w)) for loss in (found, truth)]
    for of_found, of_truth in zip(*gradients, strict=True):
        assert (of_found - of_truth).abs().max() <= 4 * within * of_truth.abs().max()


# ---- lse ----


def test_z_loss(sampled_softmax_loss):
    x, w, t = problem(dtype=F64)
    found = sampled_softmax_loss(x, w, t, return_lse=True)
    logits = 20 * F.normalize(x) @ F.normalize(w).T
    right = F.cross_entropy(logits, t), logits.logsumexp(1)
    totals = [loss + 1e-2 * (lse**2).mean() for loss, lse in (found, right)]
    assert_equal_with_gradients(*totals, (x, w))


def test_two_halves_of_a_class_set_are_the_whole(sampled_softmax_loss):
    x, w, t = problem(dtype=F64)
    options = {"return_lse": True, "reduction": "none", "scale": 3.0}
    _, whole = sampled_softmax_loss(x, w, t, **options)
    (_, one), (loss, other) = (
        sampled_softmax_loss(x, w, t, half, **options) for half in torch.arange(12).split(6)
    )
    others_alone = other + torch.log(-torch.expm1(-loss))  # the target is in each half once
    torch.testing.assert_close(torch.logaddexp(one, others_alone), whole)


# ---- labels ----


def test_in_batch_softmax_with_repeated_items(sampled_softmax_loss):
    x, items = (rows.detach().requires_grad_() for rows in problem(C=6)[:2])
    ids = torch.tensor([5, 7, 5, 8, 7, 5])
    found = sampled_softmax_loss(x, items, torch.arange(6), entry_labels=ids, target_labels=ids)
    logits = 20 * F.normalize(x) @ F.normalize(items).T
    hits = (ids[:, None] == ids) & ~torch.eye(6, dtype=torch.bool)
    right = F.cross_entropy(logits.masked_fill(hits, -torch.inf), torch.arange(6))
    assert_equal_with_gradients(found, right, (x, items), rtol=1e-4, atol=1e-5)


def test_simclr(sampled_softmax_loss):
    """Both views of an image share a label: neither is a negative of the other, nor a row of itself."""
    n = 5
    views = problem(B=2 * n)[0]
    other, image = (torch.arange(2 * n) + n) % (2 * n), torch.arange(2 * n) % n
    found = sampled_softmax_loss(views, views, other, entry_labels=image, target_labels=image, scale=5.0)
    logits = (5 * F.normalize(views) @ F.normalize(views).T).masked_fill(torch.eye(2 * n).bool(), -torch.inf)
    assert_equal_with_gradients(found, F.cross_entropy(logits, other), (views,), rtol=1e-4, atol=1e-5)


def test_moco(sampled_softmax_loss):
    """A key for each query, and a queue of the keys of other images."""
    query, queue, _ = problem(B=4, C=9)
    key = problem(B=4, seed=1)[0]
    rows, image = torch.cat([key, queue]), torch.tensor([0, 1, 2, 3, 1, 5, 6, 0, 8, 9, 10, 11, 12])
    found = sampled_softmax_loss(
        query, rows, torch.arange(4), torch.arange(4, 13), entry_labels=image[4:], target_labels=image[:4]
    )
    positive = (F.normalize(query) * F.normalize(key)).sum(1, keepdim=True)
    negative = F.normalize(query) @ F.normalize(queue).T
    negative = negative.masked_fill(image[:4, None] == image[4:], -torch.inf)
    right = F.cross_entropy(20 * torch.cat([positive, negative], 1), torch.zeros(4, dtype=torch.int64))
    assert_equal_with_gradients(found, right, (query, key, queue), rtol=1e-4, atol=1e-5)


# ---- in torch ----

ALL = {
    "angular_margin": 0.5,
    "cosine_margin": 0.1,
    "label_smoothing": EPS,
    "class_weight": torch.linspace(0.5, 1, 12),
    "return_lse": True,
    "entry_labels": torch.arange(12) % 5,
    "target_labels": torch.arange(6) % 5,
}


def total_of(loss, lse):
    return loss + 0.1 * lse.sum()


@cpp_only
@pytest.mark.parametrize("rounding", [None, *later(BF16)])
def test_compiled_equals_eager(rounding, sampled_softmax_loss):
    x, w, t = problem()

    def total(x, w):
        with torch.autocast("cpu", rounding or BF16, enabled=rounding is not None):
            return total_of(*sampled_softmax_loss(x, w, t, **ALL))

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    assert_equal_with_gradients(compiled(x, w), total(x, w), (x, w))


@cpp_only
def test_vmap(sampled_softmax_loss):
    xs, ws, ts = (torch.stack(each) for each in zip(*(problem(seed=i) for i in range(3)), strict=True))
    xs, ws = xs.detach().requires_grad_(), ws.detach().requires_grad_()

    def total(x, w, t):
        return total_of(*sampled_softmax_loss(x, w, t, **ALL))

    alone = torch.stack([total(*each) for each in zip(xs, ws, ts, strict=True)])
    assert_equal_with_gradients(torch.vmap(total)(xs, ws, ts), alone, (xs, ws))


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_autocast_rounds_as_the_reference_does(dtype):
    x, w, t = problem()
    with torch.autocast("cpu", dtype):
        found, right = (total_of(*loss_function(x, w, t, **ALL, impl=i)) for i in ("cpp", "reference"))
    assert found.dtype == F32
    assert_equal_with_gradients(found, right, (x, w), rtol=1e-4, atol=1e-5)


@cpp_only
def test_nothing_dense_is_made_for_sparse_gradients(sampled_softmax_loss):
    x, w, t = problem(C=50)
    ids, options = (
        torch.tensor([1, 30, 7]),
        {"label_smoothing": EPS, "angular_margin": 0.5, "return_lse": True},
    )
    totals = [
        total_of(*sampled_softmax_loss(x, w, t, ids, **options, sparse_grad=sparse))
        for sparse in (True, False)
    ]
    (sparse,), (dense,) = (torch.autograd.grad(total, w) for total in totals)
    assert sparse.is_coalesced() and sparse.indices()[0].tolist() == sorted({*ids.tolist(), *t.tolist()})
    torch.testing.assert_close(sparse.to_dense(), dense)


@pytest.mark.parametrize("C", [50, 400])  # of the second a class set is a small share
@cpp_only
@pytest.mark.parametrize("dtype", [F16, BF16, F32])
@pytest.mark.parametrize("class_ids", [None, torch.tensor([1, 30, 7, 7])])
def test_sparse_gradients_are_the_dense_ones(C, class_ids, dtype, sampled_softmax_loss):
    x, w, t = problem(C=C, dtype=dtype)
    w.data, bias = w.data.to(dtype), torch.linspace(-1, 1, C).to(dtype).requires_grad_()
    for extra in (
        {"cosine_margin": 0.2},
        {"label_smoothing": EPS},
        {"return_lse": True, "label_smoothing": EPS},
    ):
        found = []
        for sparse_grad in (True, False):
            options = extra | {"sparse_grad": sparse_grad}
            loss = sampled_softmax_loss(x, w, t, class_ids, bias=bias, **options)
            found.append(torch.autograd.grad(total_of(*loss) if isinstance(loss, tuple) else loss, (w, bias)))
        for sparse, dense in zip(*found, strict=True):
            assert sparse.is_sparse and sparse.dtype is dense.dtype is dtype and not dense.is_sparse
            torch.testing.assert_close(sparse.to_dense(), dense)


@cpp_only
@pytest.mark.parametrize("shared", [True, False])
def test_sparse_gradients_under_vmap(shared, sampled_softmax_loss):
    xs, ws, ts = (torch.stack(each) for each in zip(*(problem(seed=i, C=50) for i in range(3)), strict=True))
    w, dims = (ws[0], (0, None, 0)) if shared else (ws, 0)
    w, ids = w.detach().requires_grad_(), torch.tensor([1, 30, 7])

    def loss(x, w, t):
        options = {"label_smoothing": EPS, "cosine_margin": 0.2, "sparse_grad": True}
        return sampled_softmax_loss(x, w, t, ids, **options)

    (found,) = torch.autograd.grad(torch.vmap(loss, dims)(xs, w, ts).sum(), w)
    each = zip(xs, [w] * 3 if shared else w, ts, strict=True)
    alone = torch.stack(
        [sampled_softmax_loss(*one, ids, label_smoothing=EPS, cosine_margin=0.2) for one in each]
    )
    assert found.is_sparse
    torch.testing.assert_close(found.to_dense(), torch.autograd.grad(alone.sum(), w)[0])


def test_the_same_bits_twice():
    x, w, t = problem(B=64, C=200)
    options = ALL | {"class_weight": torch.ones(200), "entry_labels": torch.arange(200) % 9}
    options["target_labels"] = torch.arange(64) % 9
    runs = []
    for _ in range(2):
        total = total_of(*loss_function(x, w, t, **options))
        runs.append((total, *torch.autograd.grad(total, (x, w))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---- the module ----


@pytest.mark.parametrize("num_sampled", [None, 5])
def test_the_module_has_them(num_sampled):
    x, _, t = problem()
    given = {name: value for name, value in ALL.items() if "labels" not in name}
    criterion = SampledSoftmaxLoss(12, 8, num_sampled, generator=torch.Generator().manual_seed(0), **given)
    assert set(criterion.state_dict()) == {"weight", "class_weight"}
    g = torch.Generator()
    g.set_state(criterion.generator.get_state())
    ids, counts = (None, None) if num_sampled is None else draw_batch_class_set(t, 12, num_sampled, g)
    found, right = criterion(x, t), loss_function(x, criterion.weight, t, ids, counts, **given)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    own = torch.linspace(0, 1, 6)
    loss, _ = criterion.eval()(x, t, cosine_margin=own)
    assert loss == loss_function(x, criterion.weight, t, **given | {"cosine_margin": own})[0]


@pytest.mark.parametrize("kind", [SampledSoftmaxLoss, ShardedSampledSoftmaxLoss])
@pytest.mark.parametrize("num_sampled", [None, 5])
def test_labels_of_a_modules_classes(num_sampled, kind):
    """Each class has its label, whichever are drawn; compiled too, and in eval mode."""
    x, _, t = problem(B=6)
    t, of_classes, of_rows = t % 12, torch.arange(12) % 5, torch.tensor([0, 4, 2, 2, 9, 1])
    criterion = kind(12, 8, num_sampled, generator=torch.Generator().manual_seed(0))
    g = torch.Generator()
    for labels in (
        {"entry_labels": of_classes},
        {"target_labels": of_rows},
        dict(entry_labels=of_classes, target_labels=of_rows),
    ):
        g.set_state(criterion.generator.get_state())
        ids, counts = (None, None) if num_sampled is None else draw_batch_class_set(t, 12, num_sampled, g)
        given = dict(labels)
        if ids is not None and "entry_labels" in given:
            given["entry_labels"] = of_classes[ids]
        assert torch.equal(
            criterion(x, t, **labels), loss_function(x, criterion.weight, t, ids, counts, **given)
        )
        of_all = criterion.eval()(x, t, **labels)
        assert torch.equal(of_all, loss_function(x, criterion.weight, t, **labels))
        criterion.train()
    with pytest.raises(
        ValueError, match=r"entry_labels: expected shape \(12,\) = \(num_classes,\), got \(3,\)"
    ):
        criterion(x, t, entry_labels=torch.arange(3))
    with pytest.raises(ValueError, match=r"target_labels: expected shape \(6,\) = target's, got \(3,\)"):
        criterion(x, t, target_labels=torch.arange(3))


@pytest.mark.exhaustive
def test_labels_of_a_module_compiled():
    x, _, t = problem(B=6)
    labels = {"entry_labels": torch.arange(12) % 5, "target_labels": torch.arange(6) % 5}
    criteria = [SampledSoftmaxLoss(12, 8, 5, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    compiled = torch.compile(criteria[0], fullgraph=True, backend="aot_eager")
    losses = compiled(x, t, **labels), criteria[1](x, t, **labels)
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss, x)[0] for loss in losses))


def test_a_learned_scale_has_the_modules_dtype():
    criterion = SampledSoftmaxLoss(12, 8, learn_scale=True, dtype=F64, angular_margin=0.5)
    x, _, t = problem(dtype=F64)
    criterion(x, t).backward()
    assert criterion.scale.dtype is criterion.scale.grad.dtype is F64 and criterion.scale.grad != 0


@pytest.mark.parametrize(
    "name, wrong", [("angular_margin", "big"), ("label_smoothing", 2), ("return_lse", 1)]
)
def test_the_module_says_what_is_wrong(name, wrong):
    with pytest.raises((TypeError, ValueError), match=f"{name}: expected"):
        SampledSoftmaxLoss(12, 8, **{name: wrong})
    with pytest.raises(ValueError, match=r"class_weight: expected shape \(12,\)"):
        SampledSoftmaxLoss(12, 8, class_weight=torch.ones(3))


@pytest.mark.parametrize("kind", [SampledSoftmaxLoss, ShardedSampledSoftmaxLoss])
@pytest.mark.parametrize("number", [-1.0, torch.nan, torch.inf])
def test_modules_look_at_class_weights(number, kind):
    """In the words of the function: when they are made, and what was written into the buffer since."""
    weights = torch.ones(12)
    weights[5] = number
    message = rf"class_weight\[5\] = {number}, expected a finite number of at least 0"
    with pytest.raises(ValueError, match=message):
        kind(12, 8, class_weight=weights)
    criterion = kind(12, 8, class_weight=torch.ones(12))
    criterion.class_weight[5] = number
    with pytest.raises(ValueError, match=message):
        criterion(problem()[0], torch.arange(6))


@pytest.mark.parametrize("kind", [SampledSoftmaxLoss, ShardedSampledSoftmaxLoss])
@pytest.mark.parametrize("name", ["angular_margin", "label_smoothing", "class_weight", "sampler"])
def test_modules_learn_no_constant(name, kind):
    value = torch.full((12,) if name in ("class_weight", "sampler") else (), 0.1, requires_grad=True)
    with pytest.raises(ValueError, match=f"{name}: expected a constant, got a tensor that requires grad"):
        kind(12, 8, 3, **{name: value})


# ---- errors ----


@pytest.mark.parametrize(
    "wrong, kind, message",
    [
        (
            {"angular_margin": 0.5, "similarity": "dot"},
            ValueError,
            'angular_margin: expected 0 for similarity="dot"',
        ),
        ({"cosine_margin": torch.ones(6), "similarity": "dot"}, ValueError, "cosine_margin: expected 0"),
        ({"angular_margin": "big"}, TypeError, "angular_margin: expected a number, got str"),
        ({"cosine_margin": float("nan")}, ValueError, "cosine_margin: expected a finite number, got nan"),
        (
            {"angular_margin": 28.6},
            ValueError,
            "angular_margin: expected radians from -pi to pi, got 28.6; 28.6 degrees are 0.4992",
        ),
        (
            {"angular_margin": torch.tensor([0, 0, -3.2, 0, 0, 0])},
            ValueError,
            r"angular_margin\[2\] = -3.2\d*, expected radians from -pi to pi",
        ),
        ({"angular_margin": torch.ones(5)}, ValueError, r"angular_margin: expected shape \(6,\) = target's"),
        (
            {"angular_margin": torch.ones(6, requires_grad=True)},
            ValueError,
            "angular_margin: expected a constant",
        ),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing: expected a number from 0 to 1, got 1.5"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing: expected a number from 0 to 1, got -0.1"),
        (
            {"label_smoothing": float("nan")},
            ValueError,
            "label_smoothing: expected a number from 0 to 1, got nan",
        ),
        *(
            (
                {name: torch.tensor(0.1, requires_grad=True)},
                ValueError,
                f"{name}: expected a constant, got a tensor",
            )
            for name in ("label_smoothing", "angular_margin", "cosine_margin")
        ),
        *(
            (
                {name: torch.tensor([0, 0, torch.nan, 0, 0, 0]), "target": torch.arange(6) + 3},
                ValueError,
                rf"{name}\[2\] = nan, expected (a finite number|radians)",
            )
            for name in ("angular_margin", "cosine_margin")
        ),
        *(
            (
                {
                    "class_weight": torch.ones(12).index_fill(0, torch.tensor([5]), number),
                    "target": torch.arange(6),
                },
                ValueError,
                rf"class_weight\[5\] = {number}, expected a finite number of at least 0",
            )
            for number in (-1.0, torch.nan, torch.inf)
        ),
        ({"class_weight": torch.ones(6)}, ValueError, r"class_weight: expected shape \(12,\) = \(C,\)"),
        (
            {"class_weight": torch.ones(12, requires_grad=True)},
            ValueError,
            "class_weight: expected a constant",
        ),
        ({"class_weight": torch.ones(12).long()}, TypeError, "class_weight: expected float16 or"),
        ({"return_lse": 1}, TypeError, "return_lse: expected True or False, got int"),
        (
            {"entry_labels": torch.ones(6).long()},
            ValueError,
            r"entry_labels: expected shape \(12,\) = \(S,\)",
        ),
        ({"target_labels": torch.ones(6)}, TypeError, "target_labels: expected int64, got float32"),
        ({"target": torch.tensor([0, 1, 12, 0, 0, 0]), "return_lse": True}, IndexError, r"target\[2\] = 12"),
        (
            {"target_log_expected_count": torch.full((6,), torch.inf), "return_lse": True},
            ValueError,
            r"target_log_expected_count\[0\] = inf, expected a finite number",
        ),
    ],
)
@pytest.mark.parametrize("impl", ["cpp", "reference"])
def test_what_is_wrong_is_said(wrong, kind, message, impl):
    x, w, t = problem()
    with pytest.raises(kind, match=message):
        loss_function(x, w, **({"target": t} | wrong), impl=impl)


@pytest.mark.parametrize("impl", ["cpp", "reference"])
def test_without_classes_every_row_is_ignored(impl):
    x, w, _ = problem()
    t, options = torch.full((6,), -100), {"label_smoothing": 0.1, "class_weight": torch.ones(0)}
    loss, lse = loss_function(x, w[:0], t, **options, return_lse=True, impl=impl)
    assert loss == 0 and torch.equal(lse, torch.zeros(6))


@pytest.mark.parametrize("class_ids", [None, torch.arange(3)])
def test_a_batch_of_no_rows_is_smoothed_to_nothing(class_ids, sampled_softmax_loss):
    x, w, t = problem()
    x, w = x[:0].detach().requires_grad_(), w.detach().requires_grad_()
    options = {"label_smoothing": 0.1, "reduction": "sum", "return_lse": True}
    loss, lse = sampled_softmax_loss(x, w, t[:0], class_ids, **options)
    assert loss == 0 and lse.shape == (0,)
    gradients = torch.autograd.grad(loss + lse.sum(), (x, w))
    assert gradients[0].shape == x.shape and not gradients[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_without_columns_have_cosine_0(dtype):
    x, w, t = torch.zeros(2, 0, dtype=dtype), torch.zeros(5, 0, dtype=dtype), torch.tensor([1, 2])
    even = math.log(5)
    assert loss_function(x, w, t, label_smoothing=0.1).item() == pytest.approx(even)
    margin = math.log(4 + math.exp(-4.0)) + 4.0  # 20 * 0.2 under the others
    assert loss_function(x, w, t, cosine_margin=0.2).item() == pytest.approx(margin)


# ---- compiled and exported ---------------------------------------------------------------------------------

COMPOSED = {
    "cosine_margin": 0.1,
    "angular_margin": 0.1,
    "label_smoothing": 0.1,
    "class_weight": torch.ones(12),
    "return_lse": True,
}


def of_classes(x, w, t, **options):
    loss = loss_function(x, w, t, **options)
    return loss[0] if isinstance(loss, tuple) else loss


@pytest.mark.parametrize("name", COMPOSED)
@pytest.mark.parametrize("backend", COMPILERS)
def test_a_compiled_loss_refuses_what_is_no_class(name, backend):
    """A compiler's own indexing takes -1 for the last class."""
    x, w = torch.randn(3, 5), torch.randn(12, 5, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(of_classes, fullgraph=True, backend=backend)
    assert compiled(x, w, torch.tensor([3, -100, 11]), **{name: COMPOSED[name]}).isfinite()
    for bad in (-1, 12, -101):
        with pytest.raises(
            IndexError, match=rf"target\[1\] = {bad}, expected a class in \[0, 12\) or ignore"
        ):
            compiled(x, w, torch.tensor([3, bad, 11]), **{name: COMPOSED[name]})


@pytest.mark.parametrize("name", COMPOSED)
def test_an_exported_loss_takes_a_batch_of_no_rows(name):
    class Loss(torch.nn.Module):
        def forward(self, x, w, t):
            return of_classes(x, w, t, **{name: COMPOSED[name]})

    x, w, t = torch.randn(4, 5), torch.randn(12, 5), torch.tensor([3, -100, 11, 0])
    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Loss(), (x, w, t), dynamic_shapes=(batch, None, batch)).module()
    torch.testing.assert_close(program(x, w, t), of_classes(x, w, t, **{name: COMPOSED[name]}))
    torch.testing.assert_close(program(x[1:2], w, t[1:2]), torch.tensor(0.0))
    torch.testing.assert_close(program(x[:0], w, t[:0]), torch.tensor(0.0))


DEGREES, NO_NUMBER = torch.tensor([0.3, 28.5, 0.3]), torch.tensor([0.3, 0.3, torch.nan])
WRONG = {
    "degrees": ({"angular_margin": DEGREES}, r"angular_margin\[1\] = 28.5, expected radians"),
    "no number": ({"cosine_margin": NO_NUMBER}, r"cosine_margin\[2\] = nan, expected a finite number"),
    "negative": ({"class_weight": -torch.ones(12)}, r"class_weight\[3\] = -1.0, expected a finite number"),
}


@pytest.mark.parametrize("options, words", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("backend", COMPILERS)
def test_a_compiled_loss_refuses_numbers_out_of_range(options, words, backend):
    x, w, t = torch.randn(3, 5), torch.randn(12, 5, requires_grad=True), torch.tensor([3, 11, 3])
    torch.compiler.reset()
    compiled = torch.compile(of_classes, fullgraph=True, backend=backend)
    good = {name: torch.full_like(value, 0.3) for name, value in options.items()}
    torch.testing.assert_close(compiled(x, w, t, **good), of_classes(x, w, t, **good))
    with pytest.raises(ValueError, match=words):
        compiled(x, w, t, **options)


MODES = {
    "a default device": lambda: torch.device("cpu"),
    "a counter of flops": lambda: FlopCounterMode(display=False),
    "a mode that saves": lambda: torch.autograd.graph.save_on_cpu(),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_values_are_checked_in_modes_that_trace_nothing(mode):
    x, w, t = torch.randn(3, 5), torch.randn(12, 5), torch.tensor([3, 11, 3])
    criterion = SampledSoftmaxLoss(12, 5, 4, similarity="cosine")
    with mode():
        for options, words in WRONG.values():
            with pytest.raises(ValueError, match=words):
                of_classes(x, w, t, **options)
            if "class_weight" not in options:
                with pytest.raises(ValueError, match=words):
                    criterion(x, t, **options)
        bad, generator = torch.tensor([3, 12, -5]), torch.Generator().manual_seed(0)
        before = generator.get_state()
        for call in (
            lambda: of_classes(x, w, bad),
            lambda: of_classes(x, w, bad, impl="reference"),
            lambda: draw_batch_class_set(bad, 12, 4, generator=generator),
        ):
            with pytest.raises(IndexError, match=r"target\[1\] = 12, expected a class in"):
                call()
        assert torch.equal(generator.get_state(), before)


def test_a_stack_of_compiled_losses_checks_its_class_weights():
    x, w, t = torch.randn(2, 3, 5), torch.randn(12, 5), torch.tensor([[3, -100, 11], [0, 1, 2]])

    def stacked(x, t, margins, weights):
        def loss(x, t, margin):
            return of_classes(x, w, t, cosine_margin=margin, class_weight=weights)

        return torch.vmap(loss)(x, t, margins)

    good = (x, t, torch.full((2, 3), 0.1), torch.ones(12))
    compiled = torch.compile(stacked, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*good), stacked(*good))
    with pytest.raises(ValueError, match=r"class_weight\[target\]\[0\] = -1.0, expected a finite number"):
        compiled(*good[:3], -torch.ones(12))
    with pytest.raises(ValueError, match=r"cosine_margin\[0\] = nan, expected a finite number"):
        compiled(*good[:2], good[2] * torch.nan, good[3])


def test_a_stack_of_compiled_losses_checks_its_targets():
    x, w, t = torch.randn(2, 3, 5), torch.randn(12, 5), torch.tensor([[3, -100, 11], [0, 1, 2]])

    def stacked(x, t):
        return torch.vmap(lambda x, t: of_classes(x, w, t, cosine_margin=0.1))(x, t)

    compiled = torch.compile(stacked, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t), stacked(x, t))
    with pytest.raises(IndexError, match="= -1, expected a class in"):
        compiled(x, t.where(t != 2, -1))
