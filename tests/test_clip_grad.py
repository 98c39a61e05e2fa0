"""Clipping: torch's, bit for bit, on dense gradients, and of what a sparse gradient stands for."""

import doctest
import math
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from fedss_kernels import (
    RowSGD,
    SampledSoftmaxLoss,
    clip_grad,
    clip_grad_norm_,
    clip_grad_value_,
    sparse_rows,
)


def sparse(ids, values, shape):
    ids = torch.as_tensor(ids, dtype=torch.int64)
    ids = ids[None] if ids.dim() == 1 else ids
    return torch.sparse_coo_tensor(ids, values, shape, check_invariants=True)


def with_gradients(*gradients):
    parameters = [nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype)) for grad in gradients]
    for parameter, grad in zip(parameters, gradients, strict=True):
        parameter.grad = grad
    return [*parameters, nn.Parameter(torch.zeros(2))]  # one without a gradient


def gradients(dtype=torch.float32):
    """Repeated rows, which nearly cancel; ascending ones; none; a bias'; two sparse dimensions."""
    torch.manual_seed(0)
    repeats, ascending = torch.randn(5, 3, dtype=dtype), torch.randn(2, 3, dtype=dtype)
    repeats[1] = -repeats[0]
    return [
        sparse([4, 4, 0, 2, 0], repeats, (6, 3)),
        sparse([1, 5], ascending, (6, 3)),
        sparse([], torch.zeros(0, 3, dtype=dtype), (6, 3)),
        sparse([3, 1, 3], torch.randn(3, dtype=dtype), (6,)),
        sparse([[0, 1, 0], [1, 0, 1]], torch.randn(3, 2, dtype=dtype), (2, 2, 2)),
        torch.randn(4, 2, dtype=dtype),
    ]


@pytest.fixture(params=["looks at the ids", "does not wait"], autouse=True)
def as_on_a_gpu(request):
    """Where to look whether ids repeat would be to wait they are summed unseen."""
    if request.param == "looks at the ids":
        yield
        return
    with (
        mock.patch.object(clip_grad, "is_listed_once", torch.Tensor.is_coalesced),
        mock.patch.object(sparse_rows, "is_listed_once", torch.Tensor.is_coalesced),
    ):
        yield


ORDERS = [2.0, 1, np.float32(3), np.array(2), math.inf, "inf", torch.tensor(2), torch.tensor(math.inf)]


@pytest.mark.parametrize("norm_type", ORDERS, ids=repr)
@pytest.mark.parametrize("max_norm", [1.5, 1e3, math.inf, torch.tensor(1.5), np.int64(2)], ids=repr)
def test_norm_is_that_of_the_dense_gradients(norm_type, max_norm):
    ours, theirs = with_gradients(*gradients()), with_gradients(*(g.to_dense() for g in gradients()))
    norm = clip_grad_norm_(ours, max_norm, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(theirs, float(max_norm), float(norm_type))
    torch.testing.assert_close(norm, expected)
    for p, q in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(p.grad.to_dense(), q.grad)
    assert [p.grad.is_sparse for p in ours[:-1]] == [True] * 5 + [False]


@pytest.mark.parametrize("foreach", [None, True, False])
def test_dense_gradients_have_the_bits_of_torch(foreach):
    torch.manual_seed(0)
    given = [torch.randn(4, 3), torch.randn(5), torch.randn(()), torch.zeros(0)]
    ours, theirs = (with_gradients(*(g.clone() for g in given)) for _ in range(2))
    norms = (
        f(p, 0.3, foreach=foreach)
        for f, p in ((clip_grad_norm_, ours), (torch.nn.utils.clip_grad_norm_, theirs))
    )
    assert torch.equal(*norms)
    clip_grad_value_(ours, 0.01, foreach=foreach)
    torch.nn.utils.clip_grad_value_(theirs, 0.01, foreach=foreach)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(ours[:-1], theirs[:-1], strict=True))


def test_values_are_those_of_the_dense_gradients_clipped():
    ours, theirs = with_gradients(*gradients()), with_gradients(*(g.to_dense() for g in gradients()))
    clip_grad_value_(ours, 0.5)
    torch.nn.utils.clip_grad_value_(theirs, 0.5)
    for p, q in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(p.grad.to_dense(), q.grad)
    clip_grad_value_(ours, math.inf)  # changes nothing
    for p, q in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(p.grad.to_dense(), q.grad)
    assert [len(p.grad._values()) for p in ours[:-2]] == [5, 2, 0, 3, 3]


def test_one_parameter_and_none():
    (parameter, _) = with_gradients(sparse([1, 1], torch.tensor([[3.0], [5.0]]), (4, 1)))
    assert clip_grad_norm_(parameter, 4.0).item() == 8
    assert parameter.grad.to_dense()[1].item() == pytest.approx(4)
    clip_grad_value_(parameter, 1.0)
    assert parameter.grad.to_dense()[1].item() == 1
    assert clip_grad_norm_([], 1.0).item() == clip_grad_norm_(nn.Parameter(torch.ones(2)), 1.0).item() == 0


