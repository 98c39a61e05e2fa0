"""The loss of pytorch-metric-learning that samples classes, beside that library's own."""

import importlib
import math
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fedss_kernels import RowSGD

pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

from fedss_kernels.integrations.metric_learning import SampledSoftmax

B, D, C = 12, 16, 50


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(B, D, generator=rng, requires_grad=True), torch.randint(8, (B,), generator=rng)


def beside(theirs, **options) -> SampledSoftmax:
    """Ours with the class rows of theirs."""
    ours = SampledSoftmax(C, D, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours


def assert_equal(ours, theirs, *more) -> None:
    """Loss and gradients, for the same embeddings, labels and whatever else a call takes."""
    results = []
    for loss_func, rows in ((ours, ours.criterion.weight), (theirs, theirs.W)):
        embeddings, labels = batch()
        loss = loss_func(embeddings, labels, *more)
        to_input, to_rows = torch.autograd.grad(loss, (embeddings, rows))
        results.append((loss, to_input, to_rows if rows.shape == (C, D) else to_rows.t()))
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5 * right.abs().max().item())


def test_all_classes_equal_normalized_softmax():
    theirs = losses.NormalizedSoftmaxLoss(C, D, temperature=0.05)
    assert_equal(beside(theirs, scale=20.0), theirs)


@pytest.mark.parametrize("degrees", [0.0, 28.6, 120.0])
def test_all_classes_equal_arcface(degrees):
    """At 120 degrees some targets' angles pass pi with it."""
    theirs = losses.ArcFaceLoss(C, D, margin=degrees, scale=64)
    assert_equal(beside(theirs, scale=64.0, angular_margin=math.radians(degrees)), theirs)


def test_all_classes_equal_cosface():
    theirs = losses.CosFaceLoss(C, D, margin=0.35, scale=64)
    assert_equal(beside(theirs, scale=64.0, cosine_margin=0.35), theirs)


def test_the_rows_start_as_theirs():
    torch.manual_seed(0)
    assert 0.9 < SampledSoftmax(C, D).W.std() < 1.1
    doubled = SampledSoftmax(C, D, weight_init_func=lambda W: torch.nn.init.constant_(W, 2.0))
    assert (doubled.criterion.weight == 2.0).all() and doubled.W.shape == (D, C)


@pytest.mark.parametrize("options", [{}, {"weight_init_func": torch.nn.init.ones_}], ids=["usual", "ones"])
def test_made_on_meta_the_rows_start_as_those_made_at_once(options):
    torch.manual_seed(0)
    right = SampledSoftmax(C, D, **options).W
    with torch.device("meta"):
        late = SampledSoftmax(C, D, **options)
    late = late.to_empty(device="cpu")
    for reset in (late, late.criterion):  # wrappers reset what owns the parameters
        torch.manual_seed(0)
        reset.reset_parameters()
        assert torch.equal(late.W, right)


def test_a_state_dict_comes_back():
    first, second = SampledSoftmax(C, D), SampledSoftmax(C, D)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.W, second.W)


def test_a_miner_weighs_the_rows():
    theirs = losses.NormalizedSoftmaxLoss(C, D, temperature=0.05)
    mined = miners.BatchHardMiner()(*batch())
    ours = beside(theirs)
    assert_equal(ours, theirs, mined)
    assert ours(*batch(), mined) != ours(*batch())


@pytest.mark.parametrize(
    "options",
    [
        {"reducer": reducers.ThresholdReducer(low=3.0)},
        {"reducer": reducers.AvgNonZeroReducer()},
        {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.1},
        {"weight_regularizer": regularizers.RegularFaceRegularizer(), "weight_reg_weight": 0.5},
        {"weight_regularizer": regularizers.LpRegularizer()},
    ],
    ids=lambda options: type(next(iter(options.values()))).__name__,
)
def test_reducers_and_regularizers(options):
    theirs = losses.NormalizedSoftmaxLoss(C, D, temperature=0.05, **options)
    assert_equal(beside(theirs, **options), theirs)


def test_logits_and_accuracy_are_of_all_classes():
    theirs = losses.NormalizedSoftmaxLoss(C, D, temperature=0.05)
    ours, (embeddings, _) = beside(theirs, num_sampled=5), batch()
    torch.testing.assert_close(ours.get_logits(embeddings), theirs.get_logits(embeddings))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_logits_of_other_dtypes_than_the_rows_are_as_theirs(dtype):
    theirs = losses.NormalizedSoftmaxLoss(C, D, temperature=0.05)
    ours, embeddings = beside(theirs), batch()[0].to(dtype)
    theirs(embeddings, batch()[1])  # casts its rows
    tolerance = 20 * 4 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-12
    mine, right = ours.get_logits(embeddings), theirs.get_logits(embeddings)
    torch.testing.assert_close(mine, right, rtol=0, atol=tolerance)
    assert ours.criterion.weight.dtype == torch.float32


