"""Median and trimmed mean: against numpy, and in the server's step."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedss_kernels.federated.messages import Update
from fedss_kernels.federated.server.robust import by_row, median, trimmed_mean
from fedss_kernels.federated.server.row_table import SGD
from fedss_kernels.federated.server.server import Server


def values(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(0, 0.49))
def test_they_are_what_numpy_says(seed, clients, trim):
    found = values(seed, clients, 3)
    np.testing.assert_allclose(median(found), np.median(found.numpy(), 0), rtol=1e-6)
    cut = int(trim * clients)
    kept = np.sort(found.numpy(), 0)[cut : clients - cut]
    np.testing.assert_allclose(trimmed_mean(found, trim), kept.mean(0), rtol=1e-5, atol=1e-6)


def test_what_is_trimmed_is_the_share_whatever_its_binary_digits():
    """0.29 * 100 is 28.999999999999996 in floating point."""
    found = torch.arange(100.0)[:, None]
    found[:29] = -1e6
    found[71:] = 1e6
    assert trimmed_mean(found, 0.29).item() == pytest.approx((29 + 70) / 2)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), st.data())
def test_what_is_not_finite_is_no_value(seed, clients, data):
    """Of each coordinate by itself the statistic is that of its finite values alone; of none it is NaN."""
    found = values(seed, clients, 4)
    for _ in range(data.draw(st.integers(0, 9))):
        place = data.draw(st.integers(0, clients - 1)), data.draw(st.integers(0, 3))
        found[place] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    for statistic in (median, lambda numbers: trimmed_mean(numbers, 0.3)):
        each = statistic(found)
        for i in range(4):
            finite = found[found[:, i].isfinite(), i : i + 1]
            expected = statistic(finite)[0] if len(finite) else torch.tensor(np.nan)
            torch.testing.assert_close(each[i], expected, rtol=0, atol=0, equal_nan=True)
    by_rows = by_row(median, torch.cat([found, found]), torch.arange(2).repeat_interleave(clients), 2)
    torch.testing.assert_close(by_rows, median(found).expand(2, 4), rtol=0, atol=0, equal_nan=True)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_each_row_has_the_statistic_of_its_own_holders(seed, held):
    ids, places = torch.tensor(held).unique(return_inverse=True)
    rows = values(seed, len(held), 4)
    found = by_row(median, rows, places, len(ids))
    for place in range(len(ids)):
        np.testing.assert_allclose(found[place], np.median(rows[places == place].numpy(), 0), rtol=1e-6)


@pytest.mark.parametrize("denominator", ["cohort", "holders"])
def test_a_rows_statistic_is_weighed_by_its_holders_share(denominator):
    """Row 0 is held by clients of 1, 2 and 5 images of 10, row 1 by the one of 2 and that of the 2 others."""
    server = Server(
        torch.zeros(2),
        3,
        1,
        initial_rows=lambda ids: torch.zeros(len(ids), 1),
        optimizer=SGD(1.0, 0.0),
        denominator=denominator,
        statistic=median,
    )
    updates = [
        Update(0, torch.tensor([0]), torch.tensor([[1.0]]), torch.tensor([0.0, 1.0]), 1, 0.0),
        Update(1, torch.tensor([0, 1]), torch.tensor([[4.0], [2.0]]), torch.tensor([2.0, 2.0]), 2, 0.0),
        Update(2, torch.tensor([0]), torch.tensor([[1e30]]), torch.tensor([1e30, 4.0]), 5, 0.0),
        Update(3, torch.tensor([1]), torch.tensor([[4.0]]), torch.tensor([4.0, -1e30]), 2, 0.0),
    ]
    gradient = server.aggregate(updates)
    share = torch.tensor([[8 / 10], [4 / 10]]) if denominator == "cohort" else torch.ones(2, 1)
    torch.testing.assert_close(gradient.rows, torch.tensor([[4.0], [3.0]]) * share)
    torch.testing.assert_close(gradient.extractor, torch.tensor([3.0, 1.5]))
