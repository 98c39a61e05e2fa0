"""The fused row step of AdamW, and RowAdam: torch.optim.AdamW on listed rows and on dense gradients."""

import copy
import doctest
import io
import math
import pickle
from collections.abc import Sequence
from fractions import Fraction
from unittest import mock

import fedss_kernels.reference.row_adam
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from fedss_kernels.reference import row_adam_step_ as reference_step_
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import excess
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from fedss_kernels import RowAdam, RowSGD, SampledSoftmaxLoss, row_adam, row_adam_step_, sampled_softmax_loss

TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = "fedss_kernels.triton_kernels.scatter_add"
NUMBERS = {"lr": 0.3, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.01}
STATE = ("weight", "exp_avg", "exp_avg_sq", "row_steps")


def problem(C=20, M=12, D=7, dtype=torch.float32, rows_dtype=None, seed=0):
    """weight, exp_avg, exp_avg_sq, row_steps, class_ids, rows; a row without steps has no averages."""
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    weight, exp_avg, exp_avg_sq = (torch.randn(C, D, generator=g, dtype=torch.float64) for _ in range(3))
    row_steps = torch.randint(5, (C,), generator=g)
    begun = (row_steps > 0)[:, None]
    state = (weight, exp_avg * begun, exp_avg_sq.square() * begun)
    rows = torch.randn(M, D, generator=g, dtype=torch.float64).to(rows_dtype or dtype)
    return dict(zip(STATE, (*(t.to(dtype) for t in state), row_steps), strict=True)) | {
        "class_ids": torch.randperm(C, generator=g)[:M],
        "rows": rows,
    }


def clones(arguments, dtype=None):
    return {
        name: t.to(dtype, copy=True) if dtype and t.is_floating_point() else t.clone()
        for name, t in arguments.items()
    }


def test_hand_worked_table(impl):
    """The second step of row 1: m = 2 + (6 - 2)/2 = 4, v = 4 * 3/4 + 36/4 = 12, n = 2.

    1 - 1/4 = 3/4 and 1 - 9/16 = 7/16: w = 7/8 * 8 - 0.5 * 4 / (3/4) / sqrt(12 * 16/7). Nothing is read of
    the other rows: infinity and NaN stay there.
    """
    weight = torch.tensor([[math.inf], [8.0], [3.0]])
    exp_avg, exp_avg_sq = torch.tensor([[math.nan], [2.0], [1.0]]), torch.tensor([[math.nan], [4.0], [1.0]])
    state = weight, exp_avg, exp_avg_sq, torch.tensor([7, 1, 9])
    numbers = {"lr": 0.5, "betas": (0.5, 0.75), "eps": 0.0, "weight_decay": 0.25, "impl": impl}
    assert row_adam_step_(*state, torch.tensor([1]), torch.tensor([[6.0]]), **numbers) is weight
    assert weight[1].item() == pytest.approx(7 - 8 / 3 / math.sqrt(12 * 16 / 7), rel=1e-6)
    assert exp_avg[1:].flatten().tolist() == [4, 1] and exp_avg_sq[1:].flatten().tolist() == [12, 1]
    assert state[3].tolist() == [7, 2, 9]
    assert exp_avg[0].isnan() and weight[::2].flatten().tolist() == [math.inf, 3]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    C=st.integers(1, 30),
    part=st.floats(0, 1),
    D=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    rows_dtype=st.sampled_from([None, torch.float16, torch.bfloat16]),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.5)]),
    weight_decay=st.sampled_from([0.0, 0.01]),
    elements=st.sampled_from([256, 1024]),
    seed=st.integers(0, 99),
)
def test_is_the_definition(impl, C, part, D, dtype, rows_dtype, betas, weight_decay, elements, seed):
    """elements: of a tile of the GPU's kernel; a smaller one has fewer positions than there are rows."""
    arguments = problem(C, int(part * C), D, dtype, rows_dtype, seed)
    numbers = NUMBERS | {"betas": betas, "weight_decay": weight_decay}
    plain, truth = clones(arguments), clones(arguments, torch.float64)
    reference_step_(**plain, **numbers)
    reference_step_(**truth, **numbers)
    with mock.patch(f"{TRITON}.ELEMENTS", elements):
        row_adam_step_(**arguments, **numbers, impl=impl)
    for name in STATE[:3]:
        assert excess(arguments[name], truth[name], plain[name], dtype) <= 1, name
    assert torch.equal(arguments["row_steps"], plain["row_steps"])


