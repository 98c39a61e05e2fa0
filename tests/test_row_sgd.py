"""RowSGD: torch.optim.SGD on the rows that a sparse gradient lists, and on dense gradients."""

import copy
import io
import math
import pickle
import re
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from largest_made import LargestMade
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from fedss_kernels import (
    RowAdam,
    RowSGD,
    SampledSoftmaxLoss,
    clip_grad_norm_,
    row_momentum_step_,
)

# Numbers whose products and sums are exact in float32 for a few steps: methods that agree have the same bits.
EXACT = [
    {"lr": 0.5},
    {"lr": 0.5, "weight_decay": 0.25},
    {"lr": 0.5, "momentum": 0.5},
    {"lr": 0.25, "momentum": 0.5, "weight_decay": 0.5},
    {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.25, "nesterov": True},
]
MOMENTUM = {RowSGD: {"momentum": 0.5}, RowAdam: {}}


def small_integers(*shape, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=g).to(dtype)


def sparse(ids, rows, C):
    ids = torch.as_tensor(ids, dtype=torch.int64).reshape(1, -1)
    return torch.sparse_coo_tensor(ids, rows, (C, *rows.shape[1:]), check_invariants=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", EXACT, ids=str)
def test_is_torch_sgd_when_every_row_has_a_gradient(options, dtype):
    C, D = 6, 35
    ours, theirs = (nn.Parameter(small_integers(C, D, dtype=dtype)) for _ in range(2))
    row_sgd, sgd = RowSGD([ours], **options), torch.optim.SGD([theirs], **options)
    for seed in range(1, 4):
        rows, order = small_integers(C, D, seed=seed, dtype=dtype), torch.randperm(C)
        ours.grad, theirs.grad = sparse(order, rows[order], C), rows
        row_sgd.step()
        sgd.step()
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", EXACT, ids=str)
def test_a_row_is_a_parameter_that_sgd_sees_only_in_the_steps_that_list_it(options):
    C, D = 5, 3
    weight = nn.Parameter(small_integers(C, D))
    lone_rows = [nn.Parameter(row.clone()) for row in weight.detach()]
    row_sgd, lone_sgds = RowSGD([weight], **options), [torch.optim.SGD([row], **options) for row in lone_rows]
    for step, ids in enumerate([[0, 3], [3], [], [1, 0, 3]]):  # 4 and 2 never; 0 after a gap
        rows = small_integers(len(ids), D, seed=step + 1)
        weight.grad = sparse(ids, rows, C)
        row_sgd.step()
        for c, row in zip(ids, rows, strict=True):
            lone_rows[c].grad = row
            lone_sgds[c].step()
        assert torch.equal(weight, torch.stack(lone_rows))
    if options.get("momentum"):
        velocity = row_sgd.state[weight]["momentum_buffer"]
        assert not velocity[[2, 4]].any()
        for c in (0, 1, 3):
            assert torch.equal(velocity[c], lone_sgds[c].state[lone_rows[c]]["momentum_buffer"])


def test_without_momentum_there_is_no_state():
    weight = nn.Parameter(torch.ones(4, 2))
    weight.grad = sparse([1], torch.ones(1, 2), 4)
    optimizer = RowSGD([weight], lr=0.5, weight_decay=0.5)
    optimizer.step()
    assert not optimizer.state[weight] and weight.tolist() == [[1, 1], [0.25, 0.25], [1, 1], [1, 1]]


@pytest.mark.parametrize("ids", [[2, 0, 2], [0, 2, 2], [2, 2, 0]], ids=str)
def test_entries_of_one_row_are_summed(ids):
    weight = nn.Parameter(torch.zeros(3, 2))
    weight.grad = sparse(ids, torch.ones(3, 2), 3)
    RowSGD([weight], lr=1.0, momentum=0.5).step()
    assert weight.tolist() == [[-1, -1], [0, 0], [-2, -2]]


@pytest.mark.parametrize("options", EXACT, ids=str)
def test_dense_gradients_have_the_bits_of_torch_sgd(options):
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    theirs = copy.deepcopy(ours)
    row_sgd, sgd = RowSGD(ours.parameters(), **options), torch.optim.SGD(theirs.parameters(), **options)
    for _ in range(3):
        input = torch.randn(2, 5)
        for model, optimizer in ((ours, row_sgd), (theirs, sgd)):
            optimizer.zero_grad()
            model(input).square().sum().backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_parameters_are_computed_in_float32_and_rounded_once(dtype):
    """g = v = 1 + w, so w - v = -1; from a v rounded to 1 it would be w - 1, which rounds to -1 + eps / 2.

    v itself, between 1 and 1 + eps, is stored as one of the two.
    """
    eps = torch.finfo(dtype).eps
    weight = nn.Parameter(torch.full((2, 1), 0.375 * eps, dtype=dtype))
    optimizer = RowSGD([weight], lr=1.0, momentum=0.5, weight_decay=1.0)
    weight.grad = sparse([0], torch.ones(1, 1, dtype=dtype), 2)
    optimizer.step()
    assert weight.flatten().tolist() == [-1.0, 0.375 * eps]
    velocity = optimizer.state[weight]["momentum_buffer"].flatten().tolist()
    assert velocity[0] in (1.0, 1 + eps) and velocity[1] == 0.0


def model_and_batch():
    torch.manual_seed(0)
    model = nn.ModuleDict({"table": nn.Embedding(50, 8, sparse=True), "head": nn.Linear(8, 4)})
    return model, torch.randint(50, (6,)), torch.randint(4, (6,))


def train(model, optimizer, ids, target):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model["head"](model["table"](ids)), target)
    loss.backward()
    optimizer.step()
    return loss


