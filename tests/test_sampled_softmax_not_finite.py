"""A number that is not finite never passes for a good one: losses and gradients beside plain PyTorch's.

Where plain PyTorch's number is not finite the kernel's is not; where it is finite, they are equal.
"""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from later import later
from loss_cases import BF16, F16, F32, F64
from tolerance import eager_loss
from torch import Tensor

import fedss_kernels

NAN, INF = torch.nan, torch.inf
pytestmark = [  # numpy's, under interpreted kernels
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning"),
]
TARGET, OTHER = 3, 4  # classes; the first is the target of row 0, the second nobody's
IDS = torch.tensor([0, 1, OTHER, 2, OTHER, TARGET])
RIGHT = {F32: 1e-4, F64: 1e-6, F16: 0.02, BF16: 0.06}

Problem = dict[str, Tensor]  # its differentiable tensors


def problem(dtype: torch.dtype = F32, B: int = 3, C: int = 9, D: int = 5) -> tuple[Problem, Tensor]:
    g = torch.Generator().manual_seed(0)
    tensors = {
        "input": torch.randn(B, D, generator=g).to(dtype),
        "weight": torch.randn(C, D, generator=g).to(dtype),
        "bias": torch.randn(C, generator=g).to(dtype),
        "scale": torch.tensor(2.0),
    }
    return tensors, torch.tensor([TARGET, 1, 7]).repeat(-(-B // 3))[:B]


def poison(p: Problem, place: str, value: float) -> None:
    if place == "input":
        p["input"][0, 0] = value
    elif place == "every bias":
        p["bias"].fill_(value)
    elif place == "scale":
        p["scale"].fill_(value)
    else:
        name, of = place.split(" of ")
        row = TARGET if of == "target" else OTHER
        p[name].view(len(p[name]), -1)[row, 0] = value


def overflow(p: Problem, of: str, sign: float) -> None:
    """One dot product past float32's largest number, of finite ones."""
    row = TARGET if of == "target" else OTHER
    p["input"][0], p["weight"][row], p["weight"][:, 0] = 0, 0, 0
    p["input"][0, 0], p["weight"][row, 0] = 3e38, sign * 10


def poisoned(similarity: str, dtype: torch.dtype = F32, few: bool = False, **sizes) -> Iterator[tuple]:
    """(name, tensors, target)"""
    places = "input", "weight of target", "weight of other", "bias of target", "bias of other"
    for place in (*places, "every bias", "scale"):
        for value in (NAN, INF, -INF):
            if few and value != (-INF if place == "every bias" else INF):
                continue
            p, target = problem(dtype, **sizes)
            poison(p, place, value)
            yield f"{place} {value}", p, target
    if similarity == "dot":  # a logit of -inf, of every row
        p, target = problem(dtype, **sizes)
        p["input"][:, 0].abs_()
        p["weight"][OTHER, 0] = -INF
        yield "every product of other -inf", p, target
    if similarity == "dot" and dtype in (F32, BF16):
        for of, sign in (("target", 1), ("target", -1), ("other", 1), ("other", -1)):
            p, target = problem(dtype, **sizes)
            overflow(p, of, sign)
            yield f"overflow of {of} {sign}", p, target


def results(
    loss_function, p: Problem, target: Tensor, ids, similarity, reduction, **extra
) -> dict[str, Tensor]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in p.items()}
    input, weight, *others = leaves.values()
    options = dict(zip(("bias", "scale"), others, strict=True), similarity=similarity, reduction=reduction)
    loss = loss_function(input, weight, target, ids, **options, **extra)
    upstream = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    gradients = torch.autograd.grad(loss, list(leaves.values()), upstream)
    return {"loss": loss.detach(), **{n: g.to_dense() for n, g in zip(leaves, gradients, strict=True)}}


def assert_no_false_number(found: dict[str, Tensor], plain: dict[str, Tensor], about: object) -> None:
    dtype = found["input"].dtype
    for name, result in found.items():
        right, finite = plain[name], plain[name].isfinite()
        assert not result[~finite].isfinite().any(), (name, about)
        tolerance = {"rtol": RIGHT[dtype], "atol": RIGHT[dtype] * 10, "equal_nan": True}
        assert torch.allclose(result[finite].double(), right[finite].double(), **tolerance), (name, about)


@pytest.mark.parametrize("sparse_grad", [False, *later(True)])
@pytest.mark.parametrize("ids", [None, IDS, IDS[:0], IDS[-1:]], ids=["all", "some", "none", "a target"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_cpu_kernels(similarity, ids, sparse_grad):
    for dtype in (F32, F64, F16, BF16):
        for name, p, target in poisoned(similarity, dtype):
            for reduction in ("mean", "sum", "none"):
                arguments = (p, target, ids, similarity, reduction)
                found = results(fedss_kernels.sampled_softmax_loss, *arguments, sparse_grad=sparse_grad)
                assert_no_false_number(found, results(eager_loss, *arguments), (name, dtype, reduction))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_cpu_kernels_where_float32_does(similarity, dtype, set_threads):
    """Problems past those that are computed in float64 throughout; several tiles of rows or of classes."""
    set_threads(2)
    for name, p, target in poisoned(similarity, dtype, few=True, B=130, C=40, D=70):
        arguments = (p, target, None, similarity, "none")
        found = results(fedss_kernels.sampled_softmax_loss, *arguments)
        plain = results(eager_loss, *arguments)
        if dtype == BF16:  # whose own sums over so many rows are too rough to be compared with
            plain = {name: torch.where(t.isfinite(), found[name], t) for name, t in plain.items()}
        assert_no_false_number(found, plain, name)


@pytest.mark.parametrize("ids", [None, IDS, IDS[:0]], ids=["all", "some", "none"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_reference(similarity, ids):
    """Where the target's logit is -inf it is NaN throughout, and plain PyTorch +inf with finite gradients."""
    for name, p, target in poisoned(similarity):
        for reduction in ("mean", "none"):
            arguments = (p, target, ids, similarity, reduction)
            found = results(fedss_kernels.sampled_softmax_loss, *arguments, impl="reference")
            plain = results(eager_loss, *arguments)
            if not plain["loss"].isfinite().all():
                plain = {name: torch.where(t.isfinite(), found[name], t) for name, t in plain.items()}
            assert_no_false_number(found, plain, name)


@pytest.mark.exhaustive
def test_gpu_kernels_in_float64(gpu_loss):
    """As small problems are."""
    for name, p, target in poisoned("dot", few=True):
        arguments = (p, target, IDS, "dot", "none")
        assert_no_false_number(results(gpu_loss, *arguments), results(eager_loss, *arguments), name)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_gpu_kernels_in_float32(similarity, sampled_softmax_loss):
    if sampled_softmax_loss is fedss_kernels.sampled_softmax_loss:
        return  # above
    for nth, (name, p, target) in enumerate(poisoned(similarity, few=True)):
        ids = (None, IDS, IDS[:0])[nth % 3]
        arguments = (p, target, ids, similarity, ("mean", "none")[nth % 2])
        assert_no_false_number(
            results(sampled_softmax_loss, *arguments), results(eager_loss, *arguments), name
        )


def test_a_diverged_training_does_not_look_finished(any_loss):
    """The target's dot product overflows: exactly computed the loss would be 0."""
    x = torch.tensor([[3e38, 0.5]], requires_grad=True)
    w = torch.tensor([[0.1, 0.2], [10, 0.3], [0.5, 0.1]], requires_grad=True)
    loss = any_loss(x, w, torch.tensor([1]), scale=1.0, similarity="dot")
    for result in (loss, *torch.autograd.grad(loss, (x, w))):
        assert result.isnan().all()


def test_all_biases_of_minus_infinity(any_loss):
    x, w = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    loss = any_loss(x, w, torch.tensor([1, 2]), bias=torch.full((4,), -INF))
    for result in (loss, *torch.autograd.grad(loss, (x, w))):
        assert result.isnan().all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_may_hold_anything(reduction, any_loss):
    p, target = problem()
    target[0] = -100
    expected = results(any_loss, p, target, IDS, "cosine", reduction)
    p["input"][0] = NAN
    found = results(any_loss, p, target, IDS, "cosine", reduction)
    for name, result in found.items():
        assert torch.equal(result, expected[name]), name


def test_no_row_that_counts_costs_nothing_whatever_there_is(any_loss):
    for value in (NAN, INF):
        p, target = problem()
        for tensor in p.values():
            tensor.fill_(value)
        for name, result in results(any_loss, p, target.fill_(-100), IDS, "cosine", "mean").items():
            assert (result == 0).all(), name


@pytest.fixture(params=["cpp", "reference", "triton"])
def any_loss(request):
    """By each implementation, as it is shipped; the GPU's interpreted where there is none."""
    if request.param == "triton":
        return request.getfixturevalue("gpu_loss")
    return partial(fedss_kernels.sampled_softmax_loss, impl=request.param)
