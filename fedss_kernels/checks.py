"""Checks of arguments: every message names the argument, what was expected and what came."""

import math
import numbers
from typing import Any, NoReturn

import numpy as np
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises TypeError unless `value` is a dense tensor of one of `dtypes`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    check_dtype(name, value.dtype, dtypes)
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested one" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor; pass its full_tensor() or to_local()"
        )


def check_dtype(name: str, value: object, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises TypeError unless `value` is one of `dtypes`."""
    if not isinstance(value, torch.dtype) or value not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected {expected}, got {repr(value).removeprefix('torch.')}")


def check_shape(name: str, value: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Raises ValueError unless `value` has `shape`; `meaning` says what the shape stands for, e.g. "(S,)"."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)} = {meaning}, got {tuple(value.shape)}")


def check_constant(name: str, value: Tensor) -> None:
    """Raises ValueError for a tensor that requires grad where there is no gradient to it."""
    if value.requires_grad:
        raise ValueError(
            f"{name}: expected a constant, got a tensor that requires grad; pass {name}.detach()"
        )


def check_device(name: str, value: Tensor, device: torch.device, of: str) -> None:
    """Raises ValueError unless `value` lies on `device`, which is that of the argument `of`."""
    if value.device != device:
        if device.type == "meta":
            refuse_meta(of)
        raise ValueError(f"{name}: expected a tensor on {device} as {of} is, got one on {value.device}")


def refuse_meta(name: str) -> NoReturn:
    """Raises ValueError for a tensor on meta where numbers are wanted."""
    raise ValueError(
        f"{name}: expected a tensor that holds numbers, got one on meta; a module made there is ready "
        "after to_empty(device=...) and reset_parameters() or load_state_dict(...)"
    )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        expected = " or ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def unwrapped(values: Tensor) -> Tensor:
    """(n,) numbers to look at: inside torch.vmap and torch.func.grad those of all problems."""
    while is_functorch_wrapped_tensor(values):
        values = get_unwrapped(values)
    return values.reshape(-1)


def single_item(value: Any) -> Any:
    """What a tensor or an array of one element holds; else `value`, as one on meta is."""
    held = isinstance(value, (Tensor, np.ndarray)) and math.prod(value.shape) == 1
    return value.item() if held and not _is_on_meta(value) else value


def _is_on_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "meta"


def as_integer(value: Any) -> Any:
    """Any integer, NumPy's or of 0 dimensions too, as an int; what is none comes back, to be refused."""
    if type(value) is int:
        return value
    number = single_item(value) if getattr(value, "ndim", 1) == 0 else value
    return int(number) if isinstance(number, numbers.Integral) and not isinstance(number, bool) else value


def check_integer(name: str, value: object, least: int, most: int | None = None) -> int:
    """`value` as an int; raises TypeError unless it is an integer, ValueError outside `least` to `most`."""
    value = as_integer(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value >= 2**63:
        raise ValueError(f"{name}: expected a 64-bit integer, got {value}")
    if value < least or (most is not None and value > most):
        expected = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{name}: expected {expected}, got {value}")
    return value


def check_ignore_index(ignore_index: Any) -> int:
    """`ignore_index` as an int; raises TypeError unless it is a 64-bit integer."""
    ignore_index = as_integer(ignore_index)
    if type(ignore_index) is not int or not -(2**63) <= ignore_index < 2**63:
        raise TypeError(f"ignore_index: expected a 64-bit integer, got {ignore_index!r}")
    return ignore_index


def check_ids(name: str, ids: Tensor, C: int, ignore_index: int | None) -> None:
    """Raises IndexError for an id that is no class, by its place and value. Waits for the device."""
    ids = unwrapped(ids)
    bad = (ids < 0) | (ids >= C)
    if ignore_index is not None:
        bad &= ids != ignore_index
    if bad.any():
        i = int(bad.nonzero()[0, 0])
        also = "" if ignore_index is None else f" or ignore_index {ignore_index}"
        raise IndexError(f"{name}[{i}] = {int(ids[i])}, expected a class in [0, {C}){also}")


def as_number(
    name: str,
    value: object,
    least: float = -math.inf,
    below: float = math.inf,
    *,
    most: float = math.inf,
    infinite: bool = False,
) -> float:
    """A number of Python's, numpy's, or of a tensor or array of one element, as float: what torch's take.

    Raises TypeError for something else, ValueError unless it is finite and in [least, below) and [least,
    most], or infinity where `infinite` lets that be, and for a tensor that requires grad. Of a tensor on a
    GPU it waits for the number.
    """
    if type(value) is float and -math.inf < value < below and least <= value <= most:
        return value
    if isinstance(value, Tensor):
        check_constant(name, value)
    number: Any = single_item(value)
    real = isinstance(number, (int, float)) or isinstance(number, numbers.Real)
    if isinstance(number, bool) or not real:
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, (Tensor, np.ndarray)) else ""
        shape += " on meta" if _is_on_meta(value) else ""
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}{shape}")
    if infinite and number == math.inf:
        return math.inf
    try:
        number, found = float(number), number
    except OverflowError:
        number, found = math.inf, "one past float64's range"
    # math.isfinite cannot be traced with a symbolic value
    if not abs(number) < math.inf or number < least or number >= below or number > most:
        expected = "a finite number" if least == -math.inf else f"a finite number of at least {least:g}"
        expected += "" if below == math.inf else f" and below {below:g}"
        expected = expected if most == math.inf else f"a number from {least:g} to {most:g}"
        raise ValueError(f"{name}: expected {expected}, got {found}")
    return number


def check_flag(name: str, value: object) -> bool:
    """`value` as a bool; raises TypeError unless it is True or False, NumPy's or Python's."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")
    return bool(value)


def refuse_forward_mode(name: str) -> None:
    """Raises RuntimeError inside a level of forward-mode AD, which would drop the tangents: a silent zero."""
    if forward_ad._current_level >= 0:
        raise RuntimeError(f"{name} has no forward-mode derivative (jvp, jacfwd, make_dual)")
