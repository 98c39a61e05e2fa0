"""What the GPU kernels promise beyond the loss itself: wrong ids, launches, graphs, memory, torch.

Without a GPU they run interpreted, on CPU tensors; what needs a device is marked `gpu`.
"""

import contextlib
import os
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
from fedss_kernels.reference import sampled_softmax_loss as reference_loss
from later import later
from loss_cases import BF16, F16, F32, F64, Case, assert_same, blocks_of_16, check
from tolerance import eager_loss, excess, with_features_shuffled
from torch.utils._python_dispatch import TorchDispatchMode

import fedss_kernels
from fedss_kernels import direct_triton
from fedss_kernels.loss_operator import OPERATORS as OPS
from fedss_kernels.triton_kernels import configurations, launch, plan, sampled_softmax
from fedss_kernels.triton_kernels.configurations import AMD, NVIDIA, forced

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
loss_by_triton = partial(fedss_kernels.sampled_softmax_loss, impl="triton")
gpu = pytest.mark.gpu
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")


def problem(B=6, C=12, D=8, S=9, dtype=F32, device=DEVICE):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(B, D, generator=g).to(device, dtype).requires_grad_()
    w = torch.randn(C, D, generator=g).to(device, dtype).requires_grad_()
    target, ids = torch.randint(C, (B,), generator=g), torch.randint(C, (S,), generator=g)
    return x, w, target.to(device), ids.to(device), torch.randn(S, generator=g).to(device)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss.sum(), tensors)


# ---- wrong values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [12, -(2**62)])
def test_a_target_that_does_not_exist_makes_its_own_loss_nan(bad):
    x, w, t, ids, counts = problem()
    t[2] = bad
    losses = loss_by_triton(x, w, t, ids, counts, reduction="none")
    assert losses.isnan().tolist() == [False, False, True, False, False, False]
    good = torch.arange(6, device=DEVICE) != 2
    assert_same(
        losses[good], loss_by_triton(x[good], w, t[good], ids, counts, reduction="none"), loss_by_triton
    )
    assert loss_by_triton(x, w, t, ids, counts).isnan()
    for sparse_grad in (False, True):  # a row whose loss is not used passes nothing on
        losses = loss_by_triton(x, w, t, ids, counts, reduction="none", sparse_grad=sparse_grad)
        found = gradients(losses[good], x, w)
        expected = gradients(loss_by_triton(x[good], w, t[good], ids, counts, reduction="none"), x, w)
        for a, b in zip(found, expected, strict=True):
            assert_same(a.to_dense(), b, loss_by_triton)


@pytest.mark.parametrize("bad", [-1, 12, 2**40, -(2**62)])
def test_a_class_that_does_not_exist_makes_every_loss_nan(bad):
    x, w, t, ids, counts = problem()
    ids[4] = bad
    t[1] = -100
    losses = loss_by_triton(x, w, t, ids, counts, reduction="none")
    assert losses.isnan().tolist() == [True, False, True, True, True, True]
    gradients(losses, x, w)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_wrong_correction_makes_the_losses_it_enters_nan(value):
    x, w, t, ids, counts = problem()
    targets_counts = torch.zeros(6, device=DEVICE)
    targets_counts[3] = value
    losses = loss_by_triton(x, w, t, ids, target_log_expected_count=targets_counts, reduction="none")
    assert losses.isnan().tolist() == [False, False, False, True, False, False]
    counts[4] = value
    assert loss_by_triton(x, w, t, ids, counts, reduction="none").isnan().all()


@pytest.mark.parametrize("name, bad", [("target", 12), ("class_ids", -1)])
def test_validation_can_be_asked_for(name, bad, monkeypatch):
    x, w, t, ids, counts = problem()
    (t if name == "target" else ids)[3] = bad
    monkeypatch.setenv("FEDSS_VALIDATE", "1")
    with pytest.raises(IndexError, match=rf"{name}\[3\] = {bad}, expected a class in \[0, 12\)"):
        loss_by_triton(x, w, t, ids, counts)
    with pytest.raises(ValueError, match=r"log_expected_count\[0\] = nan"):
        loss_by_triton(x, w, torch.zeros_like(t), torch.zeros_like(ids), counts * torch.nan)


