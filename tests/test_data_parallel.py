"""The module under torch.distributed, in two processes over gloo: DDP with sparse gradients, FSDP, ZeRO."""

import copy
import datetime
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook, quantization_hooks
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard, register_fsdp_forward_method
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

from fedss_kernels import RowSGD, SampledSoftmaxLoss, clip_grad_norm_, sampled_softmax_loss

WORLD, C, D = 2, 50, 8
SPARSE = ("criterion.weight", "criterion.bias")


class Classifier(nn.Module):
    """A net with the criterion in it; the parameters of all ranks are equal, the negatives are not."""

    def __init__(self, rank, **options):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(D, D)
        self.criterion = SampledSoftmaxLoss(C, D, 5, generator=torch.Generator().manual_seed(0), **options)
        self.criterion.generator.set_state(torch.Generator().manual_seed(rank).get_state())

    def forward(self, input, target):
        return self.criterion(self.encoder(input), target)


def batch(rows, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, D, generator=g), torch.randint(C, (rows,), generator=g)


def mean_over_ranks(tensor):
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / WORLD


def dense(gradient):
    return gradient.to_dense() if gradient.is_sparse else gradient


def refused(message, call):
    with pytest.raises(RuntimeError, match=message):
        call()


# ---- what both processes do: each is a test ----------------------------------------------------------------


def ddp_averages_sparse_gradients(rank, **options):
    """Of unequal and empty batches, in two backward passes, one of them added up before it is sent."""
    alone = Classifier(rank, sparse_grad=True, **options)
    model = DistributedDataParallel(copy.deepcopy(alone))
    for rows in ((5, 3), (0, 4), (0, 0)):
        alone.zero_grad()
        model.zero_grad()
        with model.no_sync():
            for net in (alone, model):
                net(*batch(2, rank)).backward()
        for net in (alone, model):
            net(*batch(rows[rank], 10 + rank)).backward()
        for (name, mine), (_, shared) in zip(
            alone.named_parameters(), model.module.named_parameters(), strict=True
        ):
            assert shared.grad.is_sparse == mine.grad.is_sparse == (name in SPARSE)
            torch.testing.assert_close(dense(shared.grad), mean_over_ranks(dense(mine.grad)), msg=name)


def ddp_averages_sparse_gradients_of_a_bias_beside_a_learned_scale(rank):
    ddp_averages_sparse_gradients(rank, bias=True, learn_scale=True)


def ddp_of_the_criterion_alone(rank):
    model = DistributedDataParallel(SampledSoftmaxLoss(C, D, 5, sparse_grad=True))
    model(*batch(4, rank)).backward()
    assert model.module.weight.grad.is_sparse


def zero_redundancy_optimizer_equals_the_optimizer(rank):
    nets = []
    for kind in (RowSGD, ZeroRedundancyOptimizer):
        model = DistributedDataParallel(Classifier(rank, sparse_grad=True))
        options = {"optimizer_class": RowSGD} if kind is ZeroRedundancyOptimizer else {}
        optimizer = kind(model.parameters(), lr=0.1, momentum=0.9, **options)
        for step in range(3):
            optimizer.zero_grad()
            model(*batch(4, step + 10 * rank)).backward()
            optimizer.step()
        nets.append(model)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)


def zero_redundancy_optimizer_clips_by_the_norm_of_the_model(rank):
    """By clip_grad_norm_, as its processes' optimisers see a part of the model each."""
    nets = []
    for kind in (RowSGD, ZeroRedundancyOptimizer):
        model = DistributedDataParallel(Classifier(rank, sparse_grad=True))
        options = {"optimizer_class": RowSGD} if kind is ZeroRedundancyOptimizer else {"max_norm": 0.5}
        optimizer = kind(model.parameters(), lr=0.1, **options)
        model(*batch(4, rank)).backward()
        if kind is ZeroRedundancyOptimizer:
            assert clip_grad_norm_(model.parameters(), 0.5) > 0.5
        optimizer.step()
        nets.append(model)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def join_is_refused_where_it_would_send_dense_gradients(rank):
    model = DistributedDataParallel(Classifier(rank, sparse_grad=True))
    with model.join():
        refused(
            r"sparse_grad: expected False under DistributedDataParallel's join\(\), .* empty batches",
            lambda: model(*batch(4, 0)),
        )
    uneven = DistributedDataParallel(Classifier(rank, sparse_grad=True))
    with pytest.raises(RuntimeError, match="exhausted"):
        with uneven.join(throw_on_early_termination=True):  # which ends where it would send dense ones
            for step in range(1 + rank):
                uneven(*batch(4, step)).backward()
    plain = DistributedDataParallel(Classifier(rank))
    with plain.join():
        for step in range(1 + rank):
            plain(*batch(4, step)).backward()


