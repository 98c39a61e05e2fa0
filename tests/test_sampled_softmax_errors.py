"""Every wrong argument gets an error that names it, says what was expected and what came."""

import copy
import functools
import re
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from fedss_kernels.reference import sampled_softmax_loss as reference_loss
from torch._subclasses.fake_tensor import FakeTensorMode

from fedss_kernels import SampledSoftmaxLoss, draw_batch_class_set, draw_class_set, sampled_softmax_loss

B, C, D, S = 4, 9, 5, 3


def arguments(**changed):
    good = {
        "input": torch.randn(B, D),
        "weight": torch.randn(C, D),
        "target": torch.randint(C, (B,)),
        "class_ids": torch.randint(C, (S,)),
        "log_expected_count": torch.randn(S),
        "target_log_expected_count": torch.randn(B),
        "bias": torch.randn(C),
        "scale": 20.0,
    }
    return good | changed


def nested(*tensors):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that the layout is a prototype
        return torch.nested.nested_tensor(list(tensors), layout=torch.strided)


BAD = [
    ({"input": [[1.0]]}, TypeError, "input: expected a tensor, got list"),
    ({"input": torch.ones(B, D, dtype=torch.int64)}, TypeError, "input: expected float16 or .* got int64"),
    ({"input": torch.ones(B, D).to_sparse()}, TypeError, "input: expected a dense tensor, got layout"),
    ({"input": nested(torch.ones(2, D), torch.ones(1, D))}, TypeError, "input: expected a dense tensor, got a nested one"),
    ({"weight": nested(torch.ones(2, D), torch.ones(1, D))}, TypeError, "weight: expected a dense tensor, got a nested one"),
    ({"target": nested(torch.zeros(2, dtype=torch.int64))}, TypeError, "target: expected a dense tensor, got a nested one"),
    ({"input": torch.tensor(1.0)}, ValueError, r"input: expected shape \(..., D\), got \(\)"),
    ({"input": torch.ones(B, D, device="meta")}, ValueError, "input: expected a tensor on cpu as weight is, got one on meta"),
    ({"target": torch.zeros(B, dtype=torch.int64, device="meta")}, ValueError, "target: expected a tensor on cpu as weight is"),
    ({"input": torch.ones(B, D - 1)}, ValueError, r"input: expected shape \(..., D\) with D = 5, as weight is \(9, 5\), got \(4, 4\)"),
    ({"weight": torch.ones(C, D + 1)}, ValueError, r"input: expected .* with D = 6, as weight is \(9, 6\), got \(4, 5\)"),
    ({"weight": torch.ones(D)}, ValueError, r"weight: expected shape \(C, D\)"),
    ({"weight": torch.ones(C, D, dtype=torch.complex64)}, TypeError, "weight: expected .* got complex64"),
    ({"weight": torch.tensor(1.0)}, ValueError, r"weight: expected shape \(C, D\), got \(\)"),
    ({"class_ids": torch.tensor(1)}, ValueError, r"class_ids: expected shape \(S,\), got \(\)"),
    ({"target": torch.zeros(B)}, TypeError, "target: expected int64, got float32"),
    ({"target": torch.zeros(B, dtype=torch.int32)}, TypeError, "target: expected int64, got int32"),
    ({"target": torch.zeros(B + 1, dtype=torch.int64)}, ValueError, r"target: expected shape \(4,\)"),
    ({"target": torch.tensor([0, 1, 9, 2])}, IndexError, r"target\[2\] = 9, expected a class in \[0, 9\) or ignore_index -100"),
    ({"target": torch.tensor([0, -1, 8, 2])}, IndexError, r"target\[1\] = -1"),
    ({"class_ids": torch.zeros(S)}, TypeError, "class_ids: expected int64, got float32"),
    ({"class_ids": torch.zeros(S, 1, dtype=torch.int64)}, ValueError, r"class_ids: expected shape \(S,\)"),
    ({"class_ids": torch.tensor([0, 1, 9])}, IndexError, r"class_ids\[2\] = 9, expected a class in \[0, 9\)$"),
    ({"class_ids": torch.tensor([0, -100, 1])}, IndexError, r"class_ids\[1\] = -100"),
    ({"log_expected_count": torch.zeros(S + 1)}, ValueError, r"log_expected_count: expected shape \(3,\) = \(S,\), got \(4,\)"),
    ({"log_expected_count": torch.zeros(S, dtype=torch.int64)}, TypeError, "log_expected_count: expected float"),
    ({"log_expected_count": torch.zeros(S, requires_grad=True)}, ValueError, "log_expected_count: expected a constant"),
    ({"log_expected_count": torch.tensor([0, torch.nan, 0])}, ValueError, r"log_expected_count.*nan"),
    ({"log_expected_count": torch.tensor([0, 0, -torch.inf])}, ValueError, r"log_expected_count.*-inf"),
    ({"target_log_expected_count": torch.zeros(S)}, ValueError, r"target_log_expected_count: expected shape \(4,\)"),
    ({"target_log_expected_count": torch.full((B,), torch.nan)}, ValueError, "target_log_expected_count"),
    ({"target_log_expected_count": torch.zeros(B, requires_grad=True)}, ValueError, "target_log_expected_count: expected a c"),
    ({"bias": torch.zeros(C, dtype=torch.float64)}, TypeError, "bias: expected float32, got float64"),
    ({"bias": torch.zeros(C, 1)}, ValueError, r"bias: expected shape \(9,\) = \(C,\), got \(9, 1\)"),
    ({"scale": torch.ones(2)}, ValueError, r"scale: expected a number or a 0-d tensor or \(1,\), got shape \(2,\)"),
    ({"scale": torch.ones(1, 1)}, ValueError, r"scale: expected a number or a 0-d tensor or \(1,\), got shape \(1, 1\)"),
    ({"scale": torch.tensor(True)}, TypeError, "scale: expected .* got bool"),
    ({"sparse_grad": 1}, TypeError, "sparse_grad: expected True or False, got int"),
    ({"scale": "20"}, TypeError, "scale: expected a number or a 0-d tensor, got str"),
    ({"scale": torch.nan}, ValueError, "scale: expected a finite number, got nan"),
    ({"scale": float("inf")}, ValueError, "scale: expected a finite number, got inf"),
    ({"scale": 10**400}, ValueError, "scale: expected a finite number, got one past float64's range"),
    ({"scale": np.float32("nan")}, ValueError, "scale: expected a finite number, got nan"),
    ({"scale": np.True_}, TypeError, "scale: expected a number or a 0-d tensor, got bool"),
    ({"scale": 1j}, TypeError, "scale: expected a number or a 0-d tensor, got complex"),
    ({"similarity": "euclid"}, ValueError, """similarity: expected "cosine" or "dot", got 'euclid'"""),
    ({"reduction": "avg"}, ValueError, """reduction: expected "mean" or "sum" or "none", got 'avg'"""),
    ({"target_log_expected_count": torch.full((B,), torch.inf)}, ValueError, r"target_log_expected_count\[0\] = inf, expected a f"),
    ({"ignore_index": None}, TypeError, "ignore_index: expected a 64-bit integer, got None"),
    ({"ignore_index": True}, TypeError, "ignore_index: expected a 64-bit integer, got True"),
    ({"ignore_index": np.float64(-100)}, TypeError, "ignore_index: expected a 64-bit integer, got np.float64"),
    ({"reduction": np.array(["mean", "sum"])}, ValueError, "reduction: expected"),
    ({"ignore_index": 2**70}, TypeError, "ignore_index: expected a 64-bit integer, got 1180591620717411303424"),
    ({"impl": "cuda"}, ValueError, "impl: expected .* got 'cuda'"),
    ({"impl": np.zeros(3)}, ValueError, "impl: expected .* got array"),
]  # fmt: skip


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("changed, error, message", BAD, ids=[message for *_, message in BAD])
def test_bad_argument(changed, error, message, impl):
    with pytest.raises(error, match=message):
        sampled_softmax_loss(**arguments(**{"impl": impl, **changed}))


