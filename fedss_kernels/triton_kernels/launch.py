"""Launches of kernels, without the time that Triton takes to look up what it has compiled.

Triton finds the compiled kernel from all that the arguments are specialized for, on every launch: 50 to 120
microseconds for thirty arguments where the launch itself takes 15. Here the same is told from a short key: of
each tensor the dtype, of each integer whether it has 32 bits; and unless the kernel says `do_not_specialize`,
of both whether they are multiples of 16 (a tensor's address), and of integers whether they are 1.
"""

from collections.abc import Hashable
from typing import Any

import torch

from .tiles import INTERPRETED

# HIP's addresses are specialized for the size of what they point to as well.
_LOOKED_UP = bool(INTERPRETED.value) or torch.version.hip is not None
_INT32 = range(-(2**31), 2**31)


class Variant:
    """A kernel with its constants and the compiler's options; called with a grid and the other arguments.

    The arguments come first in the kernel's signature, the constants last. Runs on the current device.
    """

    def __init__(self, kernel: Any, **named: Any):
        self.kernel, self.named = kernel, named
        self.compiled: dict[Hashable, Any] = {}
        if not _LOOKED_UP:
            parameters = [p for p in kernel.params if not p.is_constexpr]
            self.specialized = [not p.do_not_specialize for p in parameters]
            self.constants = (None,) * (len(kernel.params) - len(parameters))  # nobody reads them any more

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        if _LOOKED_UP:
            self.kernel[grid](*arguments, **self.named)
            return
        kinds: list[Hashable] = [torch._C._cuda_getDevice()]
        values = []
        for argument, specialized in zip(arguments, self.specialized, strict=True):
            if argument is None or type(argument) is float:
                kinds.append(argument is None)
            elif type(argument) is int:
                kinds.append(argument in _INT32)
                if specialized:
                    kinds.append("1" if argument == 1 else argument & 15 == 0)
            else:
                kinds.append(argument.dtype)
                argument = argument.data_ptr()
                if specialized:
                    kinds.append(argument & 15 == 0)
            values.append(argument)
        key = tuple(kinds)
        found = self.compiled.get(key)
        if found is None:
            self.compiled[key] = self.kernel[grid](*arguments, **self.named)
        else:
            found[grid + (1,) * (3 - len(grid))](*values, *self.constants)
