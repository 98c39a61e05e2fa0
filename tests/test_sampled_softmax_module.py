"""SampledSoftmaxLoss, the module, and the class sets it draws for its batches."""

import contextlib
import copy
import io
import pickle

import numpy as np
import pytest
import torch
from compilers import COMPILERS
from largest_made import LargestMade
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedss_kernels import SampledSoftmaxLoss, draw_batch_class_set, sampled_softmax_loss

C, D = 50, 8


def batch(B=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, D, generator=g), torch.randint(C, (B,), generator=g)


@pytest.mark.parametrize("how", ["eval", "num_sampled=None", "num_sampled=C"])
def test_full_softmax(how):
    num_sampled = {"eval": 5, "num_sampled=None": None, "num_sampled=C": C}[how]
    criterion = SampledSoftmaxLoss(C, D, num_sampled, bias=True)
    criterion.train(how != "eval")
    x, t = batch()
    expected = sampled_softmax_loss(x, criterion.weight, t, bias=criterion.bias)
    assert torch.equal(criterion(x, t), expected)


def test_training_draws_anew_each_time():
    criterion = SampledSoftmaxLoss(C, D, 5)
    x, t = batch()
    assert criterion(x, t) != criterion(x, t)


def test_generator_makes_it_repeatable():
    def run():
        criterion = SampledSoftmaxLoss(C, D, 5, generator=torch.Generator().manual_seed(3))
        return [criterion(*batch()).item() for _ in range(3)]

    first = run()
    torch.manual_seed(99)
    assert run() == first


@pytest.mark.exhaustive
def test_compiles_fullgraph_and_equals_eager():
    criterion = SampledSoftmaxLoss(C, D, 7, learn_scale=True)
    x, t = batch()
    t[3] = -100
    compiled = torch.compile(criterion, fullgraph=True)
    torch.manual_seed(1)
    eager = criterion(x, t)
    torch.manual_seed(1)
    assert torch.equal(compiled(x, t), eager)


@pytest.mark.parametrize("scale", [torch.tensor(5.0), torch.tensor([5.0], requires_grad=True)])
def test_a_learned_scale_begins_with_a_tensors_number(scale):
    criterion = SampledSoftmaxLoss(C, D, scale=scale, learn_scale=True)
    assert criterion.scale is not scale and criterion.scale.tolist() == [5.0]


@pytest.mark.parametrize("backend", COMPILERS)
def test_compiles_fullgraph_with_a_generator_and_equals_eager(backend):
    """Two losses, so two draws, which a compiler must not take for one; a copy draws as the original does."""
    criterion = SampledSoftmaxLoss(C, D, 7, generator=torch.Generator().manual_seed(5))
    copied = copy.deepcopy(criterion)
    assert copied.generator.generator is not criterion.generator.generator
    x, t = batch()
    compiled = torch.compile(lambda x: (criterion(x, t), criterion(x, t)), fullgraph=True, backend=backend)
    for _ in range(2):
        first, second = compiled(x)
        assert torch.equal(first, copied(x, t)) and torch.equal(second, copied(x, t)) and first != second


