"""The fused row step: the definition's bits for any layout, dtype and number of threads; no bad call writes."""

import doctest
import math
from unittest import mock

import fedss_kernels.reference.row_momentum
import pytest
import torch
from compilers import COMPILERS
from fedss_kernels.reference import row_momentum_step_ as reference_step_
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import excess

from fedss_kernels import row_momentum, row_momentum_step_, row_sgd

TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = "fedss_kernels.triton_kernels.scatter_add"
NUMBERS = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01}


def problem(C=20, M=12, D=7, dtype=torch.float32, rows_dtype=None, seed=0):
    """weight, velocity, class_ids, rows"""
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    weight, velocity = (torch.randn(C, D, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    rows = torch.randn(M, D, generator=g, dtype=torch.float64).to(rows_dtype or dtype)
    return weight, velocity, torch.randperm(C, generator=g)[:M], rows


@pytest.mark.parametrize("nesterov, moved", [(False, 5.0), (True, 4.5)])
def test_hand_worked_table(impl, nesterov, moved):
    """g = 2 + 8/4 = 4, v = 4/2 + 4 = 6, w = 8 - 6/2 = 5; Nesterov's w = 8 - (4 + 6/2)/2 = 4.5.

    The rows that have no gradient are not even read: infinity and NaN stay there.
    """
    weight = torch.tensor([[math.inf], [8.0], [3.0]])
    velocity = torch.tensor([[math.nan], [4.0], [1.0]])
    step = {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.25, "nesterov": nesterov, "impl": impl}
    assert row_momentum_step_(weight, velocity, torch.tensor([1]), torch.tensor([[2.0]]), **step) is weight
    assert weight.flatten().tolist() == [math.inf, moved, 3.0]
    assert velocity[0].isnan() and velocity[1:].flatten().tolist() == [6.0, 1.0]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    C=st.integers(1, 30),
    part=st.floats(0, 1),
    D=st.integers(0, 70),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    rows_dtype=st.sampled_from([None, torch.float16, torch.bfloat16]),
    momentum=st.sampled_from([None, 0.0, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.01]),
    nesterov=st.booleans(),
    elements=st.sampled_from([256, 1024]),
    seed=st.integers(0, 99),
)
def test_bits_of_the_definition(
    impl, C, part, D, dtype, rows_dtype, momentum, weight_decay, nesterov, elements, seed
):
    """elements: of a tile of the GPU's kernel; a smaller one has fewer positions than there are rows."""
    weight, velocity, ids, rows = problem(C, round(part * C), D, dtype, rows_dtype, seed)
    velocity = None if momentum is None else velocity
    numbers = {
        "lr": 0.3,
        "momentum": momentum or 0.0,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
    }
    expected = [None if t is None else t.clone() for t in (weight, velocity)]
    truth = [None if t is None else t.to(torch.float64, copy=True) for t in (weight, velocity)]
    reference_step_(*expected, ids, rows, **numbers)
    reference_step_(*truth, ids, rows.double(), **numbers)
    with mock.patch(f"{TRITON}.ELEMENTS", elements):
        row_momentum_step_(weight, velocity, ids, rows, **numbers, impl=impl)
    for got, plain, true in zip((weight, velocity), expected, truth, strict=True):
        if got is not None:
            assert torch.equal(got, plain)
            assert excess(got, true, plain, dtype) <= 1


# Several tasks of several rows, rows that end inside a run; rows longer than a task.
SIZES = [{"C": 9000, "M": 8000, "D": 33}, {"C": 5, "M": 4, "D": 40_001}]


@pytest.mark.parametrize("threads", [2, 3, 4])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_same_bits_for_any_number_of_threads(sizes, threads, set_threads):
    weight, velocity, ids, rows = problem(**sizes)
    expected = (weight.clone(), velocity.clone())
    row_momentum_step_(*expected, ids, rows, **NUMBERS)  # conftest: one thread
    plain = (weight.clone(), velocity.clone())
    reference_step_(*plain, ids, rows, **NUMBERS)
    set_threads(threads)
    row_momentum_step_(weight, velocity, ids, rows, **NUMBERS)
    for got, one_thread, definition in zip((weight, velocity), expected, plain, strict=True):
        assert torch.equal(got, one_thread) and torch.equal(got, definition)


def test_order_of_the_rows_does_not_matter(impl):
    weight, velocity, ids, rows = problem()
    other = (weight.clone(), velocity.clone())
    row_momentum_step_(weight, velocity, ids, rows, **NUMBERS, impl=impl)
    ids, order = ids.sort()
    row_momentum_step_(*other, ids, rows[order], **NUMBERS, impl=impl)
    assert torch.equal(other[0], weight) and torch.equal(other[1], velocity)


def test_rounds_every_operation(impl):
    """Fused, each of these would keep e^2 = 2^-24 beside 1, which a rounded product has lost."""
    e = 2.0**-12
    near, ids = torch.full((1, 16), 1 + e), torch.tensor([0])  # near^2 rounds to 1 + 2e
    minus = torch.full((1, 16), -(1 + 2 * e))
    velocity = near.clone()
    row_momentum_step_(near.clone(), velocity, ids, minus, lr=1.0, momentum=1 + e, impl=impl)
    assert not velocity.any()  # momentum * velocity + g
    weight, velocity = near.clone(), torch.zeros(1, 16)
    row_momentum_step_(weight, velocity, ids, minus, lr=1.0, momentum=0.0, weight_decay=1 + e, impl=impl)
    assert not velocity.any()  # row + weight_decay * weight
    weight = -minus
    row_momentum_step_(weight, None, ids, near, lr=1 + e, momentum=0.0, impl=impl)
    assert not weight.any()  # weight - lr * v


def test_no_decay_is_no_gradient_of_an_infinite_weight(impl):
    weight, velocity = torch.full((1, 3), math.inf), torch.zeros(1, 3)
    row_momentum_step_(weight, velocity, torch.tensor([0]), torch.ones(1, 3), lr=1.0, momentum=0.5, impl=impl)
    assert (velocity == 1).all() and (weight == math.inf).all()


@pytest.mark.parametrize("of", ["weight", "velocity", "rows"])
def test_strided_tensors_are_used_as_they_are(impl, of):
    tensors = dict(zip(("weight", "velocity", "class_ids", "rows"), problem(), strict=True))
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    row_momentum_step_(**expected, **NUMBERS)
    values = tensors[of]
    room = torch.full((values.shape[1] * 2, values.shape[0] + 3), math.nan)
    tensors[of] = room[::2, 1:-2].T.copy_(values)
    tensors["class_ids"] = torch.stack([tensors["class_ids"]] * 2, 1)[:, 1]
    row_momentum_step_(**tensors, **NUMBERS, impl=impl)
    assert torch.equal(tensors["weight"], expected["weight"])
    assert torch.equal(tensors["velocity"], expected["velocity"])
    assert room[1::2].isnan().all() and room[:, 0].isnan().all() and room[:, -2:].isnan().all()


BAD = [
    (lambda: {"weight": torch.zeros(20, 7, dtype=torch.float16)}, TypeError, "weight: expected float32 or float64, got float16"),
    (lambda: {"weight": torch.zeros(20)}, ValueError, r"weight: expected shape \(C, D\), got \(20,\)"),
    (lambda: {"weight": torch.zeros(1, 7).expand(20, 7)}, ValueError, "weight: expected a tensor whose elements do not share"),
    (lambda: {"weight": torch.zeros(20, 7, requires_grad=True)}, ValueError, "weight: expected a tensor that does not require"),
    (lambda: {"weight": torch.zeros(20, 7, device="meta")}, ValueError, "weight: expected a CPU or CUDA tensor, got one on meta"),
    (lambda: {"velocity": torch.zeros(20, 7, dtype=torch.float64)}, TypeError, "velocity: expected float32, got float64"),
    (lambda: {"velocity": torch.zeros(21, 7)}, ValueError, r"velocity: expected shape \(20, 7\) = \(C, D\), weight's, got \(21, 7\)"),
    (lambda: {"velocity": torch.zeros(20, 1).expand(20, 7)}, ValueError, "velocity: expected a tensor whose elements do not"),
    (lambda: {"velocity": torch.zeros(20, 7, requires_grad=True)}, ValueError, "velocity: expected a tensor that does not"),
    (lambda: {"velocity": None}, ValueError, "velocity: expected a tensor, as momentum is 0.9, got None"),
    (lambda: {"class_ids": torch.zeros(12)}, TypeError, "class_ids: expected int64, got float32"),
    (lambda: {"class_ids": torch.zeros(12, 1, dtype=torch.int64)}, ValueError, r"class_ids: expected shape \(M,\)"),
    (lambda: {"class_ids": torch.arange(9, 21)}, IndexError, r"class_ids\[11\] = 20, expected a class in \[0, 20\)"),
    (lambda: {"class_ids": torch.arange(-1, 11)}, IndexError, r"class_ids\[0\] = -1"),
    (lambda: {"class_ids": torch.arange(12) // 2 * 2}, ValueError, r"class_ids\[1\] = 0 is also class_ids\[0\], expected each class"),
    (lambda: {"class_ids": torch.arange(12) % 11}, ValueError, r"class_ids\[11\] = 0 is also class_ids\[0\], expected each class"),
    (lambda: {"rows": torch.zeros(12, 8)}, ValueError, r"rows: expected shape \(12, 7\) = \(M, D\), got \(12, 8\)"),
    (lambda: {"rows": torch.zeros(12, 7, dtype=torch.float64)}, TypeError, "rows: expected float32 or float16 or bfloat16, got"),
    (lambda: {"rows": torch.zeros(12, 7, requires_grad=True)}, ValueError, "rows: expected a tensor that does not require grad"),
    (lambda: {"lr": "0.1"}, TypeError, "lr: expected a number, got str"),
    (lambda: {"lr": math.nan}, ValueError, "lr: expected a finite number, got nan"),
    (lambda: {"momentum": math.inf}, ValueError, "momentum: expected a finite number, got inf"),
    (lambda: {"weight_decay": None}, TypeError, "weight_decay: expected a number, got NoneType"),
    (lambda: {"nesterov": 1}, TypeError, "nesterov: expected True or False, got int"),
    (lambda: {"impl": "cuda"}, ValueError, 'impl: expected "auto" or "cpp" or "triton", got \'cuda\''),
]  # fmt: skip


@pytest.mark.parametrize("changed, error, message", BAD, ids=[message for *_, message in BAD])
def test_bad_call_changes_nothing(impl, changed, error, message):
    arguments = dict(zip(("weight", "velocity", "class_ids", "rows"), problem(), strict=True))
    arguments |= NUMBERS | {"impl": impl} | changed()
    state = [t for t in (arguments["weight"], arguments["velocity"]) if t is not None and not t.is_meta]
    before = [t.clone() for t in state]
    with pytest.raises(error, match=message):
        row_momentum_step_(**arguments)
    assert all(torch.equal(tensor, old) for tensor, old in zip(state, before, strict=True))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 63).map(lambda c: c * 2**20), max_size=40))