def test_good_arguments_pass():
    assert sampled_softmax_loss(**arguments()).isfinite()
    assert sampled_softmax_loss(**arguments(impl="reference")).isfinite()


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("scale", [np.float32(2), np.float64(2), np.int64(2), Fraction(2), 2])
def test_any_real_number_is_a_scale(scale, impl):
    given = arguments(impl=impl)
    expected = sampled_softmax_loss(**given | {"scale": 2.0})
    assert torch.equal(sampled_softmax_loss(**given | {"scale": scale}), expected)
    module = SampledSoftmaxLoss(C, D, scale=scale)
    assert type(module.scale) is float and module.scale == 2


@pytest.mark.parametrize("scale", [torch.tensor(2), torch.tensor([2], dtype=torch.uint8)], ids=str)
def test_a_tensor_of_an_integer_is_a_scale(scale, impl):
    given = arguments(impl=impl)
    expected = sampled_softmax_loss(**given | {"scale": 2.0})
    assert torch.equal(sampled_softmax_loss(**given | {"scale": scale}), expected)
    x, t = given["input"], given["target"]
    criteria = [SampledSoftmaxLoss(C, D, scale=s, impl=impl) for s in (scale, 2.0)]
    criteria[1].load_state_dict(criteria[0].state_dict())
    assert torch.equal(criteria[0](x, t), criteria[1](x, t))
    assert torch.equal(criteria[0].topk(x, 2).values, criteria[1].topk(x, 2).values)
    assert SampledSoftmaxLoss(C, D, scale=scale, learn_scale=True).scale.tolist() == [2.0]


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_any_integer_is_an_ignore_index(impl):
    given = arguments(target=torch.tensor([0, 3, 3, 1]), impl=impl)
    expected = sampled_softmax_loss(**given, ignore_index=3)
    for index in (np.int64(3), np.int32(3), np.uint8(3), torch.tensor(3), torch.tensor(3, dtype=torch.int8)):
        assert torch.equal(sampled_softmax_loss(**given, ignore_index=index), expected)