def test_trains():
    """200 steps on 50 separable classes: from chance to every one right."""
    torch.manual_seed(0)
    means = torch.randn(C, D)
    criterion = SampledSoftmaxLoss(C, D, 10, learn_scale=True)
    optimizer = torch.optim.SGD(criterion.parameters(), lr=1.0)
    for _ in range(200):
        t = torch.randint(C, (64,))
        loss = criterion(means[t] + 0.05 * torch.randn(64, D), t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (criterion.topk(means, 1).indices[:, 0] == torch.arange(C)).all()


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("block_size", [1, 7, 50, 1000])
def test_topk_equals_sorting_all_logits(similarity, block_size):
    criterion = SampledSoftmaxLoss(C, D, similarity=similarity, bias=True, scale=3.0).double()
    torch.nn.init.normal_(criterion.bias)
    x = torch.randn(4, 3, D, dtype=torch.float64)
    rows, weight = x, criterion.weight
    if similarity == "cosine":
        rows, weight = (torch.nn.functional.normalize(r, dim=-1) for r in (rows, weight))
    expected = (3.0 * rows @ weight.T + criterion.bias).topk(9)
    values, indices = criterion.topk(x, 9, block_size)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(indices, expected.indices) and indices.shape == (4, 3, 9)


def test_topk_of_rows_of_any_length():
    criterion = SampledSoftmaxLoss(C, D)
    x = torch.randn(3, D)
    expected = criterion.topk(x, 4).indices
    for length in (1e25, 1e-9):
        assert torch.equal(criterion.topk(x * length, 4).indices, expected)
    assert not criterion.topk(x * 1e-14, 4).values.any()  # a zero row: cosine 0 with every class
    criterion.double()
    expected = criterion.topk(x.double(), 4)
    for length in (1e160, 1e200, 1e300):  # whose squares pass float64's largest number
        found = criterion.topk(x.double() * length, 4)
        assert torch.equal(found.indices, expected.indices)
        torch.testing.assert_close(found.values, expected.values)


def test_topk_says_which_logits_are_not_finite():
    """They come first, as in torch.topk, in any block."""
    criterion = SampledSoftmaxLoss(9, 2)
    with torch.no_grad():
        criterion.weight[[2, 7]] = torch.tensor([[torch.nan, 1], [1, torch.inf]])
    for block_size in (1, 4, 9):
        values, indices = criterion.topk(torch.ones(3, 2), 4, block_size)
        assert values.isnan().tolist() == [[True, True, False, False]] * 3
        assert (indices[:, :2].sort().values == torch.tensor([2, 7])).all()


@pytest.mark.parametrize("scale", [1e-3, 20.0, 1e6])
def test_topk_of_classes_of_any_length(scale):
    """Each row of the matrix at another length; the last two too long to square, too short for a cosine."""
    criterion, x = SampledSoftmaxLoss(C, D, scale=scale), torch.randn(3, D)
    weight = criterion.weight.data
    expected = scale * torch.nn.functional.cosine_similarity(x.double()[:, None], weight.double(), dim=-1)
    weight *= 10.0 ** torch.linspace(-10, 37, C)[:, None]
    weight[-2:] *= torch.tensor([[3e38 / weight[-2].abs().max()], [1e-13 / weight[-1].norm()]])
    expected[:, -1] = 0
    for dtype in (torch.float32, torch.float64):
        criterion.to(dtype)
        if dtype == torch.float64:
            criterion.weight.data[:-1] *= 1e250
        values, indices = criterion.topk(x, C)
        assert torch.equal(indices.sort().values, torch.arange(C).expand(3, C))
        exact = expected.gather(1, indices).to(dtype)
        torch.testing.assert_close(values, exact, rtol=1e-5, atol=1e-6 * scale)


def test_topk_of_a_few_rows_copies_no_block_of_the_matrix():
    criterion, x = SampledSoftmaxLoss(200, 64), torch.randn(4, 64)
    with LargestMade([criterion.weight]) as largest:
        criterion.topk(x, 3, block_size=100)
    assert largest.elements == 4 * 100  # the logits of a block


def test_state_copies_and_saves():
    generator = torch.Generator().manual_seed(1)
    criterion = SampledSoftmaxLoss(C, D, 5, bias=True, learn_scale=True, generator=generator)
    x, t = batch()
    copied = pickle.loads(pickle.dumps(criterion)).eval()
    buffer = io.BytesIO()
    torch.save(criterion.state_dict(), buffer)
    buffer.seek(0)
    loaded = SampledSoftmaxLoss(C, D, 5, bias=True, learn_scale=True).eval()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(copied(x, t), loaded(x, t))


def test_representation_says_what_it_is():
    shown = repr(SampledSoftmaxLoss(C, D, 5))
    assert shown == (
        "SampledSoftmaxLoss(50, 8, num_sampled=5, scale=20.0, similarity='cosine', bias=False, "
        "sparse_grad=False)"
    )
    options = {"sampler": "log_uniform", "angular_margin": 0.5, "cosine_margin": 0.25}
    options |= {"label_smoothing": 0.1, "ignore_index": 0, "reduction": "sum", "return_lse": True}
    shown = repr(SampledSoftmaxLoss(C, D, 5, class_weight=torch.ones(C), **options, impl="cpp"))
    words = ", ".join(f"{name}={value!r}" for name, value in (options | {"impl": "cpp"}).items())
    assert f"sparse_grad=False, {words}, class_weight=True)" in shown
    shown = repr(SampledSoftmaxLoss(C, D, 5, sampler=torch.arange(1, C + 1)))
    assert shown.count("sampler") == 1 and "(sampler): FrequencySampler(50, power=0.75)" in shown


@pytest.mark.parametrize("target", [C, -1, 2**62])
def test_a_class_that_is_none_is_not_drawn_for(target):
    """Nothing is drawn: the generator is as it was."""
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    with pytest.raises(
        IndexError, match=rf"^target\[1\] = {target}, expected a class in \[0, 50\) or ignore"
    ):
        draw_batch_class_set(torch.tensor([-100, target]), C, 5, generator)
    assert torch.equal(generator.get_state(), before)
    draw_batch_class_set(torch.tensor([-100, 3]), C, 5, generator)


WRONG = {
    "columns": {"input": torch.ones(2, D + 1)},
    "dtype": {"input": torch.ones(2, D, dtype=torch.int64)},
    "no tensor": {"input": [[1.0]]},
    "rows": {"input": torch.ones(3, D)},
    "class": {"target": torch.tensor([1, C])},
    "negative class": {"target": torch.tensor([-1, -100])},
    "margins' shape": {"cosine_margin": torch.ones(3)},
    "margin": {"angular_margin": torch.tensor([0.1, torch.nan])},
    "labels' shape": {"target_labels": torch.tensor([1])},
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("with_generator", [False, True])
def test_a_call_that_is_refused_draws_nothing(wrong, with_generator):
    generator = torch.Generator() if with_generator else None
    criterion = SampledSoftmaxLoss(C, D, 5, generator=generator)
    drawn_from = generator or torch.default_generator
    before = drawn_from.get_state()
    with pytest.raises((TypeError, ValueError, IndexError)):
        criterion(**{"input": torch.ones(2, D), "target": torch.tensor([1, 2])} | WRONG[wrong])
    assert torch.equal(drawn_from.get_state(), before)


@pytest.mark.parametrize("left", ["bias", "class_weight"])
def test_nor_does_one_whose_weight_alone_has_grown(left):
    generator = torch.Generator().manual_seed(0)
    criterion = SampledSoftmaxLoss(C, D, 5, generator=generator, bias=True, class_weight=torch.ones(C))
    for name in {"weight", "bias", "class_weight"} - {left}:
        held = getattr(criterion, name).detach()
        grown = torch.cat([held, held[:3]])
        setattr(criterion, name, grown if name == "class_weight" else torch.nn.Parameter(grown))
    before = generator.get_state()
    with pytest.raises(ValueError, match=f"^{left}: expected shape"):
        criterion(*batch())
    assert torch.equal(generator.get_state(), before)


def test_a_scale_may_lie_where_the_module_does():
    """On meta, which stands for any other device than the CPU."""
    scale = torch.tensor(5.0, device="meta")
    assert SampledSoftmaxLoss(C, D, scale=scale, device="meta").scale is scale
    with pytest.raises(ValueError, match="scale: expected a number to begin with"):
        SampledSoftmaxLoss(C, D, scale=scale, learn_scale=True, device="meta")
    with pytest.raises(ValueError, match="scale: expected a tensor on cpu, got one on meta"):
        SampledSoftmaxLoss(C, D, scale=scale)


# ---- its parameters ----------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_weight():
    """Classes added by assigning a larger weight are drawn, corrected for, found by topk and told."""
    criterion = SampledSoftmaxLoss(4, D, 3, bias=True, generator=torch.Generator().manual_seed(0))
    criterion.weight = torch.nn.Parameter(torch.cat([criterion.weight.detach(), torch.randn(C - 4, D)]))
    x, t = batch()
    with pytest.raises(ValueError, match=r"bias: expected shape \(50,\) = \(C,\), got \(4,\)"):
        criterion(x, t)
    criterion.bias = torch.nn.Parameter(torch.zeros(C))
    assert (criterion.num_classes, criterion.embedding_dim) == (C, D)
    assert repr(criterion).startswith("SampledSoftmaxLoss(50, 8, ")
    twin = torch.Generator()
    twin.set_state(criterion.generator.get_state())
    class_ids, counts = draw_batch_class_set(t, C, 3, twin)
    assert class_ids[len(t) :].max() >= 4
    expected = sampled_softmax_loss(x, criterion.weight, t, class_ids, counts, bias=criterion.bias)
    assert torch.equal(criterion(x, t), expected)
    found = criterion.topk(criterion.weight.detach(), 1).indices[:, 0]
    assert torch.equal(found, torch.arange(C))


def test_class_weights_of_other_classes_stay_at_a_reset():
    grown = SampledSoftmaxLoss(C, D, 5, class_weight=torch.rand(C))
    late = SampledSoftmaxLoss(C + 2, D, 5)
    grown.weight = torch.nn.Parameter(torch.randn(C + 2, D))
    for criterion in (grown, late):
        criterion.class_weight = torch.arange(C + 2.0)
        criterion.reset_parameters()
        assert torch.equal(criterion.class_weight, torch.arange(C + 2.0))


def test_class_weights_without_numbers_are_refused():
    with torch.device("meta"), pytest.raises(ValueError, match=r'class_weight: .*the device "meta"'):
        SampledSoftmaxLoss(C, D, 5, class_weight=torch.ones(C))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_class_weights_that_are_assigned_as_a_parameter_count(requires_grad):
    x, t, shares = torch.randn(6, D), torch.randint(C, (6,)), torch.rand(C) + 0.1
    criterion = SampledSoftmaxLoss(C, D)
    criterion.class_weight = shares
    expected = criterion(x, t)
    criterion.class_weight = nn.Parameter(shares, requires_grad=requires_grad)
    assert "class_weight=True" in repr(criterion)
    if requires_grad:
        with pytest.raises(ValueError, match="class_weight: expected a constant"):
            criterion(x, t)
    else:
        assert torch.equal(criterion(x, t), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_reset_parameters_makes_what_a_new_module_has(dtype):
    def new(device):
        generator = torch.Generator().manual_seed(4)
        options = {"bias": True, "learn_scale": True, "scale": 7.0, "dtype": dtype, "device": device}
        return SampledSoftmaxLoss(C, D, 5, generator=generator, class_weight=weights, **options)

    weights = torch.rand(C, generator=torch.Generator().manual_seed(5))

    fresh, late = new("cpu"), new("meta").to_empty(device="cpu")
    for tensor in (*late.parameters(), *late.buffers()):
        tensor.data.fill_(torch.nan)
    late.reset_parameters()
    assert torch.equal(late.class_weight, weights)
    for (name, a), (_, b) in zip(fresh.named_parameters(), late.named_parameters(), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype == dtype, name
    x, t = batch()
    assert torch.equal(fresh(x, t), late(x, t))  # the same negatives too


def test_a_module_made_on_the_default_device_meta_and_one_of_a_given_parameter():
    with torch.device("meta"):
        late = [SampledSoftmaxLoss(C, D, learn_scale=True, scale=7.0, bias=True)]
    late += [SampledSoftmaxLoss(C, D, scale=nn.Parameter(torch.tensor(7.0)))]
    for criterion in late:
        criterion.to_empty(device="cpu").scale.data.fill_(torch.nan)
        criterion.reset_parameters()
        assert criterion.scale.item() == 7.0


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_modules_under_vmap_with_its_randomness_refused(sparse_grad):
    criterion = SampledSoftmaxLoss(C, D, sparse_grad=sparse_grad)
    x, t = batch()
    state = torch.get_rng_state()

    def loss(x):
        return torch.func.functional_call(criterion, dict(criterion.named_parameters()), (x, t))

    with torch.no_grad():
        together = torch.vmap(loss)(torch.stack([x, 2 * x]))
        assert torch.equal(together, torch.stack([loss(x), loss(2 * x)]))
    assert torch.equal(torch.get_rng_state(), state)


ROUTES = ["auto", "reference", "triton", "autocast", "compiled"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_scale_of_shape_1_is_as_one_of_shape_0(route, reduction):
    x, t = batch()
    w = torch.randn(C, D, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def loss(scale):
        impl = route if route in ("reference", "triton") else "auto"
        return sampled_softmax_loss(x, w, t, scale=scale, reduction=reduction, impl=impl)

    results = []
    for shape in ((), (1,)):
        torch.compiler.reset()
        scale = torch.full(shape, 7.3, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=route == "autocast"):
            value = (
                torch.compile(loss, fullgraph=True, backend="aot_eager") if route == "compiled" else loss
            )(scale)
        gradient, dw = torch.autograd.grad(value.sum(), (scale, w), retain_graph=True)
        assert gradient.shape == shape and value.shape == (t.shape if reduction == "none" else ())
        results.append((value, gradient.reshape(()), dw))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    if route in ("auto", "triton", "autocast"):
        (gradient,) = torch.autograd.grad(loss(scale).sum(), scale, create_graph=True)
        assert gradient.shape == (1,)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            gradient.sum().backward()


def test_a_learned_scale_has_the_modules_dtype_and_loads_one_of_shape_0():
    for dtype in (torch.float32, torch.float64):
        module = torch.nn.Sequential(SampledSoftmaxLoss(C, D, learn_scale=True, dtype=dtype))
        assert module[0].scale.dtype == dtype and module[0].scale.shape == (1,)
        state = module.state_dict() | {"0.scale": torch.tensor(3.0)}
        kept = dict(state)
        module.load_state_dict(state)
        assert module[0].scale.tolist() == [3.0] and state["0.scale"].shape == ()
        assert state.keys() == kept.keys()


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_parameters_are_met_once_and_under_the_same_names(sparse_grad):
    model = torch.nn.Sequential(
        torch.nn.Linear(2, D), SampledSoftmaxLoss(C, D, 5, sparse_grad=sparse_grad, learn_scale=True)
    )
    names = ["0.weight", "0.bias", "1.weight", "1.scale"]
    assert sorted(model.state_dict()) == sorted(names)
    for once in (True, False):
        found = list(model.named_parameters(remove_duplicate=once))
        assert sorted(name for name, _ in found) == sorted(names)
    assert dict(found)["1.weight"] is model[1].weight and isinstance(model[1].weight, torch.nn.Parameter)
    assert [name for name, _ in model.named_children()] == ["0", "1"]
    assert not any(isinstance(module, torch.nn.Embedding) for module in model.modules())
    by_module = [p for module in model.modules() for p in module.parameters(recurse=False)]
    assert len(by_module) == len(set(by_module)) == len(names)  # as for groups of an optimiser
    copied = copy.deepcopy(model)
    assert list(copied.state_dict()) == list(model.state_dict())
    assert not any(module.training for module in model.eval().modules())


# ---- what is around it -------------------------------------------------------------------------------------


def test_topk_under_autocast_is_as_without():
    criterion = SampledSoftmaxLoss(2000, 64, bias=True)
    x = torch.randn(100, 64)
    expected = criterion.topk(x, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = criterion.topk(x, 5)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.values, expected.values)


@pytest.mark.parametrize("around", ["autocast", "float64", "meta", "deterministic", "inference"])
def test_what_is_around_it_changes_nothing(around):
    """But for the loss under autocast, which rounds rows."""
    generator = torch.Generator().manual_seed(2)
    criterion = SampledSoftmaxLoss(C, D, 5, bias=True, learn_scale=True, generator=generator)
    twin, (x, t) = copy.deepcopy(criterion), batch()
    expected = criterion(x, t), *criterion.topk(x, 5), *draw_batch_class_set(t, C, 5, criterion.generator)
    try:
        with {
            "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
            "meta": lambda: torch.device("meta"),
            "inference": torch.inference_mode,
        }.get(around, contextlib.nullcontext)():
            if around == "float64":
                torch.set_default_dtype(torch.float64)
            if around == "deterministic":
                torch.use_deterministic_algorithms(True)
            found = twin(x, t), *twin.topk(x, 5), *draw_batch_class_set(t, C, 5, twin.generator)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == b.dtype
        assert torch.equal(a, b) or (around == "autocast" and i == 0)


def test_a_generator_handled_in_inference_mode_can_be_drawn_from_outside():
    criterion = SampledSoftmaxLoss(C, D, 5, generator=torch.Generator())
    with torch.inference_mode():
        copied = copy.deepcopy(criterion.generator)
    first = draw_batch_class_set(batch()[1], C, 5, copied)[0]
    assert torch.equal(first, draw_batch_class_set(batch()[1], C, 5, criterion.generator)[0])


@pytest.mark.exhaustive  # a process that imports torch
def test_a_generator_goes_to_another_process(tmp_path):
    """In the state that it has, and as one where two criteria draw from it."""
    generator = torch.Generator().manual_seed(1)
    torch.rand(3, generator=generator)
    criteria = torch.nn.ModuleList(SampledSoftmaxLoss(C, D, 5, generator=generator) for _ in range(2))
    process = torch.multiprocessing.get_context("spawn").Process(
        target=torch.save, args=(criteria, tmp_path / "criteria.pt")
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    found = torch.load(tmp_path / "criteria.pt", weights_only=False)
    assert torch.equal(found[0].generator.get_state(), generator.get_state())
    for copied, criterion in zip(found, criteria, strict=True):
        assert torch.equal(copied(*batch()), criterion(*batch()))


def test_a_generator_is_in_no_exported_program():
    """Which would draw from whatever generator has its number where it is loaded."""
    x, t = torch.randn(6, D), torch.randint(C, (6,))
    criterion = SampledSoftmaxLoss(C, D, 5, generator=torch.Generator().manual_seed(1))
    with pytest.raises(Exception, match="generator: expected None in torch.export"):
        torch.export.export(criterion, (x, t))
    torch.export.export(criterion.eval(), (x, t))
    criterion.train().generator = None
    torch.export.export(criterion, (x, t))


def test_a_generator_may_be_given_later():
    criterion, twin = (SampledSoftmaxLoss(C, D, 5) for _ in range(2))
    for module in (criterion, twin):
        module.generator = torch.Generator().manual_seed(1)
        module.reset_parameters()
    assert torch.equal(criterion.weight, twin.weight) and torch.equal(criterion(*batch()), twin(*batch()))


def test_the_generators_state_resumes_the_negatives():
    def new():
        return SampledSoftmaxLoss(C, D, 5, generator=torch.Generator().manual_seed(8))

    criterion = new()
    criterion(*batch())
    buffer = io.BytesIO()
    torch.save({"criterion": criterion.state_dict(), "generator": criterion.generator.get_state()}, buffer)
    expected = [criterion(*batch()) for _ in range(2)]
    buffer.seek(0)
    saved, resumed = torch.load(buffer, weights_only=True), new()
    resumed.load_state_dict(saved["criterion"])
    resumed.generator.set_state(saved["generator"])
    assert [resumed(*batch()) for _ in range(2)] == expected


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_negatives_or_refuses(use_reentrant):
    x, t = batch()
    x.requires_grad_()

    def run(criterion):
        checkpoint(lambda x: criterion(x * 2, t), x, use_reentrant=use_reentrant).backward()
        return criterion.weight.grad

    plain = SampledSoftmaxLoss(C, D, 5)
    torch.manual_seed(3)
    found = run(copy.deepcopy(plain))
    torch.manual_seed(3)
    plain(x * 2, t).backward()
    assert torch.equal(found, plain.weight.grad)

    criterion = SampledSoftmaxLoss(C, D, 5, generator=torch.Generator())
    with pytest.raises(RuntimeError, match="generator: expected a class set to be drawn in the forward pass"):
        run(criterion)
    with pytest.raises(RuntimeError, match="generator: expected a class set to be drawn in the forward pass"):
        drawn = checkpoint(
            lambda x: x.sum() * draw_batch_class_set(t, C, 5, torch.Generator())[0].sum(),
            x,
            use_reentrant=True,
        )
        drawn.backward()
    run(criterion.eval())  # draws nothing


def test_hooks_on_gradients_draw_with_the_default_generator_alone():
    x, t = batch()
    for generator in (None, torch.Generator()):
        criterion = SampledSoftmaxLoss(C, D, 5, generator=generator)
        seen = []
        leaf = x.clone().requires_grad_()
        leaf.register_hook(lambda grad, c=criterion, seen=seen: seen.append(c(x, t)))
        loss = (leaf * 2).sum()
        if generator is None:
            loss.backward()
            assert seen[0].isfinite()
        else:
            with pytest.raises(RuntimeError, match="in the forward pass, not in the backward .* of hooks on"):
                loss.backward()


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_weight_that_others_make(norm):
    """Dense gradients pass through weight_norm, sparse ones are refused with the cause and the way."""
    x, t = batch()
    dense = norm(SampledSoftmaxLoss(C, D, 5))
    dense(x, t).backward()
    assert all(p.grad.isfinite().all() for p in dense.parameters())
    sparse = norm(SampledSoftmaxLoss(C, D, 5, sparse_grad=True))
    with pytest.raises(
        RuntimeError, match="sparse_grad: expected False .* weight_norm, .* take sparse_grad=F"
    ):
        sparse(x, t)
    sparse.eval()
    with torch.no_grad():
        sparse(x, t)
    spectral = nn.utils.parametrizations.spectral_norm(SampledSoftmaxLoss(C, D, 5, sparse_grad=True))
    spectral(x, t).backward()  # by a division, which takes them
    assert spectral.parametrizations.weight.original.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing_is_refused_with_the_way():
    x, t = batch()
    for criterion in (SampledSoftmaxLoss(C, D, 5), SampledSoftmaxLoss(C, D).eval()):
        with pytest.raises(
            RuntimeError, match=r"torch.jit.trace cannot record it.* take torch.export.export"
        ):
            torch.jit.trace(criterion, (x, t))


def test_sizes_assigned_later_are_checked():
    x, t = batch()
    criterion = SampledSoftmaxLoss(C, D, 5)
    for bad in ("3", 2.5, True):
        criterion.num_sampled = bad
        with pytest.raises(TypeError, match="num_sampled: expected an integer, got"):
            criterion(x, t)
    criterion.num_sampled = np.int64(C)  # all of them
    full = SampledSoftmaxLoss(C, D)
    full.load_state_dict(criterion.state_dict())
    assert torch.equal(criterion(x, t), full(x, t))


# ---- draw_batch_class_set
# --------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [0, 1, 5, 46, 47, 60])
def test_batch_class_set_holds_positives_once_and_negatives_outside(m):
    target = torch.tensor([7, 3, 7, -100, 49, 3])
    ids, counts = draw_batch_class_set(target, C, m, torch.Generator().manual_seed(m))
    kept = counts != torch.inf
    positives, negatives = ids[:6][kept[:6]], ids[6:]
    assert positives.sort().values.tolist() == [3, 7, 49] and not counts[:6][kept[:6]].any()
    assert len(negatives) == m and not set(negatives.tolist()) & {3, 7, 49}
    if m:
        torch.testing.assert_close(counts[6:], torch.log(torch.tensor(m / 47)).expand(m))
    if m == 47:  # as many as there are: each of them once
        assert sorted(negatives.tolist()) == [j for j in range(C) if j not in (3, 7, 49)]


@pytest.mark.exhaustive
def test_every_other_class_is_expected_equally_often():
    """m / (C - |P|) draws of each: 20,000 sets of 9 among 47 give 3,830 a class, sd at most sqrt(that)."""
    g = torch.Generator().manual_seed(0)
    target, seen = torch.tensor([0, 25, 49]), torch.zeros(C)
    for _ in range(20_000):
        seen += torch.bincount(draw_batch_class_set(target, C, 9, g)[0][3:], minlength=C)
    others = torch.ones(C, dtype=torch.bool)
    others[target] = False
    expected = 20_000 * 9 / 47
    assert not seen[target].any()
    assert ((seen[others] - expected).abs() < 5 * expected**0.5).all()


def test_batch_that_holds_every_class_leaves_all_draws_out():
    ids, counts = draw_batch_class_set(torch.arange(4), 4, 3)
    assert ids.max() < 4 and (counts[4:] == torch.inf).all()
    x, w = torch.randn(4, D), torch.randn(4, D)
    loss = sampled_softmax_loss(x, w, torch.arange(4), ids, counts)
    assert torch.equal(loss, sampled_softmax_loss(x, w, torch.arange(4)))


def test_denominator_is_the_full_one_on_average():
    """What the correction is for: the mean over draws of the sampled denominator is the full one's, to 1%."""
    g = torch.Generator().manual_seed(0)
    w, target = torch.randn(C, D, generator=g), torch.tensor([4, 4, 11])
    exp_logits = torch.exp(w @ torch.randn(D, generator=g) / 3)
    total = 0.0
    for _ in range(4000):
        ids, counts = draw_batch_class_set(target, C, 10, g)
        total += (exp_logits[ids] * torch.exp(-counts)).sum().item() / 4000
    assert total == pytest.approx(exp_logits.sum().item(), rel=0.01)


@pytest.mark.parametrize(
    ("scale", "dtype"), [(70_000.0, torch.float16), (1e300, torch.float32), (1e300, None)]
)
def test_a_scale_that_its_dtype_does_not_hold_is_refused_where_it_is_learned(scale, dtype):
    with pytest.raises(ValueError, match=r"scale: expected a number that torch\.float\d\d holds"):
        SampledSoftmaxLoss(10, 4, 3, scale=scale, learn_scale=True, dtype=dtype)
    assert SampledSoftmaxLoss(10, 4, 3, scale=20.0, learn_scale=True, dtype=torch.float16).scale.item() == 20


def test_margins_are_the_functions_and_only_of_cosines():
    criterion = SampledSoftmaxLoss(9, 4, angular_margin=0.5, cosine_margin=0.1)
    input, target = torch.randn(3, 4), torch.tensor([1, 2, 1])
    margins = {"angular_margin": 0.5, "cosine_margin": 0.1}
    right = sampled_softmax_loss(input, criterion.weight, target, **margins)
    assert torch.equal(criterion(input, target), right)
    assert not torch.equal(right, sampled_softmax_loss(input, criterion.weight, target))
    with pytest.raises(ValueError, match='cosine_margin: expected 0 for similarity="dot"'):
        SampledSoftmaxLoss(9, 4, similarity="dot", cosine_margin=0.1)
    with pytest.raises(TypeError, match="angular_margin: expected a number, got str"):
        SampledSoftmaxLoss(9, 4, angular_margin="much")
