"""RowSGD: torch.optim.SGD on the rows that a sparse gradient lists, and on dense gradients."""

import copy
import io

import pytest
import torch
from torch import nn

from fedss_kernels import RowSGD, SampledSoftmaxLoss

# Numbers whose products and sums are exact in float32 for a few steps: methods that agree have the same bits.
EXACT = [
    {"lr": 0.5},
    {"lr": 0.5, "weight_decay": 0.25},
    {"lr": 0.5, "momentum": 0.5},
    {"lr": 0.25, "momentum": 0.5, "weight_decay": 0.5},
    {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.25, "nesterov": True},
]


def small_integers(*shape, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=g).to(dtype)


def sparse(ids, rows, C):
    ids = torch.as_tensor(ids, dtype=torch.int64).reshape(1, -1)
    return torch.sparse_coo_tensor(ids, rows, (C, rows.shape[1]), check_invariants=True)


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
