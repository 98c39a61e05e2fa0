"""What operators that change rows of a matrix in place have in common: registration, checks, order of ids."""

import operator
from collections.abc import Callable

import torch
from torch import Tensor

from .checks import check_device, refuse_forward_mode
from .operator_names import named_by_schema

_library = torch.library.Library("fedss_kernels", "FRAGMENT")


def register(schema: str, changed: int, kernel: Callable[..., None]) -> Callable[..., None]:
    """Registers, and returns, an operator that changes its first `changed` arguments and returns nothing.

    `kernel` runs it on any device. Each call raises the version of what it changes, as in-place operations
    do, so that autograd sees that a saved tensor changed.
    """
    called = schema.partition("(")[0]
    name, schema = named_by_schema(schema)
    _library.define(schema)
    registered = getattr(torch.ops.fedss_kernels, name)

    def run(*arguments) -> None:
        refuse_forward_mode(called)
        kernel(*arguments)

    def count_the_change(keys, *arguments) -> None:
        for tensor in arguments[:changed]:
            if tensor is not None:
                torch.autograd.graph.increment_version(tensor)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            below = keys & torch._C._after_ADInplaceOrView_keyset
            registered.default.redispatch(below, *arguments)

    _library.impl(name, run, "CPU")
    _library.impl(name, run, "CUDA")
    _library.impl(name, count_the_change, "ADInplaceOrView", with_keyset=True)
    torch.library.register_fake(f"fedss_kernels::{name}", lambda *arguments: None, lib=_library)
    return registered


def check_arguments(changed: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """Raises ValueError unless all lie on one device, none requires grad and none that changes is negated."""
    first, matrix = next(iter(changed.items()))
    if matrix.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{first}: expected a CPU or CUDA tensor, got one on {matrix.device}")
    for name, tensor in {**changed, **read}.items():
        check_device(name, tensor, matrix.device, first)
        if tensor.requires_grad:
            raise ValueError(f"{name}: expected a tensor that does not require grad; pass {name}.detach()")
    if torch.compiler.is_compiling():
        return
    for name, tensor in changed.items():
        if tensor.is_neg():
            raise ValueError(f"{name}: expected a plain tensor, got a view that negates its memory")


def sorted_ids(class_ids: Tensor, C: int, *, check: bool, once: bool = False) -> tuple[Tensor, Tensor]:
    """(the ids in ascending order, the position of each in `class_ids`); equal ids stay in their order.

    An id outside [0, C) becomes -1 or C, so that 4 bytes hold any: a radix sort's time goes with the bytes.

    With `check` it raises IndexError for an id out of range and, with `once`, ValueError for one that comes
    twice. That waits for the device once, so it cannot be done, and is not, while a CUDA graph is captured.
    """
    narrow = torch.int32 if C < 2**31 else torch.int64
    ids, order = class_ids.clamp(-1, C).to(narrow).sort(stable=True)
    if check and not (class_ids.is_cuda and torch.cuda.is_current_stream_capturing()):
        outside, again = (ids < 0) | (ids >= C), ids[1:] == ids[:-1]
        some_outside, some_again = torch.stack((outside.any(), again.any())).tolist()
        if some_outside:
            i = int(order[outside].min())
            raise IndexError(f"class_ids[{i}] = {class_ids[i]}, expected a class in [0, {C})")
        if once and some_again:
            i, before = min(zip(order[1:][again].tolist(), order[:-1][again].tolist(), strict=True))
            raise ValueError(
                f"class_ids[{i}] = {class_ids[i]} is also class_ids[{before}], expected each class once"
            )
    return ids, order


def check_memory(changed: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """Raises ValueError unless every element that is changed lies where no other element of the call does."""
    others = [(name, tensor, _byte_range(tensor)) for name, tensor in read.items() if tensor.numel()]
    for name, matrix in changed.items():
        if not matrix.numel():
            continue
        if overlaps_itself(matrix):
            raise ValueError(
                f"{name}: expected a tensor whose elements do not share memory, got an expanded one"
            )
        first, last = _byte_range(matrix)
        for other_name, other, (other_first, other_last) in others:
            apart = last <= other_first or other_last <= first
            if not apart and not _are_columns_apart(matrix, other, other_first - first):
                raise ValueError(
                    f"{other_name}: expected memory of its own, got a tensor that overlaps {name}"
                )
        others.insert(0, (name, matrix, (first, last)))


def _byte_range(tensor: Tensor) -> tuple[int, int]:
    """[first, last) address; strides of a tensor are never negative."""
    first, strides = tensor.data_ptr(), tensor.stride()
    last = sum(map(operator.mul, tensor.shape, strides)) - sum(strides)
    return first, first + (last + 1) * tensor.element_size()


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements share an address: a faster axis must end before a slower one steps."""
    end = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= end:
            return True
        end += (size - 1) * stride
    return False


def _are_columns_apart(matrix: Tensor, other: Tensor, bytes_on: int) -> bool:
    """Whether both are columns of one matrix, and none of them both's; `other` begins `bytes_on` further."""
    pitch = matrix.stride(0) * matrix.element_size()
    same_pitch = other.dim() == 2 and other.stride(0) * other.element_size() == pitch
    if not (same_pitch and pitch > 0 and matrix.stride(1) == other.stride(1) == 1):
        return False
    offset = bytes_on % pitch
    columns, other_columns = (t.shape[1] * t.element_size() for t in (matrix, other))
    return offset >= columns and offset + other_columns <= pitch
