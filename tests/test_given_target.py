"""The loss of rows whose targets' logits are given, and labels that tell accidental hits."""

import pytest
import torch
from fedss_kernels.reference import sampled_softmax_loss as reference_loss
from loss_cases import F32, F64

from fedss_kernels.class_table import class_tables
from fedss_kernels.given_target import row_losses
from fedss_kernels.loss_operator import OPERATORS

B, C, D = 6, 9, 8


def loss_given_target(x, w, labels, given, ids=None, counts=None, *, bias=None, scale=20.0, **options):
    entry_labels, sparse_grad = options.get("entry_labels"), options.get("sparse_grad", False)
    weight, bias = class_tables(w, bias, sparse_grad, None if ids is None else len(ids) + len(x))
    return row_losses(
        *(x, weight, labels, (ids, counts, None), bias, scale, "cosine", -100, "cpp", None),
        labels=(entry_labels, None, given),
    )


def problem(dtype=F64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, w, bias, given = (torch.randn(*n, generator=g, dtype=F64) for n in ((B, D), (C, D), (C,), (B,)))
    tensors = [t.to(dtype).requires_grad_() for t in (x, w, bias, 3 * given)]
    scale = torch.tensor(7.0, dtype=dtype, requires_grad=True)
    labels, ids = torch.randint(4, (B,), generator=g), torch.randint(C, (12,), generator=g)
    labels[1] = -100
    return tensors, scale, labels, ids, torch.randn(12, generator=g)


def both(x, w, bias, given, scale, labels, ids, counts, entries, **options):
    found = loss_given_target(
        *(x, w, labels, given, ids, counts),
        bias=bias,
        scale=scale,
        entry_labels=entries,
        **options,
    )
    right = reference_loss(
        *(x, w, labels, ids, counts),
        bias=bias,
        scale=scale,
        entry_labels=entries,
        target_logit=given,
        reduction="none",
    )
    return found, right


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("entries", ["of classes", "of entries", "none"])
@pytest.mark.parametrize("all_classes", [False, True])
def test_equals_the_definition(all_classes, entries, sparse_grad):
    """A class may be listed under several labels: then it is a hit of a row under some of them only."""
    (x, w, bias, given), scale, labels, ids, counts = problem()
    ids = ids if not all_classes else None
    listed = torch.arange(C) if ids is None else ids
    entry_labels = {"of classes": listed % 4, "of entries": torch.arange(len(listed)) % 4, "none": None}
    counts = counts[: len(listed)]
    found, right = both(
        *(x, w, bias, given, scale, labels, ids, counts), entry_labels[entries], sparse_grad=sparse_grad
    )
    torch.testing.assert_close(found, right)
    upstream, tensors = torch.linspace(-1, 1, B), (x, w, bias, given, scale)
    of_found, of_right = (torch.autograd.grad(loss, tensors, upstream.double()) for loss in (found, right))
    for a, b in zip(of_found, of_right, strict=True):
        torch.testing.assert_close(a.to_dense() if a.is_sparse else a, b)
    if sparse_grad:
        classes = of_found[1].indices()[0]
        assert of_found[1].is_coalesced() and (classes.diff() > 0).all()


def test_gradcheck():
    (x, w, bias, given), scale, labels, ids, counts = problem()

    def loss(*tensors):
        return loss_given_target(
            *(tensors[0], tensors[1], labels, tensors[3], ids, counts),
            bias=tensors[2],
            scale=tensors[4],
            entry_labels=ids % 4,
        )

    assert torch.autograd.gradcheck(loss, (x, w, bias, given, scale))


def test_the_operator_gives_the_bits_of_the_direct_route():
    (x, w, bias, given), scale, labels, ids, counts = problem(F32)

    def loss(x, w, given):
        return loss_given_target(x, w, labels, given, ids, counts, entry_labels=ids % 4)

    alone, compiled = loss(x, w, given), torch.compile(loss, fullgraph=True, backend="aot_eager")(x, w, given)
    assert torch.equal(alone, compiled)
    for a, b in zip(*(torch.autograd.grad(f.sum(), (x, w, given)) for f in (alone, compiled)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("all_classes", [False, True])
def test_opcheck(all_classes):
    (x, w, bias, given), scale, labels, ids, counts = problem(F32)
    ids, counts = (None, None) if all_classes else (ids, counts)
    entries = torch.arange(C if ids is None else 12) % 4
    tensors = (x, w, labels, ids, counts, None, bias, scale)
    options = ("cosine", -100, "none", False, "cpp", [False] * 4, None, entries, labels, given)
    torch.library.opcheck(OPERATORS.sampled_softmax_loss.default, (*tensors, *options))
    tensors = [t if t is None else t.detach() for t in tensors]
    made = [x.new_empty(0)] * 6
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


def test_shards_of_the_classes_add_up():
    """L = log(1 + sum_r (exp(L_r) - 1)): each part of the classes by itself, as where they lie on devices."""
    (x, w, _, given), _, labels, *_ = problem()
    parts = [
        loss_given_target(x, w[part], labels, given, entry_labels=part) for part in torch.arange(C).split(4)
    ]
    whole = loss_given_target(x, w, labels, given)
    torch.testing.assert_close(torch.log1p(torch.stack([part.expm1() for part in parts]).sum(0)), whole)