@pytest.mark.parametrize("sizes", [{"C": 9000, "M": 8000, "D": 33}, {"C": 5, "M": 4, "D": 40_001}], ids=str)
def test_same_bits_for_any_number_of_threads(sizes, set_threads):
    """Several tasks of several rows, rows that end inside a run; rows longer than a task."""
    arguments = problem(**sizes)
    alone = clones(arguments)
    row_adam_step_(**alone, **NUMBERS)  # conftest: one thread
    for threads in (2, 3, 4):
        some = clones(arguments)
        set_threads(threads)
        row_adam_step_(**some, **NUMBERS)
        assert all(torch.equal(some[name], alone[name]) for name in STATE)


@pytest.mark.parametrize("of", ["weight", "exp_avg", "exp_avg_sq", "rows"])
def test_strided_tensors_are_used_as_they_are(impl, of):
    arguments = problem()
    expected = clones(arguments)
    row_adam_step_(**expected, **NUMBERS, impl=impl)
    values = arguments[of]
    room = torch.full((values.shape[1] * 2, values.shape[0] + 3), math.nan)
    arguments[of] = room[::2, 1:-2].T.copy_(values)
    for name in ("class_ids", "row_steps"):
        arguments[name] = torch.stack([arguments[name]] * 2, 1)[:, 1]
    row_adam_step_(**arguments, **NUMBERS, impl=impl)
    assert all(torch.equal(arguments[name], expected[name]) for name in STATE)
    assert room[1::2].isnan().all() and room[:, 0].isnan().all() and room[:, -2:].isnan().all()


def expanded():
    return torch.zeros(20, 1).expand(20, 7)


BAD = [
    (lambda: {"weight": torch.zeros(20, 7, dtype=torch.float16)}, TypeError, "weight: expected float32 or float64, got float16"),
    (lambda: {"weight": torch.zeros(20)}, ValueError, r"weight: expected shape \(C, D\), got \(20,\)"),
    (lambda: {"weight": expanded()}, ValueError, "weight: expected a tensor whose elements do not share"),
    (lambda: {"exp_avg": torch.zeros(20, 7).double()}, TypeError, "exp_avg: expected float32, got float64"),
    (lambda: {"exp_avg_sq": torch.zeros(21, 7)}, ValueError, r"exp_avg_sq: expected shape \(20, 7\) = \(C, D\), weight's"),
    (lambda: {"exp_avg_sq": expanded()}, ValueError, "exp_avg_sq: expected a tensor whose elements do not"),
    (lambda: {"row_steps": torch.zeros(20)}, TypeError, "row_steps: expected int64, got float32"),
    (lambda: {"row_steps": torch.zeros(19, dtype=torch.int64)}, ValueError, r"row_steps: expected shape \(20,\) = \(C,\), got"),
    (lambda: {"row_steps": torch.zeros(1, dtype=torch.int64).expand(20)}, ValueError, "row_steps: expected a tensor whose"),
    (lambda: {"class_ids": torch.zeros(12)}, TypeError, "class_ids: expected int64, got float32"),
    (lambda: {"class_ids": torch.arange(9, 21)}, IndexError, r"class_ids\[11\] = 20, expected a class in \[0, 20\)"),
    (lambda: {"class_ids": torch.arange(12) % 11}, ValueError, r"class_ids\[11\] = 0 is also class_ids\[0\], expected each class"),
    (lambda: {"rows": torch.zeros(12, 8)}, ValueError, r"rows: expected shape \(12, 7\) = \(M, D\), got \(12, 8\)"),
    (lambda: {"rows": torch.zeros(12, 7, requires_grad=True)}, ValueError, "rows: expected a tensor that does not require grad"),
    (lambda: {"lr": -0.1}, ValueError, "lr: expected a finite number of at least 0, got -0.1"),
    (lambda: {"betas": (0.9, 1.0)}, ValueError, r"betas\[1\]: expected a finite number of at least 0 and below 1, got 1.0"),
    (lambda: {"betas": 0.9}, TypeError, "betas: expected two numbers, got 0.9"),
    (lambda: {"eps": None}, TypeError, "eps: expected a number, got NoneType"),
    (lambda: {"impl": "cuda"}, ValueError, 'impl: expected "auto" or "cpp" or "triton", got \'cuda\''),
]  # fmt: skip


@pytest.mark.parametrize("changed, error, message", BAD, ids=[message for *_, message in BAD])
def test_bad_call_changes_nothing(impl, changed, error, message):
    arguments = problem() | NUMBERS | {"impl": impl} | changed()
    before = {name: arguments[name].clone() for name in STATE}
    with pytest.raises(error, match=message):
        row_adam_step_(**arguments)
    assert all(torch.equal(arguments[name], before[name]) for name in STATE)