def nccl_is_refused_with_sparse_gradients_only(rank):
    found, dist.get_backend_config = dist.get_backend_config, lambda group: "cpu:nccl,cuda:nccl"
    try:
        sparse = Classifier(rank, sparse_grad=True)
        model = DistributedDataParallel(sparse)
        refused(
            "sparse_grad: expected False under DistributedDataParallel over NCCL", lambda: model(*batch(4, 0))
        )
        with torch.no_grad():
            model(*batch(4, 0))
        DistributedDataParallel(Classifier(rank))(*batch(4, 0)).backward()
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(sparse, ["criterion.weight"])
        DistributedDataParallel(sparse)(*batch(4, rank)).backward()
        assert sparse.criterion.weight.grad.is_sparse
    finally:
        dist.get_backend_config = found


def float16_is_refused_with_sparse_gradients_only(rank):
    half = {"dtype": torch.float16, "num_sampled": 5}
    x, t = batch(4, rank)
    model = DistributedDataParallel(SampledSoftmaxLoss(C, D, sparse_grad=True, **half))
    refused(
        "sparse_grad: expected False under DistributedDataParallel in float16", lambda: model(x.half(), t)
    )
    DistributedDataParallel(SampledSoftmaxLoss(C, D, **half))(x.half(), t).backward()


def fully_shard_trains_as_one_process_does(rank):
    alone = Classifier(rank, learn_scale=True)
    model = copy.deepcopy(alone)
    fully_shard(model.criterion)
    fully_shard(model)
    for net in (alone, model):
        net(*batch(4, rank)).backward()
    for (name, mine), (_, shared) in zip(alone.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(shared.grad.full_tensor(), mean_over_ranks(mine.grad), msg=name)


def fully_shard_refuses_sparse_gradients(rank):
    for modules in (lambda net: [net], lambda net: [net.criterion, net]):
        net = Classifier(rank, sparse_grad=True, bias=True)
        net.criterion.weight.requires_grad_(len(modules(net)) == 2)  # the bias' gradient is sparse too
        for module in modules(net):
            fully_shard(module)
        refused("sparse_grad: expected False under fully_shard", lambda net=net: net(*batch(4, 0)))
    net = Classifier(rank, sparse_grad=True, learn_scale=True)
    fully_shard(net, ignored_params={net.criterion.weight})
    net(*batch(4, rank)).backward()
    assert net.criterion.weight.grad.is_sparse


def topk_of_shards_says_how_to_see_all_of_it(rank):
    x, _ = batch(4, 0)
    criterion = Classifier(rank).criterion
    expected = criterion.topk(x, 3)
    fully_shard(criterion)
    refused(r"got a DTensor \(50, 8\).*register_fsdp_forward_method\(criterion", lambda: criterion.topk(x, 3))
    criterion.unshard()
    assert torch.equal(criterion.topk(x, 3).indices, expected.indices)
    criterion.reshard()
    register_fsdp_forward_method(criterion, "topk")
    assert torch.equal(criterion.topk(x, 3).values, expected.values)
    criterion.reshard()
    with pytest.raises(TypeError, match="weight: expected a plain tensor, got a DTensor"):
        sampled_softmax_loss(x, criterion.weight, batch(4, 0)[1])


def flat_shards_are_refused_in_words(rank):
    """FullyShardedDataParallel leaves a view of freed memory, or a part of a vector."""
    x, t = batch(4, rank)
    for original in (False, True):
        options = {"device_id": torch.device("cpu"), "use_orig_params": original}
        net = FullyShardedDataParallel(SampledSoftmaxLoss(C, D, 5, sparse_grad=True), **options)
        refused("sparse_grad: expected False for a weight or bias that is a view", lambda net=net: net(x, t))
        criterion = SampledSoftmaxLoss(C, D, 5)
        net = FullyShardedDataParallel(criterion, **options)
        net(x, t).backward()
        for call in (lambda c: c.topk(x, 3), lambda c: c(x, t)):
            refused("weight: expected all of a .* summon_full_params", lambda c=criterion, f=call: f(c))
        if not original:
            with pytest.raises(ValueError, match="weight: expected a tensor with memory"):
                sampled_softmax_loss(x, criterion.weight.detach(), t)
        with FullyShardedDataParallel.summon_full_params(net):
            assert criterion.topk(x, 3).indices.shape == (4, 3)


def replicate_is_refused_with_sparse_gradients_only(rank):
    model = replicate(Classifier(rank, sparse_grad=True))
    refused("sparse_grad: expected False under replicate.* DistributedData", lambda: model(*batch(4, 0)))
    with torch.no_grad():
        model(*batch(4, 0))
    replicate(Classifier(rank))(*batch(4, 0)).backward()
    model = Classifier(rank, sparse_grad=True)
    replicate(model, ignored_modules=[model.criterion])(*batch(4, rank)).backward()
    assert model.criterion.weight.grad.is_sparse


def hooks_that_compress_are_refused_with_sparse_gradients_only(rank):
    hooks = (
        default_hooks.fp16_compress_hook,
        default_hooks.fp16_compress_wrapper(default_hooks.allreduce_hook),
        quantization_hooks.quantization_pertensor_hook,
        powerSGD_hook.powerSGD_hook,
        powerSGD_hook.batched_powerSGD_hook,
    )
    for hook in hooks:
        model = DistributedDataParallel(Classifier(rank, sparse_grad=True))
        model.register_comm_hook(None, hook)
        refused(
            f"sparse_grad: expected False under DistributedDataParallel with {hook.__name__}, which .*; l",
            lambda model=model: model(*batch(4, 0)),
        )
        model.module.criterion.weight.requires_grad_(False)
        model(*batch(4, 0))
    model = DistributedDataParallel(Classifier(rank))
    model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    model(*batch(4, rank)).backward()
    model = DistributedDataParallel(Classifier(rank, sparse_grad=True))
    model.register_comm_hook(None, default_hooks.allreduce_hook)
    model(*batch(4, rank)).backward()
    assert model.module.criterion.weight.grad.is_sparse


class ByFunction(nn.Module):
    """The loss of a weight that is a parameter of any module."""

    def __init__(self, rank):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C, D))

    def forward(self, input, target):
        return sampled_softmax_loss(input, self.weight, target, sparse_grad=True)


