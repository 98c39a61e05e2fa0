"""Classes over several processes: equal to one process with the union of the class sets; no rank hangs.

Each check is run in groups of processes over gloo: of two here, of three among the exhaustive tests, whose
shards are not equal, and of whose ranks one has no rows. What is compared is float64 unless it says so.
"""

import copy
import datetime
import math
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

import fedss_kernels.reference as reference
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from later import later
from tolerance import eager_loss, excess
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fedss_kernels import FrequencySampler, RowAdam, RowSGD, SampledSoftmaxLoss, ShardedSampledSoftmaxLoss
from fedss_kernels.sharded import combined

C, D = 23, 6
ROW_ARGUMENTS = ("angular_margin", "cosine_margin", "target_labels")
SIZES = (3, 5, 0, 4)  # rows of each rank: unequal, and one without


class Problem:
    """The same numbers on all ranks: a class matrix and everybody's batch; and a rank's own rows of it."""

    def __init__(self, rank, world, *, classes=C, sizes=SIZES, dtype=torch.float64, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.rank, self.world, self.sizes = rank, world, sizes[:world]
        B = sum(self.sizes)
        self.weight = torch.randn(classes, D, generator=g, dtype=torch.float64).to(dtype)
        self.bias = torch.randn(classes, generator=g, dtype=torch.float64).to(dtype)
        self.input = torch.randn(B, D, generator=g, dtype=torch.float64).to(dtype)
        self.target = torch.randint(classes, (B,), generator=g)
        first = sum(self.sizes[:rank])
        self.own = slice(first, first + self.sizes[rank])

    def criterion(self, num_sampled=None, **options):
        """With the rows of `weight`, cut; it remembers its class set, and what it drew it for."""
        options = {"dtype": self.weight.dtype, **options}
        criterion = ShardedSampledSoftmaxLoss(len(self.weight), D, num_sampled, **options)
        state = {"weight": self.weight, "bias": self.bias}
        criterion.load_state_dict({n: state.get(n, p) for n, p in criterion.state_dict().items()})
        draw = criterion._class_set

        def remembered(*arguments):
            criterion.drawn, criterion.draw_again = draw(*arguments), partial(draw, *arguments)
            return criterion.drawn

        criterion._class_set = remembered
        return criterion

    def rows(self):
        return self.input[self.own].clone().requires_grad_(), self.target[self.own]


def union_of_class_sets(criterion):
    """(class_ids, log_expected_count) of all ranks' blocks, by their own numbers."""
    own = criterion.own_classes
    ids, counts = getattr(criterion, "drawn", (None, None))
    if not own or ids is None:
        ids, counts = torch.arange(len(own)), torch.zeros(len(own))
    parts = [None] * criterion.ranks.world
    dist.all_gather_object(parts, (ids + own.start, counts))
    return torch.cat([ids for ids, _ in parts]), torch.cat([counts.double() for _, counts in parts])


def dense(gradient):
    return gradient.to_dense() if gradient.is_sparse else gradient


def agrees_with_one_process(problem, criterion, **call):
    """Loss and gradients of a call, beside the reference on everybody's batch and the union of class sets."""
    x, t = problem.rows()
    ofs = {n: v[problem.own] if n in ROW_ARGUMENTS and torch.is_tensor(v) else v for n, v in call.items()}
    if "entry_labels" in call:
        own = criterion.own_classes
        ofs["entry_labels"] = call["entry_labels"][own.start : own.stop]
    ofs = {n: v for n, v in ofs.items() if n in (*ROW_ARGUMENTS, "entry_labels")}  # others are the module's
    loss = criterion(x, t, **ofs)
    loss, lse = loss if call.get("return_lse") else (loss, None)
    total = loss if loss.dim() == 0 else loss.sum() * problem.world
    (total if lse is None else total + (lse**2).sum() * problem.world).backward()

    ids, counts = union_of_class_sets(criterion)
    X, W, b = (t.double().clone().requires_grad_() for t in (problem.input, problem.weight, problem.bias))
    scale = torch.as_tensor(criterion.scale).detach().double().reshape(()).clone().requires_grad_()
    whole = reference.sampled_softmax_loss(
        *(X, W, problem.target, ids, counts),
        bias=None if criterion.bias is None else b,
        scale=scale,
        similarity=criterion.similarity,
        ignore_index=criterion.ignore_index,
        reduction=criterion.reduction,
        **call | ({"entry_labels": call["entry_labels"][ids]} if "entry_labels" in call else {}),
    )
    whole, whole_lse = whole if call.get("return_lse") else (whole, None)
    (whole.sum() if whole_lse is None else whole.sum() + (whole_lse**2).sum()).backward()
    if lse is not None:
        torch.testing.assert_close(lse, whole_lse[problem.own])
    same = torch.testing.assert_close
    same(loss, whole if whole.dim() == 0 else whole[problem.own])
    same(x.grad / problem.world, X.grad[problem.own])
    block = slice(criterion.own_classes.start, criterion.own_classes.stop)
    if criterion.own_classes:
        assert criterion.weight.grad.is_sparse == criterion.sparse_grad
        same(dense(criterion.weight.grad), W.grad[block])
        if criterion.bias is not None:
            assert criterion.bias.grad.is_sparse == criterion.sparse_grad
            same(dense(criterion.bias.grad), b.grad[block])
    if isinstance(criterion.scale, nn.Parameter):
        same(criterion.scale.grad.reshape(()), scale.grad)


def refused(kind, message, call):
    with pytest.raises(kind, match=message):
        call()


# ---- what all processes do: each is a test -----------------------------------------------------------------


def the_full_softmax(rank, world):
    agrees_with_one_process(p := Problem(rank, world), p.criterion())


def a_class_set_of_each_block(rank, world):
    p = Problem(rank, world)
    for m in (1, 7, 22):
        agrees_with_one_process(p, p.criterion(m))


def both_similarities_a_bias_and_a_learned_scale(rank, world):
    p = Problem(rank, world)
    agrees_with_one_process(p, p.criterion(7, similarity="dot", scale=1.5, bias=True, learn_scale=True))
    agrees_with_one_process(p, p.criterion(None, bias=True, learn_scale=True))


def every_reduction(rank, world):
    p = Problem(rank, world)
    for reduction in ("mean", "sum", "none"):
        agrees_with_one_process(p, p.criterion(7, reduction=reduction, bias=True))


def every_argument(rank, world):
    p = Problem(rank, world)
    p.target[1] = -100
    g = torch.Generator().manual_seed(1)
    each = torch.rand(len(p.target), generator=g, dtype=torch.float64)
    weights = torch.rand(C, generator=g, dtype=torch.float64)
    labels = {"entry_labels": torch.arange(C) % 7, "target_labels": p.target % 7}
    for call in (
        {"angular_margin": 0.5, "cosine_margin": 0.35},
        {"angular_margin": each, "cosine_margin": each * 0.1},
        {"label_smoothing": 0.1},
        {"class_weight": weights},
        {"return_lse": True},
        labels,
        {"angular_margin": each, "label_smoothing": 0.2, "class_weight": weights, "return_lse": True}
        | labels,
    ):
        for m, sparse in ((None, False), (7, True)):
            options = {
                n: v for n, v in call.items() if n in ("label_smoothing", "class_weight", "return_lse")
            }
            criterion = p.criterion(m, bias=True, learn_scale=True, sparse_grad=sparse, **options)
            agrees_with_one_process(p, criterion, **call)


def the_gpu_kernels_take_part(rank, world):
    """On GPUs; here interpreted."""
    p = Problem(rank, world)
    p.target[1] = -100
    labels = {"entry_labels": torch.arange(C) % 7, "target_labels": p.target % 7}
    agrees_with_one_process(p, p.criterion(7, impl="triton", bias=True, learn_scale=True), angular_margin=0.5)
    agrees_with_one_process(p, p.criterion(None, impl="triton", sparse_grad=True), **labels)


def sparse_gradients(rank, world):
    p = Problem(rank, world)
    criterion = p.criterion(7, sparse_grad=True, bias=True)
    agrees_with_one_process(p, criterion)
    listed = set(criterion.weight.grad.coalesce().indices()[0].tolist())
    ids, counts = criterion.drawn if criterion.drawn[0] is not None else (torch.arange(12), torch.zeros(12))
    first = criterion.own_classes.start
    targets = {t - first for t in p.target.tolist() if t in criterion.own_classes}
    assert listed == set(ids[counts < math.inf].tolist()) | targets


def few_classes_leave_ranks_without_any(rank, world):
    for classes in (1, 2, 5):
        p = Problem(rank, world, classes=classes)
        agrees_with_one_process(p, p.criterion(None, bias=True, learn_scale=True))
        agrees_with_one_process(p, p.criterion(1, bias=True))


def one_rank_has_all_targets_of_its_own_block(rank, world):
    p = Problem(rank, world)
    p.target.fill_(C - 1)
    agrees_with_one_process(p, p.criterion(7, bias=True))


def batches_of_nobody_and_of_one(rank, world):
    for sizes in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 0, 0, 2)):
        p = Problem(rank, world, sizes=sizes)
        agrees_with_one_process(p, p.criterion(7, bias=True, learn_scale=True))


