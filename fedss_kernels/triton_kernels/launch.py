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
        self.compiled: dict[tuple[Hashable, ...], Any] = {}
        self.tensors: list[int] = []  # which arguments are tensors, or None
        self.integers: list[int] = []
        self.specialized: list[int] = []  # of both

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> Any:
        """What was compiled; None where kernels are interpreted."""
        if _LOOKED_UP:
            return self.kernel[grid](*arguments, **self.named)
        if not self.compiled:
            self._sort(arguments)
        values = list(arguments)
        key: list[Hashable] = [torch._C._cuda_getDevice()]
        for at in self.tensors:
            tensor = values[at]
            if tensor is None:
                key.append(None)
            else:
                key.append(tensor.dtype)
                values[at] = tensor.data_ptr()
        for at in self.specialized:
            number = values[at]
            key.append(number is not None and (number & 15 == 0) + 2 * (number == 1))
        key += [values[at] in _INT32 for at in self.integers]
        found = self.compiled.get(tuple(key))
        if found is None:
            found = self.compiled[tuple(key)] = self.kernel[grid](*arguments, **self.named)
        else:
            found[grid + (1,) * (3 - len(grid))](*values, *self.constants)
        return found

    def _sort(self, arguments: tuple[Any, ...]) -> None:
        """The same for every call, so that threads may do it at once."""
        parameters = self.kernel.params
        self.constants = (None,) * (len(parameters) - len(arguments))  # nobody reads them any more
        kinds = [None if type(each) is float else type(each) is int for each in arguments]
        self.tensors = [at for at, is_integer in enumerate(kinds) if is_integer is False]
        self.integers = [at for at, is_integer in enumerate(kinds) if is_integer]
        both = (at for at, is_integer in enumerate(kinds) if is_integer is not None)
        self.specialized = [at for at in both if not parameters[at].do_not_specialize]
