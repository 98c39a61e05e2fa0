"""The check of class ids as an operator, for where a compiler sees to it what runs."""

from typing import Any

import torch
from torch import Tensor

from .checks import check_ids
from .operator_names import named_by_schema

_library = torch.library.Library("fedss_kernels", "FRAGMENT")
_NAME, _schema = named_by_schema("checked_ids(Tensor ids, str name, int C, int ignore_index) -> Tensor")
_library.define(_schema)
_operator = getattr(torch.ops.fedss_kernels, _NAME)


def checked_ids(name: str, ids: Tensor, C: int, ignore_index: int) -> Tensor:
    """`ids`, on a CPU. Raises IndexError, as it runs, for one that is no class and not `ignore_index`.

    What comes after is to read these, so that a compiler neither leaves the check out nor puts it off.
    """
    return _operator(ids, name, C, ignore_index)


def _checked(ids: Tensor, name: str, C: int, ignore_index: int) -> Tensor:
    check_ids(name, ids, C, ignore_index)
    return ids.clone()  # an operator may not return what it was given


_library.impl(_NAME, _checked, "CPU")


@torch.library.register_fake(f"fedss_kernels::{_NAME}", lib=_library)
def _fake(ids: Tensor, name: str, C: int, ignore_index: int) -> Tensor:
    return torch.empty_like(ids)


@torch.library.register_vmap(f"fedss_kernels::{_NAME}", lib=_library)
def _of_each_problem(info: Any, in_dims: Any, ids: Tensor, *arguments: Any) -> tuple[Tensor, int | None]:
    return _operator(ids, *arguments), in_dims[0]