@pytest.mark.exhaustive
def test_interpreting_is_asked_for_not_fallen_into():
    """Without the interpreter impl="triton" refuses CPU tensors, and says how to have it."""
    code = """
        import torch, fedss_kernels, sys
        assert "triton" not in sys.modules, "imported for nothing"
        try:
            fedss_kernels.sampled_softmax_loss(
                torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]), impl="triton"
            )
        except ValueError as error:
            assert "TRITON_INTERPRET=1" in str(error)
        else:
            raise AssertionError("no error")
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=environment)


def test_autocast_rounds_all_but_float64():
    """Beside float64, and where the scale is past float32."""
    x, w, t, ids, counts = problem()
    exact = w.detach().double()
    with torch.autocast(DEVICE, BF16):
        found = [
            loss_by_triton(x, exact, t, ids, counts),
            loss_by_triton(exact[:6], w, t, ids, counts),
            loss_by_triton(x, w, t, ids, counts, scale=1e21),
        ]
    rows, classes = x.detach().to(BF16).double(), w.detach().to(BF16).double()
    expected = [
        reference_loss(rows, exact, t, ids, counts.double()),
        reference_loss(exact[:6], classes, t, ids, counts.double()),
        reference_loss(rows, classes, t, ids, counts.double(), scale=1e21),
    ]
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-6, atol=0)


# ---- launches ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def counted_launches(monkeypatch):
    """Names of the kernels launched inside, all by Triton: nothing is known from earlier calls."""
    names = []
    call = launch.Variant.__call__

    def counting(self, *arguments):
        names.append(self.kernel.fn.__name__)
        return call(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(launch.Variant, "__call__", counting)
        patch.setattr(sampled_softmax, "_calls", {})
        patch.setattr(direct_triton, "_known", {})
        yield names


@pytest.mark.parametrize("reduction", ["mean", *later("none")])
@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("S", [None, 20])
def test_a_client_takes_two_launches_each_way(S, sparse_grad, reduction, monkeypatch):
    x, w, t, ids, counts = problem(B=32, C=24, D=32, S=S or 24)
    scale = torch.tensor(20.0, device=DEVICE, requires_grad=True)
    bias = torch.zeros(24, device=DEVICE, requires_grad=True)
    options = {"bias": bias, "scale": scale, "sparse_grad": sparse_grad, "reduction": reduction}
    with counted_launches(monkeypatch) as names:
        loss = loss_by_triton(x, w, t, ids if S else None, counts, **options)
        assert len(names) == 2
        gradients(loss, x, w, bias, scale)
        assert len(names) == 4


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("S", [None, 20])
def test_labels_and_given_logits_take_no_launch_more(S, given, monkeypatch):
    x, w, t, ids, counts = problem(B=32, C=24, D=32, S=S or 24)
    logits = torch.zeros(32, device=DEVICE, requires_grad=True) if given else None
    scale = torch.tensor(20.0, dtype=F64)
    options = ("cosine", -100, "none", False, "triton", [False] * 4, None, counts.long(), t, logits)
    with counted_launches(monkeypatch) as names:
        loss = OPS.sampled_softmax_loss(x, w, t, ids if S else None, counts, None, None, scale, *options)[0]
        assert names == ["partial_terms", "merge_splits"]
        gradients(loss, x, w)
        assert names[2:] == ["small_tiles", "small_results"]


@pytest.mark.parametrize("small", [True, False])
def test_a_wrong_class_makes_the_losses_that_it_enters_nan(small):
    """Not those that leave it out by its label."""
    x, w, t, ids, counts = problem()
    ids[4] = 12
    labels = torch.arange(9, device=DEVICE) % 3
    with forced(partial(blocks_of_16, small)):
        losses = loss_by_triton(
            x, w, t, ids, counts, entry_labels=labels, target_labels=torch.arange(6, device=DEVICE) % 3,
            reduction="none",
        )  # fmt: skip
    assert losses.isnan().tolist() == [True, False, True] * 2


@pytest.fixture
def memories(monkeypatch):
    """Of each run, as if all but the first were launched without Triton; None: the run's own."""
    found = []

    def run(self, given, factor, memory=None):
        self.again = True
        assert memory is None or memory.numel() >= self.bytes
        found.append(memory)
        self._run_by_triton(given, factor, self.memory() if memory is None else memory)

    monkeypatch.setattr(plan.Plan, "run", run)
    monkeypatch.setattr(sampled_softmax, "_calls", {})
    monkeypatch.setattr(direct_triton, "_known", {})
    return found


