"""Rounding by chance: right on average, to one of the two numbers beside, by the seed alone."""

import math

import pytest
import torch

from fedss_kernels.stochastic_rounding import StochasticRounding

DTYPES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_the_dtype_stay(dtype):
    """Every one of the 65,536, the infinities among them; a NaN stays one."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    rounded = StochasticRounding(0, 0, 0)(every.float(), dtype)
    assert torch.equal(rounded.isnan(), every.isnan())
    assert torch.equal(rounded[~every.isnan()], every[~every.isnan()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 1e-3, 3e-6, 1e-7, 60000.0])
@pytest.mark.parametrize("part", [0.25, 0.5, 0.9])
def test_is_right_on_average_and_to_a_neighbour(dtype, size, part):
    """3e-6 and 1e-7 lie among float16's denormal numbers."""
    below = torch.tensor(size).to(dtype)
    above = (below.view(torch.int16) + 1).view(dtype)
    value = below.float() + part * (above.float() - below.float())
    for sign in (1, -1):
        rounded = sign * StochasticRounding(0, 0, 0)(sign * value.expand(40_000).clone(), dtype)
        assert set(rounded.tolist()) == {below.item(), above.item()}
        up = (rounded == above).float().mean().item()
        assert up == pytest.approx(part, abs=5 * math.sqrt(part * (1 - part) / 40_000))


@pytest.mark.parametrize("dtype", DTYPES)
def test_past_the_largest_number_as_to_nearest(dtype):
    largest = torch.finfo(dtype).max
    spacing = largest * torch.finfo(dtype).eps / 2  # at most what lies between the largest and the next
    values = torch.tensor([largest, largest + spacing * 0.25, -largest - spacing * 0.25, math.inf, -math.inf])
    rounded = StochasticRounding(0, 0, 0)(values.repeat(1000), dtype).reshape(1000, 5)
    assert torch.equal(rounded, values.to(dtype).expand(1000, 5))


def test_denormals_flushed_to_zero_are_no_nan():
    values = torch.tensor([0.0, -0.0, 1e-38, 3e-38, 1e-30])
    try:
        supported = torch.set_flush_denormal(True)
        assert supported or values.isfinite().all()
        assert StochasticRounding(0, 0, 0)(values, torch.bfloat16).isfinite().all()
    finally:
        torch.set_flush_denormal(False)


def test_goes_by_seed_step_stream_and_order():
    values = torch.full((1000,), 1 + 2.0**-9)

    def rounded(*key, number=1):
        rounding = StochasticRounding(*key)
        return [rounding(values, torch.bfloat16) for _ in range(number)]

    first, second = rounded(1, 2, 3, number=2)
    assert torch.equal(rounded(1, 2, 3)[0], first) and not torch.equal(first, second)
    for key in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3)):
        assert not torch.equal(rounded(*key)[0], first)
    wide = values.double()
    assert StochasticRounding(0, 0, 0)(wide, torch.float64) is wide  # nothing to round


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
def test_the_default_dtype_does_not_matter(default):
    values = torch.linspace(1, 2, 1000)
    expected = StochasticRounding(0, 0, 0)(values, torch.bfloat16)
    torch.set_default_dtype(default)
    try:
        found = StochasticRounding(0, 0, 0)(values, torch.bfloat16)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
