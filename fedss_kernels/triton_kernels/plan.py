"""What one pass over a problem does, laid out once and done again for every problem like it.

The first run goes through Triton, which compiles. The next ones call the GPU's driver with the parameters of
the first, only addresses and the scale's factor written anew: a microsecond or so for each launch besides the
driver's own time, where Triton takes ten to a hundred. What Triton does beyond a plain launch (clusters,
memory of its own) sends a plan through Triton every time; so do kernels that are interpreted, and AMD's.
Between launches there are matrix products, which are torch's.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
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
    first: int = 0
    size: int | None = None  # of its rows, from the first on; None: all

    def rows(self, first: int, count: int) -> "Given":
        return Given(self.place, first, count)


class Scratch(NamedTuple):
    """A contiguous tensor for the time of one run, uninitialised."""

    offset: int  # in bytes, of the plan's memory
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, first: int, count: int) -> "Scratch":
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return Scratch(self.offset + first * row, (count, *self.shape[1:]), self.dtype)


class Factor:
    """A float64 that every run is given."""


FACTOR = Factor()
Matrix = Given | Scratch
Argument = Given | Scratch | Factor | int | None | tuple["Argument", ...]


class Launch(NamedTuple):
    variant: Variant
    grid: tuple[int, ...]
    arguments: tuple[Argument, ...]


class Product(NamedTuple):
    """out = a @ b, or out += a @ b; float32 sums of what has 16 bits."""

    out: Matrix
    a: Matrix
    b: Matrix
    transposed: tuple[bool, bool]  # a and b
    adds: bool

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return self[:3]

    def run(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        a, b = (m.T if turned else m for m, turned in zip((a, b), self.transposed, strict=True))
        if a.dtype != out.dtype and not a.is_cuda:  # torch multiplies so on GPUs only
            a, b = a.to(out.dtype), b.to(out.dtype)
        if a.dtype != out.dtype:
            if self.adds:
                torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
            else:
                torch.mm(a, b, out_dtype=out.dtype, out=out)
        elif self.adds:
            torch.addmm(out, a, b, out=out)
        else:
            torch.mm(a, b, out=out)


class Other(NamedTuple):
    """What else torch does; quick to launch."""

    run: Callable[..., Any]
    matrices: tuple[Matrix, ...]


Step = Launch | Product | Other


class Plan:
    def __init__(self, device: torch.device):
        self.device = device
        self.bytes = 0  # of the memory that a run needs
        self.steps: list[Step] = []
        self.again: Any = None  # the steps, launches without Triton; False: nothing can
        self.compiled: list[Any] = []  # kept, as what is no longer referred to is unloaded

    def empty(self, *shape: int, dtype: torch.dtype) -> Scratch:
        found = Scratch(self.bytes, shape, dtype)
        self.bytes += -(-found.nbytes // _ALIGNMENT) * _ALIGNMENT
        return found

    def launch(self, variant: Variant, grid: tuple[int, ...], *arguments: Argument) -> None:
        if math.prod(grid) > 0:
            self.steps.append(Launch(variant, grid, arguments))

    def product(
        self,
        out: Matrix,
        a: Matrix,
        b: Matrix,
        transposed: tuple[bool, bool] = (False, False),
        adds: bool = False,
    ) -> None:
        self.steps.append(Product(out, a, b, transposed, adds))

    def other(self, run: Callable[..., Any], *matrices: Matrix) -> None:
        self.steps.append(Other(run, matrices))

    @property
    def launches(self) -> list[Launch]:
        return [step for step in self.steps if isinstance(step, Launch)]

    def run(self, given: Sequence[Tensor | None], factor: float, memory: Tensor | None = None) -> None:
        """On the current stream. memory: `self.bytes` of it or more, where they are there already."""
        if memory is None:
            memory = self.memory()
        if not self.again:
            with device_of(given[0]):
                self._run_by_triton(given, factor, memory)
        elif torch._C._cuda_getDevice() != self.device.index:
            with torch.cuda.device(self.device):
                self.run(given, factor, memory)
        else:
            stream = torch._C._cuda_getCurrentRawStream(self.device.index)
            for step in self.again:
                if isinstance(step, Product | Other):
                    step.run(*(_actual(matrix, given, memory) for matrix in step.matrices))
                else:
                    step.run(stream, factor, *given, memory)

    def memory(self, at_least: int = 0) -> Tensor:
        return torch.empty(max(self.bytes, at_least), dtype=torch.uint8, device=self.device)

    def _run_by_triton(self, given: Sequence[Tensor | None], factor: float, memory: Tensor) -> None:
        found = []
        for step in self.steps:
            if isinstance(step, Launch):
                actual = (_actual(argument, given, memory, factor) for argument in step.arguments)
                found.append(step.variant(step.grid, *actual))
            else:
                step.run(*(_actual(matrix, given, memory) for matrix in step.matrices))
        if self.again is None and self.device.type == "cuda" and None not in found:
            self.again = self._without_triton(found, len(given))
            self.compiled = found

    def _without_triton(self, compiled: list[Any], memory: int) -> Any:
        """memory: the place of the plan's own among a run's."""
        again: list[Any] = []
        left = iter(compiled)
        try:
            for launched, steps in itertools.groupby(self.steps, lambda step: isinstance(step, Launch)):
                if not launched:
                    again += steps
                    continue
                together = _C.GpuLaunches()
                for step in steps:
                    assert isinstance(step, Launch)
                    if not _add(together, step, next(left), memory):
                        return False
                again.append(together)
        except (RuntimeError, ValueError):  # an old driver; another layout than is known
            return False
        return again


def _actual(argument: Any, given: Sequence[Tensor | None], memory: Tensor, factor: float = 0.0) -> Any:
    if isinstance(argument, Given):
        tensor = given[argument.place]
        if argument.size is None:
            return tensor
        assert tensor is not None
        return tensor[argument.first : argument.first + argument.size]
    if isinstance(argument, Scratch):
        part = memory[argument.offset : argument.offset + argument.nbytes]
        return part.view(argument.dtype).view(argument.shape)
    if isinstance(argument, tuple):
        actual = [_actual(each, given, memory, factor) for each in argument]
        return type(argument)(*actual) if hasattr(argument, "_fields") else tuple(actual)
    return factor if argument is FACTOR else argument


def _add(together: Any, step: Launch, compiled: Any, memory: int) -> bool:
    """Whether the launch can be made without Triton, and is added."""
    if not _plain(compiled.metadata):
        return False
    kinds = [compiled.src.signature[name] for name in step.variant.kernel.arg_names]
    parameters = [
        _parameter(kind, argument, memory)
        for kind, argument in _flattened(tuple(kinds), step.arguments)
        if kind != "constexpr"
    ]
    threads = 32 * compiled.metadata.num_warps
    x, y, z = (*step.grid, 1, 1)[:3]
    together.add(compiled.function, (x, y, z), threads, compiled.metadata.shared, parameters)
    return True


def _plain(metadata: Any) -> bool:
    """Whether Triton's launch does nothing that a plain one does not."""
    beyond = ("launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size", "gsan")
    plain = metadata.num_ctas == 1 and not any(getattr(metadata, name, False) for name in beyond)
    return torch.version.hip is None and plain


def _flattened(kinds: tuple[Any, ...], arguments: tuple[Any, ...]) -> Iterator[tuple[str, Argument]]:
    """(type, argument) of each parameter, those of tuples in their order; "constexpr": compiled in."""
    for kind, argument in zip(kinds, arguments, strict=False):  # the kernel's constants come last
        if isinstance(kind, tuple):
            yield from _flattened(kind, argument)
        else:
            yield kind, argument


def _parameter(kind: str, argument: Argument, memory: int) -> tuple[int, int, int]:
    """(bytes, source, value), see csrc/gpu_launches.hpp; raises ValueError for what is not known."""
    if isinstance(argument, Given) and argument.size is None and kind.startswith("*"):
        return 8, argument.place, 0
    if isinstance(argument, Scratch) and kind.startswith("*"):
        return 8, memory, argument.offset
    if argument is FACTOR and kind == "fp64":
        return 8, -2, 0
    if isinstance(argument, int) and kind in ("i32", "i64"):
        return int(kind[1:]) // 8, -1, argument
    raise ValueError(f"a parameter of type {kind} for {argument}")
