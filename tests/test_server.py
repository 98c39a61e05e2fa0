"""The server, against a round worked out by hand, and the initial class matrix."""

import numpy as np
import pytest
import torch

from fedss_kernels.federated.messages import Update
from fedss_kernels.federated.randomness import Purpose, generator, initial_rows, splitmix64
from fedss_kernels.federated.server.row_table import SGD
from fedss_kernels.federated.server.server import Server


def server(denominator: str = "cohort", lr: float = 1.0) -> Server:
    made = Server(
        torch.tensor([10.0, 20.0]),
        num_classes=4,
        embedding_dim=1,
        initial_rows=lambda ids: ids[:, None] + 1.0,
        optimizer=SGD(lr, momentum=0.5),
        denominator=denominator,
    )
    return made


def update(class_ids: list[int], rows: list[float], extractor: list[float], num_examples: int) -> Update:
    return Update(
        0,
        torch.tensor(class_ids),
        torch.tensor(rows)[:, None],
        torch.tensor(extractor),
        num_examples,
        loss=0.0,
    )


UPDATES = [  # n = 4: weights 1/4 and 3/4
    update([0, 2], [8.0, 4.0], [4.0, 0.0], num_examples=1),
    update([2, 3], [12.0, -4.0], [0.0, 8.0], num_examples=3),
]


@pytest.mark.parametrize(
    "denominator, rows",
    [
        ("cohort", [8 / 4, 4 / 4 + 12 * 3 / 4, -4 * 3 / 4]),
        ("holders", [8.0, 4 / 4 + 12 * 3 / 4, -4.0]),  # rows 0 and 3 have one holder each, row 2 has both
    ],
)
def test_aggregate_is_the_weighted_average_of_the_updates(denominator, rows):
    gradient = server(denominator).aggregate(UPDATES)
    assert gradient.class_ids.tolist() == [0, 2, 3]
    assert gradient.rows.flatten().tolist() == rows
    assert gradient.extractor.tolist() == [4 / 4, 8 * 3 / 4]


def test_a_gradient_is_float32_whatever_torchs_default_is():
    made = server()
    torch.set_default_dtype(torch.float64)
    try:
        gradient = made.aggregate(UPDATES)
    finally:
        torch.set_default_dtype(torch.float32)
    assert gradient.rows.dtype == torch.float32


def test_step_is_sgd_with_momentum_and_untouched_rows_coast():
    made = server(lr=2.0)
    made.step(made.aggregate(UPDATES))
    # v = g = (2, 0, 10, -3); W - 2 v
    assert made.weight[:].flatten().tolist() == [1 - 4, 2, 3 - 20, 4 + 6]
    assert made.extractor.tolist() == [10 - 2, 20 - 12]
    made.step(made.aggregate([update([1], [1.0], [0.0, 0.0], num_examples=7)]))
    # v = v / 2 + g = (1, 1, 5, -1.5): rows 0, 2 and 3, that nobody held, go on; phi's v = (0.5, 3)
    assert made.weight[:].flatten().tolist() == [-3 - 2, 2 - 2, -17 - 10, 10 + 3]
    assert made.extractor.tolist() == [8 - 1, 8 - 6]


def test_aggregate_adds_in_the_order_of_the_updates():
    # In float32 (1 + 1e8) - 1e8 = 0 and (1e8 - 1e8) + 1 = 1; every weight is 1/3, so scale by 3.
    parts = [update([1], [3 * x], [3 * x, 0.0], num_examples=1) for x in (1.0, 1e8, -1e8)]
    for order, expected in (((0, 1, 2), 0.0), ((1, 2, 0), 1.0)):
        gradient = server().aggregate([parts[i] for i in order])
        assert gradient.rows.item() == pytest.approx(expected, abs=1e-6)
        assert gradient.extractor[0].item() == pytest.approx(expected, abs=1e-6)


def test_select_gives_copies_of_the_rows_asked_for():
    made = server()
    phi, rows = made.select(torch.tensor([1, 3]))
    assert phi.tolist() == [10, 20] and rows.flatten().tolist() == [2, 4]
    rows.zero_()
    assert made.weight[:].flatten().tolist() == [1, 2, 3, 4]


# ---- the initial class matrix ------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 7, 64])
def test_an_initial_row_depends_on_seed_and_row_alone(dim):
    rows = initial_rows(5, torch.arange(1000), dim, 0.3)
    assert rows.shape == (1000, dim) and rows.dtype == torch.float32
    ids = torch.tensor([999, 0, 17, 17, 400])
    assert initial_rows(5, ids, dim, 0.3).equal(rows[ids])
    assert initial_rows(5, torch.tensor([17]), dim, 0.3).equal(rows[17:18])
    assert initial_rows(5, torch.tensor([], dtype=torch.int64), dim, 0.3).shape == (0, dim)


def test_initial_rows_are_standard_normal_times_scale():
    x = initial_rows(1, torch.arange(20_000), 64, 0.1).double() / 0.1
    n = x.numel()  # 1.28 million: the standard errors below are 4 sd
    assert abs(x.mean()) < 4 / n**0.5
    assert abs(x.square().mean() - 1) < 4 * (2 / n) ** 0.5
    assert abs(x.pow(3).mean()) < 4 * (15 / n) ** 0.5
    assert abs(x.pow(4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert abs((x.abs() < 1).double().mean() - 0.682689) < 4 * (0.217 / n) ** 0.5


def test_initial_rows_columns_and_seeds_are_uncorrelated():
    x = initial_rows(1, torch.arange(20_000), 64, 1.0).double()
    limit = 5 / 20_000**0.5  # 5 sd: 2016 pairs of columns
    columns = torch.corrcoef(x.T) - torch.eye(64)
    assert columns.abs().max() < limit
    assert abs((x[1:] * x[:-1]).mean()) < 5 / x[1:].numel() ** 0.5
    for seed in (0, 2, 1 + 2**32):
        assert abs((x * initial_rows(seed, torch.arange(20_000), 64, 1.0)).mean()) < 5 / x.numel() ** 0.5


def test_splitmix64_is_the_published_generator():
    """The first outputs of the reference splitmix64.c for state 1234567: next() adds gamma, then mixes."""
    gamma = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + i * gamma) % 2**64 for i in range(3)], dtype=np.uint64)
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_random_streams_differ_in_every_argument():
    base = (1, 2, 3, 4, Purpose.BATCHES)
    others = [(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0), (1, 3, 2, 4)]
    draws = {tuple(generator(*base).integers(2**63, size=2).tolist())}
    assert tuple(generator(*base).integers(2**63, size=2).tolist()) in draws
    for arguments in [(*other, Purpose.BATCHES) for other in others] + [(*base[:4], Purpose.NEGATIVES)]:
        draws.add(tuple(generator(*arguments).integers(2**63, size=2).tolist()))
    assert len(draws) == 1 + len(others) + 1
