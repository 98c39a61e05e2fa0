"""The loss of rows whose targets' logits are given, and labels that tell accidental hits."""

import math
from functools import partial

import pytest
import torch
from fedss_kernels.reference import sampled_softmax_loss as reference_loss
from loss_cases import F16, F32, F64, GPU_IMPLEMENTATIONS, blocks_of_16

from fedss_kernels import composed_loss
from fedss_kernels.class_table import class_tables
from fedss_kernels.given_target import row_losses
from fedss_kernels.loss_operator import OPERATORS
from fedss_kernels.triton_kernels.configurations import forced

B, C, D, S = 6, 20, 18, 35  # the GPU kernels' blocks have 16 classes and columns

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")


@pytest.fixture(params=["cpp", *GPU_IMPLEMENTATIONS])
def impl(request):
    """Each implementation, tensors made where it runs; without a GPU its kernels both ways, interpreted."""
    if request.param in ("cpp", "gpu"):
        with torch.device("cpu" if request.param == "cpp" else "cuda"):
            yield "cpp" if request.param == "cpp" else "triton"
    else:
        with forced(partial(blocks_of_16, request.param == "triton in two launches")):
            yield "triton"


def loss_given_target(impl, x, w, labels, given, ids=None, counts=None, *, bias=None, scale=20.0, **options):
    options = {"similarity": "cosine", "ignore_index": -100, "sparse_grad": False} | options
    similarity, ignore_index, sparse_grad = (options.pop(n) for n in list(options)[:3])
    weight, bias = class_tables(w, bias, sparse_grad, None if ids is None else len(ids) + len(x))
    return row_losses(
        *(x, weight, labels, (ids, counts, None), bias, scale, similarity, ignore_index, impl, None),
        labels=(options.get("entry_labels"), options.get("target_labels"), given),
    )


def problem(dtype=F64, seed=0):
    g, here = torch.Generator().manual_seed(seed), torch.empty(0).device
    x, w, bias, given = (
        torch.randn(*n, generator=g, dtype=F64, device="cpu") for n in ((B, D), (C, D), (C,), (B,))
    )
    tensors = [t.to(here, dtype).requires_grad_() for t in (x, w, bias, 3 * given)]
    scale = torch.tensor(7.0, dtype=dtype, requires_grad=True)
    labels, ids = (torch.randint(n, (m,), generator=g, device="cpu") for n, m in ((4, B), (C, S)))
    labels[1] = -100
    return tensors, scale, labels.to(here), ids.to(here), torch.randn(S, generator=g, device="cpu").to(here)


def both(impl, x, w, bias, given, scale, labels, ids, counts, **options):
    found = loss_given_target(impl, x, w, labels, given, ids, counts, bias=bias, scale=scale, **options)
    options.pop("sparse_grad", None)
    right = reference_loss(
        *(x, w, labels, ids, counts),
        bias=bias,
        scale=scale,
        target_logit=given,
        reduction="none",
        **options,
    )
    return found, right


def assert_equal_with_gradients(found, right, tensors):
    torch.testing.assert_close(found, right)
    upstream = torch.linspace(-1, 1, B, dtype=F64)
    of_found, of_right = (torch.autograd.grad(loss, tensors, upstream) for loss in (found, right))
    for a, b in zip(of_found, of_right, strict=True):
        torch.testing.assert_close(a.to_dense(), b)
    return of_found


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("entries", ["of classes", "of entries", "none"])
@pytest.mark.parametrize("all_classes", [False, True])
def test_equals_the_definition(all_classes, entries, sparse_grad, impl):
    """A class may be listed under several labels: then it is a hit of a row under some of them only."""
    (x, w, bias, given), scale, labels, ids, counts = problem()
    ids = ids if not all_classes else None
    listed = torch.arange(C) if ids is None else ids
    entry_labels = {"of classes": listed % 4, "of entries": torch.arange(len(listed)) % 4, "none": None}
    counts = counts[: len(listed)].clone()
    counts[3], listed = torch.inf, torch.cat([listed[:3], listed[4:]])
    found, right = both(
        *(impl, x, w, bias, given, scale, labels, ids, counts),
        entry_labels=entry_labels[entries],
        sparse_grad=sparse_grad,
    )
    of_found = assert_equal_with_gradients(found, right, (x, w, bias, given, scale))
    if sparse_grad:  # of a class that is nobody's but a target's label none is listed
        assert set(of_found[1].coalesce().indices()[0].tolist()) == set(listed.tolist())
    if sparse_grad and impl == "cpp":
        assert of_found[1].is_coalesced() and (of_found[1].indices()[0].diff() > 0).all()


