"""FedAwS' server step against its definition, differentiated in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_federation import DIM, NUM_CLASSES, tiny_config, tiny_data, tiny_model
from torch.nn.functional import normalize

from fedss_kernels.federated import run
from fedss_kernels.federated.learning_rate import learning_rate
from fedss_kernels.federated.randomness import NO_CLIENT, Purpose, generator, initial_rows
from fedss_kernels.federated.server import spreadout
from fedss_kernels.federated.server.row_table import SGD, RowTable
from fedss_kernels.federated.server.spreadout import Spreadout


def table_of(rows: torch.Tensor) -> RowTable:
    return RowTable(*rows.shape, SGD(1.0, 0.9), lambda ids: rows[ids])


def definition(rows: torch.Tensor, sampled: list[int], margin: float, neighbours: int) -> torch.Tensor:
    """The gradient (C, D) of the sum over the sampled rows' pairs with their nearest others."""
    rows = rows.double().requires_grad_()
    units = normalize(rows, dim=1)
    total = rows.sum() * 0
    for c in sampled:
        cosines = units[c] @ units.T
        others = [j for j in cosines.argsort(descending=True).tolist() if j != c][:neighbours]
        total = total + sum((margin - 1 + cosines[j]).clamp(min=0) ** 2 for j in others)
    return torch.autograd.grad(total, rows)[0]


def dense(ids: torch.Tensor, gradient: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.zeros(rows, gradient.shape[1]).index_copy(0, ids, gradient).double()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(2, 12),
    st.sampled_from([1, 2, 5, 11, None]),
    st.floats(0.1, 2.0),
    st.integers(1, 12),
    st.sampled_from([1, 7, 30, 10**6]),
)
def test_it_is_the_gradient_of_the_definition(seed, classes, neighbours, margin, sample, block):
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(classes, 3, generator=rng) * 0.3
    sampled = torch.randperm(classes, generator=rng)[:sample].sort().values
    before, spreadout.BLOCK = spreadout.BLOCK, block
    try:
        ids, found = Spreadout(1.0, margin, neighbours, None).gradient(table_of(rows), sampled)
    finally:
        spreadout.BLOCK = before
    assert (ids[1:] > ids[:-1]).all()
    count = classes - 1 if neighbours is None else min(neighbours, classes - 1)
    expected = definition(rows, sampled.tolist(), margin, count)
    scale = expected.abs().max().item()
    torch.testing.assert_close(dense(ids, found, classes), expected, rtol=0, atol=2e-5 * scale + 1e-6)


def test_with_every_row_and_all_neighbours_it_is_the_sum_over_all_pairs():
    rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    by_nearest = spreadout._nearest(table_of(rows), torch.arange(9), 8)[1]
    assert all(
        sorted(others) == [j for j in range(9) if j != c] for c, others in enumerate(by_nearest.tolist())
    )
    of_all = Spreadout(1.0, 0.9, None, None).gradient(table_of(rows), torch.arange(9))
    of_nearest = Spreadout(1.0, 0.9, 8, None)._of_nearest(table_of(rows), torch.arange(9), 8)
    torch.testing.assert_close(dense(*of_all, 9), dense(*of_nearest, 9), rtol=1e-4, atol=1e-6)


def test_rows_that_are_apart_or_have_no_direction_stay():
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, 0.0]])
    for neighbours in (None, 2):
        table = table_of(rows)
        Spreadout(10.0, 0.9, neighbours, None).step(table, 1.0, np.random.default_rng(0))
        assert torch.equal(table[:], rows)


@pytest.mark.parametrize("neighbours", [None, 2])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_nobodys_neighbour(neighbours, bad):
    """The others move as if it were not there, though it would be nearer than those that are opposite."""
    rows = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.5], [0.0, 0.0]])
    rows[3, 0] = bad
    expected, table = table_of(rows[:3]), table_of(rows)
    for each in (expected, table):
        Spreadout(0.3, 1.9, neighbours, None).step(each, 1.0, np.random.default_rng(0))
    torch.testing.assert_close(table[:][:3], expected[:], rtol=1e-6, atol=1e-7)
    assert not torch.equal(expected[:], rows[:3]) and torch.equal(table[:][3].isfinite(), rows[3].isfinite())