def test_unchecked_ids_are_summed_or_passed_over():
    """RowAdam on CUDA, and a captured CUDA graph: rows of one class are summed, wrong ids ignored."""
    with torch.device(TRITON_DEVICE):
        arguments = problem(M=4)
        ids, rows = arguments.pop("class_ids"), arguments.pop("rows")
        expected = clones(arguments)
        summed = torch.stack([rows[0] + rows[1] + rows[2], *rows[1:]])
        row_adam_step_(**expected, class_ids=ids, rows=summed, **NUMBERS, impl="triton")
        some = torch.cat([ids[[0, 0, 0]], torch.tensor([-1, 20, 2**32]), ids[1:]])
    rows, numbers = torch.cat([rows[:3], rows[:3], rows[1:]]), (0.3, 0.9, 0.99, 1e-6, 0.01)
    row_adam.step_(*arguments.values(), some, rows, *numbers, impl="triton", check_ids=False)
    assert all(torch.equal(arguments[name], expected[name]) for name in STATE)


def test_opcheck(impl):
    arguments = (*problem().values(), 0.3, 0.9, 0.99, 1e-6, 0.01, True, impl)
    torch.library.opcheck(row_adam.OPERATOR.default, arguments)


@pytest.mark.parametrize("module", [row_adam, fedss_kernels.reference.row_adam])
def test_examples_in_docstrings(module):
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted and not result.failed


# ---- RowAdam ----


def sparse(ids, rows, C):
    ids = torch.as_tensor(ids, dtype=torch.int64).reshape(1, -1)
    return torch.sparse_coo_tensor(ids, rows, (C, *rows.shape[1:]), check_invariants=True)


OPTIONS = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.0, "betas": (0.5, 0.75)},
    {"lr": 0.01, "weight_decay": 0.5, "eps": 1e-3},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_torch_adamw_when_every_row_has_a_gradient(options, dtype):
    C, D = 6, 35
    torch.manual_seed(0)
    start = torch.randn(C, D, dtype=dtype)
    ours, theirs, truth = (nn.Parameter(start.to(t, copy=True)) for t in (dtype, dtype, torch.float64))
    optimizers = (
        RowAdam([ours], **options),
        torch.optim.AdamW([theirs], **options),
        torch.optim.AdamW([truth], **options),
    )
    for _ in range(5):
        rows, order = torch.randn(C, D, dtype=dtype), torch.randperm(C)
        ours.grad, theirs.grad, truth.grad = sparse(order, rows[order], C), rows, rows.double()
        for optimizer in optimizers:
            optimizer.step()
    assert excess(ours.detach(), truth.detach(), theirs.detach(), dtype) <= 1


def test_a_row_is_a_parameter_that_adamw_sees_only_in_the_steps_that_list_it():
    C, D = 5, 3
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(C, D))
    lone_rows = [nn.Parameter(row.clone()) for row in weight.detach()]
    ours, lone = RowAdam([weight], lr=0.1), [torch.optim.AdamW([row], lr=0.1) for row in lone_rows]
    for ids in ([0, 3], [3], [], [1, 0, 3]):  # 4 and 2 never; 0 after a gap
        rows = torch.randn(len(ids), D)
        weight.grad = sparse(ids, rows, C)
        ours.step()
        for c, row in zip(ids, rows, strict=True):
            lone_rows[c].grad = row
            lone[c].step()
    torch.testing.assert_close(weight, torch.stack(lone_rows), rtol=1e-6, atol=1e-7)
    assert ours.state[weight]["row_steps"].tolist() == [2, 1, 0, 3, 0]
    assert ours.state[weight]["step"].item() == 4


def test_first_steps_beside_sparse_adam():
    """The same where all rows have taken all steps; a late row's first is lr here, and there

    (1 - beta1) / sqrt(1 - beta2) = 0.5 / 0.1 of it.
    """
    ours, theirs = (nn.Parameter(torch.zeros(2, 1)) for _ in range(2))
    betas = (0.5, 0.99)
    optimizers = (
        RowAdam([ours], lr=1.0, betas=betas, weight_decay=0.0),
        torch.optim.SparseAdam([theirs], lr=1.0, betas=betas),
    )
    for row in [0] * 800 + [1]:
        for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
            weight.grad = sparse([row], torch.ones(1, 1), 2)
            optimizer.step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-3, atol=0)
    assert ours[1].item() == pytest.approx(-1, rel=1e-5) and theirs[1].item() == pytest.approx(-5, rel=0.01)


@pytest.mark.parametrize("options", [*OPTIONS, {"lr": torch.tensor(0.1)}], ids=str)
def test_dense_gradients_have_the_bits_of_torch_adamw(options):
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    theirs = copy.deepcopy(ours)
    optimizers = RowAdam(ours.parameters(), **options), torch.optim.AdamW(theirs.parameters(), **options)
    for _ in range(3):
        input = torch.randn(2, 5)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(input).square().sum().backward()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_dense_gradient_of_counted_rows_lists_every_row():
    torch.manual_seed(0)
    dense, listed = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    optimizers = [RowAdam([weight], lr=0.1) for weight in (dense, listed)]
    for weight, optimizer in zip((dense, listed), optimizers, strict=True):
        weight.grad = sparse([2], torch.ones(1, 3), 4)
        optimizer.step()
    rows = torch.randn(4, 3)
    dense.grad, listed.grad = rows, sparse(range(4), rows, 4)
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(dense, listed)
    assert optimizers[0].state[dense]["row_steps"].tolist() == [1, 1, 2, 1]


