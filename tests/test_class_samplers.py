"""Negatives with replacement, by Zipf's law and by frequencies: how often each class comes, and the state."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from compilers import COMPILERS
from hypothesis import given
from hypothesis import strategies as st
from later import later

from fedss_kernels import FrequencySampler, SampledSoftmaxLoss, draw_batch_class_set, sampled_softmax_loss
from fedss_kernels.class_samplers import UNIFORM, draw_log_uniform
from fedss_kernels.class_sets import GeneratorHandle

C, D = 50, 8
FREQUENCIES = torch.arange(1, C + 1).flip(0) ** 2  # 2500 to 1


def samplers():
    return {"uniform": "uniform", "log_uniform": "log_uniform", "frequencies": FrequencySampler(FREQUENCIES)}


def probabilities(name):
    """The definition: TensorFlow's law, and word2vec's."""
    if name == "log_uniform":
        return torch.log((torch.arange(C).double() + 2) / (torch.arange(C) + 1)) / math.log(C + 1)
    weights = FREQUENCIES.double() ** 0.75
    return weights / weights.sum()


def uniform(n, seed=0):
    return torch.randint(UNIFORM, (n,), generator=torch.Generator().manual_seed(seed))


def draw(name, uniform):
    return draw_log_uniform(uniform, C) if name == "log_uniform" else samplers()[name].draw(uniform)


@pytest.mark.parametrize("name", ["log_uniform", "frequencies"])
def test_classes_come_as_often_as_their_probability_says(name):
    """Pearson's chi-square: 49 degrees of freedom pass 86 once in 1,000."""
    q, n = probabilities(name), 200_000
    assert q.sum().item() == pytest.approx(1)
    drawn, log_probability = draw(name, uniform(n))
    torch.testing.assert_close(log_probability, q.log()[drawn], rtol=1e-12, atol=1e-12)
    assert ((torch.bincount(drawn, minlength=C) - n * q) ** 2 / (n * q)).sum() < 86


def test_zipf_takes_each_uniform_number_to_its_class():
    """From a grid of 10,000 numbers, of which the share q_j falls to class j: to within one."""
    grid = torch.arange(10_000) * (UNIFORM // 10_000) + UNIFORM // 20_000
    drawn = draw_log_uniform(grid, C)[0]
    counts = torch.bincount(drawn, minlength=C)
    assert ((counts - 10_000 * probabilities("log_uniform")).abs() <= 1).all()
    ends = torch.tensor([0, UNIFORM - 1])
    for classes in (1, 2, C, 10**6, 2**40):
        assert draw_log_uniform(ends, classes)[0].tolist() == [0, classes - 1]


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40), st.sampled_from([0.0, 0.75, 1.0, 2.0]))
def test_tables_hold_the_frequencies(frequencies, power):
    """Each cell gives its own class or its alias: added up over the cells, what every class should have."""
    sampler = FrequencySampler(torch.tensor(frequencies, dtype=torch.float64), power)
    kept, alias, ways = (table.numpy() for table in (sampler.kept, sampler.alias, sampler.ways))
    n = len(frequencies)
    coins = UNIFORM // n
    found = kept.astype(object)
    for i in range(n):
        found[alias[i]] += int(coins - kept[i])
    assert found.tolist() == ways.tolist() and sum(found) == coins * n and (kept > 0).all()
    expected = np.array(frequencies) ** power
    np.testing.assert_allclose(ways / (coins * n), expected / expected.sum(), rtol=1e-9, atol=n / UNIFORM)


def test_a_cell_gives_its_class_below_the_kept_coins_and_its_alias_from_there_on():
    sampler, coins = FrequencySampler(torch.tensor([1, 3]), 1.0), UNIFORM // 2
    half = coins // 2  # of cell 0, whose share is 2 * 1 / 4
    assert sampler.kept.tolist() == [half, coins] and sampler.alias.tolist()[0] == 1
    cell_0 = torch.tensor([0, half - 1, half, coins - 1]) * 2
    assert sampler.draw(cell_0)[0].tolist() == [0, 0, 1, 1]
    assert sampler.draw(cell_0)[1].exp().tolist() == pytest.approx([0.25, 0.25, 0.75, 0.75])