@pytest.mark.parametrize("S, sparse_grad", [(None, False), (None, True), (9, True)])
def test_what_waits_for_the_backward_pass_is_used_once(S, sparse_grad, memories):
    x, w, t, ids, counts = problem(S=S or 12)
    arguments = x, w, t, ids if S else None, counts
    first = loss_by_triton(*arguments, sparse_grad=sparse_grad)
    expected = [each.to_dense() for each in gradients(first, x, w)]
    assert memories == [None, None]
    loss = loss_by_triton(*arguments, sparse_grad=sparse_grad)
    found = [torch.autograd.grad(loss, (x, w), retain_graph=True) for _ in range(2)]
    forward, once, twice = memories[2:]
    assert forward is once is not None and twice is None
    for each in found:
        for got, right in zip(each, expected, strict=True):
            assert torch.equal(got.to_dense(), right)
    values = [w_grad.coalesce().values() if sparse_grad else w_grad for _, w_grad in found]
    assert found[0][0].data_ptr() != found[1][0].data_ptr() and values[0].data_ptr() != values[1].data_ptr()
    x.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(loss, x, w)


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"reduction": "none"}])
def test_little_waits_for_the_backward_pass(options, memories):
    """Nothing of size C x D; other gradients than the last time's are not prepared for."""
    x, w, t, ids, counts = problem()
    bias = torch.zeros(12, device=DEVICE, requires_grad=True) if options.pop("bias", False) else None
    for _ in range(2):
        gradients(loss_by_triton(x, w, t, ids, counts, bias=bias, **options), x, w)
    assert memories == [None] * 4
    loss_by_triton(x, w.detach(), t, ids, counts, bias=bias, **options)
    assert memories[4] is None


@gpu
def test_all_but_the_first_call_are_launched_without_triton(monkeypatch):
    monkeypatch.setattr(sampled_softmax, "_calls", {})
    monkeypatch.setattr(direct_triton, "_known", {})
    for B, dtype in ((6, F32), (300, BF16)):
        x, w, t, ids, counts = problem(B=B, S=300, C=400, D=64, dtype=dtype)
        steps = [gradients(loss_by_triton(x, w, t, ids, counts, sparse_grad=True), x, w) for _ in range(3)]
        for step in steps[1:]:
            assert torch.equal(step[0], steps[0][0]) and torch.equal(step[1]._values(), steps[0][1]._values())
    plans = [made for calls in sampled_softmax._calls.values() for made in calls.plans.values()]
    assert len(plans) == 4 and all(made.again for made in plans)


@pytest.mark.parametrize(
    "table, B, D", [(NVIDIA, 5, 33), (NVIDIA, 100, 33), (AMD, 5, 144), (AMD, 100, 48), (NVIDIA, 140, 33)]
)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.exhaustive
def test_shipped_configurations_are_right_too(table, B, D, dtype, monkeypatch):
    """D = 144: two groups of columns in the backward pass."""
    monkeypatch.setattr(configurations, "TABLE", table)
    check(Case(0, B=B, S=20, C=30, D=D, dtype=dtype, bias=True), loss_by_triton)


