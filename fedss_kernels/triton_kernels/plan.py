"""What one pass over a problem launches, laid out once and launched again for every problem like it.

The first run goes through Triton, which compiles. The next ones call the GPU's driver with the parameters of
the first, only addresses and the scale's factor written anew: a microsecond or so for each launch besides the
driver's own time, where Triton takes ten to a hundred. What Triton does beyond a plain launch (clusters,
memory of its own) sends a plan through Triton every time; so do kernels that are interpreted, and AMD's.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.cuda import device_of

from .. import _C
from .launch import Variant

_ALIGNMENT = 256  # bytes: as torch aligns what it allocates


class Given(NamedTuple):
    """A tensor that every run is given, by its place; the same dtype, shape and alignment each time."""

    place: int


class Scratch(NamedTuple):
    """A contiguous tensor for the time of one run, uninitialised."""

    offset: int  # in bytes, of the plan's memory
    shape: tuple[int, ...]
    dtype: torch.dtype


class Factor:
    """A float64 that every run is given."""


FACTOR = Factor()
Argument = Given | Scratch | Factor | int | None


class Plan:
    def __init__(self, device: torch.device):
        self.device = device
        self.bytes = 0  # of the memory that a run needs
        self.launches: list[tuple[Variant, tuple[int, ...], tuple[Argument, ...]]] = []
        self.again: Any = None  # what makes the launches without Triton; False: nothing can
        self.compiled: list[Any] = []  # kept, as what is no longer referred to is unloaded

    def empty(self, *shape: int, dtype: torch.dtype) -> Scratch:
        found = Scratch(self.bytes, shape, dtype)
        self.bytes += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        return found

    def launch(self, variant: Variant, grid: tuple[int, ...], *arguments: Argument) -> None:
        self.launches.append((variant, grid, arguments))

    def run(self, given: Sequence[Tensor | None], factor: float, memory: Tensor | None = None) -> None:
        """On the current stream. memory: `self.bytes` of it or more, where they are there already."""
        if not self.again:
            with device_of(given[0]):
                self._run_by_triton(given, factor)
        elif torch._C._cuda_getDevice() != self.device.index:
            with torch.cuda.device(self.device):
                self.run(given, factor, memory)
        else:
            if memory is None:
                memory = self.memory()
            stream = torch._C._cuda_getCurrentRawStream(self.device.index)
            self.again.run(stream, factor, *given, memory)

    def memory(self, at_least: int = 0) -> Tensor:
        return torch.empty(max(self.bytes, at_least), dtype=torch.uint8, device=self.device)

    def _run_by_triton(self, given: Sequence[Tensor | None], factor: float) -> None:
        scratch: dict[Scratch, Tensor] = {}

        def actual(argument: Argument) -> Any:
            if isinstance(argument, Given):
                return given[argument.place]
            if isinstance(argument, Scratch):
                if argument not in scratch:
                    scratch[argument] = torch.empty(argument.shape, dtype=argument.dtype, device=self.device)
                return scratch[argument]
            return factor if argument is FACTOR else argument

        found = [
            variant(grid, *(actual(argument) for argument in arguments))
            for variant, grid, arguments in self.launches
        ]
        if self.again is None and self.device.type == "cuda" and None not in found:
            self.again = self._without_triton(found, len(given))
            self.compiled = found

    def _without_triton(self, found: list[Any], memory: int) -> Any:
        """memory: the place of the plan's own among a run's."""
        try:
            again = _C.GpuLaunches()
            for (variant, grid, arguments), compiled in zip(self.launches, found, strict=True):
                if not _plain(compiled.metadata):
                    return False
                parameters = [
                    _parameter(kind, argument, memory)
                    for kind, argument in zip(_kinds(variant, compiled), arguments, strict=False)
                    if kind != "constexpr"
                ]
                threads = 32 * compiled.metadata.num_warps
                shared = compiled.metadata.shared
                x, y, z = (*grid, 1, 1)[:3]
                again.add(compiled.function, (x, y, z), threads, shared, parameters)
        except (RuntimeError, ValueError):  # an old driver; another layout than is known
            return False
        return again


def _plain(metadata: Any) -> bool:
    """Whether Triton's launch does nothing that a plain one does not."""
    beyond = ("launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size", "gsan")
    plain = metadata.num_ctas == 1 and not any(getattr(metadata, name, False) for name in beyond)
    return torch.version.hip is None and plain


def _kinds(variant: Variant, compiled: Any) -> list[str]:
    """Types of the kernel's arguments, in order; "constexpr" of what it was compiled for."""
    return [compiled.src.signature[name] for name in variant.kernel.arg_names]


def _parameter(kind: str, argument: Argument, memory: int) -> tuple[int, int, int]:
    """(bytes, source, value), see csrc/gpu_launches.hpp; raises ValueError for what is not known."""
    if isinstance(argument, Given) and kind.startswith("*"):
        return 8, argument.place, 0
    if isinstance(argument, Scratch) and kind.startswith("*"):
        return 8, memory, argument.offset
    if argument is FACTOR and kind == "fp64":
        return 8, -2, 0
    if isinstance(argument, int) and kind in ("i32", "i64"):
        return int(kind[1:]) // 8, -1, argument
    raise ValueError(f"a parameter of type {kind} for {argument}")