def test_one_optimiser_for_a_whole_model():
    model, ids, target = model_and_batch()
    before = model["table"].weight.detach().clone()
    optimizer = RowSGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-3)
    losses = [train(model, optimizer, ids, target).item() for _ in range(20)]
    assert losses[-1] < losses[0] / 2
    others = ~torch.isin(torch.arange(50), ids)
    assert torch.equal(model["table"].weight[others], before[others])
    assert (model["table"].weight[~others] != before[~others]).any(1).all()


def test_sampled_softmax_loss_with_sparse_grad():
    """One plain step is torch.optim.SGD's on the dense gradient, which has zeros in the other rows."""
    torch.manual_seed(0)
    input, target = torch.randn(4, 8), torch.tensor([3, 1, 4, 1])
    weights = []
    for kind, sparse_grad in ((RowSGD, True), (torch.optim.SGD, False)):
        generator = torch.Generator().manual_seed(0)
        criterion = SampledSoftmaxLoss(100, 8, 10, sparse_grad=sparse_grad, generator=generator)
        criterion(input, target).backward()
        assert criterion.weight.grad.is_sparse == sparse_grad
        kind(criterion.parameters(), lr=0.1).step()
        weights.append(criterion.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-7)


def test_state_dict_continues_where_it_stopped():
    model, ids, target = model_and_batch()
    options = {"lr": 0.5, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": True}
    optimizer = RowSGD(model.parameters(), **options)
    for _ in range(2):
        train(model, optimizer, ids, target)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    other, _, _ = model_and_batch()
    other_optimizer = RowSGD(other.parameters(), lr=99.0)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["model"])
    other_optimizer.load_state_dict(saved["optimizer"])
    for _ in range(2):
        train(model, optimizer, ids, target)
        train(other, other_optimizer, ids, target)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_takes_over_the_state_of_torch_sgd():
    """v = 1 from torch's step, then 0.5 + 1 = 1.5; 1 - 1 - 1.5 = -1.5."""
    weight = nn.Parameter(torch.ones(1, 1))
    theirs = torch.optim.SGD([weight], lr=1.0, momentum=0.5)
    weight.grad = torch.ones(1, 1)
    theirs.step()
    ours = RowSGD([weight], lr=0.1)
    ours.load_state_dict(theirs.state_dict())
    weight.grad = sparse([0], torch.ones(1, 1), 1)
    ours.step()
    assert weight.item() == -1.5


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("first, then", [(torch.optim.SGD, RowSGD), (RowSGD, torch.optim.SGD)])
def test_state_dicts_are_those_of_torch_sgd(first, then, momentum):
    """Trained by one and then by the other: the bits of SGD alone."""
    weights, options = [nn.Parameter(torch.ones(3, 2)) for _ in range(2)], {"lr": 0.5, "momentum": momentum}
    alone, optimizer = torch.optim.SGD(weights[:1], **options), first(weights[1:], **options)
    for step in range(4):
        if step == 2:
            state, optimizer = optimizer.state_dict(), then(weights[1:], lr=9.0)
            optimizer.load_state_dict(state)
        for weight in weights:
            weight.grad = small_integers(3, 2, seed=step)
        alone.step()
        optimizer.step()
    assert torch.equal(*weights)
    assert set(alone.param_groups[0]) <= set(RowSGD(weights, lr=0.1).param_groups[0])