@pytest.mark.parametrize("kind", [RowAdam, RowSGD])
def test_a_bias_with_a_sparse_gradient_is_stepped_by_rows(kind):
    """As one column: (C,) and (C, 1) are the same."""
    bias, column = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6, 1))
    options = {"lr": 0.5, "weight_decay": 0.25} | ({"momentum": 0.5} if kind is RowSGD else {})
    optimizers = kind([bias], **options), kind([column], **options)
    for ids in ([4, 1, 4], [0, 2], []):
        values = torch.arange(1.0, len(ids) + 1)
        bias.grad, column.grad = sparse(ids, values, 6), sparse(ids, values[:, None], 6)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(bias, column[:, 0])
    assert (bias != 1).tolist() == [True, True, True, False, True, False]


def test_sampled_softmax_loss_with_sparse_grad():
    torch.manual_seed(0)
    criterion = SampledSoftmaxLoss(50, 8, 10, sparse_grad=True)
    input, target = torch.randn(20, 8), torch.randint(50, (20,))
    optimizer = RowAdam(criterion.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(criterion(input, target))
        losses[-1].backward()
        optimizer.step()
    assert sum(losses[-5:]) < sum(losses[:5]) / 2


def test_the_default_device_does_not_matter():
    weights = torch.ones(2, 5, 3).unbind()
    for weight in weights:
        weight.grad = sparse([4, 1], torch.ones(2, 3), 5)
    RowAdam([weights[0]]).step()
    with torch.device("meta"):
        RowAdam([weights[1]]).step()
    assert torch.equal(*weights)


@pytest.mark.parametrize("sparsely", [True, False])
def test_steps_are_counted_past_256_whatever_the_default_dtype_is(sparsely):
    weight = torch.ones(5, 3, requires_grad=True)
    optimizer = RowAdam([weight])
    torch.set_default_dtype(torch.bfloat16)
    try:
        weight.grad = sparse([1], torch.ones(1, 3, dtype=torch.float32), 5) if sparsely else weight.detach()
        for _ in range(258):
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[weight]["step"] == 258


def steps(optimizer, weights, number, sparsely):
    torch.manual_seed(number)
    for weight in weights:
        rows = torch.randn(2, *weight.shape[1:], dtype=weight.dtype)
        weight.grad = sparse([number % 4, 4], rows, 5) if sparsely else torch.randn_like(weight)
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [RowAdam, RowSGD])
def test_state_dict_and_pickle_continue_where_they_stopped(kind, dtype):
    """The same bits as without a stop: averages, counts of rows, and where the rounding stands."""
    options = {"lr": 1e-3, "seed": 3} | ({"momentum": 0.9} if kind is RowSGD else {})
    weights = [nn.Parameter(torch.ones(5, 7, dtype=dtype)), nn.Parameter(torch.ones(5, dtype=dtype))]
    optimizer = kind(weights, **options)
    for number in range(6):
        steps(optimizer, weights, number, sparsely=number != 4)
    others = [nn.Parameter(weight.detach().clone()) for weight in weights]
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = kind(others, lr=7.0)
    other.load_state_dict(torch.load(file, weights_only=True))
    pickled, pickled_weights = pickle.loads(pickle.dumps((optimizer, weights)))
    for number in range(6, 10):
        for run in ((optimizer, weights), (other, others), (pickled, pickled_weights)):
            steps(*run, number, sparsely=True)
    for p, q, r in zip(weights, others, pickled_weights, strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, other.state[q][name]) and value.dtype == other.state[q][name].dtype


