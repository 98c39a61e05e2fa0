"""Tensors of several parts of a state in one mapping, by names that say whose they are."""

from collections.abc import Mapping

from torch import Tensor


def named(of: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{of}.{name}": tensor for name, tensor in tensors.items()}


def part(of: str, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `named`, of one part among others."""
    return {name.removeprefix(f"{of}."): t for name, t in stored.items() if name.startswith(f"{of}.")}