def test_checkpoints_of_older_versions():
    """Of torch 1.x, which had fewer options and kept a velocity of None, and of RowSGD without them."""
    weight = nn.Parameter(torch.ones(3, 2))
    group = {"lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False, "params": [0]}
    for extra in ({"dampening": 0}, {}, {"initial_lr": 0.5, "swa_lr": 0.1}):
        optimizer = RowSGD([weight], lr=9.0, max_norm=2.0, seed=np.int64(4))
        optimizer.load_state_dict({"state": {0: {"momentum_buffer": None}}, "param_groups": [group | extra]})
        weight.grad = torch.ones(3, 2)
        optimizer.step()
        (loaded,) = optimizer.param_groups
        assert (loaded["lr"], loaded["max_norm"], loaded["seed"]) == (0.5, 2.0, 4)  # the constructor's remain
        assert loaded.items() >= extra.items()
    old = RowSGD([weight], lr=0.5)
    for name in ("max_norm", "seed", "rounding_step", "dampening", "foreach"):
        del old.param_groups[0][name], old.defaults[name]
    unpickled = pickle.loads(pickle.dumps(old))
    assert unpickled.param_groups[0]["max_norm"] is None
    unpickled.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def sgd_state(weight, **options):
    theirs = torch.optim.SGD([weight], **options)
    weight.grad = torch.ones_like(weight)
    theirs.step()
    return theirs.state_dict()


def changed(state, **options):
    state["param_groups"][0].update(options)
    return state


def with_state(state, **values):
    state["state"][0] = values
    return state


def rmsprop_state(weight):
    theirs = torch.optim.RMSprop([weight], momentum=0.5)
    weight.grad = torch.ones_like(weight)
    theirs.step()
    return theirs.state_dict()


BAD_STATES = [
    (lambda w: sgd_state(w, maximize=True), ValueError, r"param_groups\[0\]: maximize: expected False, as RowSGD has no other, got True"),
    (lambda w: sgd_state(w, momentum=0.9, dampening=0.5), ValueError, "dampening: expected 0, as RowSGD has no other, got 0.5"),
    (lambda w: changed(sgd_state(w), differentiable=True), ValueError, "differentiable: expected False, as RowSGD has no other, got True"),
    (lambda w: torch.optim.AdamW([w]).state_dict(), ValueError, "expected an option momentum, got none: is this the state of another"),
    (lambda w: sgd_state(nn.Parameter(torch.ones(2, 2)), momentum=0.9), ValueError, r"momentum_buffer: expected shape \(3, 2\), its"),
    (lambda w: with_state(sgd_state(w), momentum_buffer=[0.0] * 6), TypeError, "momentum_buffer: expected a dense tensor, got list"),
    (lambda w: with_state(sgd_state(w), momentum_buffer=torch.ones(3, 2).to_sparse()), TypeError, "momentum_buffer: expected a dense tensor, got layout torch.sparse_coo"),
    (lambda w: with_state(sgd_state(w), momentum_buffer=torch.tensor([[1.0, 2.0], [3.0, math.nan], [5.0, 6.0]])), ValueError, r"momentum_buffer\[1, 1\]: expected a finite number, got nan"),
    (lambda w: with_state(sgd_state(w), momentum_buffer=torch.full((3, 2), -math.inf)), ValueError, r"momentum_buffer\[0, 0\]: expected a finite number, got -inf"),
    (lambda w: with_state(sgd_state(w), momentum_buffer=torch.full((3, 2), 1e39, dtype=torch.float64)), ValueError, r"momentum_buffer\[0, 0\]: expected a number that float32 holds, its parameter's, got 1e\+39"),
    (lambda w: with_state(sgd_state(w), momentum_buffer=torch.full((3, 2), math.inf, dtype=torch.float16)), ValueError, r"momentum_buffer\[0, 0\]: expected a finite number, got inf"),
    (lambda w: with_state(sgd_state(w), momentum_buffer=torch.ones(3, 2).long()), TypeError, "momentum_buffer: expected float16 or .*, got int64"),
    (lambda w: with_state(sgd_state(w), momentum_buffer=torch.ones(3, 2, dtype=torch.complex64)), TypeError, "momentum_buffer: expected float16 or .*, got complex64"),
    (lambda w: with_state(sgd_state(w), momentum_buffer=torch.ones(3, 2, requires_grad=True)), ValueError, "momentum_buffer: expected a constant, got a tensor that requires grad"),
    (lambda w: with_state(sgd_state(w), momentum_buffer=torch.ones(1, 2).expand(3, 2)), ValueError, "momentum_buffer: expected a tensor whose elements do not share memory"),
    (lambda w: rmsprop_state(w), ValueError, "state: expected momentum_buffer, got square_avg, step too: is this the state of another optimiser than RowSGD"),
    (lambda w: torch.optim.RMSprop([w]).state_dict(), ValueError, r"param_groups\[0\]: expected the options of RowSGD, got alpha too, which RMSprop has: is this the state of"),
    (lambda w: torch.optim.Muon([w]).state_dict(), ValueError, "expected the options of RowSGD, got adjust_lr_fn too, which Muon has: is this the state of another"),
    (lambda w: changed(sgd_state(w), lr=-1), ValueError, r"param_groups\[0\]: lr: expected a finite number of at least 0, got -1"),
    (lambda w: changed(sgd_state(w), momentum="0.9"), TypeError, r"param_groups\[0\]: momentum: expected a number, got str"),
    (lambda w: changed(sgd_state(w), nesterov=True), ValueError, "nesterov: expected False without momentum, got True"),
    (lambda w: changed(sgd_state(w), seed=-1), ValueError, "seed: expected at least 0, got -1"),
]  # fmt: skip


@pytest.mark.parametrize("make, error, message", BAD_STATES, ids=[message for *_, message in BAD_STATES])
def test_other_states_are_refused_by_name(make, error, message):
    weight = nn.Parameter(torch.ones(3, 2))
    bad = make(weight)
    optimizer = RowSGD([weight], lr=0.5, momentum=0.5)
    weight.grad = sparse([1], torch.ones(1, 2), 3)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(bad)
    assert str(optimizer.state_dict()) == str(before)


@pytest.mark.parametrize("kind, theirs", [(RowSGD, torch.optim.SGD), (RowAdam, torch.optim.AdamW)], ids=str)
def test_options_that_a_state_lacks_stay_the_groups_own(kind, theirs):
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = kind([{"params": [w], "max_norm": 1.0, "seed": i} for i, w in enumerate(weights)], lr=0.1)
    optimizer.load_state_dict(theirs([{"params": [w]} for w in weights], lr=0.2).state_dict())
    assert [(g["lr"], g["max_norm"], g["seed"]) for g in optimizer.param_groups] == [
        (0.2, 1.0, 0),
        (0.2, 1.0, 1),
    ]


@pytest.mark.parametrize("kind, theirs", [(RowSGD, torch.optim.SGD), (RowAdam, torch.optim.AdamW)], ids=str)
def test_complex_parameters_are_stepped_and_saved_as_in_torch(kind, theirs):
    weights = [nn.Parameter(torch.ones(3, dtype=torch.complex64)) for _ in range(2)]
    options = {"lr": 0.5, **MOMENTUM[kind]}
    ours, right = kind(weights[:1], **options), theirs(weights[1:], **options)
    for _ in range(2):
        for weight, optimizer in zip(weights, (ours, right), strict=True):
            weight.grad = torch.full_like(weight, 1 + 2j)
            optimizer.step()
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(*weights)
    moment, saved = next(iter(kind.MOMENTS)), copy.deepcopy(ours.state_dict())
    for bad, error in ((torch.ones(3), TypeError), (torch.full_like(weights[0], 1j * math.nan), ValueError)):
        saved["state"][0][moment] = bad
        with pytest.raises(error, match=moment):
            ours.load_state_dict(saved)


def test_options_of_ones_own_groups_are_loaded_whatever_their_names():
    groups = [{"params": [nn.Parameter(torch.ones(1))], "alpha": 3}]  # RMSprop has one too
    state = RowSGD(groups, lr=0.5).state_dict()
    optimizer = RowSGD(groups, lr=0.1)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["alpha"] == 3


@pytest.mark.parametrize(
    "number",
    [
        *(torch.tensor(0.5), torch.tensor([0.5]), np.float32(0.5), np.float64(0.5), np.float16(0.5)),
        np.array(0.5),
    ],
    ids=repr,
)
@pytest.mark.parametrize("sparsely", [True, False])
def test_numbers_are_those_that_torch_takes(number, sparsely):
    weights = [nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    ours = RowSGD(weights[:1], lr=number, momentum=np.float32(0.5), weight_decay=np.int64(1))
    theirs = torch.optim.SGD(weights[1:], lr=0.5, momentum=0.5, weight_decay=1)
    for seed in range(3):
        rows = small_integers(3, 2, seed=seed)
        weights[0].grad, weights[1].grad = sparse(range(3), rows, 3) if sparsely else rows, rows
        ours.step()
        theirs.step()
    assert torch.equal(*weights)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"][0]["momentum"] == 0.5


@pytest.mark.parametrize(
    "kind, options",
    [
        (RowAdam, {"betas": (np.float32(0.5), np.float64(0.75))}),
        (RowAdam, {"betas": [np.float32(0.5), Fraction(3, 4)], "eps": Fraction(1, 8)}),
        (RowAdam, {"betas": np.array([0.5, 0.75])}),
        (RowSGD, {"lr": Fraction(1, 2), "momentum": np.longdouble(0.5), "max_norm": Fraction(1)}),
    ],
    ids=str,
)
def test_numbers_are_saved_as_pythons(kind, options):
    """So that torch.load reads them with weights_only."""
    defaults = kind([nn.Parameter(torch.ones(1))], lr=0.5)
    for optimizer in (
        kind([nn.Parameter(torch.ones(1))], **{"lr": 0.5} | options),
        kind([{"params": [nn.Parameter(torch.ones(1))], **options}], lr=0.5),
    ):
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        (group,) = torch.load(file, weights_only=True)["param_groups"]
        assert all(np.array_equal(group[name], options[name]) for name in options)
        assert group.keys() == defaults.state_dict()["param_groups"][0].keys()


@pytest.mark.parametrize("norm", [torch.tensor(1.0), np.float32(1), 1], ids=repr)
def test_a_norm_may_be_any_number_in_several_groups(norm):
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = RowSGD([{"params": [weight]} for weight in weights], lr=1.0, max_norm=norm)
    for weight in weights:
        weight.grad = torch.ones(1)
    optimizer.step()
    torch.testing.assert_close(torch.cat(weights), torch.full((2,), -(0.5**0.5)))


@pytest.mark.parametrize("kind", [RowSGD, RowAdam])
def test_a_norm_past_the_largest_float16(kind):
    """65504 is the largest: of 4 numbers of 40,000 the norm is 80,000, and the step is as with others."""
    weights = [nn.Parameter(torch.zeros(4, dtype=torch.float16)) for _ in range(2)]
    for weight, grad in zip(weights, (40_000.0, 0.5), strict=True):
        weight.grad = torch.full_like(weight, grad)
        kind([weight], lr=0.5, weight_decay=0.0, max_norm=1.0).step()
    assert torch.equal(*weights) and weights[0].min() == weights[0].max() < -0.2


def test_numbers_of_the_row_step():
    weight, ids, rows = torch.ones(2, 1), torch.tensor([1]), torch.ones(1, 1)
    numbers = {"lr": torch.tensor(0.5), "momentum": np.float32(0), "weight_decay": np.int64(1)}
    assert row_momentum_step_(weight, None, ids, rows, **numbers).flatten().tolist() == [1, 0]


@pytest.mark.parametrize("kind", ["StepLR", "OneCycleLR"])
def test_schedulers_that_write_into_a_tensor(kind):
    """As torch.optim.SGD: the tensor stays, its number changes; OneCycleLR also writes the momentum."""
    moved = []
    for make in (RowSGD, torch.optim.SGD):
        weight = nn.Parameter(torch.ones(3, 2))
        optimizer = make([weight], lr=torch.tensor(0.5), momentum=0.5)
        options = {"step_size": 1} if kind == "StepLR" else {"max_lr": 0.5, "total_steps": 4}
        scheduler = getattr(torch.optim.lr_scheduler, kind)(optimizer, **options)
        for _ in range(3):
            rows = torch.ones(3, 2)
            weight.grad = sparse(range(3), rows, 3) if make is RowSGD else rows
            optimizer.step()
            scheduler.step()
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
        moved.append(weight.detach())
    torch.testing.assert_close(*moved)


def test_options_changed_by_hand_are_checked_before_anything_changes():
    weight, bias = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))
    optimizer = RowSGD([{"params": [weight]}, {"params": [bias]}], lr=0.5)
    weight.grad, bias.grad = torch.ones(3, 2), torch.ones(3)
    for name, value in (("lr", -1), ("maximize", True), ("max_norm", 1.0)):  # the other group has none
        before = optimizer.param_groups[1][name]
        optimizer.param_groups[1][name] = value
        with pytest.raises(ValueError, match=f"{name}: expected"):
            optimizer.step()
        optimizer.param_groups[1][name] = before
    assert (weight == 1).all() and (bias == 1).all()


