"""Large problems on GPUs: how they are cut; what a call launches, multiplies and holds; right however cut."""

from functools import partial
from unittest import mock

import pytest
import torch
from fedss_kernels.reference import sampled_softmax_loss as reference_loss
from later import later
from loss_cases import BF16, F16, F32, F64, Case, check
from test_triton_kernels import DEVICE, OPS, arguments_of, gradients, loss_by_triton, problem
from torch._dynamo.testing import CompileCounterWithBackend

from fedss_kernels.triton_kernels import calls, chunks, launch, plan, sampled_softmax, tuning
from fedss_kernels.triton_kernels.chunks import Chunks, chunks_of
from fedss_kernels.triton_kernels.configurations import NVIDIA, configure, forced, is_small

MIB = 2**20


def bytes_of_problem(B, S, D, itemsize=2):
    """Of inputs and gradients."""
    return 2 * itemsize * (B + S) * D


# ---- how they are cut --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "B, S, D, small",
    [
        (32, 820, 64, True),
        (128, 3968, 64, True),
        (100, 170, 1280, True),
        (1, 1, 1, True),
        (129, 100, 64, False),
        (100, 4000, 64, False),
        (128, 3900, 1280, False),
        (4096, 8192, 512, False),
    ],
)
def test_small_problems_are_those_of_clients(B, S, D, small):
    assert is_small(B, S, D) == small
    chosen = configure(NVIDIA, B, S, D, BF16, BF16, 2**20)
    assert isinstance(chosen, Chunks) != small
    assert not small or chosen.blocks.rows >= B, "all rows in one tile"


@pytest.mark.parametrize(
    "B, S, D, all_classes",
    [
        (256, 1024, 128, True),
        (129, 4000, 64, True),
        (4096, 8192, 512, True),
        (32768, 8192, 512, True),
        (4096, 128_256, 4096, False),  # 87 rows at a time would add 2 GiB of sums up 47 times
        (200, 10**6, 64, False),
        (10**6, 1000, 256, True),
        (10**6, 10**6, 64, False),
        (3, 10**9, 16, False),
    ],
)
def test_chunks_are_within_the_budget(B, S, D, all_classes):
    problem_bytes = bytes_of_problem(B, S, D)
    chosen = chunks_of(B, S, D, 2, problem_bytes)
    budget = max(chunks.BUDGET, problem_bytes * chunks.SHARE / 100)
    assert (chosen.classes == S) == all_classes
    assert chosen.rows * chosen.classes * (4 + 2) <= budget
    if not all_classes:
        assert chosen.classes * ((4 + 2) * chosen.rows + (4 + 2) * D) <= budget
    for first, blocks in ((B, chosen.blocks(B)), (S, chosen.sets(S))):
        assert sum(size for _, size in blocks) == first
        assert [start for start, _ in blocks[1:]] == [start + size for start, size in blocks[:-1]]
        assert len({size for _, size in blocks[:-1]}) <= 1, "alike, but for the last"


def test_a_few_rows_of_all_classes_are_not_worth_their_sums():
    """Of 16-bit rows of 512 numbers 469 are, see `has_all_classes`."""
    for rows, worth in ((460, False), (480, True)):
        S = chunks.BUDGET // 6 // rows
        assert chunks.has_all_classes(rows * 7, S, 512, 2, 0) == worth
        assert chunks.has_all_classes(rows, S, 512, 2, 0), "a single block has nothing to add up"


# ---- what a call takes -------------------------------------------------------------------------------------


@pytest.fixture
def plans(monkeypatch):
    """Plans that were run, in order, each with the shapes of its products: (rows, columns, added up)."""
    run, product, found = plan.Plan.run, plan.Product.run, []

    def running(self, *arguments):
        found.append((self, []))
        run(self, *arguments)

    def multiplying(self, out, a, b):
        found[-1][1].append((*out.shape, a.shape[0 if self.transposed[0] else 1]))
        product(self, out, a, b)

    monkeypatch.setattr(plan.Plan, "run", running)
    monkeypatch.setattr(plan.Product, "run", multiplying)
    return found