def test_finds_every_repeated_class(impl, ids):
    """The first position whose class came before; far apart, so that a table of hashes has collisions."""
    repeated = next((i for i, c in enumerate(ids) if c in ids[:i]), None)
    weight = torch.zeros(1, 0).expand(2**26, 0)  # no elements: M = 40 of 2^26 classes cost nothing
    arguments = (weight, None, torch.tensor(ids, dtype=torch.int64), torch.zeros(len(ids), 0))
    if repeated is None:
        row_momentum_step_(*arguments, lr=1.0, momentum=0.0, impl=impl)
        return
    message = rf"class_ids\[{repeated}\] = {ids[repeated]} is also class_ids\[{ids.index(ids[repeated])}\]"
    with pytest.raises(ValueError, match=message):
        row_momentum_step_(*arguments, lr=1.0, momentum=0.0, impl=impl)


def test_overlap_is_refused_and_neighbours_are_not(impl):
    buffer, ids = torch.zeros(20, 14), torch.arange(20)
    left, right, rows = buffer[:, :7], buffer[:, 7:], torch.ones(20, 7)
    with pytest.raises(
        ValueError, match="weight: expected memory of its own, got a tensor that overlaps velocity"
    ):
        row_momentum_step_(left, left, ids, rows, **NUMBERS, impl=impl)
    with pytest.raises(
        ValueError, match="rows: expected memory of its own, got a tensor that overlaps weight"
    ):
        row_momentum_step_(left, rows, ids, buffer[:, 3:10], **NUMBERS, impl=impl)
    with pytest.raises(
        ValueError, match="rows: expected memory of its own, got a tensor that overlaps velocity"
    ):
        row_momentum_step_(rows, left, ids, left, **NUMBERS, impl=impl)
    row_momentum_step_(left, right, ids, rows, lr=1.0, momentum=0.5, impl=impl)  # no element in common
    assert (left == -1).all() and (right == 1).all()