def test_numbers_that_change_in_place_are_read_in_each_step():
    for lr in (torch.tensor(0.5), np.array(0.5)):
        weight = nn.Parameter(torch.zeros(1))
        optimizer = RowSGD([weight], lr=0.5)
        optimizer.param_groups[0]["lr"] = lr
        weight.grad = torch.ones(1)
        for number in (0.5, 0.25, -1.0):
            lr[()] = number
            if number < 0:
                with pytest.raises(ValueError, match=r"param_groups\[0\]: lr: expected .* got -1"):
                    optimizer.step()
            else:
                optimizer.step()
        assert weight.item() == -0.75


@pytest.mark.parametrize("kind", [RowSGD, RowAdam])
def test_options_are_checked_when_they_changed(kind, monkeypatch):
    """Once for a hundred steps, and again for each edit; a copy and a loaded one begin anew."""
    weight = nn.Parameter(torch.zeros(3, 2))
    optimizer = kind([weight], lr=0.5)
    seen = []
    check = kind._checked_rule
    monkeypatch.setattr(kind, "_checked_rule", lambda *arguments: seen.append(1) or check(*arguments))
    weight.grad = sparse([1], torch.ones(1, 2), 3)

    def checks_of_steps(optimizer, steps):
        seen.clear()
        for _ in range(steps):
            optimizer.step()
        return len(seen)

    assert checks_of_steps(optimizer, 300) == 1
    optimizer.param_groups[0]["lr"] = 0.25
    assert checks_of_steps(optimizer, 3) == 1
    optimizer.param_groups[0]["rounding_step"] = -1
    with pytest.raises(ValueError, match="rounding_step: expected at least 0, got -1"):
        optimizer.step()
    optimizer.param_groups[0]["rounding_step"] = 0
    optimizer.load_state_dict(optimizer.state_dict())
    assert checks_of_steps(optimizer, 3) == 1
    assert checks_of_steps(pickle.loads(pickle.dumps(optimizer)), 3) == 1
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    assert checks_of_steps(optimizer, 3) == 2  # groups
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match="expected an option lr, got none"):
        optimizer.step()


