"""The operator in torch: registration, compilation, autocast, gradient scaling, DDP, forks, threads."""

import copy
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from compilers import COMPILERS
from later import later
from loss_cases import Case
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fedss_kernels import RowSGD, SampledSoftmaxLoss, draw_batch_class_set, sampled_softmax_loss
from fedss_kernels.loss_operator import OPERATORS as OPS
from fedss_kernels.operator_names import named_by_schema

B, C, D = 5, 9, 7


def problem(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(B, D, generator=g).to(dtype).requires_grad_()
    w = torch.randn(C, D, generator=g).requires_grad_()
    ids, counts = torch.randint(C, (6,), generator=g), torch.randn(6, generator=g)
    return x, w, torch.randint(C, (B,), generator=g), ids, counts


def gradients(loss, *tensors):
    return torch.autograd.grad(loss.sum(), tensors)


def test_an_operator_of_another_schema_has_another_name():
    """As torch finds compiled code on disk by operators' names, that of other versions of the package too."""
    schemas = ["f(Tensor a) -> Tensor", "f(Tensor a, Tensor? b=None) -> Tensor", "f(Tensor a) -> Tensor"]
    (one, schema), (two, _), (same, _) = map(named_by_schema, schemas)
    assert one == same != two and schema == f"{one}(Tensor a) -> Tensor"
    registered = [
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fedss_kernels::")
    ]
    assert len(registered) >= 6
    assert all(re.fullmatch(r"fedss_kernels::[a-z_]+_[0-9a-f]{8}", name) for name in registered)


@pytest.mark.parametrize("reduction, wanted", [("mean", True), ("sum", False), ("none", False)])
@pytest.mark.parametrize("all_classes", [False, True])
def test_opcheck_forward(reduction, wanted, all_classes):
    x, w, t, ids, counts = problem()
    ids, counts = (None, None) if all_classes else (ids, counts)
    bias, scale = torch.randn(C, requires_grad=True), torch.tensor(20.0, requires_grad=True)
    tensors = (x, w, t, ids, counts, None, bias, scale)
    arguments = (*tensors, "cosine", -100, reduction, False, "cpp", [wanted] * 4, None)
    torch.library.opcheck(OPS.sampled_softmax_loss.default, arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck_backward(reduction):
    x, w, t, ids, counts = problem()
    wanted = [reduction == "mean"] * 4
    inputs = (x.detach(), w.detach(), t, ids, counts, None, torch.zeros(C), torch.tensor(20.0))
    options = ("cosine", -100, reduction, False, "cpp", wanted, None)
    loss, *made = OPS.sampled_softmax_loss(*inputs, *options)
    arguments = (torch.ones_like(loss), made, [True] * 4, *inputs, *options)
    torch.library.opcheck(OPS.sampled_softmax_loss_backward.default, arguments)


def test_operator_called_without_asking_for_gradients_still_has_them():
    x, w, t, ids, counts = problem()
    called = OPS.sampled_softmax_loss(
        x,
        w,
        t,
        ids,
        counts,
        None,
        None,
        torch.tensor(20.0),
        "cosine",
        -100,
        "mean",
        False,
        "cpp",
        [False] * 4,
        None,
    )[0]
    asked = sampled_softmax_loss(x, w, t, ids, counts)
    for a, b in zip(gradients(called, x, w), gradients(asked, x, w), strict=True):
        assert torch.equal(a, b)


class SeenOperators(TorchDispatchMode):
    """Lets every operator pass, and notes its name."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


ROUTES = [
    Case(0, reduction="mean"),
    Case(1, reduction="sum", dtype=torch.bfloat16, distinct=5),
    Case(2, reduction="none", dtype=torch.float16, learned_scale=False),
    Case(3, S=None, dtype=torch.float64, bias=True, ignored=0.3),
    Case(4, B=64, S=200, C=300, D=70, bias=True, left_out=0.2),
    Case(5, B=64, S=200, C=300, D=70, dtype=torch.bfloat16, learned_scale=False),
    Case(6, B=64, S=None, C=300, D=70, dtype=torch.bfloat16, weight_dtype=torch.float32, strided=True),
]


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("case", ROUTES, ids=lambda case: f"case {case.seed}")
def test_both_routes_give_the_same_bits(case, sparse_grad):
    direct = case.results(sampled_softmax_loss, sparse_grad=sparse_grad)
    with SeenOperators() as seen:
        by_operator = case.results(sampled_softmax_loss, sparse_grad=sparse_grad)
    assert OPS.sampled_softmax_loss.default.name() in seen.names
    for name, result in direct.items():
        a, b = (r.to_dense() if r.is_sparse else r for r in (result, by_operator[name]))
        assert torch.equal(a, b), name


def test_plain_eager_takes_the_direct_route():
    x, w, t, ids, counts = problem()
    with torch.profiler.profile() as profile:
        sampled_softmax_loss(x, w, t, ids, counts).backward()
    assert not any("fedss_kernels::" in event.key for event in profile.key_averages())


@pytest.mark.parametrize("upstream", [1.0, 0.3, -2.0, 65536.0])
def test_second_backward_gives_the_same_bits(upstream):
    """The first one hands over what the forward pass made; the second makes it again."""
    x, w, t, ids, counts = problem()
    loss = sampled_softmax_loss(x, w, t, ids, counts)
    first = torch.autograd.grad(loss, (x, w), torch.tensor(upstream), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss, (x, w), torch.tensor(upstream))
    for a, b, before in zip(first, second, kept, strict=True):
        assert torch.equal(a, b) and torch.equal(a, before) and a.data_ptr() != b.data_ptr()


@pytest.mark.parametrize("reduction", ["mean", *later("none")])
@pytest.mark.parametrize("scale", [20.0, torch.tensor(20.0, requires_grad=True)], ids=["number", "tensor"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", COMPILERS)
def test_compiled_equals_eager(reduction, scale, dynamic, backend):
    x, w, t, ids, counts = problem()

    def loss(x, w, t):
        return sampled_softmax_loss(x * 2, w, t, ids, counts, scale=scale, reduction=reduction)

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=backend)
    for rows in (B, B - 1):
        some = x[:rows].detach().requires_grad_()
        eager, traced = loss(some, w, t[:rows]), compiled(some, w, t[:rows])
        assert torch.equal(eager, traced)
        for a, b in zip(gradients(eager, some, w), gradients(traced, some, w), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_generator", [True, False])
@pytest.mark.exhaustive
def test_compiled_with_a_dynamic_batch_whose_first_has_two_rows(training, with_generator):
    generator = torch.Generator().manual_seed(0) if with_generator else None
    criterion = SampledSoftmaxLoss(C, D, 3, bias=True, learn_scale=True, generator=generator).train(training)
    twin = copy.deepcopy(criterion)
    torch.compiler.reset()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    for rows in (2, 3, 7):
        x, t = torch.randn(rows, D, requires_grad=True), torch.randint(C, (rows,))
        if rows == 2:
            for tensor in (x, t):
                torch._dynamo.mark_dynamic(tensor, 0)
        torch.manual_seed(1)
        traced = compiled(x, t)
        torch.manual_seed(1)
        eager = twin(x, t)
        assert torch.equal(traced, eager)
        assert torch.equal(gradients(traced, x)[0], gradients(eager, x)[0])


@pytest.mark.exhaustive
def test_no_batch_is_too_large_for_what_is_compiled_or_exported_for_any():
    """Where batch and negatives are more than the classes too."""
    criterion = SampledSoftmaxLoss(C, D, 3)
    x, t = torch.randn(4 * C, D), torch.randint(C, (4 * C,))
    batch = {0: torch.export.Dim("batch")}  # torch refuses one that has a bound
    torch.export.export(criterion, (x[:2], t[:2]), dynamic_shapes=(batch, batch), strict=True)
    graphs = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True, backend=graphs)
    made = []
    for rows in (2, 3, 4 * C):
        compiled(x[:rows], t[:rows]).backward()
        made.append(graphs.frame_count)
    assert made[0] == made[-1]


class Predictor(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.criterion = SampledSoftmaxLoss(C, D, bias=True, learn_scale=True)

    def forward(self, x):
        return self.criterion.topk(x, 3, block_size=4)


@pytest.mark.parametrize("strict", [False, True])
def test_topk_is_exported_for_any_batch(strict):
    predictor = Predictor()
    batch = {0: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(predictor, (torch.randn(2, D),), dynamic_shapes=(batch,), strict=strict)
    for rows in (2, 3, 8):
        x = torch.randn(rows, D)
        for a, b in zip(exported.module()(x), predictor(x), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_exported_for_any_batch(training):
    criterion = SampledSoftmaxLoss(C, D, 3).train(training)
    batch, given = {0: torch.export.Dim.DYNAMIC}, (torch.randn(2, D), torch.randint(C, (2,)))
    exported = torch.export.export(criterion, given, dynamic_shapes=(batch, batch)).module()
    for rows in (2, 6):
        x, t = torch.randn(rows, D), torch.randint(C, (rows,))
        torch.manual_seed(1)
        found = exported(x, t)
        torch.manual_seed(1)
        assert torch.equal(found, criterion(x, t))


@pytest.mark.exhaustive
def test_compiled_under_autocast_equals_eager():
    x, w, t, ids, counts = problem()
    compiled = torch.compile(lambda x: sampled_softmax_loss(x, w, t, ids, counts), fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), sampled_softmax_loss(x, w, t, ids, counts))


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:Error detected")
def test_compiled_sparse_gradient_is_refused_in_words():
    x, w, t, ids, counts = problem()
    compiled = torch.compile(lambda w: sampled_softmax_loss(x, w, t, ids, sparse_grad=True), fullgraph=True)
    with pytest.raises(Exception, match="sparse_grad=True cannot be compiled"):
        compiled(w)


def test_a_module_steps_only_the_classes_of_its_batch_and_its_draws():
    """Repeated and ignored targets stand for no class: weight decay and momentum leave all others alone."""
    seeds = (torch.Generator().manual_seed(1) for _ in range(2))
    mine, other = seeds
    criterion = SampledSoftmaxLoss(1000, D, 20, sparse_grad=True, generator=mine)
    other.set_state(mine.get_state())
    optimizer = RowSGD([criterion.weight], lr=0.1, momentum=0.9, weight_decay=0.1)
    target = torch.tensor([5, 5, 8, -100])
    before, touched = criterion.weight.detach().clone(), {5, 8}
    for _ in range(5):
        touched |= set(draw_batch_class_set(target, 1000, 20, other)[0][4:].tolist())
        optimizer.zero_grad()
        criterion(torch.randn(4, D), target).backward()
        assert criterion.weight.grad._nnz() <= 22
        optimizer.step()
    assert 0 not in touched
    moved = (criterion.weight != before).any(dim=1).nonzero()[:, 0]
    assert moved.tolist() == sorted(touched)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_rows_as_they_are_read(dtype):
    x, w, t, ids, counts = problem()
    bias = torch.randn(C, requires_grad=True)
    with torch.autocast("cpu", dtype):
        loss = sampled_softmax_loss(x, w, t, ids, counts, bias=bias, scale=20.3)
    rounded = sampled_softmax_loss(
        x.to(dtype).float(), w.to(dtype).float(), t, ids, counts, bias=bias, scale=20.3
    )  # bias, scale and corrections are not rounded
    assert loss.dtype == torch.float32 and torch.equal(loss, rounded)
    (got, got_bias), (expected, expected_bias) = gradients(loss, x, bias), gradients(rounded, x, bias)
    assert torch.equal(got_bias, expected_bias)
    assert got.dtype == torch.float32
    # .to(dtype) rounds the gradient on its way back, the kernel does not
    torch.testing.assert_close(got, expected, rtol=2.0**-7, atol=1e-5)


def test_autocast_rounds_all_but_float64():
    """Beside float64, and where the scale is past float32."""
    x, w, t, ids, counts = problem()
    exact = w.detach().double()
    with torch.autocast("cpu", torch.bfloat16):
        found = [
            sampled_softmax_loss(x, exact, t, ids, counts),
            sampled_softmax_loss(exact[:B], w, t, ids, counts),
            sampled_softmax_loss(x, w, t, ids, counts, scale=1e21),
        ]
    rows, classes = x.detach().bfloat16().double(), w.detach().bfloat16().double()
    expected = [
        sampled_softmax_loss(rows, exact, t, ids, counts.double()),
        sampled_softmax_loss(exact[:B], classes, t, ids, counts.double()),
        sampled_softmax_loss(rows, classes, t, ids, counts.double(), scale=1e21),
    ]
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-6, atol=0)


def test_autocast_rounds_to_the_nearest_of_every_16_bit_number():
    """Ties, subnormals, overflow and infinities: the loss of rounded rows equals torch's own rounding."""
    bits = torch.arange(2**16, dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float16):
        exact = bits.to(torch.int16).view(dtype).float()
        exact = exact[exact.isfinite()]
        step = torch.nextafter(exact.to(dtype), torch.tensor(torch.inf, dtype=dtype)).float()
        between = torch.cat([exact + (step - exact) * part for part in (0.0, 0.49, 0.5, 0.51)])
        between = between[between.isfinite() & (between.abs() > 1e-12)]
        rows = torch.stack([between, torch.ones_like(between)], 1)
        w, t = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.zeros(len(rows), dtype=torch.int64)
        options = {"similarity": "dot", "scale": 1.0, "reduction": "none"}
        with torch.autocast("cpu", dtype):
            got = sampled_softmax_loss(rows, w, t, **options)
        expected = sampled_softmax_loss(rows.to(dtype).float(), w, t, **options)
        assert torch.equal(got.nan_to_num(-1), expected.nan_to_num(-1))


def test_autocast_leaves_float64_alone():
    x, w, t, ids, counts = problem(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = sampled_softmax_loss(x, w.double(), t, ids, counts)
    assert torch.equal(loss, sampled_softmax_loss(x, w.double(), t, ids, counts))


def test_no_grad_and_inference_mode():
    x, w, t, ids, counts = problem()
    expected = sampled_softmax_loss(x, w, t, ids, counts)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = sampled_softmax_loss(x, w, t, ids, counts)
        assert torch.equal(loss, expected) and not loss.requires_grad


def test_default_device_does_not_matter():
    x, w, t, ids, counts = problem()
    expected = sampled_softmax_loss(x, w, t, ids, counts)
    with torch.device("meta"):
        assert torch.equal(sampled_softmax_loss(x, w, t, ids, counts), expected)


def test_activation_checkpointing():
    x, w, t, ids, counts = problem()
    expected = gradients(sampled_softmax_loss(x * 2, w, t, ids, counts), x, w)
    loss = checkpoint(lambda x, w: sampled_softmax_loss(x * 2, w, t, ids, counts), x, w, use_reentrant=False)
    for a, b in zip(gradients(loss, x, w), expected, strict=True):
        assert torch.equal(a, b)


def test_changing_a_saved_tensor_is_noticed():
    x, w, t, ids, counts = problem()
    loss = sampled_softmax_loss(x, w, t, ids, counts)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_reference_under_autocast_rounds_as_the_kernel_does(reduction):
    x, w, t, ids, counts = problem()
    results = []
    for impl in ("cpp", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            loss = sampled_softmax_loss(x, w, t, ids, counts, reduction=reduction, impl=impl)
        results.append((loss, *gradients(loss, x, w)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_grad_scaler(sparse_grad):
    """A scaled step equals the unscaled one: powers of two pass through float32 gradients exactly."""
    x, w, t, ids, counts = problem()
    plain, scaled = (w.detach().clone().requires_grad_() for _ in range(2))
    for weight, scaler in ((plain, None), (scaled, torch.amp.GradScaler("cpu", init_scale=2.0**16))):
        optimizer = torch.optim.SGD([weight], lr=0.1)
        loss = sampled_softmax_loss(x, weight, t, ids, counts, sparse_grad=sparse_grad)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert torch.equal(plain, scaled) and not torch.equal(plain, w)


def _train_in_parallel(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = DistributedDataParallel(SampledSoftmaxLoss(C, D))
    x, _, t, _, _ = problem()
    model(x.detach()[rank::world], t[rank::world]).backward()
    if rank == 0:
        torch.save(model.module.weight.grad, folder / "gradient.pt")
    dist.barrier()
    # Not by way of destructors: the model's may wait for a thread that waits for the interpreter.
    os._exit(0)


@pytest.mark.exhaustive
def test_data_parallel_averages_the_gradients(tmp_path):
    mp.spawn(_train_in_parallel, args=(2, tmp_path), nprocs=2)
    got = torch.load(tmp_path / "gradient.pt", weights_only=True)
    torch.manual_seed(0)
    criterion = SampledSoftmaxLoss(C, D)
    x, _, t, _, _ = problem()
    expected = sum(gradients(criterion(x[r::2], t[r::2]), criterion.weight)[0] for r in range(2)) / 2
    torch.testing.assert_close(got, expected)


def big_loss():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(200, 64, generator=g), torch.randn(500, 64, generator=g)
    return sampled_softmax_loss(x, w, torch.randint(500, (200,), generator=g)).item()


def test_usable_after_fork(set_threads):
    """A forked child has none of the parent's threads: it must start its own, not wait for theirs."""
    set_threads(2)
    expected = big_loss()
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write_end, repr(big_loss()).encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        assert float(pipe.read()) == expected
    assert os.waitpid(child, 0)[1] == 0


def test_called_from_several_threads_at_once(set_threads):
    set_threads(2)
    expected, got = big_loss(), []
    threads = [threading.Thread(target=lambda: got.extend(big_loss() for _ in range(10))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [expected] * 40


def test_denormals_are_treated_alike_by_all_threads(set_threads):
    """The pool's threads may have started before the caller told its own to flush denormals."""
    x = torch.full((200, 64), 1e-39, requires_grad=True)
    w, t = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)), torch.arange(200)
    set_threads(2)
    big_loss()
    results = []
    try:
        torch.set_flush_denormal(True)
        for threads in (1, 2, 2):
            set_threads(threads)
            results.append(gradients(sampled_softmax_loss(x, w, t, similarity="dot", scale=1e-2), x)[0])
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(result, results[0]) for result in results)


class NotOrdinary(torch.Tensor):
    """Takes the operator, not the direct route."""


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", [torch.Tensor, NotOrdinary])
def test_batches_of_upstream_gradients_are_refused_with_the_way(reduction, kind):
    x, w, t = torch.randn(4, 8, requires_grad=True), torch.randn(10, 8), torch.tensor([3, 1, 4, 1])
    w = w.as_subclass(kind)

    def batched(impl):
        loss = sampled_softmax_loss(x, w, t, reduction=reduction, impl=impl)
        upstreams = torch.ones(3, *loss.shape)
        return torch.autograd.grad(loss, x, upstreams, is_grads_batched=True)[0]

    with pytest.raises(
        RuntimeError, match="one upstream gradient at a time, got a batch .* is_grads_batched=T"
    ):
        batched("auto")
    assert batched("reference").shape == (3, 4, 8)


@pytest.mark.parametrize("num_sampled", [None, 5])
def test_function_transforms_of_the_module(num_sampled):
    x, t = torch.randn(4, 8), torch.tensor([3, 1, 4, 1])
    criterion = SampledSoftmaxLoss(10, 8, num_sampled)

    def loss(weight):
        return torch.func.functional_call(criterion, {"weight": weight}, (x, t))

    weight = criterion.weight.detach()
    with pytest.raises(RuntimeError, match="no derivative under torch.func.grad .* with impl=.reference"):
        torch.func.grad(loss)(weight)
    criterion.impl = "reference"
    torch.manual_seed(1)
    found = torch.func.grad(loss)(weight)
    torch.manual_seed(1)
    criterion(x, t).backward()
    torch.testing.assert_close(found, criterion.weight.grad)


@pytest.mark.parametrize(
    "make",
    [
        lambda w: w[:C],
        lambda w: torch.cat([w, w]),
        lambda w: w[torch.arange(C)],
        lambda w: w.index_select(0, torch.arange(C)),
        lambda w: w.view(C, 1, D).flatten(1),
        lambda w: w.T.contiguous().T,
        lambda w: w @ torch.eye(D),
        lambda w: torch.nn.functional.linear(w, torch.eye(D), torch.ones(D)),
        lambda w: torch.nn.functional.normalize(w),
        lambda w: torch.nn.functional.embedding(torch.arange(C), w),
        lambda w: w.double().float(),
        lambda w: torch.where(torch.ones(C, 1) > 0, w, 0.0),
        lambda w: w.masked_fill(torch.ones(C, 1) > 2, 0.0),
        lambda w: torch.stack([w, w])[0],
        lambda w: w.split(C)[0],
        lambda w: torch.nn.functional.pad(w, (0, 0, 0, 1)),
        lambda w: w.unsqueeze(0).squeeze(0),
        lambda w: w.tanh(),
        lambda w: w.clamp(-1, 1),
        lambda w: torch.unbind(w.expand(2, C, D))[0],
        lambda w: w + torch.ones(C, 2) @ w[:2],  # as of LoRA
        lambda w: 2 * torch.nn.functional.gelu(w),
        lambda w: torch.nn.functional.softplus(w),
        lambda w: torch.nn.functional.layer_norm(w, (D,)),
        lambda w: torch.nn.functional.rms_norm(w, (D,)),
        lambda w: w.flip(0),
        lambda w: w[: C // 2].repeat(2, 1),
        lambda w: w.abs().sqrt(),
        lambda w: w.abs() ** w,
        lambda w: torch.empty(C, D, dtype=torch.float64).copy_(w).float(),
    ],
)
def test_a_weight_whose_maker_takes_dense_gradients_alone(make):
    w = torch.randn(C, D, requires_grad=True)
    x, t = torch.randn(4, D), torch.arange(4)
    with pytest.raises(
        RuntimeError, match=r"sparse_grad: expected False .* got one by \w+Backward\d, .* take"
    ):
        sampled_softmax_loss(x, make(w), t, sparse_grad=True)
    with pytest.raises(RuntimeError, match="sparse_grad: expected False for a weight that is computed"):
        sampled_softmax_loss(x, make(w), t, sparse_grad=np.True_)
    sampled_softmax_loss(x, make(w), t).backward()
    with torch.no_grad():
        sampled_softmax_loss(x, make(w), t, sparse_grad=True)


@pytest.mark.parametrize(
    "make",
    [
        *(lambda w: w * 2, lambda w: w + 1, lambda w: w / 2, lambda w: -w, torch.clone, torch.exp),
        lambda w: w * torch.linspace(0, 1, C)[:, None] - w.square(),
        lambda w: w + w.mean(0, keepdim=True).tanh().expand(C, D),  # whose gradient is summed over classes
    ],
)
def test_a_weight_whose_maker_takes_sparse_gradients(make):
    w = torch.randn(C, D, requires_grad=True)
    x, t = torch.randn(4, D), torch.arange(4)
    gradients = [
        torch.autograd.grad(sampled_softmax_loss(x, make(w), t, sparse_grad=sparse), w)[0]
        for sparse in (False, True)
    ]
    torch.testing.assert_close(gradients[0], gradients[1].to_dense())
