"""The server's matrices: a lazy row equals a dense one, reading changes nothing, memory and files agree."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedss_kernels import _C
from fedss_kernels.federated.randomness import initial_rows
from fedss_kernels.federated.server.class_store import ClassStore
from fedss_kernels.federated.server.row_table import SGD, Adagrad, RowTable
from fedss_kernels.federated.server.rows import Rows

NOTHING = torch.empty(0, dtype=torch.int64)


def draw(ids):
    return initial_rows(0, ids, 3, 1.0)


def table(num_rows=5, optimizer=None, folder=None, dim=3):
    store = ClassStore.new(folder, num_rows, dim) if folder else None
    return RowTable(num_rows, dim, optimizer or SGD(1.0, 0.9), lambda i: initial_rows(0, i, dim, 1.0), store)


def gradient(seed, ids, dim=3):
    return torch.randn(len(ids), dim, generator=torch.Generator().manual_seed(seed))


class Dense:
    """v <- beta v + g, W <- W - lr v on every row, in float64."""

    def __init__(self, num_rows, lr, momentum):
        self.lr, self.momentum = lr, momentum
        self.weight = draw(torch.arange(num_rows)).double().numpy()
        self.velocity = np.zeros_like(self.weight)

    def step(self, ids, rows):
        self.velocity *= self.momentum
        self.velocity[ids.numpy()] += rows.double().numpy()
        self.weight -= self.lr * self.velocity


GAPS = st.one_of(st.integers(0, 5), st.sampled_from([37, 200]))
TOUCHES = st.lists(st.tuples(st.sets(st.integers(0, 4)), GAPS), min_size=1, max_size=12)


@pytest.mark.exhaustive
@settings(deadline=None, max_examples=60)
@given(TOUCHES, st.sampled_from([0.0, 0.5, 0.9, 0.99]), st.sampled_from([1.0, 0.3]))
def test_lazy_rows_equal_dense_ones_for_any_touches_and_gaps(touches, momentum, lr):
    lazy, dense = table(optimizer=SGD(lr, momentum)), Dense(5, lr, momentum)
    for seed, (ids, gap) in enumerate(touches):
        ids = torch.tensor(sorted(ids), dtype=torch.int64)
        for each in (ids, *[NOTHING] * gap):
            g = gradient(seed, each)
            lazy.step(each, g)
            dense.step(each, g)
        reach = 1 + lr * len(touches) * 4 / (1 - momentum)  # of the largest partial sum
        np.testing.assert_allclose(lazy[:].numpy(), dense.weight, rtol=0, atol=1e-6 * reach)


@pytest.mark.exhaustive
@pytest.mark.parametrize("momentum", [0.9, 0.999])
def test_a_gap_of_ten_thousand_steps(momentum):
    lazy, dense = table(optimizer=SGD(1.0, momentum)), Dense(5, 1.0, momentum)
    for ids in (torch.tensor([1, 3]), *[NOTHING] * 10_000, torch.tensor([1])):
        for each in (lazy, dense):
            each.step(ids, gradient(7, ids))
    np.testing.assert_allclose(lazy[:].numpy(), dense.weight, rtol=1e-5, atol=1e-5)


def play(each, looks):
    """Ten steps of some rows; `looks`: read everything in between."""
    for round in range(10):
        ids = torch.tensor(sorted({round % 5, (3 * round + 1) % 5}))
        each.step(ids, gradient(round, ids))
        if looks:
            each[:]
            each.read(torch.tensor([4, 0, 0]))
    return each[:]


@pytest.mark.parametrize("optimizer", [SGD(1.0, 0.9), SGD(0.5, 0.0), Adagrad(0.1)])
def test_when_and_how_often_one_reads_changes_no_bit(optimizer):
    quiet, read = table(optimizer=optimizer), table(optimizer=optimizer)
    assert torch.equal(play(quiet, looks=False), play(read, looks=True))
    for a, b in zip(vars(quiet.rows).values(), vars(read.rows).values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("optimizer", [SGD(1.0, 0.9), Adagrad(0.1)])
def test_files_agree_with_memory_bit_for_bit(optimizer, tmp_path):
    assert torch.equal(
        play(table(optimizer=optimizer), False), play(table(optimizer=optimizer, folder=tmp_path), True)
    )
    with pytest.raises(FileExistsError):
        table(folder=tmp_path)


def test_files_hold_no_zeros(tmp_path):
    """A hundred million rows of 64: 52 GB, of which four pages at most are there after a step of two rows."""
    big = table(10**8, folder=tmp_path, dim=64)
    ids = torch.tensor([5, 10**8 - 1])
    expected = initial_rows(0, ids, 64, 1.0) - 1
    big.step(ids, torch.ones(2, 64))
    assert torch.equal(big.read(ids), expected)
    file = tmp_path / "rows.bin"
    assert file.stat().st_size == 10**8 * (2 * 64 * 4 + 8)
    assert file.stat().st_blocks * 512 < 2**20


@pytest.mark.exhaustive
def test_memory_is_taken_as_rows_are_stepped(peak_memory):
    setup = """
        import torch
        from fedss_kernels.federated.server.row_table import SGD, RowTable
        ids, rows = torch.arange(0, 10**7, 10**4), torch.ones(1000, 64)
    """
    run = "RowTable(10**7, 64, SGD(1.0, 0.9), lambda new: rows[: len(new)]).step(ids, rows)"
    assert peak_memory(setup, run) < 64 * 2**20


def test_a_row_is_drawn_when_it_is_read_and_never_after_its_first_step():
    drawn = []

    def initial(ids):
        drawn.append(ids.tolist())
        return draw(ids)

    each = RowTable(5, 3, SGD(1.0, 0.9), initial)
    assert torch.equal(each.read(torch.tensor([3, 1, 3])), draw(torch.tensor([3, 1, 3])))
    assert not each.rows.weight.any() and not each.rows.stepped.any(), "reading stores nothing"
    each.step(torch.tensor([1]), torch.zeros(1, 3))
    each.step(torch.tensor([1, 4]), torch.zeros(2, 3))
    each.read(torch.tensor([1, 4]))
    assert drawn == [[3, 1, 3], [1], [4]]


def test_bits_do_not_depend_on_threads(set_threads):
    found = []
    for threads in (1, 2, 4):
        set_threads(threads)
        each = table(4000, dim=64)
        for round in range(3):
            ids = torch.arange(round, 4000, 2 + round)
            each.step(ids, gradient(round, ids, 64))
        found.append(each[:])
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_adagrad_by_hand():
    each = RowTable(3, 1, Adagrad(lr=0.5, eps=0.0), lambda ids: torch.full((len(ids), 1), 10.0))
    each.step(torch.tensor([0, 2]), torch.tensor([[3.0], [-1.0]]))
    each.step(torch.tensor([0]), torch.tensor([[4.0]]))
    assert each[:].flatten().tolist() == pytest.approx([10 - 0.5 - 0.5 * 4 / 5, 10, 10.5])


@pytest.mark.parametrize("optimizer", [SGD(1.0, 0.9), Adagrad(0.1)])
@pytest.mark.parametrize("bad, error", [([0, 5], IndexError), ([-1, 2], IndexError), ([2, 2], ValueError)])
def test_a_bad_step_changes_nothing(bad, error, optimizer):
    each = table(optimizer=optimizer)
    play(each, looks=False)
    before = {name: stored.clone() for name, stored in vars(each.rows).items()}
    with pytest.raises(error, match="class_ids"):
        each.step(torch.tensor(bad), torch.ones(len(bad), 3))
    if error is IndexError:
        with pytest.raises(IndexError, match="class_ids"):
            each.read(torch.tensor(bad))
    assert each.now == 10
    for name, stored in vars(each.rows).items():
        assert torch.equal(stored, before[name])


def test_the_kernel_refuses_what_does_not_fit():
    rows = Rows.zeros(4, 3)
    ids, out = torch.tensor([1, 2]), torch.empty(2, 3)
    good = {"weight": rows.weight, "velocity": rows.state, "stepped": rows.stepped, "now": 0, "lr": 1.0}
    for name, value in {
        "weight": rows.weight.double(),
        "velocity": torch.zeros(4, 2),
        "stepped": torch.zeros(3, dtype=torch.int64),
        "momentum": 1.0,
        "out": torch.empty(1, 3),
        "class_ids": torch.tensor([1.0, 2.0]),
    }.items():
        with pytest.raises(ValueError, match=name):
            _C.lazy_momentum_read(**(good | {"momentum": 0.9, "class_ids": ids, "out": out} | {name: value}))
    with pytest.raises(IndexError, match=r"class_ids\[1\] = 4"):
        _C.lazy_momentum_read(**good, momentum=0.9, class_ids=torch.tensor([0, 4]), out=out)
    with pytest.raises(ValueError, match=r"class_ids\[1\] = 2 is also class_ids\[0\]"):
        _C.lazy_momentum_step(**good, momentum=0.9, class_ids=torch.tensor([2, 2]), rows=out)


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("optimizer", [SGD(1.0, 0.9), Adagrad(0.1)])
def test_it_knows_whether_all_that_was_written_is_finite(where, optimizer, tmp_path):
    def written(change: float, by: str) -> bool:
        found = table(optimizer=optimizer, folder=tmp_path / f"{change}{by}" if where == "file" else None)
        found.step(torch.tensor([0, 1]), torch.full((2, 3), 3e37))  # their sum is past float32, they are not
        number = torch.zeros(2, 3)
        number[1, 2] = change
        getattr(found, by)(torch.tensor([2, 4]), number)
        found.step(torch.tensor([0, 1]), torch.ones(2, 3))
        return found.finite

    big = isinstance(optimizer, Adagrad)  # whose state holds the squares
    assert [written(0.0, by) for by in ("step", "move")] == [not big, not big]
    for bad in (np.nan, np.inf, -np.inf):
        assert not written(bad, "step") and not written(bad, "move")


@pytest.mark.parametrize("optimizer", [SGD(0.3, 0.9), Adagrad(0.3)])
def test_rows_are_lent_as_they_are_read_and_without_a_copy_where_none_is_behind(optimizer):
    made, every = table(optimizer=optimizer), torch.arange(5)
    inner, apart = torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4])
    turned = torch.tensor([1, 3, 2, 4])
    for step, touched in enumerate([every, every, inner, every]):
        for ids in (every, inner, apart, turned, NOTHING):
            assert torch.equal(made.lend(ids), made.read(ids))
            assert made.lend(turned[2:]).untyped_storage().size() < made.rows.numbers.untyped_storage().size()
        made.step(touched, gradient(step, touched))
        shared = [
            made.lend(ids).data_ptr() == made.rows.weight[ids[0]].data_ptr() for ids in (every, inner, apart)
        ]
        assert shared == [touched is every, True, False]
    with pytest.raises(IndexError, match="got 5"):
        made.lend(torch.tensor([3, 4, 5]))


def test_new_rows_side_by_side_are_lent_from_where_they_will_be():
    every, made, other = torch.arange(5), table(num_rows=5), table(num_rows=5)
    for ids in (every, every[1:4]):
        lent = made.lend(ids)
        assert lent.data_ptr() == made.rows.weight[ids[0]].data_ptr() and torch.equal(lent, other.read(ids))
    assert not len(made.stored()["class_ids"])  # they are as new as before
    for touched in (every[2:4], every):
        made.step(touched, gradient(0, touched))
        other.step(touched, gradient(0, touched))
        assert torch.equal(made[:], other[:])
        assert all(torch.equal(made.stored()[name], kept) for name, kept in other.stored().items())


def test_new_rows_are_drawn_a_few_at_a_time_to_the_same_bits(monkeypatch):
    at_once, drawn = table(num_rows=50), []
    monkeypatch.setattr("fedss_kernels.federated.server.row_table.DRAWN_AT_A_TIME", 8)
    parts, real = table(num_rows=50), at_once.initial
    parts.initial = lambda ids: drawn.append(len(ids)) or real(ids)
    assert torch.equal(parts[:], real(torch.arange(50))) and drawn == [8] * 6 + [2]
    parts.step(torch.arange(50), gradient(0, torch.arange(50)))
    monkeypatch.undo()
    at_once.step(torch.arange(50), gradient(0, torch.arange(50)))
    assert torch.equal(parts[:], at_once[:])