def test_sampled_it_estimates_the_loss_and_moves_the_rows_that_took_part():
    theirs = losses.NormalizedSoftmaxLoss(C, D, temperature=1.0)
    rng = torch.Generator().manual_seed(0)
    ours = beside(theirs, num_sampled=30, scale=1.0, sparse_grad=True, generator=rng)
    embeddings, labels = batch()
    assert ours.eval()(embeddings, labels).item() == pytest.approx(theirs(embeddings, labels).item(), 1e-5)
    ours.train()
    drawn = torch.stack([ours(embeddings, labels).detach() for _ in range(300)])
    assert abs(drawn.mean() - theirs(embeddings, labels)) < 4 * drawn.std() / 300**0.5 and drawn.std() > 1e-3

    ours(embeddings, labels).backward()
    gradient = ours.criterion.weight.grad.coalesce()
    touched = gradient.indices()[0]
    assert 20 < len(touched) <= 30 + len(labels.unique()) and set(labels.tolist()) <= set(touched.tolist())
    before = ours.W.detach().clone()
    RowSGD(ours.parameters(), lr=0.1).step()
    moved = (ours.W != before).any(0).nonzero().flatten()
    assert set(moved.tolist()) <= set(touched.tolist()) and len(moved) > 20


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"sparse_grad": True, "weight_regularizer": regularizers.LpRegularizer()},
            "sparse_grad: expected",
        ),
        ({"num_sampled": -1}, "num_sampled: expected"),
        ({"scale": float("nan")}, "scale: "),
        ({"angular_margin": float("nan")}, "angular_margin: expected"),
    ],
)
def test_what_does_not_go_is_said(options, words):
    with pytest.raises(ValueError, match=words):
        SampledSoftmax(C, D, **options)


def test_labels_are_any_integers():
    loss_func, (embeddings, labels) = SampledSoftmax(C, D), batch()
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(loss_func(embeddings, labels.to(dtype)), loss_func(embeddings, labels))
    for wrong, found in ((labels.float(), "torch.float32"), (labels > 0, "torch.bool")):
        with pytest.raises(TypeError, match=f"labels: expected integers, got {found}"):
            loss_func(embeddings, wrong)


def test_another_distance_is_refused_as_there():
    for distance in (distances.LpDistance(), distances.CosineSimilarity(power=2)):
        with pytest.raises(AssertionError, match="SampledSoftmax requires"):
            SampledSoftmax(C, D, distance=distance)


def test_references_and_missing_labels_are_refused_as_there():
    embeddings, labels = batch()
    with pytest.raises(ValueError, match="labels are required"):
        SampledSoftmax(C, D)(embeddings)
    with pytest.raises(ValueError, match="ref_emb"):
        SampledSoftmax(C, D)(embeddings, labels, ref_emb=embeddings + 1, ref_labels=labels + 1)


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning.distances", None)
    monkeypatch.delitem(sys.modules, "fedss_kernels.integrations.metric_learning")
    with pytest.raises(ImportError, match="pip install pytorch-metric-learning"):
        importlib.import_module("fedss_kernels.integrations.metric_learning")


def of_two_processes(rank: int, address: str, results: str) -> None:
    """Saves loss and gradients of theirs and ours, each in its wrapper, half of a batch in each process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    torch.manual_seed(0)
    theirs = losses.NormalizedSoftmaxLoss(C, D, temperature=0.05)
    saved = []
    for loss_func in (theirs, beside(theirs)):
        embeddings, labels = batch(seed=rank)
        loss = DistributedLossWrapper(loss_func)(embeddings, labels)
        loss.backward()
        rows = next(loss_func.parameters()).grad
        saved.append([loss.detach(), embeddings.grad, rows if len(rows) == C else rows.t()])
    torch.save(saved, f"{results}{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.exhaustive
def test_the_distributed_wrapper_gathers_for_it_as_for_theirs(tmp_path):
    mp.spawn(of_two_processes, (str(tmp_path / "address"), str(tmp_path / "results")), nprocs=2)
    for rank in range(2):
        theirs, ours = torch.load(tmp_path / f"results{rank}")
        for mine, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
