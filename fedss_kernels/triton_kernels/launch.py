"""Launches of kernels, without the time that Triton takes to look up what it has compiled.

Triton finds the compiled kernel from all that the arguments are specialized for, on every launch: 50 to 120
microseconds for thirty arguments where the launch itself takes 15. Here the same is told from a short key: of
each tensor the dtype, of each integer whether it has 32 bits; and unless the kernel says `do_not_specialize`,
of both whether they are multiples of 16 (a tensor's address), and of integers whether they are 1. To what
is in a tuple Triton does not apply `do_not_specialize`.
"""

import functools
from collections.abc import Hashable
from typing import Any

import torch
import triton.language as tl

from .tiles import INTERPRETED

TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
TORCH_TYPES = {of_triton: of_torch for of_torch, of_triton in TYPES.items()}
# HIP's addresses are specialized for the size of what they point to as well.
_LOOKED_UP = bool(INTERPRETED.value) or torch.version.hip is not None
_INT32 = range(-(2**31), 2**31)


class Variant:
    """A kernel with its constants and the compiler's options; called with a grid and the other arguments.

    The arguments come first in the kernel's signature, the constants last. Runs on the current device.
    """

    def __init__(self, kernel: Any, **named: Any):
        self.kernel, self.named = kernel, named
        self.compiled: dict[tuple[Hashable, ...], Any] = {}

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> Any:
        """What was compiled; None where kernels are interpreted."""
        if _LOOKED_UP:
            return self.kernel[grid](*arguments, **self.named)
        parameters = self.kernel.params
        plain = (parameter.do_not_specialize for parameter in parameters)
        kinds, values = zip(*map(_short, arguments, plain), strict=True)
        key = (torch._C._cuda_getDevice(), *kinds)
        found = self.compiled.get(key)
        if found is None:
            found = self.compiled[key] = self.kernel[grid](*arguments, **self.named)
        else:
            constants = (None,) * (len(parameters) - len(arguments))  # nobody reads them any more
            found[grid + (1,) * (3 - len(grid))](*values, *constants)
        return found


def variant(kernel: Any, **named: Any) -> Variant:
    """The kernel with those of the constants that it has, and the options: constants have capital names."""
    own = {name: value for name, value in named.items() if name in kernel.arg_names or name.islower()}
    return _variant(kernel, tuple(own.items()))


@functools.lru_cache(maxsize=4096)
def _variant(kernel: Any, named: tuple[tuple[str, Any], ...]) -> Variant:
    return Variant(kernel, **dict(named))


def _short(argument: Any, plain: bool) -> tuple[Hashable, Any]:
    """(what the kernel is compiled for, what it is launched with); plain: it is not specialized for more."""
    if isinstance(argument, tuple):
        kinds, values = zip(*(_short(each, False) for each in argument), strict=True)
        return kinds, values
    if isinstance(argument, torch.Tensor):
        address = argument.data_ptr()
        return (argument.dtype, not plain and address % 16 == 0), address
    if isinstance(argument, int):
        special = not plain and (argument % 16 == 0, argument == 1)
        return (argument in _INT32, special), argument
    return None, argument  # None or a float