def test_the_rarest_of_very_many_classes_can_be_drawn_and_cost_does_not_grow():
    sampler = FrequencySampler(1 / torch.arange(1, 300_001).double() ** 3, 1.0)
    assert (sampler.ways > 0).all()
    drawn, log_probability = sampler.draw(uniform(1000))
    assert drawn.shape == (1000,) and log_probability.isfinite().all()
    zeta3 = 1.2020569
    assert (drawn == 0).double().mean().item() == pytest.approx(1 / zeta3, abs=0.05)


# ---- class sets and the loss -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["log_uniform", "frequencies"])
def test_a_batchs_classes_are_there_once_and_draws_of_them_left_out(name):
    target = torch.tensor([7, 3, 7, -100, 0, 3])
    ids, counts = draw_batch_class_set(
        target, C, 400, torch.Generator().manual_seed(1), sampler=samplers()[name]
    )
    kept = counts != torch.inf
    assert ids[:6][kept[:6]].tolist() == [0, 3, 7] and not counts[:6][kept[:6]].any()
    assert ids.shape == counts.shape == (406,) and counts.dtype == torch.float32
    drawn, is_own = ids[6:], torch.isin(ids[6:], target)
    assert is_own.any() and torch.equal(kept[6:], ~is_own)
    expected = torch.log(400 * probabilities(name)).float()
    torch.testing.assert_close(counts[6:][~is_own], expected[drawn[~is_own]])


@pytest.mark.parametrize("name", ["uniform", "log_uniform", "frequencies"])
def test_every_class_counts_once_on_average(name):
    """So the denominator is the full one on average, whatever the logits: 400,000 draws / (m q_j).

    The sd of class j is 1 / sqrt(m q_j).
    """
    target, total = torch.tensor([4, 4, 11]), torch.zeros(C, dtype=torch.float64)
    g, m = torch.Generator().manual_seed(0), 400_000
    ids, counts = draw_batch_class_set(target, C, m, g, sampler=samplers()[name])
    total.index_add_(0, ids, torch.exp(-counts.double()))
    q = torch.full((C,), 1 / C, dtype=torch.float64) if name == "uniform" else probabilities(name)
    assert ((total - 1).abs() < 5 / (m * q).sqrt()).all()
    assert total[4] == total[11] == 1