def _tied(rank):
    """A head for inference that was there first."""
    net = nn.Module()
    net.head = nn.Linear(D, C, bias=False)
    net.criterion = SampledSoftmaxLoss(C, D, 5, sparse_grad=True)
    net.criterion.weight = net.head.weight
    net.forward = net.criterion.forward
    return net


def _pruned(rank):
    net = Classifier(rank, sparse_grad=True)
    prune.random_unstructured(net.criterion, "weight", 0.3)
    return net


def gradients_that_ddp_takes_for_dense_are_refused_in_words(rank):
    asked = {ByFunction: "ByFunction", _tied: "Linear", _pruned: "SampledSoftmaxLoss"}
    for make, name in asked.items():
        model = DistributedDataParallel(make(rank))
        words = f"sparse_grad: expected False .* the first module that has the parameter is {name}; give the"
        refused(words, lambda model=model: model(*batch(4, 0)))
        with torch.no_grad():
            model(*batch(4, 0))
    net = _tied(rank)
    net.criterion.sparse_grad = False
    DistributedDataParallel(net)(*batch(4, rank)).backward()
    head_last = nn.ModuleDict({"criterion": net.criterion, "head": net.head})
    net.criterion.sparse_grad, head_last.forward = True, net.criterion.forward
    head_last.zero_grad()
    DistributedDataParallel(head_last)(*batch(4, rank)).backward()
    assert net.head.weight.grad.is_sparse


def the_loss_of_a_sharded_parameter_is_refused_in_words(rank):
    """Of any module: fully_shard's gathered one, and the view that FullyShardedDataParallel makes."""
    net = ByFunction(rank)
    fully_shard(net)
    refused("sparse_grad: expected False under fully_shard", lambda: net(*batch(4, 0)))
    flat = FullyShardedDataParallel(ByFunction(rank), device_id=torch.device("cpu"))
    refused("sparse_grad: expected False .* or FullyShardedDataParallel, got", lambda: flat(*batch(4, 0)))
    model = replicate(ByFunction(rank))
    refused("sparse_grad: expected False under replicate", lambda: model(*batch(4, 0)))


# ---- the processes -----------------------------------------------------------------------------------------

CHECKS = [
    ddp_averages_sparse_gradients,
    ddp_averages_sparse_gradients_of_a_bias_beside_a_learned_scale,
    ddp_of_the_criterion_alone,
    zero_redundancy_optimizer_equals_the_optimizer,
    zero_redundancy_optimizer_clips_by_the_norm_of_the_model,
    nccl_is_refused_with_sparse_gradients_only,
    join_is_refused_where_it_would_send_dense_gradients,
    replicate_is_refused_with_sparse_gradients_only,
    hooks_that_compress_are_refused_with_sparse_gradients_only,
    float16_is_refused_with_sparse_gradients_only,
    gradients_that_ddp_takes_for_dense_are_refused_in_words,
    the_loss_of_a_sharded_parameter_is_refused_in_words,
    fully_shard_trains_as_one_process_does,
    fully_shard_refuses_sparse_gradients,
    topk_of_shards_says_how_to_see_all_of_it,
    flat_shards_are_refused_in_words,
]


def _run_checks(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        *("gloo", f"file://{folder}/meet"),
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    failures = {}
    for check in CHECKS:
        try:
            check(rank)
        except BaseException:
            failures[check.__name__] = traceback.format_exc()
        dist.barrier()
    torch.save(failures, folder / f"failures_{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(_run_checks, args=(folder,), nprocs=WORLD)
    return [torch.load(folder / f"failures_{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_in_two_processes(failures, check):
    assert not any(check in failed for failed in failures), failures[0].get(check) or failures[1].get(check)
