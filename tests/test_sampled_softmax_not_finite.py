"""A number that is not finite never passes for a good one: losses and gradients beside plain PyTorch's.

Where plain PyTorch's number is not finite the kernel's is not; where it is, they are equal.
"""

import itertools
from functools import partial

import pytest
import torch
from loss_cases import BF16, F16, F32, F64, GPU_IMPLEMENTATIONS
from tolerance import eager_loss
from torch import Tensor

import fedss_kernels

NAN, INF = torch.nan, torch.inf
pytestmark = [
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),  # numpy's, under interpreted kernels
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


@pytest.fixture(params=["cpp", "reference", "triton as shipped", *GPU_IMPLEMENTATIONS])
def any_loss(request):
    if request.param == "reference":
        return partial(fedss_kernels.sampled_softmax_loss, impl="reference")
    if request.param == "triton as shipped":
        return request.getfixturevalue("gpu_loss")
    ...


def problem(B: int, C: int, D: int, dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "input": torch.randn(B, D, generator=g).to(dtype),
        "weight": torch.randn(C, D, generator=g).to(dtype),
        "bias": torch.randn(C, generator=g).to(dtype),
        "scale": torch.tensor(2.0),
    }