@pytest.mark.parametrize("similarity, ignore_index", [("cosine", -1), ("dot", -100)])
def test_a_label_is_any_number(similarity, ignore_index, impl):
    """Past 32 bits too, where 32 of them are a class; and -1, as wrong classes' numbers are."""
    (x, w, bias, given), scale, labels, ids, counts = problem()
    labels = torch.tensor([3, ignore_index, 2**32 + 3, -1, -(2**63), 2**63 - 1])
    options = {"similarity": similarity, "ignore_index": ignore_index}
    scale = scale if similarity == "cosine" else torch.tensor(0.5, dtype=F64, requires_grad=True)
    for entries in (None, labels[torch.arange(S) % 6]):
        tensors = (x, w, bias, given, scale)
        found, right = both(impl, *tensors, labels, ids, counts, entry_labels=entries, **options)
        assert_equal_with_gradients(found, right, tensors)


def test_labels_of_their_own_beside_a_given_logit(impl):
    (x, w, bias, given), scale, labels, ids, counts = problem()
    own, tensors = torch.arange(B) % 5, (x, w, bias, given, scale)
    found, right = both(impl, *tensors, labels, ids, counts, entry_labels=ids % 5, target_labels=own)
    assert_equal_with_gradients(found, right, tensors)


@pytest.mark.parametrize("dtype", [F32, F16])
def test_a_class_set_of_nothing_costs_nothing(dtype, impl):
    (x, w, *_, given), _, labels, ids, counts = problem(F32)
    w = w.detach().to(dtype).requires_grad_()
    losses = loss_given_target(impl, x, w, labels, given, ids[:0], counts[:0], sparse_grad=True)
    of_x, of_w = torch.autograd.grad(losses.sum(), (x, w))
    assert not losses.any() and not of_x.any() and of_w.coalesce().indices().numel() == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_given_logit_that_is_not_finite_makes_its_own_loss_so(value, impl):
    (x, w, _, given), _, labels, *_ = problem(F32)
    given = given.detach().clone()
    given[:3] = value  # one of them ignored
    losses = loss_given_target(impl, x, w, labels, given)
    assert losses.isfinite().tolist() == [False, True, False, True, True, True]


def test_gradcheck():
    """The CPU kernel's: the others are compared with the definition."""
    (x, w, bias, given), scale, labels, ids, counts = problem()

    def loss(*tensors):
        return loss_given_target(
            *("cpp", tensors[0], tensors[1], labels, tensors[3], ids, counts),
            bias=tensors[2],
            scale=tensors[4],
            entry_labels=ids % 4,
        )

    assert torch.autograd.gradcheck(loss, (x, w, bias, given, scale))