def test_negated_views(impl):
    negated = torch.view_as_complex(torch.ones(3, 2, 2)).conj().imag  # -1 everywhere, by a flag
    step = {"lr": 1.0, "momentum": 0.0, "impl": impl}
    weight = row_momentum_step_(torch.zeros(3, 2), None, torch.arange(3), negated, **step)
    assert (weight == 1).all()
    for state in ((negated, None), (torch.zeros(3, 2), negated)):
        with pytest.raises(ValueError, match="expected a plain tensor, got a view that negates"):
            row_momentum_step_(*state, torch.arange(3), torch.ones(3, 2), **step)


def test_rows_longer_than_a_tile_of_the_gpu_kernel():
    with torch.device(TRITON_DEVICE), mock.patch(f"{TRITON}.ELEMENTS", 16):
        weight, velocity, ids, rows = problem(M=5, D=35)
        expected = weight.clone(), velocity.clone()
        reference_step_(*expected, ids, rows, **NUMBERS)
        row_momentum_step_(weight, velocity, ids, rows, **NUMBERS, impl="triton")
        assert torch.equal(weight, expected[0]) and torch.equal(velocity, expected[1])


def test_float64_numbers_are_not_rounded_to_float32(impl):
    weight, velocity = torch.ones(2, 1, 1, dtype=torch.float64)
    ids, rows = torch.tensor([0]), torch.zeros(1, 1, dtype=torch.float64)
    row_momentum_step_(weight, velocity, ids, rows, lr=0.1, momentum=0.7, weight_decay=1e-3, impl=impl)
    assert velocity.item() == 0.7 + 1e-3 and weight.item() == 1 - 0.1 * (0.7 + 1e-3)