def test_flags_may_be_numpys():
    """And are saved as Python's."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = RowSGD([weight], lr=0.5, momentum=0.5, nesterov=np.bool_(True))
    assert optimizer.param_groups[0]["nesterov"] is True
    optimizer.param_groups[0]["nesterov"] = np.bool_(True)
    weight.grad = torch.ones(1)
    optimizer.step()
    assert weight.item() == -0.75  # 0.5 * (1 + 0.5)
    with pytest.raises(TypeError, match="nesterov: expected True or False, got int"):
        RowSGD([weight], lr=0.5, momentum=0.5, nesterov=1)


CHANGED_SINCE = [
    (lambda p: torch.cat([p, p]), r"params\[0\]: \(6, 2\) torch.float32 on cpu, has another shape, .* is \(3, 2\) torch.float32"),
    (lambda p: p.double(), r"params\[0\]: \(3, 2\) torch.float64 on cpu, has another .* load_state_dict\(state_dict\(\)\) casts"),
]  # fmt: skip


@pytest.mark.parametrize("kind, options", [(RowSGD, {"lr": 0.5, "momentum": 0.5}), (RowAdam, {"lr": 0.5})])
@pytest.mark.parametrize("change, message", CHANGED_SINCE, ids=["larger", "double"])
@pytest.mark.parametrize("dense", [False, True])
def test_parameters_that_changed_since_their_first_step(dense, kind, options, change, message):
    """Refused before anything changes, and what the message names goes on."""
    weight, bias = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))
    optimizer = kind([weight, bias], **options)
    for step in range(2):
        listed = sparse([1], torch.ones(1, 2, dtype=weight.dtype), len(weight))
        weight.grad, bias.grad = listed.to_dense() if dense else listed, torch.ones(3)
        if step == 0:
            optimizer.step()
            weight.grad, weight.data = None, change(weight.data)
    before = bias.clone()
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(bias, before)
    if len(weight) == 3:
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        assert not torch.equal(bias, before)


@pytest.mark.parametrize("kind", [RowSGD, RowAdam])
def test_a_parameter_on_another_device_than_its_state_is_refused_before_anything_changes(kind):
    """As where it was moved since its first step: here the state is, to meta."""
    weights = [nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    optimizer, moment = kind(weights, lr=0.5, **MOMENTUM[kind]), next(iter(kind.MOMENTS))
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    state, before = optimizer.state[weights[1]], weights[0].clone()
    state[moment] = state[moment].to("meta")
    message = (
        rf"params\[1\]: .* on cpu, has another shape, .* {moment} is .* on meta; load_state_dict\(.* moves"
    )
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(weights[0], before)


@pytest.mark.parametrize("kind", [RowSGD, RowAdam])
def test_a_parameter_grown_since_its_backward_pass_is_named(kind):
    weight, bias = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))
    optimizer = kind([("bias", bias), ("head.weight", weight)], lr=0.5)
    weight.grad, bias.grad = torch.ones(3, 2), torch.ones(3)
    weight.data = torch.ones(6, 2)
    message = r"params\[1\] \(head.weight\): expected a gradient of shape \(6, 2\), .* got one of \(3, 2\)"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert (bias == 1).all() and not optimizer.state


@pytest.mark.parametrize("kind", [RowSGD, RowAdam])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize(
    "own, given",
    [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.bfloat16, torch.float64)],
    ids=str,
)
def test_dense_gradients_of_another_dtype_are_read_in_the_parameters(kind, counted, own, given):
    weights = [nn.Parameter(torch.ones(3, 2, dtype=own)) for _ in range(2)]
    optimizers = [kind([w], lr=0.5, weight_decay=0.5, **MOMENTUM[kind]) for w in weights]
    weights[0].grad_dtype = None
    for step in range(3):
        for weight, optimizer, dtype in zip(weights, optimizers, (given, own), strict=True):
            weight.grad = small_integers(3, 2, seed=step, dtype=dtype)
            if step == 0 and counted:
                weight.grad = weight.grad.to(own).to_sparse(1)
            optimizer.step()
    assert torch.equal(*weights) and str(optimizers[0].state_dict()) == str(optimizers[1].state_dict())


@pytest.mark.parametrize("kind", [RowSGD, RowAdam])
def test_a_complex_gradient_of_a_real_parameter_is_refused_before_anything_changes(kind):
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    weights[1].grad_dtype = None
    weights[0].grad, weights[1].grad = torch.ones(2), torch.ones(2, dtype=torch.complex64)
    optimizer = kind(weights, lr=0.5)
    message = r"params\[1\]: expected a gradient of real numbers, as torch.float32 holds, got torch.complex64"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert (weights[0] == 1).all() and not optimizer.state


def test_sparse_gradients_of_another_dtype():
    weight = nn.Parameter(torch.ones(3, 2))
    weight.grad_dtype = None
    optimizer = RowSGD([weight], lr=0.5, momentum=0.5)
    weight.grad = sparse([1], torch.ones(1, 2, dtype=torch.float64), 3)
    with pytest.raises(
        ValueError, match=r"params\[0\]: expected a sparse gradient of torch.float32, .* torch.float64"
    ):
        optimizer.step()
    assert not optimizer.state
    weight.grad = sparse([1], torch.ones(1, 2, dtype=torch.bfloat16), 3)
    optimizer.step()
    assert weight[1, 0] == 0.5


@pytest.mark.parametrize("kind", [RowSGD, RowAdam])
@pytest.mark.parametrize(
    "params, message",
    [
        (
            [{"lr": 0.1, "seed": 3}],
            "params: expected the parameters of a group .*, got one of lr, seed alone",
        ),
        ([{}], "params: expected the parameters of a group .*, got one of nothing"),
        ([{"params": None}], "params: expected the parameters of a group .*, got NoneType"),
        ({"params": [nn.Parameter(torch.zeros(2))]}, "params: expected parameters or .*groups, got dict"),
        (None, "params: expected parameters or a list of groups, got NoneType"),
        (nn.Linear(2, 2), r"params: expected parameters or a list of groups, got Linear: .*\.parameters\(\)"),
    ],
)
def test_groups_without_parameters_are_refused_in_words(kind, params, message):
    with pytest.raises((TypeError, ValueError), match=message):
        kind(params, lr=0.1)
    weight = nn.Parameter(torch.zeros(3, 2))
    optimizer = kind([weight], lr=0.1)
    if isinstance(params, list):
        with pytest.raises((TypeError, ValueError), match=message):
            optimizer.add_param_group(params[0])
        with pytest.raises((TypeError, ValueError), match=message):
            kind([{"params": [weight]}, *params], lr=0.1)
    assert [group["params"] for group in optimizer.param_groups] == [[weight]]
    assert kind(nn.ParameterList([weight]), lr=0.1).param_groups[0]["params"] == [weight]


@pytest.mark.parametrize("kind", [RowSGD, RowAdam])
def test_a_group_whose_option_is_wrong_is_named(kind):
    weights = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    words = re.escape("param_groups[1]: lr: expected a finite number of at least 0, got -1.0")
    with pytest.raises(ValueError, match=words):
        kind([{"params": weights[:1]}, {"params": weights[1:2], "lr": -1.0}], lr=0.1)
    optimizer = kind(weights[:1], lr=0.1)
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": weights[1:2], "lr": -1.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind, options", [(RowSGD, {}), (RowSGD, {"momentum": 0.9}), (RowAdam, {})])
def test_a_compiled_step_gives_each_parameter_its_own_state(kind, options):
    """Rows of several, and a net's dense ones beside them."""

    def trained(wrap):
        weights = [nn.Parameter(torch.ones(4, 2)) for _ in range(3)]
        optimizer = kind(weights, lr=0.1, **options)
        step = wrap(optimizer.step)
        for nth in range(3):
            for weight in weights[:2]:
                weight.grad = torch.sparse_coo_tensor([[nth, 1]], torch.ones(2, 2), weight.shape)
            weights[2].grad = torch.ones(4, 2)
            step()
        return weights, [optimizer.state[weight] for weight in weights[:2]]

    torch.compiler.reset()
    (weights, states), (plain, expected) = (
        trained(partial(torch.compile, backend="eager")),
        trained(lambda f: f),
    )
    assert all(map(torch.equal, weights[:2], plain[:2]))
    torch.testing.assert_close(weights[2], plain[2])  # by torch, where a compiled AdamW has other bits
    for state, others in zip(states, expected, strict=True):
        for name, value in others.items():
            assert torch.equal(torch.as_tensor(state[name]), torch.as_tensor(value)), name