@pytest.mark.exhaustive
def test_the_operator_gives_the_bits_of_the_direct_route(impl):
    (x, w, bias, given), scale, labels, ids, counts = problem(F32)

    def loss(x, w, given):
        return loss_given_target(impl, x, w, labels, given, ids, counts, entry_labels=ids % 4)

    alone, compiled = loss(x, w, given), torch.compile(loss, fullgraph=True, backend="aot_eager")(x, w, given)
    tolerance = 0 if impl == "cpp" else 1e-6  # numpy's products depend on where in memory they are
    for a, b in zip(
        *((f, *torch.autograd.grad(f.sum(), (x, w, given))) for f in (alone, compiled)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.exhaustive
@pytest.mark.parametrize("all_classes", [False, True])
def test_opcheck(all_classes, impl):
    (x, w, bias, given), scale, labels, ids, counts = problem(F32)
    ids, counts = (None, None) if all_classes else (ids, counts)
    entries = torch.arange(C if ids is None else S) % 4
    tensors = (x, w, labels, ids, counts, None, bias, scale)
    options = ("cosine", -100, "none", False, impl, [False] * 4, None, entries, labels, given)
    torch.library.opcheck(OPERATORS.sampled_softmax_loss.default, (*tensors, *options))
    tensors = [t if t is None else t.detach() for t in tensors]
    with torch.no_grad():
        _, *made = OPERATORS.sampled_softmax_loss(*tensors, *options)
    backward = (torch.ones(B), made, [True] * 4, *tensors, *options[:-1], given.detach())
    torch.library.opcheck(OPERATORS.sampled_softmax_loss_backward.default, backward)


@pytest.mark.parametrize("kernel", ["cpp", "triton"])
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_opcheck_of_stand_ins(sparse_grad, kernel):
    """Of 16-bit tables, whose gradients come in float32. (The reference is no operator.)"""
    (x, w, bias, _), scale, labels, ids, counts = problem(F32)
    labels = labels.clamp(min=0)
    stand_ins = [torch.zeros(t.shape).requires_grad_() for t in (w, bias)]
    values = [t.detach().bfloat16() for t in (w, bias)]
    options = ("cosine", -100, "none", sparse_grad, kernel, [False] * 4, None, None, None, None, *values)
    tensors = (x, stand_ins[0], labels, ids, counts, None, stand_ins[1], scale)
    # torch has no sparse gradients on fake tensors
    checks = ["test_schema", "test_autograd_registration"]
    checks += [] if sparse_grad else ["test_faketensor"]
    checks += ["test_aot_dispatch_dynamic"] if kernel == "cpp" and not sparse_grad else []
    torch.library.opcheck(OPERATORS.sampled_softmax_loss.default, (*tensors, *options), test_utils=checks)
    loss = OPERATORS.sampled_softmax_loss(*tensors, *options)[0]
    gradients = torch.autograd.grad(loss.sum(), stand_ins)
    assert all(g.dtype is F32 and g.is_sparse == sparse_grad for g in gradients)
    right = reference_loss(
        *(x, values[0].double(), labels, ids, counts),
        bias=values[1].double(),
        scale=scale,
        reduction="none",
        dtype=F64,
    )
    torch.testing.assert_close(loss.double(), right, rtol=1e-4, atol=1e-5)


def test_shards_of_the_classes_add_up(impl):
    """L = log(1 + sum_r (exp(L_r) - 1)): each part of the classes by itself, as where they lie on devices."""
    (x, w, _, given), _, labels, *_ = problem()
    parts = [
        loss_given_target(impl, x, w[part], labels, given, entry_labels=part)
        for part in torch.arange(C).split(9)
    ]
    whole = loss_given_target(impl, x, w, labels, given)
    torch.testing.assert_close(torch.log1p(torch.stack([part.expm1() for part in parts]).sum(0)), whole)


@pytest.mark.parametrize(
    "class_ids, counts, place",
    [([0, 7, 8], [math.inf, 0, 0], 7), (None, [math.inf, 0.0], 1), (None, None, 0)],
)
def test_a_batch_of_ignored_rows_has_a_class_that_is_drawn(class_ids, counts, place):
    """On a GPU sparse gradients list it, with zeros; not one that stands for nothing."""
    class_ids, counts = (None if given is None else torch.tensor(given) for given in (class_ids, counts))
    target, counted = torch.full((3,), -100), torch.zeros(3, dtype=torch.bool)
    assert composed_loss._classes(target, counted, 10, class_ids, counts)[0].tolist() == [place] * 3
    counted[1], target[1] = True, 4
    assert composed_loss._classes(target, counted, 10, class_ids, counts)[0].tolist() == [4] * 3