@pytest.mark.parametrize("S", [None, 40])
@pytest.mark.exhaustive
def test_the_same_bits_every_time(S):
    case = Case(3, B=40, S=S, C=60, D=33, bias=True, distinct=20)
    expected = case.results(loss_by_triton)
    for _ in range(2):
        for name, result in case.results(loss_by_triton).items():
            assert torch.equal(result, expected[name]), name


# ---- digits ------------------------------------------------------------------------------------------------


PARALLEL, PARALLEL_DOT = {"spread": 0.003}, {"spread": 0.03, "similarity": "dot", "scale": 5 / 6}


@pytest.mark.parametrize(
    "case, chunks",
    [
        (Case(0, B=17, S=None, C=70, D=64, **PARALLEL), False),
        (Case(9, B=17, S=70, C=80, D=64, **PARALLEL), False),
        (Case(64, B=17, S=None, C=70, D=64, **PARALLEL_DOT), True),
    ],
)
def test_differences_of_cosines_keep_their_digits(case, chunks, gpu_loss):
    """In float32, of logits nearly the same.

    The scale's gradient is one number; plain PyTorch's error is by luck next to nothing: on some CPUs
    in two orders of the features too, so its largest in five counts.
    """
    blocks = forced(partial(blocks_of_16, False)) if chunks else contextlib.nullcontext()
    with blocks:
        found = case.results(gpu_loss, sparse_grad=True)
    truth = case.results(reference_loss, in_float64=True)
    orders = (eager_loss, *(with_features_shuffled(eager_loss, seed) for seed in range(4)))
    draws = [case.results(loss) for loss in orders]
    for name, result in found.items():
        assert min(excess(result.to_dense(), truth[name], plain[name], F32) for plain in draws) <= 1, name


# ---- in torch ----------------------------------------------------------------------------------------------


def arguments_of(reduction, wanted):
    x, w, t, ids, counts = problem()
    tensors = (x, w, t, ids, counts, None, None, torch.tensor(20.0, device=DEVICE, requires_grad=True))
    return *tensors, "cosine", -100, reduction, False, "triton", [wanted] * 4, None


@pytest.mark.parametrize("reduction, wanted", [("mean", True), *later(("none", False))])
@pytest.mark.exhaustive
def test_opcheck(reduction, wanted):
    arguments = arguments_of(reduction, wanted)
    torch.library.opcheck(OPS.sampled_softmax_loss.default, arguments)
    with torch.no_grad():
        loss, *made = OPS.sampled_softmax_loss(*arguments)
    detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    backward = (torch.ones_like(loss), made, [True, True, False, True], *detached)
    torch.library.opcheck(OPS.sampled_softmax_loss_backward.default, backward)