@pytest.mark.parametrize("first, then", [(torch.optim.AdamW, RowAdam), (RowAdam, torch.optim.AdamW)], ids=str)
def test_state_dicts_are_those_of_torch_adamw(first, then):
    """Trained by one and then by the other: the bits of AdamW alone."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.ones(5, 3)) for _ in range(2)]
    alone, optimizer = torch.optim.AdamW(weights[:1], lr=0.1), first(weights[1:], lr=0.1)
    for number in range(6):
        if number == 3:
            state, optimizer = optimizer.state_dict(), then(weights[1:], lr=0.5)
            optimizer.load_state_dict(state)
        steps(alone, weights[:1], number, sparsely=False)
        steps(optimizer, weights[1:], number, sparsely=False)
    assert torch.equal(*weights)


def test_rows_of_an_adamw_state_have_taken_all_its_steps():
    weight = nn.Parameter(torch.ones(5, 3))
    theirs = torch.optim.AdamW([weight], lr=0.1)
    for number in range(3):
        steps(theirs, [weight], number, sparsely=False)
    ours = RowAdam([weight])
    ours.load_state_dict(theirs.state_dict())
    steps(ours, [weight], 0, sparsely=True)
    assert ours.state[weight]["row_steps"].tolist() == [4, 3, 3, 3, 4] and ours.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("times", [0, 10])
def test_steps_that_adamw_took_in_between_are_those_of_every_row(times, dtype):
    weight = nn.Parameter(torch.ones(5, 3, dtype=dtype))
    ours, theirs = RowAdam([weight], lr=0.1), torch.optim.AdamW([weight])
    for row in (0, 1, 2, 0):
        weight.grad = torch.sparse_coo_tensor([[row]], torch.ones(1, 3, dtype=dtype), (5, 3))
        ours.step()
    theirs.load_state_dict(ours.state_dict())
    for _ in range(times):
        weight.grad = torch.ones_like(weight)
        theirs.step()
    again = RowAdam([weight])
    again.load_state_dict(theirs.state_dict())
    found = again.state[weight]["row_steps"]
    assert found.dtype == torch.int64 and found.tolist() == [times + n for n in (2, 1, 1, 0, 0)]
    assert again.state_dict()["state"][0]["counted_to"] == times + 4
    assert again.state[weight].keys() == ours.state[weight].keys()


def test_counts_of_a_later_step_than_the_last_are_refused():
    weight = nn.Parameter(torch.ones(5, 3))
    ours = RowAdam([weight])
    steps(ours, [weight], 0, sparsely=True)
    state = ours.state_dict()
    state["state"][0]["counted_to"] = 2
    with pytest.raises(ValueError, match=r"counted_to: expected a number from 0 to 1, got 2"):
        RowAdam([weight]).load_state_dict(state)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_distributed_checkpoints_hold_the_counts_of_rows(tmp_path):
    """As the docstring has it: what is loaded into has taken a step."""

    def trained(steps):
        torch.manual_seed(steps)
        criterion = SampledSoftmaxLoss(9, 4, sparse_grad=True, bias=True)
        optimizer = RowAdam(criterion.parameters(), lr=0.1)
        for _ in range(steps):
            train(criterion, optimizer)
        return criterion, optimizer

    def train(criterion, optimizer):
        optimizer.zero_grad()
        ids = torch.tensor([1, 2])
        sampled_softmax_loss(
            torch.ones(1, 4), criterion.weight, ids[:1], ids, bias=criterion.bias, sparse_grad=True
        ).backward()
        optimizer.step()

    saved, loaded = trained(3), trained(1)
    model, state = get_state_dict(*saved)
    dcp.save({"model": model, "state": state}, checkpoint_id=tmp_path, no_dist=True)
    model, state = get_state_dict(*loaded)
    dcp.load({"model": model, "state": state}, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(*loaded, model_state_dict=model, optim_state_dict=state)
    for criterion, optimizer in (saved, loaded):
        train(criterion, optimizer)
        assert optimizer.state[criterion.weight]["row_steps"].tolist() == [0, 4, 4, 0, 0, 0, 0, 0, 0]
    assert torch.equal(saved[0].weight, loaded[0].weight)


def test_counts_of_rows_are_no_matter_to_adamw():
    weight = nn.Parameter(torch.ones(5, 3))
    ours = RowAdam([weight], lr=0.1)
    steps(ours, [weight], 0, sparsely=True)
    theirs = torch.optim.AdamW([weight])
    theirs.load_state_dict(ours.state_dict())
    steps(theirs, [weight], 1, sparsely=False)
    assert theirs.state[weight]["step"].item() == 2 and weight.isfinite().all()


def test_averages_of_16_bit_parameters_are_float32():
    """Squares of float16 gradients of 1e-5 are no float16 numbers: v would be 0 and a step m / eps."""
    weight = nn.Parameter(torch.zeros(3, 2, dtype=torch.float16))
    optimizer = RowAdam([weight], lr=0.5, weight_decay=0.0)
    for _ in range(2):
        weight.grad = sparse([1], torch.full((1, 2), 1e-5, dtype=torch.float16), 3)
        optimizer.step()
    assert optimizer.state[weight]["exp_avg_sq"].dtype == torch.float32
    torch.testing.assert_close(weight[1].float(), torch.full((2,), -1.0), rtol=0.01, atol=0)


def adamw_state(weight, **options):
    theirs = torch.optim.AdamW([weight], **options)
    weight.grad = torch.ones_like(weight)
    theirs.step()
    return theirs.state_dict()


def nadam_state(weight):
    theirs = torch.optim.NAdam([weight], decoupled_weight_decay=True)
    weight.grad = torch.ones_like(weight)
    theirs.step()
    return theirs.state_dict()


def filled(weight, row, number):
    return torch.zeros_like(weight).index_fill(0, torch.tensor([row]), number)


def changed(state, **values):
    state["state"][0].update(values)
    return state


BAD_STATES = [
    (lambda w: adamw_state(w, amsgrad=True), r"param_groups\[0\]: amsgrad: expected False, as RowAdam has no other, got True"),
    (lambda w: adamw_state(w, maximize=True), r"param_groups\[0\]: maximize: expected False, as RowAdam has no other, got True"),
    (lambda w: torch.optim.Adam([w]).state_dict(), "decoupled_weight_decay: expected True, as RowAdam has no other, got False"),
    (lambda w: torch.optim.SGD([w]).state_dict(), r"param_groups\[0\]: expected an option betas, got none: is this the state"),
    (lambda w: changed(adamw_state(w), step=torch.tensor(math.nan)), r"step: expected a finite number of at least 0 and below 9.0072e\+15, got nan"),
    (lambda w: changed(adamw_state(w), step=-1), "step: expected a finite number of at least 0 .*, got -1"),
    (lambda w: changed(adamw_state(w), row_steps=torch.tensor([0, 1, 2, -3, 4])), r"row_steps\[3\]: expected at least 0, got -3"),
    (lambda w: changed(adamw_state(w), row_steps=torch.full((5,), math.nan)), r"row_steps\[0\]: expected at least 0, got nan"),
    (lambda w: changed(adamw_state(w), exp_avg_sq=filled(w, 1, -1.0)), r"exp_avg_sq\[1, 0\]: expected at least 0, got -1"),
    (lambda w: changed(adamw_state(w), exp_avg_sq=filled(w, 4, math.nan)), r"exp_avg_sq\[4, 0\]: expected at least 0, got nan"),
    (lambda w: changed(adamw_state(w), exp_avg=torch.ones(5, 3).to_sparse()), "exp_avg: expected a dense tensor, got layout torch.sparse_coo"),
    (lambda w: changed(adamw_state(w), exp_avg=filled(w, 2, math.nan)), r"exp_avg\[2, 0\]: expected a finite number, got nan"),
    (lambda w: changed(adamw_state(w), exp_avg=filled(w, 3, -math.inf)), r"exp_avg\[3, 0\]: expected a finite number, got -inf"),
    (lambda w: changed(adamw_state(w), exp_avg_sq=filled(w, 0, math.inf)), r"exp_avg_sq\[0, 0\]: expected a finite number, got inf"),
    (lambda w: changed(adamw_state(w), exp_avg=torch.ones(5, 3).int()), "exp_avg: expected float16 or .*, got int32"),
    (lambda w: changed(adamw_state(w), exp_avg_sq=torch.ones(5, 3).bool()), "exp_avg_sq: expected float16 or .*, got bool"),
    (lambda w: changed(adamw_state(w), row_steps=torch.tensor([1, 2, 2.5, 3, 4])), r"row_steps\[2\]: expected a whole number, got 2.5"),
    (lambda w: changed(adamw_state(w), row_steps=torch.full((5,), math.inf)), r"row_steps\[0\]: expected less than 2\*\*53, got inf"),
    (lambda w: changed(adamw_state(w), row_steps=torch.tensor([1, 2, 2**63 - 1, 3, 4])), r"row_steps\[2\]: expected less than 2\*\*53, got 9.22337e\+18"),
    (lambda w: changed(adamw_state(w), step=torch.tensor(1e19)), "step: expected a finite number of at least 0 .*, got 9.9999.*e\\+18"),
    (lambda w: changed(adamw_state(w), exp_avg=torch.ones(5, 3, requires_grad=True)), "exp_avg: expected a constant, got a tensor that requires grad"),
    (lambda w: changed(adamw_state(w), exp_avg_sq=torch.ones(1, 3).expand(5, 3)), "exp_avg_sq: expected a tensor whose elements do not share memory"),
    (lambda w: changed(adamw_state(w), exp_avg_sq=None), r"state: expected exp_avg_sq of shape \(5, 3\), got none"),
    (lambda w: changed(adamw_state(w), row_steps=None), r"state: expected row_steps of shape \(5,\), got none"),
    (lambda w: nadam_state(w), "state: expected .*, got mu_product too: is this the state of another optimiser than RowAdam"),
    (lambda w: torch.optim.RAdam([w], decoupled_weight_decay=True).state_dict(), r"param_groups\[0\]: expected the options of RowAdam, got no amsgrad: is this the state of"),
    (lambda w: torch.optim.NAdam([w], decoupled_weight_decay=True).state_dict(), "expected the options of RowAdam, got momentum_decay too, which NAdam has"),
    (lambda w: torch.optim.Adamax([w]).state_dict(), "expected the options of RowAdam, got no amsgrad: is this the state of"),
    (lambda w: adamw_state(nn.Parameter(torch.ones(4, 3))), r"state: expected exp_avg of shape \(5, 3\), got \(4, 3\)"),
]  # fmt: skip


@pytest.mark.parametrize("make, message", BAD_STATES, ids=[message for _, message in BAD_STATES])
def test_other_states_are_refused_by_name(make, message):
    weight = nn.Parameter(torch.ones(5, 3))
    bad = make(weight)
    optimizer = RowAdam([weight], lr=0.1)
    steps(optimizer, [weight], 0, sparsely=True)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.load_state_dict(bad)
    assert str(optimizer.state_dict()) == str(before)


def test_averages_past_the_largest_number_of_16_bits_are_loaded():
    weight = nn.Parameter(torch.ones(5, 3, dtype=torch.float16))
    optimizer = RowAdam([weight])
    optimizer.load_state_dict(changed(adamw_state(weight), exp_avg_sq=torch.full((5, 3), 1e9)))
    assert (optimizer.state[weight]["exp_avg_sq"] == 1e9).all()


def test_counts_are_read_as_they_were_saved():
    """Not in a parameter's 16 bits, which hold neither 70,000 nor 2049.5."""
    weight = nn.Parameter(torch.ones(5, 3, dtype=torch.float16))
    optimizer, state = RowAdam([weight]), adamw_state(weight)
    optimizer.load_state_dict(changed(state, row_steps=torch.full((5,), 70_000)))
    assert (optimizer.state[weight]["row_steps"] == 70_000).all()
    with pytest.raises(ValueError, match=r"row_steps\[0\]: expected a whole number, got 2049.5"):
        optimizer.load_state_dict(changed(state, row_steps=torch.full((5,), 2049.5)))