@pytest.mark.parametrize("name", ["uniform", "log_uniform", "frequencies"])
def test_gradient_tends_to_the_full_softmaxs(name):
    """A hundred times as many draws, a tenth of the distance."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(6, D, generator=g), torch.randn(C, D, generator=g)
    t, sampler = torch.tensor([1, 8, 8, 30, 49, 0]), samplers()[name]

    def gradient(*class_set):
        leaf = w.clone().requires_grad_()
        sampled_softmax_loss(x, leaf, t, *class_set, scale=3.0).backward()
        return leaf.grad

    def distance(m):
        sets = [draw_batch_class_set(t, C, m, g, sampler=sampler) for _ in range(20)]
        return sum((gradient(*each) - full).norm() for each in sets) / 20 / full.norm()

    full = gradient()
    far, near = distance(200), distance(20_000)
    assert 0 < near < far / 5 and near < 0.05


# ---- in the module -----------------------------------------------------------------------------------------


def batch(B=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, D, generator=g), torch.randint(C, (B,), generator=g)


def module(name, **options):
    sampler = FREQUENCIES if name == "frequencies" else name
    return SampledSoftmaxLoss(C, D, 7, sampler=sampler, **options)


@pytest.mark.parametrize("name", ["frequencies", *later("log_uniform")])
@pytest.mark.parametrize("with_generator", [False, True])
@pytest.mark.parametrize("backend", COMPILERS)
def test_compiles_fullgraph_and_equals_eager(name, with_generator, backend):
    criterion = module(name, generator=torch.Generator().manual_seed(2) if with_generator else None)
    copied, (x, t) = copy.deepcopy(criterion), batch()
    compiled = torch.compile(criterion, fullgraph=True, backend=backend)
    torch.manual_seed(1)
    eager = copied(x, t)
    torch.manual_seed(1)
    assert torch.equal(compiled(x, t), eager)


@pytest.mark.exhaustive
@pytest.mark.parametrize("sampler", ["uniform", "log_uniform"])
def test_compiles_for_any_number_of_negatives_of_a_generator(sampler):
    torch.compiler.reset()
    handle = GeneratorHandle(torch.Generator())

    def sizes(target, num_sampled):
        return draw_batch_class_set(target, C, num_sampled, handle, sampler=sampler)

    compiled = torch.compile(sizes, backend="eager", fullgraph=True)
    for m in (4, 7, 9):
        ids, counts = compiled(torch.arange(5), m)
        assert ids.shape == counts.shape == (5 + m,)
    with_the_batch = torch.compile(lambda t: sizes(t, 2 * t.shape[0]), backend="eager", fullgraph=True)
    assert [len(with_the_batch(torch.arange(B))[0]) for B in (4, 5, 6)] == [12, 15, 18]


@pytest.mark.parametrize("name", ["log_uniform", "frequencies"])
def test_module_draws_by_its_sampler(name):
    criterion, (x, t) = module(name), batch()
    torch.manual_seed(5)
    loss = criterion(x, t)
    torch.manual_seed(5)
    class_set = draw_batch_class_set(t, C, 7, sampler=samplers()[name])
    assert torch.equal(loss, sampled_softmax_loss(x, criterion.weight, t, *class_set))
    assert torch.equal(criterion.eval()(x, t), sampled_softmax_loss(x, criterion.weight, t))


def test_tables_are_saved_loaded_and_made_again():
    criterion, (x, t) = module("frequencies"), batch()
    tables = {key: value for key, value in criterion.state_dict().items() if key.startswith("sampler.")}
    assert sorted(tables) == ["sampler.alias", "sampler.kept", "sampler.ways"]
    buffer = io.BytesIO()
    torch.save(criterion.state_dict(), buffer)
    buffer.seek(0)
    empty = module("frequencies", device="meta").to_empty(device="cpu")
    for table in empty.sampler.buffers():
        table.fill_(-1)
    remade = copy.deepcopy(empty)
    empty.load_state_dict(torch.load(buffer, weights_only=True))
    remade.reset_parameters()
    for each in (empty, remade):
        assert all(torch.equal(each.state_dict()[key], value) for key, value in tables.items())
    torch.manual_seed(0)
    loss = criterion(x, t)
    torch.manual_seed(0)
    assert torch.equal(empty(x, t), loss)


@pytest.mark.parametrize("cast", [torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double])
def test_a_cast_changes_no_probability(cast):
    sampler = FrequencySampler(FREQUENCIES)
    expected = sampler.draw(uniform(100))
    found = cast(copy.deepcopy(sampler)).draw(uniform(100))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def averaged(sampler):
    """What torch makes of its tables, which are whole numbers past what a float32 holds."""
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    average = torch.optim.swa_utils.AveragedModel(sampler, multi_avg_fn=ema, use_buffers=True)
    for _ in range(3):
        average.update_parameters(sampler)
    return average.module


CHANGED = "tables: expected those of one FrequencySampler, got others, as an average of buffers makes them"


def test_tables_that_were_averaged_draw_nothing_until_they_are_made_again():
    sampler = FrequencySampler(FREQUENCIES)
    average, expected = averaged(sampler), sampler.draw(uniform(100))
    assert not torch.equal(average.kept, sampler.kept)
    for found in (average, average.to(torch.float16), copy.deepcopy(average)):
        with pytest.raises(RuntimeError, match=CHANGED):
            found.draw(uniform(100))
    average.reset_parameters()
    assert all(map(torch.equal, average.draw(uniform(100)), expected))


@pytest.mark.parametrize("assign", [False, True])
def test_tables_that_were_averaged_are_not_loaded(assign):
    sampler = FrequencySampler(FREQUENCIES)
    expected = sampler.draw(uniform(100))
    with pytest.raises(RuntimeError, match=CHANGED):
        sampler.load_state_dict(averaged(sampler).state_dict(), assign=assign)
    of_floats = {name: table.double() for name, table in sampler.state_dict().items()}
    with pytest.raises(RuntimeError, match=CHANGED):
        sampler.load_state_dict(of_floats, assign=assign)
    assert all(map(torch.equal, sampler.draw(uniform(100)), expected))
    others = FrequencySampler(FREQUENCIES.flip(0))
    sampler.load_state_dict(others.state_dict(), assign=assign)
    assert all(map(torch.equal, sampler.draw(uniform(100)), others.draw(uniform(100))))


def test_tables_that_to_empty_left_draw_nothing_until_they_are_made_again():
    sampler = FrequencySampler(FREQUENCIES)
    expected = sampler.draw(uniform(100))
    empty = sampler.to_empty(device="cpu")
    for table in empty.buffers():
        table.data.fill_(10**6)  # what memory held
    for draw in (lambda: empty.draw(uniform(100)), lambda: empty.of_classes(range(3))):
        with pytest.raises(RuntimeError, match=CHANGED):
            draw()
        with torch.device("cpu"), pytest.raises(RuntimeError, match=CHANGED):
            draw()
    empty.reset_parameters()
    assert all(map(torch.equal, empty.draw(uniform(100)), expected))


def test_some_classes_are_drawn_as_by_the_tables_that_were_loaded():
    loaded, own = FrequencySampler(torch.ones(C)), range(7, 20)
    loaded.load_state_dict(FrequencySampler(FREQUENCIES, 1.0).state_dict())
    found = loaded.of_classes(own).draw(uniform(500))
    expected = FrequencySampler(FREQUENCIES[own.start : own.stop], 1.0).draw(uniform(500))
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def test_added_classes_need_a_new_sampler():
    criterion = module("frequencies")
    criterion.weight = torch.nn.Parameter(torch.randn(C + 1, D))
    with pytest.raises(
        ValueError, match="sampler: expected frequencies of 51 classes, got 50; for classes that"
    ):
        criterion(*batch())
    criterion.sampler = FrequencySampler(torch.ones(C + 1))
    assert criterion(*batch()).isfinite()


@pytest.mark.parametrize(
    ("sampler", "error", "message"),
    [
        ("zipf", ValueError, """sampler: expected "uniform" or "log_uniform", got 'zipf'"""),
        ([1.0] * C, ValueError, """sampler: expected "uniform" or "log_uniform", got \\[1.0"""),
        (
            [1.0] * 10**6,
            ValueError,
            r"got \[(1\.0, ){6}\.\.\.\]; frequencies are given as FrequencySampler\(",
        ),
        (torch.ones(C - 1), ValueError, "sampler: expected frequencies of 50 classes, got 49"),
        (torch.ones(C, 1), ValueError, r"sampler: expected shape \(C,\), C >= 1, got \(50, 1\)"),
        (torch.arange(C), ValueError, r"sampler: expected finite positive .* got 0.0 at position 0"),
        (torch.ones(C).index_fill(0, torch.tensor(3), math.nan), ValueError, "got nan at position 3"),
        (torch.ones(C, dtype=torch.bool), TypeError, "sampler: expected float16 or .* got bool"),
        (torch.ones(C, device="meta"), ValueError, "sampler: expected a tensor that holds numbers"),
    ],
)
def test_bad_samplers(sampler, error, message):
    with pytest.raises(error, match=message):
        SampledSoftmaxLoss(C, D, 5, sampler=sampler)


@pytest.mark.parametrize(("power", "error"), [(-1, ValueError), (math.inf, ValueError), ("1", TypeError)])
def test_bad_powers(power, error):
    with pytest.raises(error, match="sampler_power: expected a "):
        SampledSoftmaxLoss(C, D, 5, sampler=FREQUENCIES, sampler_power=power)
    with pytest.raises(error, match="power: expected a "):
        FrequencySampler(FREQUENCIES, power)


@pytest.mark.parametrize("uniform", [torch.rand(4), torch.arange(4, dtype=torch.int32)])
def test_what_draws_is_whole_numbers_of_64_bits(uniform):
    with pytest.raises(TypeError, match=f"^uniform: expected int64, got {str(uniform.dtype)[6:]}$"):
        FrequencySampler(torch.tensor([1, 1, 2])).draw(uniform)