class Watching(TorchDispatchMode):
    """Wants to see every operator."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("scale, sparse_grad", [(12.5, False), (torch.tensor(12.5), True)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("autocast", [False, *later(True)])
def test_both_routes_give_the_same_bits(autocast, scale, reduction, sparse_grad):
    x, w, t, ids, counts = problem()
    bias = torch.linspace(-1, 1, 12, device=DEVICE).requires_grad_()
    options = {"bias": bias, "scale": scale, "reduction": reduction, "sparse_grad": sparse_grad}

    def results():
        with torch.autocast(DEVICE, BF16, enabled=autocast):
            loss = loss_by_triton(x, w, t, ids, counts, **options)
        return loss, [g.to_dense() for g in gradients(loss, x, w, bias)]

    loss, found = results()
    assert loss.grad_fn.name().startswith("_Loss")
    with Watching():
        loss_by_operator, found_by_operator = results()
    assert not loss_by_operator.grad_fn.name().startswith("_Loss")
    assert torch.equal(loss, loss_by_operator)
    for a, b in zip(found, found_by_operator, strict=True):
        assert torch.equal(a, b)


@pytest.mark.exhaustive
def test_compiled_equals_eager():
    x, w, t, ids, counts = problem()

    def step(x, w):
        return loss_by_triton(x, w, t, ids, counts)

    if DEVICE == "cpu":  # the choice of the interpreter is not for the compiler to see
        loss_by_triton(x, w, t, ids, counts)
    compiled = torch.compile(step, fullgraph=DEVICE == "cuda")
    assert torch.equal(compiled(x, w), step(x, w))
    for a, b in zip(gradients(compiled(x, w), x, w), gradients(step(x, w), x, w), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast_rounds_rows_as_they_are_read(dtype):
    x, w, t, ids, counts = problem(D=33)
    with torch.autocast(DEVICE, dtype):
        loss = loss_by_triton(x, w, t, ids, counts)
    rows = [v.detach().to(dtype).double().requires_grad_() for v in (x, w)]
    expected = reference_loss(*rows, t, ids, counts.double())
    assert loss.dtype == F32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(gradients(loss, x, w), gradients(expected, *rows), strict=True):
        assert a.dtype == F32
        floor = 2.0**-8 if dtype == BF16 else 2.0**-10
        torch.testing.assert_close(a.double(), b, rtol=0, atol=floor * b.abs().max().item())


def test_double_backward_raises():
    x, w, t, ids, counts = problem()
    (grad,) = torch.autograd.grad(loss_by_triton(x, w, t, ids, counts), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()


def test_second_backward_gives_the_same_bits():
    x, w, t, ids, counts = problem()
    loss = loss_by_triton(x, w, t, ids, counts)
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, (x, w)), strict=True):
        assert torch.equal(a, b)


def test_sparse_gradient_lists_the_set_and_then_the_targets():
    x, w, t, ids, counts = problem()
    t[1] = -100
    (sparse,) = gradients(loss_by_triton(x, w, t, ids, counts, sparse_grad=True), w)
    (dense,) = gradients(loss_by_triton(x, w, t, ids, counts), w)
    assert sparse._nnz() == len(ids) + len(t)
    assert_same(sparse.to_dense(), dense, loss_by_triton)


@pytest.mark.parametrize("dtype", [F64, F32])
def test_a_scale_keeps_its_digits(dtype):
    """Launch arguments are float32 unless a kernel says otherwise."""
    x, w, t, ids, counts = problem(dtype=dtype)
    by_number = loss_by_triton(x, w, t, ids, counts, scale=20.1)
    by_tensor = loss_by_triton(x, w, t, ids, counts, scale=torch.tensor(20.1, dtype=F64, device=DEVICE))
    expected = reference_loss(x.double(), w.double(), t, ids, counts.double(), scale=20.1)
    for loss in (by_number, by_tensor):
        assert loss.item() == pytest.approx(expected.item(), rel=1e-14 if dtype == F64 else 1e-6)


@pytest.mark.parametrize("dtype", [F16, F32, F64])
@pytest.mark.exhaustive
def test_a_scale_that_stays_on_the_device_is_read_there(dtype, monkeypatch):
    """As on a GPU, where a tensor is not brought to the host."""
    x, w, t, ids, counts = problem(dtype=dtype)
    scale = torch.tensor(20.5, device=DEVICE, requires_grad=True)

    def results():
        loss = loss_by_triton(x, w, t, ids, counts, scale=scale)
        return loss, *gradients(loss, x, w, scale)

    expected = results()
    of = sampled_softmax.Problem.of

    def on_the_device(*arguments):
        return of(*arguments)._replace(factor=1.0, learned=arguments[7])

    monkeypatch.setattr(sampled_softmax.Problem, "of", on_the_device)
    for a, b in zip(results(), expected, strict=True):
        assert torch.equal(a, b)


def test_a_scale_past_float32_is_exact():
    x, w, t, ids, counts = problem()
    losses = loss_by_triton(x, w, t, ids, counts, scale=1e40, reduction="none")
    expected = reference_loss(x.double(), w.double(), t, ids, counts.double(), scale=1e40, reduction="none")
    torch.testing.assert_close(losses, expected.to(F32))  # infinities where float32 ends
    finite = loss_by_triton(x, w, t, ids, counts, scale=1e37)
    expected = reference_loss(x.double(), w.double(), t, ids, counts.double(), scale=1e37)
    torch.testing.assert_close(finite, expected.to(F32))
    for a, b in zip(gradients(finite, x, w), gradients(expected, x, w), strict=True):
        torch.testing.assert_close(a, b)


# ---- on a device -------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("B, S", [(32, 820), (512, 4096)])
def test_captured_in_a_graph(B, S):
    x, w, t, ids, counts = problem(B=B, C=20_000, D=64, S=S, device="cuda")

    def step(leaves):
        loss = loss_by_triton(*leaves, t, ids, counts)
        return loss, *torch.autograd.grad(loss, leaves)

    def fresh():  # autograd remembers the stream that a leaf was first used on
        return x.detach().requires_grad_(), w.detach().requires_grad_()

    leaves, stream = fresh(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        step(leaves)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            captured = step(leaves)
    torch.cuda.synchronize()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for a, b in zip(captured, step(fresh()), strict=True):
        assert torch.equal(a, b)


@gpu
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_never_waits_for_the_device(sparse_grad):
    x, w, t, ids, counts = problem(B=200, C=20_000, D=64, S=5000, device="cuda")
    loss_by_triton(x, w, t, ids, counts, sparse_grad=sparse_grad).backward()
    x.grad = w.grad = None
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_by_triton(x, w, t, ids, counts, sparse_grad=sparse_grad).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("B, S", [(32, 820), (1000, 3000)])
def test_the_same_bits_twenty_times(B, S):
    x, w, t, ids, counts = problem(B=B, C=2000, D=64, S=S, dtype=BF16, device="cuda")
    results = None
    for _ in range(20):
        loss = loss_by_triton(x, w, t, ids, counts)
        found = (loss, *gradients(loss, x, w))
        results = results or found
        for a, b in zip(found, results, strict=True):
            assert torch.equal(a, b)


@gpu
@pytest.mark.parametrize("class_set", [False, True])
@pytest.mark.parametrize("dtype", [F16, BF16, F32])
@pytest.mark.parametrize("B, S, D", [(100, 1000, 64), (1000, 3000, 64), (300, 2000, 512)])
def test_right_every_time(B, S, D, dtype, class_set):
    """A race of copies with products, say, shows now and then."""
    x, w, t, ids, counts = problem(B=B, C=5000 if class_set else S, D=D, S=S, dtype=dtype, device="cuda")
    ids = ids if class_set else None
    truth = reference_loss(x.double(), w.double(), t, ids, counts.double())
    right_gradients = gradients(truth, x, w)
    for _ in range(12):
        loss = loss_by_triton(x, w, t, ids, counts)
        torch.testing.assert_close(loss.double(), truth.detach(), rtol=1e-5, atol=1e-5)
        for found, right in zip(gradients(loss, x, w), right_gradients, strict=True):
            assert (found.double() - right).norm() <= (0.01 if dtype != F32 else 1e-5) * right.norm()


@gpu
def test_offsets_past_two_to_the_31_on_the_device():
    C, D = 2**22 + 3, 513
    weight = torch.empty(C, D, dtype=BF16, device="cuda").normal_().requires_grad_()
    x = torch.randn(40, D, device="cuda", requires_grad=True)
    ids = torch.tensor([0, C - 2, C - 1, 7], device="cuda")
    t = ids[torch.arange(40, device="cuda") % 4]
    small = weight.detach()[ids].clone().requires_grad_()
    loss = loss_by_triton(x, weight, t, ids, sparse_grad=True)
    expected = loss_by_triton(x, small, torch.arange(40, device="cuda") % 4)
    assert_same(loss, expected, loss_by_triton)
    grad = gradients(loss, weight)[0].coalesce()  # classes ascend: ids 0, 3, 1, 2
    (grad_small,) = gradients(expected, small)
    torch.testing.assert_close(grad.values(), grad_small[[0, 3, 1, 2]], rtol=0.05, atol=0.01)