def ignored_rows(rank, world):
    p = Problem(rank, world)
    p.target[::2] = -100
    agrees_with_one_process(p, p.criterion(7))
    p.target[:] = 5  # a class, which the ignored number wins over
    agrees_with_one_process(p, p.criterion(7, ignore_index=5))
    p.target[0] = 0
    agrees_with_one_process(p, p.criterion(7, ignore_index=5))


def in_eval_mode_all_classes(rank, world):
    p = Problem(rank, world)
    agrees_with_one_process(p, p.criterion(7).eval())


def leading_dimensions_come_back(rank, world):
    p = Problem(rank, world, sizes=(4, 4, 4, 4))
    x, t = p.rows()
    loss = p.criterion(reduction="none")(x.reshape(2, 2, D), t.reshape(2, 2))
    assert loss.shape == (2, 2) and torch.equal(loss.flatten(), p.criterion(reduction="none")(x, t))


def each_dtype_within_the_tolerance(rank, world):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        p = Problem(rank, world, dtype=dtype)
        criterion = p.criterion(bias=True)
        x, t = p.rows()
        loss = criterion(x, t)
        loss.backward()
        results = {}
        for name, function, kind in (("plain", eager_loss, dtype), ("truth", reference, torch.float64)):
            function = getattr(function, "sampled_softmax_loss", function)
            X, W, b = (v.to(kind, copy=True).requires_grad_() for v in (p.input, p.weight, p.bias))
            value = function(X, W, p.target, bias=b)
            value.backward()
            block = slice(criterion.own_classes.start, criterion.own_classes.stop)
            results[name] = value.detach(), X.grad[p.own], W.grad[block], b.grad[block]
        found = loss.detach(), x.grad / world, criterion.weight.grad, criterion.bias.grad
        for number, truth, plain in zip(found, results["truth"], results["plain"], strict=True):
            assert excess(number, truth, plain, dtype) <= 1, dtype
        assert x.grad.dtype == criterion.weight.grad.dtype == dtype
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def the_same_number_and_bits_on_all_ranks_and_runs(rank, world):
    p = Problem(rank, world, dtype=torch.float32)
    found = []
    for _ in range(2):
        criterion, (x, t) = p.criterion(), p.rows()
        loss = criterion(x, t)
        loss.backward()
        found.append((loss.detach(), x.grad, criterion.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    losses = [None] * world
    dist.all_gather_object(losses, found[0][0].item())
    assert len(set(losses)) == 1


def autocast_rounds_rows_as_one_process_does(rank, world):
    p = Problem(rank, world, dtype=torch.float32)
    x, t = p.rows()
    criterion = p.criterion()
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(x, t)
        whole = SampledSoftmaxLoss(C, D)
        whole.load_state_dict({"weight": p.weight})
        alone = whole(p.input, p.target)
    assert loss.dtype == torch.float32 == x.dtype
    loss.backward()
    torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-5)
    assert abs(loss - whole(p.input, p.target)) > 10 * abs(loss - alone)


def expected_counts_are_exact(rank, world):
    """Over many draws each class that no target is of is there as often as its expected count says."""
    p = Problem(rank, world)
    for sampler in ("uniform", "log_uniform", torch.arange(1, C + 1)):
        _expected_counts_are_exact(p, p.criterion(5, sampler=sampler), sampler)


def _expected_counts_are_exact(p, criterion, sampler):
    criterion(*p.rows())
    times, expected = torch.zeros(C), torch.zeros(C)
    own, draws = criterion.own_classes, 300
    for _ in range(draws):  # a rank draws without the others
        ids, counts = criterion.draw_again()
        there = counts < math.inf
        times.index_add_(0, ids[there] + own.start, torch.ones(int(there.sum())))
        expected[ids[there] + own.start] = counts[there].exp()
    mean, block = times[own.start : own.stop] / draws, expected[own.start : own.stop]
    assert (block > 0).all(), "no class is never there"
    torch.testing.assert_close(mean, block, rtol=0, atol=6 * 0.6 / draws**0.5)
    if isinstance(sampler, torch.Tensor):  # its own way with powers
        others = [j for j in own if j not in p.target.tolist()]
        share = (expected[others] / sampler[others] ** 0.75).tolist()
        assert max(share) == pytest.approx(min(share), rel=1e-5)


def samplers_of_frequencies_agree_with_one_process(rank, world):
    p = Problem(rank, world)
    for sampler in ("log_uniform", torch.arange(1, C + 1), FrequencySampler(torch.arange(1, C + 1))):
        criterion = p.criterion(7, sampler=sampler, bias=True)
        agrees_with_one_process(p, criterion)
    for sampler in (torch.ones(5), FrequencySampler(torch.ones(5))):
        refused(
            ValueError,
            "sampler: expected frequencies of 23 classes, got 5",
            partial(p.criterion, 7, sampler=sampler),
        )


def a_sampler_draws_in_a_block_as_its_frequencies_do(rank, world):
    p, frequencies = Problem(rank, world), torch.arange(1, C + 1)
    uniform = torch.randint(2**62, (500,), generator=torch.Generator().manual_seed(0))

    def draws_as_it_should(criterion):
        own = criterion.own_classes
        expected = FrequencySampler(frequencies[own.start : own.stop]).draw(uniform)
        for a, b in zip(criterion._sampler_of_block().draw(uniform), expected, strict=True):
            torch.testing.assert_close(a, b)

    for sampler in (frequencies, FrequencySampler(frequencies)):
        draws_as_it_should(p.criterion(7, sampler=sampler))
    loaded, plain = p.criterion(7, sampler=torch.ones(C)), SampledSoftmaxLoss(C, D, sampler=frequencies)
    loaded(*p.rows())
    loaded.load_state_dict(plain.state_dict())
    draws_as_it_should(loaded)
    plain.sampler = FrequencySampler(torch.ones(C))
    whole = {n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in loaded.state_dict().items()}
    plain.load_state_dict(whole)
    assert all(map(torch.equal, plain.sampler.buffers(), loaded.sampler.buffers()))
    draws_as_it_should(copy.deepcopy(loaded))
    loaded.sampler = FrequencySampler(frequencies)
    draws_as_it_should(loaded)


def tables_that_memory_left_are_refused_on_all_ranks(rank, world):
    p, frequencies = Problem(rank, world, sizes=(3, 3, 3, 3)), torch.arange(1, C + 1)
    criterion = p.criterion(7, sampler=frequencies)
    state = {n: v.clone() for n, v in criterion.state_dict().items()}
    criterion.to_empty(device="cpu")
    for table in criterion.sampler.buffers():
        table.data.fill_(0)
    refused(RuntimeError, "tables: expected those of one FrequencySampler", lambda: criterion(*p.rows()))
    criterion.load_state_dict(state)
    agrees_with_one_process(p, criterion)
    if rank == world - 1:
        criterion.sampler.kept.zero_()
    words = "tables: expected those" if rank == world - 1 else f"rank {world - 1} of {world} has raised"
    refused(RuntimeError, words, lambda: criterion(*p.rows()))
    criterion.sampler.reset_parameters()
    assert criterion(*p.rows()).isfinite()


def class_weights_come_back_and_a_short_bias_is_told(rank, world):
    p, weights = Problem(rank, world), torch.rand(C)
    criterion = p.criterion(7, class_weight=weights, bias=True)
    criterion.class_weight.zero_()
    criterion.reset_parameters()
    assert torch.equal(criterion.class_weight, weights)
    if world > 1:
        state = {"weight": p.weight, "bias": p.bias[:3], "class_weight": weights}
        refused(
            ValueError,
            f"bias: expected {C} rows, those of all ranks, got 3",
            lambda: criterion.load_state_dict(state),
        )


def negatives_are_the_blocks_share(rank, world):
    p = Problem(rank, world, classes=400, sizes=(2, 2, 2, 2))
    criterion = p.criterion(40)
    criterion(*p.rows())
    assert len(criterion.drawn[0]) - 2 * world == 40 // world or world == 3


def gradients_nobody_wants_are_not_sent(rank, world):
    p = Problem(rank, world)
    criterion = p.criterion(7)
    x, t = p.rows()
    loss = criterion(x.detach(), t)  # a frozen net
    loss.backward()
    assert criterion.weight.grad is not None
    criterion.weight.requires_grad_(False)
    x.grad = None
    criterion(x, t).backward()  # a frozen class matrix
    assert x.grad is not None
    with torch.no_grad():
        assert not criterion(x, t).requires_grad
    with torch.inference_mode():
        criterion(x.detach(), t)


def one_rank_wants_a_gradient_and_others_do_not(rank, world):
    p = Problem(rank, world, sizes=(3, 3, 3, 3))
    criterion = p.criterion(None, learn_scale=True)
    criterion.requires_grad_(rank == 0)
    x, t = p.rows()
    x.requires_grad_(rank == world - 1)
    criterion(x, t).backward()
    assert (criterion.weight.grad is not None) == (criterion.scale.grad is not None) == (rank == 0)
    assert (x.grad is not None) == (rank == world - 1)


def beside_ddp_and_fsdp_it_trains_as_one_process_does(rank, world):
    p = Problem(rank, world, sizes=(4, 2, 3, 1))
    for wrap in (DistributedDataParallel, fully_shard):
        nets = []
        for criterion, rows in (
            (p.criterion(sparse_grad=True, bias=True), p.own),
            (SampledSoftmaxLoss(C, D, sparse_grad=True, bias=True, dtype=torch.float64), slice(None)),
        ):
            torch.manual_seed(0)
            net = nn.Linear(D, D, dtype=torch.float64)
            if isinstance(criterion, ShardedSampledSoftmaxLoss):
                net = wrap(net)
            else:
                criterion.load_state_dict({"weight": p.weight, "bias": p.bias})
            optimizer = (
                RowSGD([*net.parameters(), *criterion.parameters()], lr=0.1, momentum=0.9)
                if (wrap is DistributedDataParallel or not isinstance(criterion, ShardedSampledSoftmaxLoss))
                else [
                    torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
                    RowSGD(criterion.parameters(), lr=0.1, momentum=0.9),
                ]
            )
            optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
            for _ in range(3):
                for each in optimizers:
                    each.zero_grad()
                loss = criterion(net(p.input[rows]), p.target[rows])
                loss.backward()
                for each in optimizers:
                    each.step()
            nets.append((loss, net, criterion))
        (loss, net, sharded), (alone, plain, whole) = nets
        own = slice(sharded.own_classes.start, sharded.own_classes.stop)
        torch.testing.assert_close(loss, alone)
        torch.testing.assert_close(sharded.weight, whole.weight[own])
        for mine, theirs in zip(net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(getattr(mine, "full_tensor", lambda m=mine: m)(), theirs)


def inside_ddp_or_fsdp_it_is_refused(rank, world):
    if world == 1:
        return
    p = Problem(rank, world, classes=24 if world != 4 else 24)
    message = "weight: expected a block of class rows that is this process' own, got one that {} takes"

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.criterion = nn.Linear(D, D, dtype=torch.float64), p.criterion(7)

        def forward(self, x, t):
            return self.criterion(self.body(x), t)

    x, t = p.rows()
    ddp = DistributedDataParallel(Net())
    refused(RuntimeError, message.format("DistributedDataParallel"), lambda: ddp(x, t))
    sharded = Net()
    fully_shard(sharded)
    refused(RuntimeError, message.format("FSDP"), lambda: sharded(x, t))


def topk_searches_all_blocks(rank, world):
    p = Problem(rank, world)
    whole = SampledSoftmaxLoss(C, D, dtype=torch.float64, bias=True)
    whole.load_state_dict({"weight": p.weight, "bias": p.bias})
    criterion = p.criterion(7, bias=True)
    for k in (1, 5, C):
        expected, found = whole.topk(p.input[p.own], k), criterion.topk(p.rows()[0], k, block_size=4)
        torch.testing.assert_close(found.values, expected.values)
        assert torch.equal(found.indices, expected.indices)
    p = Problem(rank, world, classes=2, sizes=(4, 4, 4, 4))
    found = p.criterion().topk(p.rows()[0].reshape(2, 2, D), 2)
    assert found.indices.shape == (2, 2, 2)
    assert torch.equal(found.indices.sort(-1).values, torch.tensor([0, 1]).expand(2, 2, 2))


def another_ranks_error_is_raised_here(rank, world):
    p = Problem(rank, world, sizes=(3, 3, 3, 3))
    criterion = p.criterion(7)
    bad = world - 1
    x, t = p.rows()

    def wrong(kind, message, call):
        alone = world == 1 or rank == bad
        expected = (kind, message) if alone else (RuntimeError, f"rank {bad} of {world} has raised an error")
        refused(*expected, (lambda: call()) if rank == bad else (lambda: criterion(x, t)))

    t_wrong = t.clone()
    t_wrong[1] = C
    wrong(IndexError, rf"target\[1\] = {C}, expected a class in \[0, {C}\)", lambda: criterion(x, t_wrong))
    wrong(ValueError, r"target: expected shape \(3,\)", lambda: criterion(x, t[:2]))
    wrong(ValueError, "input: expected shape", lambda: criterion(x[:, :4], t))
    wrong(TypeError, "input: expected a tensor", lambda: criterion(None, t))
    wrong(ValueError, "k: expected 1 to 23, got 24", lambda: criterion.topk(x, 24))
    if world > 1:  # settings that were assigned
        criterion.num_sampled = "7" if rank == bad else 7
        wrong(TypeError, "num_sampled: expected an integer, got str", lambda: criterion(x, t))
        wrong(TypeError, "num_sampled: expected an integer, got str", lambda: criterion.topk(x, 2))
        criterion.num_sampled = 7
    agrees_with_one_process(p, criterion)  # and all go on


def other_settings_are_named(rank, world):
    if world == 1:
        return
    p, own = Problem(rank, world), rank == world - 1
    x, t = p.rows()
    criterion = p.criterion(7)

    def differs(message, call):
        refused(ValueError, message, call if own else lambda: criterion(x, t))

    differs("training: expected the same on all ranks, got ", lambda: p.criterion(7).eval()(x, t))
    differs("num_sampled: .*", lambda: p.criterion(6)(x, t))
    differs("input: .*torch.float", lambda: criterion(x.float(), t))
    differs("call: .*'topk'|call: .*'forward'", lambda: criterion.topk(x, 2))
    with torch.set_grad_enabled(not own):
        refused(ValueError, r"torch.is_grad_enabled\(\)", lambda: criterion(x, t))
    agrees_with_one_process(p, criterion)


def equal_numbers_of_other_types_are_the_same(rank, world):
    p = Problem(rank, world)
    number = [float, np.float32, int, np.float64][rank]
    integer = [int, np.int64, np.int32, np.int64][rank]
    criterion = p.criterion(7)
    criterion.scale, criterion.num_sampled, criterion.ignore_index = number(5), integer(6), integer(-7)
    criterion.sparse_grad = np.True_
    p.target[0] = -7
    agrees_with_one_process(p, criterion)
    assert criterion.topk(p.rows()[0], integer(2)).indices.shape == (p.sizes[rank], 2)
    criterion.reduction = "average"
    refused(ValueError, 'reduction: expected "mean" or', lambda: criterion(*p.rows()))


def a_generator_of_one_seed_gives_each_rank_its_own_rows(rank, world):
    torch.manual_seed(3)
    seeded = torch.Generator().manual_seed(3)
    for criterion in (
        ShardedSampledSoftmaxLoss(40, D),
        ShardedSampledSoftmaxLoss(40, D, generator=seeded),
    ):
        rows = criterion.state_dict()["weight"]
        rows = rows.full_tensor() if world > 1 else rows
        assert len(rows) == 40 == len(rows.unique(dim=0))
        assert abs(rows.std().item() * D**0.5 - 1) < 0.3


def state_dicts_are_of_shards(rank, world):
    p = Problem(rank, world)
    criterion = p.criterion(7, bias=True, learn_scale=True)
    state = criterion.state_dict()
    assert list(state) == ["weight", "bias", "scale"]
    if world > 1:
        assert state["weight"].shape == (C, D) and state["bias"].shape == (C,)
        assert torch.equal(state["weight"].full_tensor(), p.weight)
        assert torch.equal(state["weight"].to_local(), criterion.weight)
        refused(
            ValueError,
            "weight: expected 23 rows, those of all ranks, got 5",
            lambda: criterion.load_state_dict(state | {"weight": torch.zeros(5, D)}),
        )
    other = ShardedSampledSoftmaxLoss(C, D, 7, bias=True, learn_scale=True, dtype=torch.float64)
    other.load_state_dict(state)
    assert torch.equal(other.weight, criterion.weight) and torch.equal(other.bias, criterion.bias)
    assert copy.deepcopy(other).num_classes == C
    assert "rows of rank" in repr(other) or world == 1


def optimizers_states_are_of_shards(rank, world):
    """As torch.distributed.checkpoint's own functions save and load them, a net's state beside."""
    for kind, options in ((RowAdam, {}), (RowSGD, {"momentum": 0.9}), (torch.optim.AdamW, {})):
        p = Problem(rank, world, sizes=(4, 4, 4, 4))

        def made(kind=kind, options=options, p=p):
            torch.manual_seed(0)
            net = DistributedDataParallel(nn.Linear(D, D, dtype=torch.float64))
            model = nn.ModuleDict({"net": net, "criterion": p.criterion(bias=True)})
            optimizer = kind(model.parameters(), lr=0.1, **options)
            model["criterion"].shard_state_of(optimizer)
            return model, optimizer

        model, optimizer = made()
        for _ in range(2):
            model["criterion"](model["net"](p.rows()[0]), p.rows()[1]).backward()
            optimizer.step()
            optimizer.zero_grad()
        saved = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        other, second = made()
        loaded = dict(zip(("model", "optimizer"), get_state_dict(other, second), strict=True))
        with tempfile.TemporaryDirectory() as folder:
            folders = [folder]
            dist.broadcast_object_list(folders)
            dcp.save(saved, checkpoint_id=folders[0])
            dcp.load(loaded, checkpoint_id=folders[0])
            dist.barrier()
        set_state_dict(other, second, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        _assert_same_state(model, optimizer, other, second)

        whole = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
        for name, value in whole["state"]["criterion.weight"].items():
            own = optimizer.state[model["criterion"].weight][name]
            assert value.dim() == 0 or value.shape == (C, *own.shape[1:]), (kind, name)
        other, third = made()
        set_optimizer_state_dict(other, third, whole, options=StateDictOptions(full_state_dict=True))
        _assert_same_state(model, optimizer, other, third)
        third.load_state_dict(optimizer.state_dict())
        _assert_same_state(model, optimizer, other, third)
    refused(
        TypeError,
        "optimizer: expected a torch.optim.Optimizer, got ModuleDict",
        lambda: model["criterion"].shard_state_of(model),
    )


def _assert_same_state(model, optimizer, other, second):
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        state, found = optimizer.state[mine], second.state[theirs]
        assert state.keys() == found.keys()
        for name, value in state.items():
            assert not hasattr(found[name], "to_local") and torch.equal(found[name], value), name


def groups_of_some_processes(rank, world):
    if world < 3:
        return
    group = dist.new_group([0, 1])
    if rank > 1:
        refused(
            TypeError,
            "process_group: expected a ProcessGroup of torch.distributed with this process in it",
            lambda: ShardedSampledSoftmaxLoss(C, D, process_group=group),
        )
        return
    p = Problem(rank, 2)
    criterion = p.criterion(process_group=group)
    loss = criterion(*p.rows())
    torch.testing.assert_close(loss, reference.sampled_softmax_loss(p.input, p.weight, p.target))
    assert torch.equal(criterion.state_dict()["weight"].full_tensor(), p.weight)


def double_backward_is_refused(rank, world):
    p = Problem(rank, world, sizes=(3, 3, 3, 3))
    x, t = p.rows()
    (gradient,) = torch.autograd.grad(p.criterion()(x, t), x, create_graph=True)
    refused(RuntimeError, "differentiat", lambda: gradient.sum().backward())


CHECKS = [
    the_full_softmax,
    a_class_set_of_each_block,
    both_similarities_a_bias_and_a_learned_scale,
    every_reduction,
    every_argument,
    the_gpu_kernels_take_part,
    sparse_gradients,
    few_classes_leave_ranks_without_any,
    one_rank_has_all_targets_of_its_own_block,
    batches_of_nobody_and_of_one,
    ignored_rows,
    in_eval_mode_all_classes,
    leading_dimensions_come_back,
    each_dtype_within_the_tolerance,
    the_same_number_and_bits_on_all_ranks_and_runs,
    autocast_rounds_rows_as_one_process_does,
    expected_counts_are_exact,
    samplers_of_frequencies_agree_with_one_process,
    a_sampler_draws_in_a_block_as_its_frequencies_do,
    tables_that_memory_left_are_refused_on_all_ranks,
    class_weights_come_back_and_a_short_bias_is_told,
    negatives_are_the_blocks_share,
    gradients_nobody_wants_are_not_sent,
    one_rank_wants_a_gradient_and_others_do_not,
    beside_ddp_and_fsdp_it_trains_as_one_process_does,
    inside_ddp_or_fsdp_it_is_refused,
    topk_searches_all_blocks,
    another_ranks_error_is_raised_here,
    other_settings_are_named,
    equal_numbers_of_other_types_are_the_same,
    a_generator_of_one_seed_gives_each_rank_its_own_rows,
    state_dicts_are_of_shards,
    optimizers_states_are_of_shards,
    groups_of_some_processes,
    double_backward_is_refused,
]


# ---- the processes -----------------------------------------------------------------------------------------

PATIENCE = 120  # seconds, after which processes that do not end are ended


def in_processes(work, world, folder):
    """work(rank, world, folder) in processes of a group; none is left behind, whatever happens."""
    context = mp.spawn(_with_group, (world, folder, work), nprocs=world, join=False)
    until = time.monotonic() + PATIENCE
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < until, f"{world} processes did not end in {PATIENCE} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()


def _with_group(rank, world, folder, work):
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=PATIENCE // 2)
    meet = f"file://{folder}/meet_{world}_{getattr(work, '__name__', 'work')}"
    dist.init_process_group("gloo", meet, rank=rank, world_size=world, timeout=patience)
    try:
        work(rank, world, folder)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _run_checks(rank: int, world: int, folder: Path) -> None:
    """One after the other, as long as none fails: its other ranks may be in the middle of a call."""
    for check in CHECKS:
        try:
            check(rank, world)
        except BaseException:
            torch.save({check.__name__: traceback.format_exc()}, folder / f"failure_{rank}.pt")
            raise


def _failures(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"processes_{world}")
    try:
        in_processes(_run_checks, world, folder)
    except (mp.ProcessExitedException, mp.ProcessRaisedException):
        found = [torch.load(path, weights_only=True) for path in sorted(folder.glob("failure_*.pt"))]
        if not found:
            raise
        return found
    return []


@pytest.fixture(scope="module", params=[2, *later(3)])
def failures(request, tmp_path_factory):
    return _failures(request.param, tmp_path_factory)


@pytest.mark.xdist_group("sharded")
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_in_several_processes(failures, check):
    names = [check.__name__ for check in CHECKS]
    first = min((names.index(name) for failure in failures for name in failure), default=len(names))
    assert first >= names.index(check), f"not reached: {names[first]} failed before"
    texts = [failure[check] for failure in failures if check in failure]
    assert not texts, "\n".join(texts)


# ---- checkpoints: into another number of processes ---------------------------------------------------------


def _trained(world):
    """A criterion and its optimiser after a step: momentum is there."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    p = Problem(rank, world, sizes=(4, 4, 4, 4))
    criterion = p.criterion(bias=True)
    optimizer = RowSGD(criterion.parameters(), lr=0.1, momentum=0.9)
    criterion(*p.rows()).backward()
    optimizer.step()
    return criterion, optimizer


def _for_checkpoint(criterion, optimizer):
    criterion.shard_state_of(optimizer)
    state = optimizer.state_dict()["state"][0]
    return {"criterion": criterion.state_dict(), "velocity": state["momentum_buffer"]}


def _save(rank, world, folder):
    criterion, optimizer = _trained(world)
    state = _for_checkpoint(criterion, optimizer)
    dcp.save(state, checkpoint_id=folder / f"of_{world}")
    if world > 1:
        state = {
            "weight": state["criterion"]["weight"].full_tensor(),
            "velocity": state["velocity"].full_tensor(),
        }
    else:
        state = {"weight": criterion.weight.data, "velocity": state["velocity"]}
    if rank == 0:
        torch.save(state, folder / "whole.pt")


def _load(rank, world, folder):
    criterion, optimizer = _trained(world)
    with torch.no_grad():
        criterion.weight.zero_()
    optimizer.state[criterion.weight]["momentum_buffer"].zero_()
    state = _for_checkpoint(criterion, optimizer)
    (saved,) = folder.glob("of_*")
    dcp.load(state, checkpoint_id=saved)
    criterion.load_state_dict(state["criterion"])
    whole, own = torch.load(folder / "whole.pt"), criterion.own_classes
    assert torch.equal(criterion.weight, whole["weight"][own.start : own.stop])
    velocity = optimizer.state[criterion.weight]["momentum_buffer"]
    assert torch.equal(velocity, whole["velocity"][own.start : own.stop])


@pytest.mark.exhaustive
@pytest.mark.parametrize(("saved", "loaded"), [(3, 2), (2, 4)])
def test_checkpoints_load_into_another_number_of_processes(saved, loaded, tmp_path):
    """And into SampledSoftmaxLoss, without torch.distributed."""
    in_processes(_save, saved, tmp_path)
    in_processes(_load, loaded, tmp_path)
    whole = torch.load(tmp_path / "whole.pt")
    criterion = SampledSoftmaxLoss(C, D, bias=True, dtype=torch.float64)
    state = {"criterion": criterion.state_dict()}
    with pytest.warns(UserWarning, match="load in a single process"):
        dcp.load(state, checkpoint_id=tmp_path / f"of_{saved}", no_dist=True)
    criterion.load_state_dict(state["criterion"])
    assert torch.equal(criterion.weight, whole["weight"])


# ---- alone -------------------------------------------------------------------------------------------------


def test_alone_it_is_the_plain_module_bit_for_bit():
    x, t = torch.randn(5, D), torch.randint(C, (5,))
    made = []
    for kind in (SampledSoftmaxLoss, ShardedSampledSoftmaxLoss):
        torch.manual_seed(0)
        criterion = kind(C, D, 7, bias=True, generator=torch.Generator().manual_seed(1))
        loss = criterion(x, t)
        loss.backward()
        made.append((loss, criterion.weight, criterion.weight.grad, *criterion.topk(x, 3)))
        assert all(type(value) is torch.Tensor for value in criterion.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))
    assert criterion.own_classes == range(C) and criterion.num_classes == C


@pytest.mark.parametrize("sharded_first", [False, True])
def test_alone_it_loads_tables_of_the_plain_module_and_the_other_way_round(sharded_first):
    kinds = (ShardedSampledSoftmaxLoss, SampledSoftmaxLoss)[:: 1 if sharded_first else -1]
    saved = kinds[0](C, D, 7, sampler=torch.arange(1, C + 1))
    loaded = kinds[1](C, D, 7, sampler=torch.ones(C))
    loaded.to_empty(device="cpu").load_state_dict(saved.state_dict())
    assert all(map(torch.equal, loaded.sampler.buffers(), saved.sampler.buffers()))
    uniform = torch.randint(2**62, (100,))
    assert all(map(torch.equal, loaded.sampler.draw(uniform), saved.sampler.draw(uniform)))


def test_the_parts_of_a_loss_are_combined_at_any_size():
    """log(1 + sum_r (exp(L_r) - 1)) beside the same in 100 digits."""
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 100
    parts = [
        (0.0, 0.0),
        (1e-12, 3e-9),
        (0.3, 2.0),
        (800.0, 1.0),
        (5000.0, 5001.0),
        (1e-30, 0.0),
        (40.0, 1e-9),
    ]
    found = combined(torch.tensor(parts, dtype=torch.float64).T)
    for pair, number in zip(parts, found.tolist(), strict=True):
        exact = mpmath.log(1 + sum(mpmath.expm1(mpmath.mpf(part)) for part in pair))
        assert abs(number - exact) <= 1e-15 * exact
    assert combined(torch.tensor([[0.25]])).item() == 0.25
    wanted = torch.tensor(parts, dtype=torch.float64).T.clone().requires_grad_()
    combined(wanted).sum().backward()
    torch.testing.assert_close(wanted.grad, torch.exp(wanted.detach() - found))


@pytest.mark.parametrize(
    ("kind", "message", "options"),
    [
        (ValueError, "num_classes: expected at least 1, got 0", {"num_classes": 0}),
        (TypeError, "num_classes: expected an integer, got str", {"num_classes": "23"}),
        (ValueError, "embedding_dim: expected at least 1, got 0", {"embedding_dim": 0}),
        (TypeError, "process_group: expected a ProcessGroup", {"process_group": "gloo"}),
    ],
)
def test_wrong_sizes_are_named(kind, message, options):
    refused(
        kind, message, partial(ShardedSampledSoftmaxLoss, **{"num_classes": C, "embedding_dim": D} | options)
    )