def in_chunks(rows, classes):
    return forced(lambda B, S, D: Chunks(rows, classes, 16, 16, 32))


def multiplied(run, B, S, D):
    """Operations of a run's products, in those of one of all rows and classes."""
    return sum(rows * columns * added for rows, columns, added in run[1]) / (B * S * D)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rows", [16, 64])
def test_three_products_where_chunks_have_all_classes(rows, reduction, plans):
    x, w, t, ids, counts = problem(B=64, C=80, D=32, S=48, dtype=BF16)
    with in_chunks(rows, 48):
        loss = loss_by_triton(x, w, t, ids, counts, reduction=reduction)
        gradients(loss, x, w)
    assert [multiplied(run, 64, 48, 32) for run in plans] == [3, 0]
    blocks = 64 // rows
    (forward, products), (backward, _) = plans
    assert len(products) == 3 * blocks
    # rows and classes prepared, losses reduced; of a block: terms, merged, pulls
    assert len(forward.launches) == 3 + 3 * blocks
    # class rows, and rows of input with their targets; then torch sorts, and classes are added up
    assert len(backward.launches) == 2


@pytest.mark.parametrize("reduction, rows, classes", [("mean", 64, 16), ("none", 64, 48), ("none", 16, 16)])
def test_four_products_else(reduction, rows, classes, plans):
    x, w, t, ids, counts = problem(B=64, C=80, D=32, S=48)
    with in_chunks(rows, classes):
        gradients(loss_by_triton(x, w, t, ids, counts, reduction=reduction), x, w)
    assert [multiplied(run, 64, 48, 32) for run in plans] == [1, 3]


def test_a_loss_without_gradients_takes_one_product(plans):
    x, w, t, ids, counts = problem(B=64, C=80, D=32, S=48)
    with in_chunks(16, 48), torch.no_grad():
        loss_by_triton(x, w, t, ids, counts)
    assert multiplied(plans[0], 64, 48, 32) == 1


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_a_gradient_that_nobody_asks_for_is_not_multiplied(frozen, reduction, plans):
    x, w, t, ids, counts = problem(B=64, C=80, D=32, S=48)
    wanted = w if frozen == "input" else x
    (x if frozen == "input" else w).requires_grad_(False)
    with in_chunks(64, 48):
        gradients(loss_by_triton(x, w, t, ids, counts, reduction=reduction), wanted)
    assert sum(multiplied(run, 64, 48, 32) for run in plans) == (2 if reduction == "mean" else 3)


def planned(B, S, D, ids=False, dtype=BF16, reduction="mean"):
    """(the forward pass' plan and the backward pass', what waits) of tensors without memory."""
    x, w = (torch.empty(n, D, dtype=dtype, device="meta") for n in (B, S))
    target, class_ids = (torch.empty(n, dtype=torch.int64, device="meta") for n in (B, S))
    options = (None, None, None, 1.0, "dot", -100, reduction, None)
    p = sampled_softmax.Problem.of(x, w, target, class_ids if ids else None, *options)
    wanted = sampled_softmax.Wanted((True, True, False, False), False, None)
    with (
        mock.patch.object(launch.Variant, "__call__", lambda *arguments: None),
        mock.patch.object(calls, "scatter_add"),
        mock.patch.dict(sampled_softmax._calls, clear=True),
    ):
        loss, made = sampled_softmax.loss(p, wanted)
        found = sampled_softmax.gradients(p, made, torch.empty_like(loss), wanted)
        (made_of,) = sampled_softmax._calls.values()
    assert found.input.shape == x.shape and found.weight.shape == w.shape
    return list(made_of.plans.values()), made


def recorded(*sizes, **options):
    """(bytes of the forward pass' plan, of the backward pass', of what waits)"""
    found, made = planned(*sizes, **options)
    return [one.bytes for one in found], sum(0 if each is None else each.nbytes for each in made)