def test_a_number_of_classes_may_come_from_the_labels():
    """labels.max() + 1 is a tensor, which torch.nn.Linear takes too."""
    criterion = SampledSoftmaxLoss(torch.tensor([0, 3, 4]).max() + 1, torch.tensor(D), torch.tensor(2))
    assert (criterion.num_classes, criterion.embedding_dim, criterion.num_sampled) == (5, D, 2)
    assert type(criterion.num_sampled) is int
    assert criterion.topk(torch.randn(2, D), torch.tensor(2)).indices.shape == (2, 2)
    for number in (int, torch.tensor, np.uint8):
        drawn = draw_class_set(number(200), torch.tensor([1, 3]), number(100), np.random.default_rng(0))
        assert len(drawn.class_ids) == 102 and drawn.log_expected_count.max() == 0
        draw_batch_class_set(torch.tensor([1]), number(5), number(2), None, number(0))
    for bad in (torch.tensor(3.0), torch.tensor(True), torch.tensor([3])):
        with pytest.raises(TypeError, match="num_classes: expected an integer, got Tensor"):
            SampledSoftmaxLoss(bad, D)


@pytest.mark.parametrize("impl", ["auto", "reference", "cpp"])
def test_meta_tensors_hold_no_numbers(impl):
    given = {name: v.to("meta") if isinstance(v, torch.Tensor) else v for name, v in arguments().items()}
    with pytest.raises(ValueError, match="input: expected a tensor that holds numbers, got one on meta"):
        sampled_softmax_loss(**given, impl=impl)
    module = SampledSoftmaxLoss(C, D, S, device="meta")
    with pytest.raises(ValueError, match=r"after to_empty\(device=...\) and reset_parameters\(\) or load"):
        module(given["input"], given["target"])
    here = arguments()
    for call in (lambda: module(here["input"], here["target"]), lambda: module.topk(here["input"], 1)):
        with pytest.raises(ValueError, match="weight: expected a tensor that holds numbers, got one on meta"):
            call()


def test_fake_tensors_have_no_sparse_gradient():
    with FakeTensorMode():
        given = arguments(weight=torch.randn(C, D, requires_grad=True))
        assert sampled_softmax_loss(**given).shape == ()
        with pytest.raises(RuntimeError, match="sparse_grad=True cannot be .* run on fake tensors"):
            sampled_softmax_loss(**given, sparse_grad=True).backward()


def test_memory_that_is_freed_is_not_read():
    given = arguments()
    given["weight"].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="weight: expected a tensor with memory"):
        sampled_softmax_loss(**given)


def test_ids_are_checked_even_where_no_row_counts():
    with pytest.raises(IndexError, match=r"class_ids\[0\] = 77"):
        sampled_softmax_loss(**arguments(target=torch.full((B,), -100), class_ids=torch.tensor([77, 0, 0])))


def test_the_position_is_that_of_the_flattened_target():
    with pytest.raises(IndexError, match=re.escape("target[5] = 10")):
        sampled_softmax_loss(torch.randn(2, 3, D), torch.randn(C, D), torch.tensor([[0, 1, 2], [3, 4, 10]]))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wrt", ["input", "weight"])
@pytest.mark.parametrize("with_loss", [False, True])
def test_double_backward_raises(reduction, wrt, with_loss):
    """A gradient penalty, alone or added to the loss, must not silently lose its part of the gradient."""
    given = arguments(reduction=reduction)
    leaf = given[wrt].requires_grad_()
    loss = sampled_softmax_loss(**given).sum()
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        (gradient.square().sum() + (loss if with_loss else 0)).backward()


def test_reference_can_be_differentiated_twice():
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    w, t = torch.randn(4, 3, dtype=torch.float64), torch.tensor([1, 2])
    assert torch.autograd.gradgradcheck(lambda x: sampled_softmax_loss(x, w, t, impl="reference"), (x,))