def test_signs_of_zeros(impl):
    """-0 - -0 = 0 and -0 - 0 = -0: the gradient of a row that is listed once is that row, to the sign."""
    weight = torch.full((2, 1), -0.0)
    rows = torch.tensor([[-0.0], [0.0]])
    row_momentum_step_(weight, None, torch.arange(2), rows, lr=1.0, momentum=0.0, impl=impl)
    assert weight.flatten().signbit().tolist() == [False, True]


def test_unchecked_ids_are_summed_or_passed_over():
    """RowSGD on CUDA, and a captured CUDA graph: repeated ids' rows are summed in order, wrong ones ignored."""
    with torch.device(TRITON_DEVICE):
        weight, velocity, ids, rows = problem(M=4)
        expected = weight.clone(), velocity.clone()
        reference_step_(*expected, ids, torch.stack([rows[0] + rows[1] + rows[2], *rows[1:]]), **NUMBERS)
        some = torch.cat([ids[[0, 0, 0]], torch.tensor([-1, 20, 2**32]), ids[1:]])
    rows = torch.cat([rows[:3], rows[:3], rows[1:]])
    numbers = NUMBERS | {"nesterov": False}
    row_momentum.step_(weight, velocity, some, rows, **numbers, impl="triton", check_ids=False)
    assert torch.equal(weight, expected[0]) and torch.equal(velocity, expected[1])