@pytest.mark.parametrize("neighbours", [None, 3])
def test_a_length_whose_square_is_past_float32_is_no_obstacle(neighbours):
    """Row 0 pushes as hard as if it were short; its own gradient goes by 1 / length."""
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    long = rows.clone()
    long[0] *= 2.0**100
    method = Spreadout(1.0, 1.5, neighbours, None)
    expected, found = (dense(*method.gradient(table_of(r), torch.arange(5)), 5) for r in (rows, long))
    expected[0] *= 2.0**-100
    for row, right in zip(found, expected, strict=True):
        torch.testing.assert_close(row / right.abs().max(), right / right.abs().max(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("neighbours", [None, 1])
def test_a_step_moves_rows_apart_and_leaves_their_velocity(neighbours):
    rows = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.0]])
    table, twin = table_of(rows), table_of(rows)
    for each in (table, twin):
        each.step(torch.tensor([0, 1]), torch.tensor([[0.0, 0.01], [0.0, 0.02]]))
    Spreadout(1.0, 0.9, neighbours, None).step(table, 0.05, np.random.default_rng(0))
    moved = table[:] - twin[:]
    units, before = normalize(table[:], dim=1), normalize(twin[:], dim=1)
    assert units[0] @ units[1] < before[0] @ before[1] - 0.01 and units[2].equal(before[2])
    for each in (table, twin):  # both coast on alike
        each.step(torch.tensor([2]), torch.zeros(1, 2))
    torch.testing.assert_close(table[:] - twin[:], moved, rtol=1e-5, atol=1e-7)
    assert torch.equal(table.rows.state, twin.rows.state)


def test_a_round_of_fedaws_is_one_of_pos_only_and_a_step_apart():
    config = {"rounds": 1, "client_lr": 0.2, "spreadout_weight": 0.5, "spreadout_margin": 1.5}
    config |= {"spreadout_neighbours": 3, "spreadout_rows": 4}
    runs = [
        run(tiny_config(method=method, **config), data=tiny_data(), model=tiny_model())
        for method in ("pos_only", "fedaws")
    ]
    rng = generator(0, 0, 0, NO_CLIENT, Purpose.SPREADOUT)
    sampled = sorted(rng.choice(NUM_CLASSES, 4, replace=False).tolist())
    gradient = definition(runs[0].weight, sampled, 1.5, 3)
    expected = runs[0].weight.double() - 0.5 * 0.2 * gradient
    torch.testing.assert_close(runs[1].weight.double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(runs[0].weight, runs[1].weight)


def test_a_class_store_is_moved_in_too(tmp_path):
    options = {"method": "fedaws", "rounds": 6, "spreadout_margin": 2.0, "checkpoint_every": 2}
    in_memory = run(tiny_config(**options), data=tiny_data(), model=tiny_model())
    in_files = run(
        tiny_config(**options, class_store=tmp_path / "rows", out=tmp_path / "run"),
        data=tiny_data(),
        model=tiny_model(),
    )
    assert torch.equal(in_files.table[:], in_memory.weight)
    start = initial_rows(0, torch.arange(NUM_CLASSES), DIM, 0.5)
    assert (in_memory.weight != start).any(1).all()  # class 6, which nobody holds, too


def test_every_round_spreads_at_its_own_rate_and_over_rows_of_its_own(monkeypatch):
    seen = []

    def note(self, table, lr, rng):
        seen.append((lr, rng.integers(2**40)))

    monkeypatch.setattr(Spreadout, "step", note)
    config = tiny_config(method="fedaws", rounds=4, warmup_rounds=2, lr_decay="cosine")
    run(config, data=tiny_data(), model=tiny_model())
    assert [lr for lr, _ in seen] == [learning_rate(config, round) for round in range(4)]
    assert [draw for _, draw in seen] == [
        generator(0, round, 0, NO_CLIENT, Purpose.SPREADOUT).integers(2**40) for round in range(4)
    ]
    assert len(set(seen)) == 4
