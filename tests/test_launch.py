"""The short way to compiled kernels: what Triton specializes for is told apart, and nothing else."""

from types import SimpleNamespace

import pytest
import torch

from fedss_kernels.triton_kernels import launch


class Kernel:
    """As triton.jit makes them, with parameters NAMES; vector and B are not specialized for."""

    def __init__(self):
        self.params = [SimpleNamespace(do_not_specialize=name in "vector B") for name in NAMES]
        self.looked_up, self.launched = [], []

    def __getitem__(self, grid):
        def look_up(*arguments, **named):
            self.looked_up.append((grid, arguments, named))
            return {whole: lambda *values: self.launched.append(values) for whole in ((3, 1, 1), (4, 2, 1))}

        return look_up


NAMES = ("matrix", "vector", "pair", "D", "B", "factor", "BLOCK")
MEMORY = torch.zeros(64)


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launch, "_LOOKED_UP", False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    return Kernel()


def arguments(matrix=MEMORY, vector=MEMORY, pair=(MEMORY, 7), D=64, B=5):
    return matrix, vector, pair, D, B, 0.5


def test_what_is_compiled_is_launched_with_addresses(kernel):
    variant = launch.Variant(kernel, BLOCK=16)
    variant((3,), *arguments())
    variant((4, 2), *arguments(vector=None))
    assert kernel.looked_up == [
        ((3,), arguments(), {"BLOCK": 16}),
        ((4, 2), arguments(vector=None), {"BLOCK": 16}),
    ]
    variant((3,), *arguments(B=7))
    variant((4, 2), *arguments(vector=None))
    address = MEMORY.data_ptr()
    pair = address, 7
    assert kernel.launched == [
        (address, address, pair, 64, 7, 0.5, None),
        (address, None, pair, 64, 5, 0.5, None),
    ]


@pytest.mark.parametrize(
    "other",
    [
        {"matrix": MEMORY.double()},
        {"matrix": MEMORY[1:]},  # an address that is no multiple of 16
        {"matrix": None},
        {"vector": MEMORY.bfloat16()},
        {"vector": None},
        {"pair": (MEMORY.double(), 7)},
        {"pair": (MEMORY[1:], 7)},
        {"pair": (None, 7)},
        {"pair": (MEMORY, 1)},
        {"pair": (MEMORY, 16)},
        {"pair": (MEMORY, 2**31)},
        {"D": 65},
        {"D": 1},
        {"D": 2**31},
        {"B": 2**31},
    ],
)
def test_what_is_specialized_otherwise_is_looked_up(other, kernel):
    variant = launch.Variant(kernel, BLOCK=16)
    for given in ({}, other, {}, other):
        variant((3,), *arguments(**given))
    assert len(kernel.looked_up) == len(kernel.launched) == 2


@pytest.mark.parametrize(
    "other",
    [
        {"matrix": MEMORY[4:]},
        {"vector": MEMORY[1:]},
        {"pair": (MEMORY[4:], 9)},
        {"D": 128},
        {"B": 1},
        {"B": 16},
    ],
)
def test_what_is_not_is_the_same(other, kernel):
    variant = launch.Variant(kernel, BLOCK=16)
    for given in ({}, other):
        variant((3,), *arguments(**given))
    assert len(kernel.looked_up) == len(kernel.launched) == 1


def test_each_device_has_its_own(kernel, monkeypatch):
    variant = launch.Variant(kernel, BLOCK=16)
    for device in (0, 1, 0, 1):
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda device=device: device, raising=False)
        variant((3,), *arguments())
    assert len(kernel.looked_up) == len(kernel.launched) == 2