@pytest.mark.parametrize("moves", [True, False])
def test_opcheck(impl, moves):
    weight, velocity, ids, rows = problem()
    arguments = (weight, velocity if moves else None, ids, rows, 0.3, 0.9 * moves, 0.01, moves, True, impl)
    torch.library.opcheck(row_momentum.OPERATOR.default, arguments)


@pytest.mark.parametrize("backend", COMPILERS)
def test_compiled_equals_eager(impl, backend):
    weight, velocity, ids, rows = problem()

    def step(weight, velocity):
        weight, velocity = weight.clone(), velocity.clone()
        return row_momentum_step_(weight, velocity, ids, rows, **NUMBERS, impl=impl) * 2, velocity * 2

    compiled, eager = (
        torch.compile(step, fullgraph=True, backend=backend)(weight, velocity),
        step(weight, velocity),
    )
    assert torch.equal(compiled[0], eager[0]) and torch.equal(compiled[1], eager[1])


@pytest.mark.parametrize("saved_one", [0, 1])
def test_autograd_sees_that_a_saved_tensor_changed(impl, saved_one):
    p, state = torch.ones(3, 1, requires_grad=True), (torch.ones(3, 1), torch.ones(3, 1))
    product = (p * state[saved_one]).sum()
    row_momentum_step_(*state, torch.tensor([0]), torch.full((1, 1), 9.0), **NUMBERS, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_forward_mode_is_refused_not_zero():
    rows = torch.ones(2, 3)

    def step(rows):
        return row_momentum_step_(torch.zeros(2, 3), None, torch.arange(2), rows, lr=1.0, momentum=0.0)

    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(step, (rows,), (rows,))


@pytest.mark.parametrize("module", [row_momentum, row_sgd, fedss_kernels.reference.row_momentum])
def test_examples_in_docstrings(module):
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted and not result.failed


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float64, torch.bfloat16)], ids=str)
def test_a_gpu_has_the_bits_of_the_cpu_every_time(dtypes):
    weight, velocity, ids, rows = problem(100_000, 64_000, 64, *dtypes)
    before = weight.cuda(), velocity.cuda()
    row_momentum_step_(weight, velocity, ids, rows, **NUMBERS, nesterov=True)
    for _ in range(20):
        state = [t.clone() for t in before]
        row_momentum_step_(*state, ids.cuda(), rows.cuda(), **NUMBERS, nesterov=True)
        assert torch.equal(state[0].cpu(), weight) and torch.equal(state[1].cpu(), velocity)


@pytest.mark.gpu
def test_more_than_2_31_elements_on_a_gpu():
    C, D = 2**25 + 3, 64
    if torch.cuda.mem_get_info()[0] < 3 * C * D * 4:
        pytest.skip(
            "two matrices of 2^31 float32 elements and one more to check them take 26 GB of GPU memory"
        )
    with torch.device("cuda"):
        weight, velocity = torch.zeros(C, D), torch.zeros(C, D)
        row_momentum_step_(weight, velocity, torch.tensor([C - 1, 0]), torch.ones(2, D), lr=1.0, momentum=0.5)
    for state in (weight, velocity):
        assert state.sum(1).nonzero().flatten().tolist() == [0, C - 1]
    assert (weight[-1] == -1).all() and (velocity[0] == 1).all()
