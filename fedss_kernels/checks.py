"""Checks of arguments: every message names the argument, what was expected and what came."""

import math
import numbers
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises TypeError unless `value` is a dense tensor of one of `dtypes`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected {expected}, got {str(value.dtype).removeprefix('torch.')}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")


def check_shape(name: str, value: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Raises ValueError unless `value` has `shape`; `meaning` says what the shape stands for, e.g. "(S,)"."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)} = {meaning}, got {tuple(value.shape)}")


def check_device(name: str, value: Tensor, device: torch.device, of: str) -> None:
    """Raises ValueError unless `value` lies on `device`, which is that of the argument `of`."""
    if value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} as {of} is, got one on {value.device}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        expected = " or ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_integer(name: str, value: object, least: int) -> None:
    """Raises TypeError unless `value` is an integer, ValueError unless it is at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def as_number(name: str, value: object, least: float = -math.inf, below: float = math.inf) -> float:
    """A number of Python's, numpy's or a tensor's of one element, as float: what torch's optimisers take.

    Raises TypeError for something else, ValueError unless it is finite and in [least, below). Of a tensor on
    a GPU it waits for the number.
    """
    if type(value) is float and -math.inf < value < below and least <= value:
        return value
    number: Any = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    real = isinstance(number, (int, float)) or isinstance(number, numbers.Real)
    if isinstance(number, bool) or not real:
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}{shape}")
    # math.isfinite cannot be traced with a symbolic value
    if not abs(number) < math.inf or number < least or number >= below:
        expected = "a finite number" if least == -math.inf else f"a finite number of at least {least:g}"
        expected += "" if below == math.inf else f" and below {below:g}"
        raise ValueError(f"{name}: expected {expected}, got {number}")
    return float(number)


def check_flag(name: str, value: object) -> None:
    """Raises TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def refuse_forward_mode(name: str) -> None:
    """Raises RuntimeError inside a level of forward-mode AD, which would drop the tangents: a silent zero."""
    if forward_ad._current_level >= 0:
        raise RuntimeError(f"{name} has no forward-mode derivative (jvp, jacfwd, make_dual)")