BAD_OPTIONS = [
    ({"lr": -0.1}, ValueError, "lr: .* at least 0, got -0.1"),
    ({"betas": torch.tensor([0.9, 0.99, 0.999])}, TypeError, r"betas: expected two numbers, got tensor"),
    (
        {"betas": torch.ones(2, device="meta")},
        TypeError,
        r"betas\[0\]: expected a number, got Tensor of shape \(\) on meta",
    ),
    ({"betas": torch.ones(2, 2)}, TypeError, r"betas\[0\]: expected a number, got Tensor of shape \(2,\)"),
    ({"betas": np.array(0.9)}, TypeError, r"betas: expected two numbers, got array\(0.9\)"),
    ({"betas": (0.9,)}, TypeError, r"betas: expected two numbers, got \(0.9,\)"),
    ({"betas": (0.9, 1 - Fraction(1, 10**30))}, ValueError, r"betas\[1\]: .* below 1, got 9+/10+"),
    ({"betas": (-0.1, 0.9)}, ValueError, r"betas\[0\]: .* at least 0 and below 1, got -0.1"),
    ({"eps": float("nan")}, ValueError, "eps: .* at least 0, got nan"),
    ({"weight_decay": -1}, ValueError, "weight_decay: .* at least 0, got -1"),
    ({"amsgrad": True}, ValueError, "amsgrad: expected False, as RowAdam has no other, got True"),
]