def test_gradients_that_have_gradients():
    """Of create_graph=True: the numbers change, as torch's clipping changes them."""
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    (weight.grad,) = torch.autograd.grad(weight.square().sum(), weight, create_graph=True)
    assert weight.grad.requires_grad and clip_grad_norm_(weight, 5.0).item() == 10
    torch.testing.assert_close(weight.grad.detach(), torch.tensor([3.0, 4.0]))


def test_sharded_gradients_beside_sparse_ones(tmp_path):
    """Of a net under FSDP2 and a class matrix that is not: torch takes either alone."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        weight, net = (nn.Parameter(torch.zeros(2)) for _ in range(2))
        weight.grad = sparse([1, 1], torch.tensor([1.0, 2.0]), (2,))
        sharded = nn.Parameter(distribute_tensor(net.detach(), mesh, [Shard(0)]))
        sharded.grad = distribute_tensor(torch.tensor([4.0, 0.0]), mesh, [Shard(0)])
        assert clip_grad_norm_([weight, sharded], 2.5).item() == 5
        torch.testing.assert_close(weight.grad.to_dense(), torch.tensor([0.0, 1.5]))
        torch.testing.assert_close(sharded.grad.full_tensor(), torch.tensor([2.0, 0.0]))
        RowSGD([weight, sharded], lr=1.0, max_norm=1.25).step()
        torch.testing.assert_close(sharded.full_tensor().detach(), torch.tensor([-1.0, 0.0]))
    finally:
        torch.distributed.destroy_process_group()


def test_16_bit_rows_are_summed_in_float32():
    """256 and 256 times 1: bfloat16 would stay at 256."""
    rows = torch.ones(257, 1, dtype=torch.bfloat16)
    rows[0] = 256
    (parameter, _) = with_gradients(sparse([2] * 257, rows, (3, 1)))
    assert clip_grad_norm_(parameter, 1e9).item() == 512


@pytest.mark.parametrize("ids", [[1, 2], [2, 2]], ids=["each row once", "one row twice"])
@pytest.mark.parametrize("size, dtype", [(60_000, torch.float16), (1.1015625, torch.bfloat16)])
def test_the_norm_of_16_bit_rows_is_a_float32(ids, size, dtype):
    """sqrt(2 * 60000^2) = 84853 is past float16's range: by an infinite norm all would be clipped to 0."""
    rows = torch.tensor([[size, 0.0], [0.0, size]], dtype=dtype)
    (parameter, _) = with_gradients(sparse(ids, rows, (3, 2)))
    norm = clip_grad_norm_(parameter, 1.0)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(size * 2**0.5, rel=1e-6)
    clipped = parameter.grad.to_dense().float()
    torch.testing.assert_close(clipped.norm(), torch.tensor(1.0), rtol=0.01, atol=0)


