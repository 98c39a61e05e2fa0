"""FEDSS_AUTOTUNE=1: a small problem is timed in two launches and in chunks, once for each signature.

It takes some seconds each. The faster way may differ from one run to the next, and with it the last bits of
results.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import triton

from .calls import Calls, Wanted
from .problem import Problem


def wanted(device: torch.device) -> bool:
    """Whether to time: never while a graph is captured, and never where kernels are interpreted."""
    return (
        os.environ.get("FEDSS_AUTOTUNE") == "1"
        and device.type == "cuda"
        and not torch.cuda.is_current_stream_capturing()
    )


def first_is_faster(p: Problem, first: Calls, second: Calls) -> bool:
    """Whether the loss of such a problem and its gradients take less time by the one than by the other."""
    return _milliseconds(_step(p, first)) <= _milliseconds(_step(p, second))


def _step(p: Problem, calls: Any) -> Callable[[], None]:
    needed = (True, True, p.bias is not None, False)
    all_of_them = Wanted(needed, sparse=p.class_ids is not None, scale_dtype=None)

    def step() -> None:
        loss, made = calls.loss(p.tensors, p.factor, all_of_them)
        calls.gradients(p.tensors, p.factor, made, torch.ones_like(loss), all_of_them)

    return step


def _milliseconds(step: Callable[[], None]) -> float:
    return triton.testing.do_bench(step, warmup=10, rep=50, return_mode="median")
