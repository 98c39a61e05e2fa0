"""Checks of what tensors hold as operators, for where a compiler sees to it what runs.

On a CPU. What comes after is to read what they return, so that a compiler neither leaves a check out nor
puts it off.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .checks import check_ids
from .direct_route import holds_numbers
from .loss_extras import check_numbers
from .operator_names import named_by_schema

_library = torch.library.Library("fedss_kernels", "FRAGMENT")


def checked_ids(name: str, ids: Tensor, C: int, ignore_index: int) -> Tensor:
    """`ids`. Raises IndexError, as it runs, for one that is no class and not `ignore_index`."""
    return _ids(ids, name, C, ignore_index)


def checked_numbers(name: str, numbers: Tensor, places: Tensor | None = None) -> Tensor:
    """`numbers`. Raises what `check_numbers` does, as it runs; where nothing traces that is done."""
    return numbers if holds_numbers() or not numbers.is_cpu else _numbers(numbers, name, places)


def _operator(schema: str, check: Callable[..., None], of_stack: Callable[..., tuple[Any, ...]]) -> Any:
    """`check` of what it is called with, as an operator that gives back the tensor that comes first.

    of_stack: what to call it with inside of torch.vmap, for all problems at once.
    """
    name, schema = named_by_schema(schema)
    _library.define(schema)
    operator = getattr(torch.ops.fedss_kernels, name)

    def run(tensor: Tensor, *arguments: Any) -> Tensor:
        check(tensor, *arguments)
        return tensor.clone()  # an operator may not return what it was given

    def fake(tensor: Tensor, *arguments: Any) -> Tensor:
        return torch.empty_like(tensor)

    def stacked(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int | None]:
        return operator(*of_stack(*arguments)), in_dims[0]

    _library.impl(name, run, "CPU")
    torch.library.register_fake(f"fedss_kernels::{name}", fake, lib=_library)
    torch.library.register_vmap(f"fedss_kernels::{name}", stacked, lib=_library)
    return operator


_ids = _operator(
    "checked_ids(Tensor ids, str name, int C, int ignore_index) -> Tensor",
    lambda ids, name, C, ignore_index: check_ids(name, ids, C, ignore_index),
    lambda *arguments: arguments,
)
_numbers = _operator(
    "checked_numbers(Tensor numbers, str name, Tensor? places) -> Tensor",
    lambda numbers, name, places: check_numbers(name, numbers.reshape(-1), places),
    lambda numbers, name, places: (numbers, name if places is None else f"{name}[target]", None),
)