@pytest.mark.parametrize("options, error, message", BAD_OPTIONS, ids=[message for *_, message in BAD_OPTIONS])
def test_bad_options(options, error, message):
    weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(error, match=message):
        RowAdam([{"params": [weight], **options}])
    optimizer = RowAdam([weight])
    optimizer.param_groups[0].update(options)
    weight.grad = sparse([1], torch.ones(1, 2), 2)
    with pytest.raises(error, match=rf"param_groups\[0\]: {message}"):
        optimizer.step()
    assert not weight.any() and not optimizer.state


def test_a_state_loads_whatever_the_default_device_is():
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = RowAdam([weight])
    weight.grad = sparse([1], torch.ones(1, 2), 3)
    optimizer.step()
    other = RowAdam([nn.Parameter(torch.ones(3, 2))])
    state = copy.deepcopy(optimizer.state_dict())
    with torch.device("meta"):
        other.load_state_dict(state)
        state["state"][0]["row_steps"][2] = -1
        with pytest.raises(ValueError, match=r"row_steps\[2\]: expected at least 0, got -1"):
            other.load_state_dict(state)
    (found,) = other.state.values()
    assert all(map(torch.equal, found.values(), optimizer.state[weight].values()))


class Listed(Sequence):
    """As settings files are read: two numbers that are in no list."""

    def __init__(self, values):
        self.values = values

    def __getitem__(self, i):
        return self.values[i]

    def __len__(self):
        return len(self.values)