@pytest.mark.parametrize(
    "dtype, size", [("float32", 3e19), ("float32", 3e38), ("bfloat16", 3e38), ("float64", 3e200)]
)
@pytest.mark.parametrize("norm_type", [2.0, 3.0])
def test_a_norm_whose_powers_overflow(dtype, size, norm_type):
    """Also one past the largest number of the gradients' dtype, of which it is a float64."""
    small = torch.tensor([[3.0, 0.0], [0.0, -4.0]], dtype=getattr(torch, dtype))
    given = [sparse([1, 2], small, (4, 2)), torch.full((5,), 2.0, dtype=small.dtype)]
    expected, found = (with_gradients(*(g * factor for g in given)) for factor in (1.0, size / 4))
    norm = clip_grad_norm_(expected, 1.0, norm_type)
    large = clip_grad_norm_(found, 1.0, norm_type, error_if_nonfinite=True)
    torch.testing.assert_close(large, norm.double() * (size / 4), rtol=0.01, atol=0)
    for p, q in zip(found[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(p.grad.to_dense(), q.grad.to_dense(), rtol=0.02, atol=0)


@pytest.mark.parametrize("sparsely", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimisers_clip_by_a_norm_whose_squares_overflow(sparsely, dtype):
    weight = nn.Parameter(torch.zeros(2, 2, dtype=dtype))
    weight.grad = torch.tensor([[0.0, 0.0], [3e19, -4e19]], dtype=dtype)
    weight.grad = weight.grad.to_sparse(1) if sparsely else weight.grad
    RowSGD([weight], lr=1.0, max_norm=1.0).step()
    torch.testing.assert_close(weight[1].float(), torch.tensor([-0.6, 0.8]), rtol=0.01, atol=0)


def test_a_norm_that_is_not_finite():
    infinite = with_gradients(torch.tensor([math.inf, 3e19]))
    assert clip_grad_norm_(infinite, 1.0).dtype == torch.float32 and infinite[0].grad[0].isnan()
    for error in (False, True):
        parameters = with_gradients(sparse([1], torch.tensor([[math.nan]]), (2, 1)), torch.ones(2))
        if error:
            with pytest.raises(RuntimeError, match="non-finite"):
                clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
            assert (parameters[1].grad == 1).all()
        else:
            assert clip_grad_norm_(parameters, 1.0).isnan() and parameters[1].grad.isnan().all()


BAD = [
    (clip_grad_norm_, (-1.0,), ValueError, "max_norm: expected a finite number of at least 0, got -1.0"),
    (clip_grad_norm_, ("1",), TypeError, "max_norm: expected a number, got str"),
    (clip_grad_norm_, (1.0, 0), ValueError, "norm_type: expected a number above 0, got 0"),
    (clip_grad_norm_, (1.0, None), TypeError, "norm_type: expected a number, got NoneType"),
    (
        clip_grad_norm_,
        (1.0, torch.ones(2)),
        TypeError,
        r"norm_type: expected a number, got Tensor of shape \(2,\)",
    ),
    (clip_grad_norm_, (1.0, np.ones(2)), TypeError, "norm_type: expected a number, got ndarray of shape"),
    (
        clip_grad_norm_,
        (torch.ones((), device="meta"),),
        TypeError,
        r"max_norm: expected a number, got Tensor of shape \(\) on meta",
    ),
    (
        clip_grad_value_,
        (math.nan,),
        ValueError,
        "clip_value: expected a finite number of at least 0, got nan",
    ),
]


@pytest.mark.parametrize("function", [clip_grad_norm_, clip_grad_value_])
def test_what_is_no_tensor_is_named(function):
    with pytest.raises(TypeError, match=r"parameters\[0\]: expected a tensor, got tuple"):
        function(torch.nn.Linear(2, 2).named_parameters(), 1.0)
    with pytest.raises(TypeError, match="parameters: expected a tensor or several, got Linear"):
        function(torch.nn.Linear(2, 2), 1.0)


@pytest.mark.parametrize("function, arguments, error, message", BAD, ids=[message for *_, message in BAD])
def test_bad_calls_change_nothing(function, arguments, error, message):
    parameters = with_gradients(torch.full((2,), 9.0))
    with pytest.raises(error, match=message):
        function(parameters, *arguments)
    assert (parameters[0].grad == 9).all()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_another_layout_is_refused_by_name():
    parameter = nn.Parameter(torch.eye(2).to_sparse_csr())
    parameter.grad = torch.eye(2).to_sparse_csr()
    with pytest.raises(
        TypeError, match=r"parameters\[0\].grad: expected a dense or sparse COO tensor, got layout"
    ):
        clip_grad_norm_([parameter], 1.0)


def test_with_the_loss_and_a_grad_scaler():
    """Unscaled, clipped, stepped: as without a scaler."""
    moved = []
    for enabled in (True, False):
        torch.manual_seed(0)
        criterion = SampledSoftmaxLoss(30, 4, 5, sparse_grad=True, generator=torch.Generator().manual_seed(0))
        optimizer = RowSGD(criterion.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        scaler.scale(criterion(torch.randn(8, 4), torch.arange(8))).backward()
        scaler.unscale_(optimizer)
        norm = clip_grad_norm_(criterion.parameters(), 0.1)
        scaler.step(optimizer)
        moved.append((norm, criterion.weight.detach()))
    for with_scaler, without in zip(*moved, strict=True):
        torch.testing.assert_close(with_scaler, without)


def test_examples_in_docstrings():
    result = doctest.testmod(clip_grad, extraglobs={"torch": torch})
    assert result.attempted and not result.failed


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for():
    for function in (clip_grad_norm_, clip_grad_value_):
        for mode in ("default", "error"):  # the first call compiles
            parameters = [nn.Parameter(torch.zeros(6, 3, device="cuda")) for _ in range(2)]
            parameters[0].grad, parameters[1].grad = gradients()[0].cuda(), torch.ones(6, 3, device="cuda")
            torch.cuda.set_sync_debug_mode(mode)
            function(parameters, 0.5)
            torch.cuda.set_sync_debug_mode("default")
        expected = with_gradients(gradients()[0], torch.ones(6, 3))
        function(expected, 0.5)
        torch.testing.assert_close(parameters[0].grad.cpu().to_dense(), expected[0].grad.to_dense())


def test_a_value_past_a_gradients_dtype_clips_nothing_there_and_the_others():
    """65504 is float16's largest number."""
    clipped, small = (
        torch.nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.float32, torch.float16)
    )
    clipped.grad, small.grad = torch.tensor([2e5, 1.0]), torch.tensor([torch.inf, -3.0], dtype=torch.float16)
    clip_grad_value_([clipped, small], 1e5)
    assert clipped.grad.tolist() == [1e5, 1.0] and small.grad.tolist() == [torch.inf, -3.0]
    clip_grad_value_(small, 65504.0)
    assert small.grad.tolist() == [65504.0, -3.0]