@pytest.mark.parametrize("kind", [RowSGD, RowAdam])
def test_a_rate_that_rounding_leaves_below_0_is_0(kind):
    """As at the end of a schedule, whose loop goes on."""
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = kind([weight], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, end_factor=0.0, total_iters=10)
    for _ in range(12):
        before = weight.detach().clone()
        weight.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), weight.shape)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] < 0 and torch.equal(weight, before)
    kind([weight], lr=0.1).load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = -1e-9
    with pytest.raises(ValueError, match="lr: expected a finite number of at least 0, got -1e-09"):
        optimizer.step()


def test_groups_of_other_norms_are_refused():
    groups = [{"params": [nn.Parameter(torch.ones(2))], "max_norm": norm} for norm in (1.0, 2.0)]
    with pytest.raises(
        ValueError, match="max_norm: expected the same number in every group, .* got 1.0, 2.0"
    ):
        RowSGD(groups, lr=0.1)
    with pytest.raises(
        ValueError, match="max_norm: expected the same number in every group, .* got None, 2.0"
    ):
        RowSGD([nn.Parameter(torch.ones(2))], lr=0.1).add_param_group(groups[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind, options", [(RowSGD, {"momentum": 0.5}), (RowAdam, {})], ids=str)
def test_max_norm_of_numbers_without_dimensions_beside_a_float64(kind, options, dtype):
    """A factor of float64 makes float64 of such a gradient, and of no other."""
    lone, matrix, row, other = (
        nn.Parameter(torch.ones(shape, dtype=of))
        for shape, of in (((), dtype), ((1, 1), torch.float64), ((1,), dtype), ((1, 1), torch.float64))
    )
    for number, beside in ((lone, matrix), (row, other)):
        optimizer = kind([number, beside], lr=0.5, max_norm=1.0, **options)
        for _ in range(2):
            for parameter in (number, beside):
                parameter.grad = torch.full_like(parameter, 2.0)
            optimizer.step()
        held = optimizer.state[number].values()
        assert all(state.dtype in (dtype, torch.float32) for state in held)
    torch.testing.assert_close(lone, row.squeeze())
    assert torch.equal(matrix, other)


@pytest.mark.parametrize("kind", [RowSGD, RowAdam])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_max_norm_is_clip_grad_norm_that_leaves_the_gradients(kind, dtype):
    """Over all groups, sparse and dense; entries of one row count as their sum."""
    torch.manual_seed(0)
    runs = []
    for clipped_before in (True, False):
        weight, bias, head = (nn.Parameter(torch.ones(s, dtype=dtype)) for s in ((6, 2), (6,), (3, 2)))
        rows = 8 * small_integers(4, 2, seed=1)
        weight.grad = sparse([5, 2, 5, 0], rows.to(dtype), 6)
        bias.grad = sparse([5, 2], torch.ones(2, dtype=dtype), 6)
        head.grad = torch.ones(3, 2, dtype=dtype)
        max_norm = None if clipped_before else 1.0
        optimizer = kind([{"params": [weight]}, {"params": [bias, head]}], lr=0.5, max_norm=max_norm)
        if clipped_before:
            clip_grad_norm_([weight, bias, head], 1.0)
        optimizer.step()
        runs.append([p.detach().float() for p in (weight, bias, head)])
    assert torch.equal(weight.grad._values().float(), rows) and torch.equal(
        head.grad.float(), torch.ones(3, 2)
    )
    for before, inside in zip(*runs, strict=True):
        tolerance = 1e-6 if dtype == torch.float32 else 2.0**-7
        torch.testing.assert_close(inside, before, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", [RowSGD, RowAdam])
@pytest.mark.parametrize("sparsely", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_steps_of_16_bit_parameters_are_not_lost(kind, sparsely, dtype):
    """100 steps of 1e-5 to 1e-3 on 1.0, below half of what is between two numbers there, as one on average."""
    step = torch.finfo(dtype).eps / 8
    weight = nn.Parameter(torch.ones(64, 32, dtype=dtype))
    optimizer = kind([weight], lr=step, weight_decay=0.0)
    rows = torch.ones(64, 32, dtype=dtype)
    for _ in range(100):
        weight.grad = sparse(range(64), rows, 64) if sparsely else rows
        optimizer.step()
    moved = (1 - weight.float().mean().item()) / step
    assert moved == pytest.approx(100, rel=0.02)


def test_a_velocity_of_16_bits_decays_and_grows():
    """Rounded to nearest a bfloat16 velocity would stay where 0.001 of it is less than half a spacing."""
    weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.bfloat16))
    optimizer = RowSGD([weight], lr=0.0, momentum=0.999)
    for step in range(200):
        rows = torch.full((64, 32), float(step == 0), dtype=torch.bfloat16)
        weight.grad = sparse(range(64), rows, 64)
        optimizer.step()
    velocity = optimizer.state[weight]["momentum_buffer"]
    assert velocity.dtype == torch.bfloat16
    assert velocity.float().mean().item() == pytest.approx(0.999**199, rel=0.01)


def test_rounding_goes_by_the_seed_alone(set_threads):
    def trained(seed, threads=1):
        set_threads(threads)
        weight, head = (nn.Parameter(torch.ones(300, 300, dtype=torch.bfloat16)) for _ in range(2))
        optimizer = RowSGD([{"params": [weight]}, {"params": [head]}], lr=1e-3, seed=seed)
        for _ in range(2):
            weight.grad = sparse(range(300), torch.ones(300, 300, dtype=torch.bfloat16), 300)
            head.grad = torch.ones(300, 300, dtype=torch.bfloat16)
            optimizer.step()
        assert not torch.equal(weight, head)  # each group has chances of its own
        return weight.detach()

    assert torch.equal(trained(seed=1), trained(seed=1, threads=3))
    assert torch.equal(trained(seed=1), trained(seed=torch.tensor(1)))
    assert not torch.equal(trained(seed=1), trained(seed=2))


@pytest.fixture
def device_mesh(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [RowSGD, RowAdam])
def test_sharded_parameters_of_16_bits(kind, device_mesh):
    """As FSDP2 makes them of a net: the bits of a plain one, where there is one process."""
    values, gradient = torch.ones(6, 4).bfloat16(), torch.ones(6, 4).bfloat16()
    sharded, plain = (
        nn.Parameter(distribute_tensor(values, device_mesh, [Shard(0)])),
        nn.Parameter(values.clone()),
    )
    sharded.grad, plain.grad = distribute_tensor(gradient, device_mesh, [Shard(0)]), gradient
    for parameter in (sharded, plain):
        optimizer = kind([parameter], lr=1e-3, **({"momentum": 0.9} if kind is RowSGD else {}))
        for _ in range(3):
            optimizer.step()
    assert torch.equal(sharded.full_tensor(), plain) and not torch.equal(plain, values)


@pytest.mark.parametrize("kind", [RowSGD, RowAdam])
def test_repeated_rows_of_16_bits_are_summed_in_float32_and_written_once(kind):
    """256 and 256 times 1, which bfloat16 would sum to 256; and each class has one chance."""
    weights = [nn.Parameter(torch.ones(5, 40, dtype=torch.bfloat16)) for _ in range(2)]
    repeats = torch.ones(258, 40, dtype=torch.bfloat16)
    repeats[:2] = 256
    weights[0].grad = sparse([3, 1] + [3] * 256, repeats, 5)
    weights[1].grad = sparse([1, 3], torch.tensor([[256.0], [512.0]]).expand(2, 40).bfloat16(), 5)
    for weight in weights:
        kind([weight], lr=2.0**-9, **({"momentum": 0.5} if kind is RowSGD else {})).step()
    assert torch.equal(weights[0] == 1, weights[1] == 1)  # which rows moved
    torch.testing.assert_close(*weights, rtol=0, atol=2.0**-7)  # other chances: a spacing apart at most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("kind, momentum", [(RowSGD, 0.0), (RowSGD, 0.5), (RowAdam, None)])
def test_a_step_makes_nothing_of_the_size_of_the_matrix(kind, momentum, max_norm, dtype):
    """Rows listed once, and repeated: numbers of the rows alone, whatever C is."""
    C, D = 2000, 4
    weight, bias = nn.Parameter(torch.ones(C, D, dtype=dtype)), nn.Parameter(torch.ones(C, dtype=dtype))
    options = {} if momentum is None else {"momentum": momentum}
    optimizer = kind([weight, bias], lr=0.5, max_norm=max_norm, **options)
    for ids in ([1, 5, 7], [1, 5, 7], [7, 1, 7]):
        weight.grad = sparse(ids, torch.ones(3, D, dtype=dtype), C)
        bias.grad = sparse(ids, torch.ones(3, dtype=dtype), C)
        state = [value for p in (weight, bias) for value in optimizer.state[p].values()]
        with LargestMade([weight, bias, *state]) as largest:
            optimizer.step()
        if state or momentum == 0:  # the first step makes it
            assert largest.elements < 100


def test_groups_scheduler_and_closure():
    table, head = nn.Parameter(torch.zeros(2, 1)), nn.Parameter(torch.zeros(1))
    optimizer = RowSGD([{"params": [table], "lr": 2.0}, {"params": [head]}], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.embedding(torch.tensor([1]), table, sparse=True).sum() + head.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 0
    scheduler.step()
    assert optimizer.step(closure).item() == -3
    assert table.flatten().tolist() == [0, -3] and head.item() == -1.5  # lr 2 + 1 and 1 + 1/2


def test_grad_scaler():
    """Scaled, unscaled and stepped like a step without it; an infinite gradient steps nothing."""
    weights = []
    for scaled in (True, False):
        weight = nn.Parameter(torch.ones(4, 3))
        optimizer = RowSGD([weight], lr=0.5, momentum=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for ids in ([1, 1, 2], [2, 0]):
            optimizer.zero_grad()
            loss = nn.functional.embedding(torch.tensor(ids), weight, sparse=True).sum()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append(weight.detach().clone())
        if scaled:
            before = weight.detach().clone()
            weight.grad = sparse([1], torch.full((1, 3), torch.inf), 4)
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            assert torch.equal(weight, before)
    assert torch.equal(*weights)


def test_autograd_sees_that_the_parameter_changed():
    weight, p = nn.Parameter(torch.ones(2, 2)), torch.ones(2, 2, requires_grad=True)
    product = (p * weight).sum()
    weight.grad = sparse([0], torch.ones(1, 2), 2)
    RowSGD([weight], lr=1.0).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


BAD_OPTIONS = [
    ({"lr": -0.1}, ValueError, "lr: .* at least 0, got -0.1"),
    ({"lr": torch.ones(2)}, TypeError, r"lr: expected a number, got Tensor of shape \(2,\)"),
    ({"lr": torch.tensor(-1.0)}, ValueError, "lr: .* at least 0, got -1.0"),
    ({"lr": True}, TypeError, "lr: expected a number, got bool"),
    ({"lr": 10**400}, ValueError, "lr: expected a finite number of at least 0, got one past float64's range"),
    ({"lr": Fraction(10**400)}, ValueError, "lr: expected a finite number of at least 0, got one past float64's range"),
    ({"lr": 0.1, "max_norm": -1}, ValueError, "max_norm: .* at least 0, got -1"),
    ({"lr": 0.1, "seed": 0.5}, TypeError, "seed: expected an integer, got float"),
    ({"lr": 0.1, "momentum": float("nan")}, ValueError, "momentum: .* at least 0, got nan"),
    ({"lr": 0.1, "weight_decay": -1}, ValueError, "weight_decay: .* at least 0, got -1"),
    ({"lr": 0.1, "nesterov": True}, ValueError, "nesterov: expected False without momentum, got True"),
    ({"lr": 0.1, "nesterov": "no"}, TypeError, "nesterov: expected True or False, got str"),
]  # fmt: skip


@pytest.mark.parametrize("options, error, message", BAD_OPTIONS, ids=[message for *_, message in BAD_OPTIONS])
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        RowSGD([nn.Parameter(torch.zeros(2, 2))], **options)
    with pytest.raises(error, match=message):
        RowSGD([{"params": [nn.Parameter(torch.zeros(2, 2))], **options}], lr=0.1)


def test_sparse_gradient_of_something_else_is_refused_before_anything_changes():
    first, cube = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2, 2))
    optimizer = RowSGD([{"params": [first]}, {"params": [cube]}], lr=1.0)
    first.grad = torch.ones(2, 2)
    for shape in ((2, 2, 2), (2, 2)):
        other = cube if len(shape) == 3 else nn.Parameter(torch.ones(shape))
        optimizer.param_groups[1]["params"] = [other]
        other.grad = torch.ones(shape).to_sparse()  # every dimension sparse
        with pytest.raises(ValueError, match=r"params\[0\]: expected a sparse gradient to list whole rows"):
            optimizer.step()
        assert (first == 1).all() and (other == 1).all()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("options", EXACT, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gpu_has_the_bits_of_the_cpu_and_is_not_waited_for(dtype, options):
    C, D = 6, 35
    weight, other = (nn.Parameter(small_integers(C, D, dtype=dtype).to(d)) for d in ("cpu", "cuda"))
    on_cpu, on_gpu = RowSGD([weight], **options), RowSGD([other], **options)
    for step, ids in enumerate([[2, 0, 2], [5, 5, 5], [], [1, 0, 3]]):  # the first step compiles
        weight.grad = sparse(ids, small_integers(len(ids), D, seed=step, dtype=dtype), C)
        other.grad = weight.grad.cuda()
        on_cpu.step()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        on_gpu.step()
        torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(other.cpu(), weight)