def in_a_sparse_tensor(values):
    return torch.tensor(values).to_sparse()


@pytest.mark.parametrize("make", [torch.tensor, in_a_sparse_tensor, np.array, Listed])
def test_two_numbers_may_lie_in_a_tensor_or_an_array(make):
    weights = [nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    ours = RowAdam(weights[:1], lr=0.1, betas=make([0.5, 0.75]))
    theirs = torch.optim.AdamW(weights[1:], lr=0.1, betas=(0.5, 0.75))
    for _ in range(2):
        for weight, optimizer in zip(weights, (ours, theirs), strict=True):
            weight.grad = torch.ones(3, 2)
            optimizer.step()
    assert torch.equal(*weights) and not isinstance(ours.param_groups[0]["betas"], Listed)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_is_not_waited_for(dtype):
    C, D = 6, 35
    weight, other = (nn.Parameter(torch.ones(C, D, dtype=dtype, device=d)) for d in ("cpu", "cuda"))
    on_cpu, on_gpu = RowAdam([weight], lr=0.5, max_norm=1.0), RowAdam([other], lr=0.5, max_norm=1.0)
    for step, ids in enumerate([[2, 0, 2], [5, 5, 5], [], [1, 0, 3]]):  # the first step compiles
        torch.manual_seed(step)
        weight.grad = sparse(ids, torch.randn(len(ids), D, dtype=dtype), C)
        other.grad = weight.grad.cuda()
        on_cpu.step()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        on_gpu.step()
        torch.cuda.set_sync_debug_mode("default")
        tolerance = {} if dtype == torch.float32 else {"rtol": 2.0**-6, "atol": 2.0**-6}
        torch.testing.assert_close(other.cpu(), weight, **tolerance)


# ---- hooks on loading ----------------------------------------------------------------------------------------

MOMENT = {RowSGD: "momentum_buffer", RowAdam: "exp_avg"}


def stepped(kind, *names, steps=1):
    """(parameters of bfloat16 by name, their optimiser); the i-th has had a gradient of i + 1."""
    named = {name: nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)) for name in names}
    optimizer = kind(named.items(), lr=0.1, **({"momentum": 0.9} if kind is RowSGD else {}))
    for _ in range(steps):
        for i, parameter in enumerate(named.values()):
            parameter.grad = torch.full_like(parameter, i + 1)
        optimizer.step()
    return named, optimizer


def by_name(optimizer, given):
    """What torch's documentation has for parameters in another order, and new ones."""
    made = optimizer.state_dict()
    (group,), (saved,) = made["param_groups"], given["param_groups"]
    place = dict(zip(saved["param_names"], saved["params"], strict=True))
    there = [(i, place[n]) for i, n in zip(group["params"], group["param_names"], strict=True) if n in place]
    return made | {"state": {i: given["state"][at] for i, at in there}}


@pytest.mark.parametrize("kind", [RowSGD, RowAdam])
def test_a_hook_loads_by_name(kind):
    named, optimizer = stepped(kind, "a", "b")
    others, other = stepped(kind, "new", "b", "a", steps=0)
    other.register_load_state_dict_pre_hook(by_name)
    other.load_state_dict(optimizer.state_dict())
    for name in ("a", "b"):
        held, loaded = (o.state[p[name]][MOMENT[kind]] for o, p in ((optimizer, named), (other, others)))
        assert torch.equal(held, loaded) and held.dtype == loaded.dtype
    assert others["new"] not in other.state


@pytest.mark.parametrize("kind", [RowSGD, RowAdam])
def test_what_is_checked_is_what_hooks_made(kind):
    def with_number(number):
        def hook(_, given):
            changed = copy.deepcopy(given)
            changed["state"][0][MOMENT[kind]][0] = number
            return changed

        return hook

    _, optimizer = stepped(kind, "a", "b")
    _, other = stepped(kind, "a", "b", steps=0)
    other.register_load_state_dict_pre_hook(with_number(math.nan))
    with pytest.raises(ValueError, match=rf"{MOMENT[kind]}\[0\]: expected a finite number"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state
    mends = other.register_load_state_dict_pre_hook(with_number(3.0))
    other.load_state_dict(optimizer.state_dict())
    mends.remove()
    with pytest.raises(ValueError, match="expected a finite number"):  # ours are gone too
        other.load_state_dict(optimizer.state_dict())


def test_hooks_after_loading_see_averages_as_they_are_kept():
    _, optimizer = stepped(RowAdam, "a")
    others, other = stepped(RowAdam, "a", steps=0)
    seen = []
    other.register_load_state_dict_post_hook(lambda o: seen.append(o.state[others["a"]]["exp_avg"].dtype))
    other.load_state_dict(optimizer.state_dict())
    assert seen == [torch.float32]