def test_reference_has_no_sparse_gradient():
    with pytest.raises(ValueError, match="sparse_grad: expected False"):
        sampled_softmax_loss(**arguments(impl="reference", sparse_grad=True))


@pytest.mark.parametrize(
    "more", [{}, {"cosine_margin": 0.1}, {"label_smoothing": 0.1}, {"return_lse": True}], ids=str
)
@pytest.mark.parametrize("wrt", ["input", "weight", "bias"])
def test_forward_mode_is_refused_not_zero(wrt, more):
    given = arguments(scale=20.0) | more
    value = given.pop(wrt)

    def loss(value):
        return sampled_softmax_loss(**{wrt: value}, **given)

    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(loss, (value,), (torch.ones_like(value),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(value, torch.ones_like(value))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            loss(dual)


def test_func_grad_is_refused_in_words_of_what_it_is():
    given = arguments()
    weight = given.pop("weight")

    def loss(weight, **options):
        return sampled_softmax_loss(weight=weight, **given, **options)

    with pytest.raises(RuntimeError, match="has no derivative under torch.func.grad"):
        torch.func.grad(loss)(weight)
    leaf = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    found = torch.func.grad(functools.partial(loss, impl="reference"))(weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)

    def beside_it(z):
        with torch.no_grad():
            unwanted = loss(weight + 0 * z.sum())
        return z.square().sum() + loss(weight) + loss(weight + 0 * z.detach().sum()) + unwanted

    torch.testing.assert_close(torch.func.grad(beside_it)(torch.ones(3)), torch.full((3,), 2.0))


BAD_MODULES = [
    ({"num_classes": 0}, ValueError, "num_classes: expected at least 1, got 0"),
    ({"num_classes": 5.0}, TypeError, "num_classes: expected an integer, got float"),
    ({"embedding_dim": 0}, ValueError, "embedding_dim: expected at least 1, got 0"),
    ({"num_sampled": -1}, ValueError, "num_sampled: expected at least 0, got -1"),
    ({"num_sampled": True}, TypeError, "num_sampled: expected an integer, got bool"),
    ({"impl": "cuda"}, ValueError, "impl: expected"),
    ({"similarity": "l2"}, ValueError, "similarity: expected"),
    ({"reduction": "avg"}, ValueError, "reduction: expected"),
    ({"scale": torch.inf}, ValueError, "scale: expected a finite number"),
    ({"scale": "20"}, TypeError, "scale: expected a number"),
    ({"learn_scale": 1}, TypeError, "learn_scale: expected True or False, got int"),
    ({"bias": "yes"}, TypeError, "bias: expected True or False, got str"),
    ({"sparse_grad": None}, TypeError, "sparse_grad: expected True or False, got NoneType"),
    ({"ignore_index": 0.5}, TypeError, "ignore_index: expected a 64-bit integer, got 0.5"),
    ({"generator": 3}, TypeError, "generator: expected a torch.Generator or None, got int"),
    ({"num_classes": 2**64}, ValueError, "num_classes: expected a 64-bit integer, got 18446744073709551616"),
    ({"dtype": "float32"}, TypeError, "dtype: expected .* got 'float32'"),
    ({"dtype": torch.int64}, TypeError, "dtype: expected float16 or bfloat16 or float32 or float64, got int64"),
]  # fmt: skip


@pytest.mark.parametrize("options, error, message", BAD_MODULES, ids=[message for *_, message in BAD_MODULES])
def test_bad_module(options, error, message):
    with pytest.raises(error, match=message):
        SampledSoftmaxLoss(**({"num_classes": 5, "embedding_dim": 3} | options))


BAD_CALLS = [
    ([torch.ones(2, 4), torch.ones(2)], TypeError, "target: expected int64, got float32"),
    ([torch.ones(2, 4), torch.tensor([0, 1])], ValueError, r"input: expected shape \(..., D\) with D = 3, as weight is \(5, 3\), got \(2, 4\)"),
    ([torch.ones(2, 3), torch.tensor([0, 1, 2])], ValueError, r"target: expected shape \(2,\)"),
    ([None, torch.tensor([0, 1])], TypeError, "input: expected a tensor, got NoneType"),
    ([torch.ones(2, 3), torch.tensor([0, 5])], IndexError, r"target\[1\] = 5, expected a class in \[0, 5\)"),
]  # fmt: skip


@pytest.mark.parametrize("given, error, message", BAD_CALLS, ids=[message for *_, message in BAD_CALLS])
def test_bad_call_of_the_module(given, error, message):
    with pytest.raises(error, match=message):
        SampledSoftmaxLoss(5, 3, 2)(*given)


def test_bad_topk():
    criterion = SampledSoftmaxLoss(5, 3, bias=True)
    x = torch.randn(2, 3)
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k: expected 1 to 5, got {k}"):
            criterion.topk(x, k)
    for k in (2.0, True, "2", None):
        with pytest.raises(TypeError, match=f"k: expected an integer, got {type(k).__name__}"):
            criterion.topk(x, k)
    with pytest.raises(ValueError, match="block_size: expected at least 1, got 0"):
        criterion.topk(x, 1, 0)
    with pytest.raises(ValueError, match=r"input: expected shape \(..., 3\), got \(2, 4\)"):
        criterion.topk(torch.randn(2, 4), 1)
    with pytest.raises(ValueError, match="input: expected a tensor on cpu as weight is, got one on meta"):
        criterion.topk(x.to("meta"), 1)
    for name, value, message in (
        ("scale", torch.ones(2), r"scale: expected a number or a 0-d tensor or \(1,\), got shape \(2,\)"),
        ("scale", "1", "scale: expected a number or a 0-d tensor, got str"),
        ("bias", torch.zeros(5, dtype=torch.int64), "bias: expected float16 .*, got int64"),
        ("weight", torch.ones(5, 3, dtype=torch.int64), "weight: expected float16 .*, got int64"),
        ("weight", torch.ones(5, 3).to_sparse(), "weight: expected a dense tensor, got layout"),
        ("weight", torch.ones(2, 5, 3), r"weight: expected shape \(C, D\), got \(2, 5, 3\)"),
    ):
        other = copy.deepcopy(criterion)
        other.__dict__[name] = value  # as functional transforms put it
        other._parameters.pop(name, None)
        with pytest.raises((TypeError, ValueError), match=message):
            other.topk(x, 1)
    expected = criterion.topk(x, 3, 2)
    assert torch.equal(criterion.topk(x, np.int64(3), np.int64(2)).indices, expected.indices)
    criterion.weight = torch.nn.Parameter(criterion.weight[:4].detach())
    with pytest.raises(ValueError, match="k: expected 1 to 4, got 5"):
        criterion.topk(x, 5)
    with pytest.raises(ValueError, match=r"bias: expected shape \(4,\) = \(C,\), got \(5,\)"):
        criterion.topk(x, 4)


BAD_BATCHES = [
    ({"target": [1]}, TypeError, "target: expected a tensor, got list"),
    ({"target": torch.ones(3)}, TypeError, "target: expected int64, got float32"),
    ({"target": torch.ones(1, 3, dtype=torch.int64)}, ValueError, r"target: expected shape \(B,\), got \(1, 3\)"),
    ({"num_classes": 0}, ValueError, "num_classes: expected at least 1, got 0"),
    ({"num_sampled": -2}, ValueError, "num_sampled: expected at least 0, got -2"),
    ({"num_sampled": 2.0}, TypeError, "num_sampled: expected an integer, got float"),
    ({"num_sampled": 2**63}, ValueError, "num_sampled: expected a 64-bit integer, got 9223372036854775808"),
    ({"num_classes": 2**63 - 1}, ValueError, r"num_classes: expected at most 2\*\*62, .* got 9223372036854775807 and num_s"),
    ({"num_classes": 2**61, "num_sampled": 3}, ValueError, r"num_classes \* num_sampled too, as 64-bit integers are drawn"),
    ({"ignore_index": "0"}, TypeError, "ignore_index: expected a 64-bit integer, got '0'"),
    ({"generator": 0}, TypeError, "generator: expected a torch.Generator or None, got int"),
]  # fmt: skip


@pytest.mark.parametrize("changed, error, message", BAD_BATCHES, ids=[message for *_, message in BAD_BATCHES])
def test_bad_batch_class_set(changed, error, message):
    good = {"target": torch.tensor([1]), "num_classes": 5, "num_sampled": 2, "generator": None}
    with pytest.raises(error, match=message):
        draw_batch_class_set(**good | changed)
    draw_batch_class_set(torch.tensor([1]), np.int64(5), np.int64(2), ignore_index=np.int64(1))


def test_reference_makes_its_tensors_where_its_arguments_are():
    """On the meta device values cannot be checked, so the definition itself is called; nothing lands on the CPU."""
    given = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in arguments().items()
    }
    for left_out in ((), ("class_ids", "log_expected_count", "target_log_expected_count", "bias")):
        some = {name: value for name, value in given.items() if name not in left_out}
        assert reference_loss(**some).device.type == "meta"