@pytest.mark.parametrize(
    "B, S, D, ids",
    [
        (4096, 128_256, 4096, False),
        (4096, 8192, 512, True),
        (4096, 8192, 512, False),
        (2048, 65536, 64, True),
    ],
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_is_held_is_a_chunk_and_o_of_rows(B, S, D, ids, reduction):
    """Beside the budget: compact rows, and of input and sums what is no larger than gradients in float32."""
    (forward, backward), waiting = recorded(B, S, D, ids, reduction=reduction)
    budget = max(chunks.BUDGET, bytes_of_problem(B, S, D) * chunks.SHARE / 100)
    of_rows = B * D * (2 + 4) + 64 * (B + S)  # input as products read it, sums of its gradient
    of_classes = S * D * (2 * ids + 4) if chunks_of(B, S, D, 2, bytes_of_problem(B, S, D)).classes == S else 0
    assert max(forward, backward) <= budget + of_rows + of_classes
    assert waiting <= 4 * (B + S) * D + 64 * B
    assert max(forward, backward, waiting) < 4 * B * S


@pytest.mark.parametrize(
    "B, S, D, ids",
    [(1, 10**7, 64, False), (12, 10**7, 512, True), (10**7, 1, 16, False), (3, 10**9, 16, False)],
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_launches_fit_in_a_grid(B, S, D, ids, reduction):
    """Of which the second axis has 65,535 programs at most, the first 2^31 - 1."""
    found, _ = planned(B, S, D, ids, reduction=reduction)
    for first, second, *_ in ((*step.grid, 1) for one in found for step in one.launches):
        assert first < 2**31 and second < 2**16


@pytest.mark.parametrize("which", ["target", "class_ids", "log_expected_count"])
@pytest.mark.exhaustive
def test_vectors_at_another_address_have_a_plan_of_their_own(which, plans):
    """Launches are compiled for addresses that are multiples of 16, or for others."""
    x, w, t, ids, counts = problem(B=40, C=60, D=33, S=20)
    vectors = {"target": t, "class_ids": ids, "log_expected_count": counts}
    odd = torch.cat([vectors[which][:1], vectors[which]])[1:]
    assert vectors[which].data_ptr() % 16 == 0 != odd.data_ptr() % 16
    losses = []
    with in_chunks(16, 20):
        for vector in (vectors[which], vectors[which], odd):
            losses.append(loss_by_triton(x, w, **vectors | {which: vector}))
            gradients(losses[-1], x, w)
    found = [run[0] for run in plans]
    assert found[:2] == found[2:4]
    assert not set(found[:2]) & set(found[4:])
    assert torch.equal(losses[0], losses[2])


# ---- right -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("S", [None, 40])
@pytest.mark.parametrize("reduction", ["mean", *later("sum", "none")])
def test_the_same_numbers_however_it_is_cut(reduction, S):
    case = Case(
        3, B=50, S=S, C=60, D=33, bias=True, distinct=30, ignored=0.1, left_out=0.1, reduction=reduction
    )
    with in_chunks(64, 64):
        expected = case.results(loss_by_triton)
    for chunk in ((16, 64), (64, 16), (32, 32)):
        with in_chunks(*chunk):
            found = case.results(loss_by_triton)
        for name, result in found.items():
            scale, which = expected[name].abs().max().item(), f"{name}, {chunk}"
            torch.testing.assert_close(result, expected[name], rtol=0, atol=2e-6 * scale, msg=which)


@pytest.mark.parametrize("dtype", [F16, F32])
def test_gradients_begun_with_the_loss_are_those_made_afterwards(dtype):
    """By the operator, which begins none unless it is told to."""
    x, w, t, ids, counts = problem(B=40, C=60, D=33, S=20, dtype=dtype)
    scale = torch.tensor(20.0, device=DEVICE, requires_grad=True)
    given = (x, w, t, ids, counts, None, None, scale, "cosine", -100, "mean", False, "triton")
    found = []
    for wanted in (True, False):
        with in_chunks(16, 20):
            loss, *_ = OPS.sampled_softmax_loss(*given, [wanted] * 4, None)
            found.append(torch.autograd.grad(loss, (x, w, scale), torch.tensor(0.7, device=DEVICE)))
    for begun, afterwards in zip(*found, strict=True):  # products may depend on where in memory they are
        torch.testing.assert_close(begun, afterwards, rtol=1e-6 if dtype == F32 else 1e-3, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", *later("none")])
@pytest.mark.parametrize("norm", [1e-4, *later(1.0), 3e3])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_float16_pulls_keep_their_digits_whatever_the_lengths_of_rows(similarity, norm, reduction):
    scale = 20.0 if similarity == "cosine" else 1 / norm
    case = Case(
        0, B=40, S=30, C=40, D=33, dtype=F16, weight_norm=norm, similarity=similarity, scale=scale,
        reduction=reduction,
    )  # fmt: skip
    for chunk in ((16, 30), (64, 16)):
        with in_chunks(*chunk):
            check(case, loss_by_triton)


def test_a_small_float16_gradient_survives_the_scaler():
    """Of 2e-9 with an upstream gradient of 65536: sums are float32, and rounded once."""
    x, w, t, _, _ = problem(B=40, C=60, D=33, dtype=F16)
    found = []
    for upstream in (1.0, 65536.0):
        with in_chunks(16, 60):
            loss = loss_by_triton(x, w, t, scale=1e-4)
            found.append(torch.autograd.grad(loss, w, torch.tensor(upstream, device=DEVICE))[0])
    exact = [v.detach().double().requires_grad_() for v in (x, w)]
    (truth,) = torch.autograd.grad(reference_loss(*exact, t, scale=1e-4), exact[1])
    assert truth.abs().max() < 1e-5 and not torch.equal(found[0].double(), truth)
    assert (found[1].double() / 65536 - truth).abs().max() <= 2.0**-10 * truth.abs().max()


@pytest.mark.parametrize("similarity, scale", [("cosine", 1e21), ("dot", 1e31)])
def test_a_scale_past_float32_takes_products_in_float64(similarity, scale):
    x, w, t, ids, counts = problem(B=40, C=60, D=33, S=20)
    with in_chunks(16, 20):
        found = loss_by_triton(x, w, t, ids, counts, scale=scale, similarity=similarity, reduction="none")
    options = {"scale": scale, "similarity": similarity, "reduction": "none"}
    expected = reference_loss(x.double(), w.double(), t, ids, counts.double(), **options)
    torch.testing.assert_close(found, expected.to(F32))


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # numpy's, of the interpreter
def test_rows_that_do_not_count_may_hold_anything():
    """Ignored ones, classes left out, rows with no upstream gradient: products read zeros there."""
    for reduction in ("mean", "none"):
        x, w, t, _, counts = problem(B=40, C=60, D=33, S=60)
        t[t == 7], t[3] = 8, -100
        counts[7] = torch.inf
        upstream = torch.ones(() if reduction == "mean" else 40, device=DEVICE)
        expected = None
        for value in (0.0, torch.nan, torch.inf):
            with torch.no_grad():
                x[3] = w[7] = value
                if reduction == "none":
                    x[5], upstream[5] = value, 0
            for chunk in ((16, 60), (64, 16)):
                with in_chunks(*chunk):
                    loss = loss_by_triton(x, w, t, None, counts, reduction=reduction)
                    found = torch.autograd.grad(loss, (x, w), upstream)
                assert all(gradient.isfinite().all() for gradient in found), (reduction, value, chunk)
                if expected is not None:
                    for a, b in zip(found, expected, strict=True):
                        torch.testing.assert_close(a, b)
            expected = found


@pytest.mark.parametrize("transposed", ["weight", *later("input")])
def test_rows_are_read_by_their_strides(transposed):
    for S in (None, 20):
        x, w, t, ids, counts = problem(B=40, C=60, D=33, S=S or 60)
        turned = (x if transposed == "input" else w).detach().T.contiguous().T.requires_grad_()
        with in_chunks(16, 16):
            one = gradients(loss_by_triton(x, w, t, ids if S else None, counts), x, w)
            x, w = (turned, w) if transposed == "input" else (x, turned)
            other = gradients(loss_by_triton(x, w, t, ids if S else None, counts), x, w)
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype, weight_dtype", [(BF16, F32), *later((F32, F64), (F16, BF16))])
def test_rows_of_two_dtypes(dtype, weight_dtype):
    for S in (None, 40):
        case = Case(1, B=40, S=S, C=50, D=33, dtype=dtype, weight_dtype=weight_dtype)
        for chunk in ((16, 64), (64, 16)):
            with in_chunks(*chunk):
                found = case.results(loss_by_triton)
            truth = case.results(reference_loss, in_float64=True)
            for name, result in found.items():
                floor = 2.0**-8 if BF16 in (dtype, weight_dtype) else 2.0**-10 if F16 in (dtype,) else 1e-5
                worst = (result.double() - truth[name]).abs().max()
                assert worst <= floor * truth[name].abs().max(), (name, S, chunk)


# ---- in torch ----------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("reduction, wanted", [("mean", True), ("mean", False), ("none", False)])
def test_opcheck(reduction, wanted):
    arguments = arguments_of(reduction, wanted)
    with in_chunks(4, 9):
        torch.library.opcheck(OPS.sampled_softmax_loss.default, arguments)
        with torch.no_grad():
            loss, *made = OPS.sampled_softmax_loss(*arguments)
        detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
        backward = (torch.ones_like(loss), made, [True, True, False, True], *detached)
        torch.library.opcheck(OPS.sampled_softmax_loss_backward.default, backward)


@pytest.mark.exhaustive
def test_compiled_for_any_batch():
    """One compilation for all batches that are cut alike."""
    x, w, t, ids, counts = problem(B=40, C=60, D=33, S=20)
    loss_by_triton(x[:2], w, t[:2], ids, counts)  # the choice of the interpreter is not the compiler's to see
    counter = CompileCounterWithBackend("aot_eager")
    step = partial(loss_by_triton, class_ids=ids, log_expected_count=counts)
    compiled = torch.compile(step, backend=counter, dynamic=True)
    frames = 0
    with in_chunks(16, 20):
        for B in (40, 37, 21):
            batch, of_batch = x.detach()[:B].clone().requires_grad_(), t[:B].clone()
            got, right = compiled(batch, w, of_batch), step(batch, w, of_batch)
            assert torch.equal(got, right)
            for a, b in zip(gradients(got, batch, w), gradients(right, batch, w), strict=True):
                assert torch.equal(a, b)
            frames = counter.frame_count if B == 40 else frames
    assert counter.frame_count == frames


def test_torch_multiplies_16_bits_into_float32_in_place():
    """As a plan asks for on GPUs: torch knows the call, if not on CPUs."""
    a, b, out = torch.zeros(4, 8, dtype=BF16), torch.zeros(8, 5, dtype=BF16), torch.zeros(4, 5)
    for adds, name in ((False, "aten::mm.dtype_out"), (True, "aten::addmm.dtype_out")):
        step = plan.Product(*(plan.Given(nth) for nth in range(3)), (False, False), adds)
        with (
            mock.patch.object(torch.Tensor, "is_cuda", True),
            pytest.raises(NotImplementedError, match=f"Could not run '{name}'"),
        ):
            step.run(out, a, b)


# ---- timed both ways ---------------------------------------------------------------------------------------


def test_the_faster_way_is_kept(monkeypatch):
    x, w, t, ids, counts = problem()
    monkeypatch.setattr(sampled_softmax, "_calls", {})
    monkeypatch.setattr(tuning, "wanted", lambda device: True)
    taken = []

    def milliseconds(step):
        step()
        taken.append(step)
        return 3.0 - len(taken)

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    p = sampled_softmax.Problem.of(
        x.detach(), w.detach(), t, ids, counts, None, None, 20.0, "cosine", -100, "mean", None
    )
    for _ in range(2):
        assert isinstance(sampled_softmax.calls_like(p), sampled_softmax.ChunkedCalls)
    assert len(taken) == 2


def test_nothing_is_timed_unless_asked_for(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not tuning.wanted(device)
    monkeypatch.setenv("FEDSS_AUTOTUNE", "1")
    assert tuning.wanted(device) and not tuning.wanted(torch.device("cpu"))
