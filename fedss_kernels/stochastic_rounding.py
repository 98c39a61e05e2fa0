"""Rounding to 16 bits up or down by chance, so that on average nothing is lost."""

import hashlib
from typing import Any

import torch
from torch import Tensor


class StochasticRounding:
    """One step's rounding: a float32 number between two 16-bit ones becomes the upper one with probability

        (number - lower) / (upper - lower)

    and so is right on average: a hundred steps of 0.001 on a bfloat16 1.0, each less than half of what is
    between two such numbers, move it by about 0.1, not by 0. A number that 16 bits hold stays what it is;
    one that is infinite, NaN or out of their range becomes what rounding to nearest makes of it.

    Which way is a pure function of `seed`, `step`, `stream` and the numbers' order, on one kind of device.
    """

    def __init__(self, seed: int, step: int, stream: int) -> None:
        self._key = f"{seed} {step} {stream}".encode()
        self._generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, values: Any, dtype: torch.dtype) -> Tensor:
        """`values`, a tensor, in `dtype`: itself if that is its own, else float32 numbers rounded."""
        if values.dtype == dtype:
            return values
        if hasattr(values, "to_local"):  # a DTensor: each process rounds what it holds
            share = self(values.to_local(), dtype)
            placed = values.device_mesh, values.placements
            return type(values).from_local(share, *placed, shape=values.shape, stride=values.stride())
        up_or_down = self._bfloat16(values) if dtype == torch.bfloat16 else self._by_spacing(values, dtype)
        if _all_in_range(values, dtype):
            return up_or_down
        in_range = values.abs() < torch.finfo(dtype).max  # not so for NaN
        return torch.where(in_range, up_or_down, values.to(dtype))

    def _bfloat16(self, values: Tensor) -> Tensor:
        """A bfloat16 is the upper half of a float32: what carries over from the lower half rounds up."""
        generator, device = self._generator(values.device), values.device
        halves = torch.randint(2**16, values.shape, generator=generator, dtype=torch.int32, device=device)
        sums = halves.add_(values.view(torch.int32)).bitwise_and_(-(2**16))
        return sums.view(torch.float32).to(torch.bfloat16)

    def _by_spacing(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """What is between float16 numbers is a power of two, and at least that between the smallest ones."""
        info = torch.finfo(dtype)
        powers = (values.view(torch.int32) & 0x7F800000).view(torch.float32)  # of 2, up to the number
        spacing = powers.mul_(info.eps).clamp_(min=info.smallest_normal * info.eps)
        scaled = values / spacing
        lower = scaled.floor()
        generator, device = self._generator(values.device), values.device
        chance = torch.rand(values.shape, generator=generator, dtype=torch.float32, device=device)
        return lower.add_(chance < scaled.sub_(lower)).mul_(spacing).to(dtype)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            digest = hashlib.blake2b(self._key, digest_size=8).digest()
            seed = int.from_bytes(digest, "little") >> 1
            self._generators[device] = torch.Generator(device).manual_seed(seed)
        return self._generators[device]


def _all_in_range(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether that is known: to ask a GPU would be to wait for it. On a CPU it takes one pass."""
    if not values.is_cpu or values.numel() == 0:
        return False
    largest = torch.finfo(dtype).max
    lowest, highest = torch.aminmax(values)
    return -largest < lowest.item() and highest.item() < largest  # not so for NaN
