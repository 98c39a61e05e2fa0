"""What a caller hands over for tensors and numbers, as these; a ValueError names the part that cannot be."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def tensor(name: str, values: Any) -> Tensor:
    """A tensor as it is, an array or a list as one."""
    if isinstance(values, Tensor):
        return values
    try:
        array = np.asarray(values)
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{name}: expected a tensor, an array or a list of numbers, got {_what(values)}"
        ) from None


def integers(name: str, values: Any, expected: str = "integers") -> Tensor:
    """Of what holds no number the type says nothing."""
    found = tensor(name, values)
    if not found.numel():
        return found.to(torch.int64)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise ValueError(f"{name}: expected {expected}, got {found.dtype}")
    return found.to(torch.int64)


def listed(name: str, values: Any) -> tuple:
    if isinstance(values, str | dict) or not isinstance(values, Iterable):
        raise ValueError(f"{name}: expected a tuple or a list, got {type(values).__name__}")
    return tuple(values)


def integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name}: expected an integer, got {value!r}")
    return int(value)


def _what(values: Any) -> str:
    """Of what cannot be a tensor: "a list of str"."""
    kind = type(values).__name__
    if isinstance(values, np.ndarray):
        return f"an array of {values.dtype}"
    return f"a list of {type(values[0]).__name__}" if isinstance(values, list) and values else kind
