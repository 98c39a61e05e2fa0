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
        info = torch.finfo(dtype)
        powers = (values.view(torch.int32) & 0x7F800000).view(torch.float32)  # of 2, up to the number
        spacing = (powers * info.eps).clamp(min=info.smallest_normal * info.eps)
        scaled = values / spacing
        lower = scaled.floor()
        generator, device = self._generator(values.device), values.device
        chance = torch.rand(values.shape, generator=generator, dtype=torch.float32, device=device)
        rounded = ((lower + (chance < scaled - lower)) * spacing).clamp(-info.max, info.max)
        nearest = values.to(dtype)
        good = nearest.isfinite() & rounded.isfinite()  # not so where denormal spacings are flushed to zero
        return torch.where(good, rounded.to(dtype), nearest)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            digest = hashlib.blake2b(self._key, digest_size=8).digest()
            seed = int.from_bytes(digest, "little") >> 1
            self._generators[device] = torch.Generator(device).manual_seed(seed)
        return self._generators[device]
