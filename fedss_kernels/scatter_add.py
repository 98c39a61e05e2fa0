"""The aggregator's face: a deterministic scatter-add of the rows that many clients send back."""

import torch
from torch import Tensor

from . import _C
from .checks import FLOATING, check_device, check_shape, check_tensor, refuse_forward_mode

_library = torch.library.Library("fedss_kernels", "FRAGMENT")
_library.define("scatter_add_(Tensor(a!) out, Tensor class_ids, Tensor rows, Tensor? scale) -> ()")


def scatter_add_(
    out: Tensor,  # (C, D) float32 | float64
    class_ids: Tensor,  # (M,) int64 in [0, C)
    rows: Tensor,  # (M, D) out's dtype | float16 | bfloat16
    scale: Tensor | None = None,  # (M,) floating; rounded to out's dtype
) -> Tensor:
    """out[class_ids[i]] += scale[i] * rows[i] for i = 0, 1, ..., M - 1, in place; returns `out`.

    The order of addition is the order of i, and each step is multiply, round, add, round in out's dtype, so
    the bits are the same for any number of threads and any instruction set. Strided tensors are used as they
    are.

    Raises TypeError or ValueError for a wrong dtype, shape or device, for `rows`, `scale` or `class_ids`
    sharing memory with `out`, and for a tensor that requires grad; IndexError for an id out of range, naming
    position and value. A call that raises leaves `out` untouched.

    >>> rows = torch.tensor([[1.0], [2.0], [3.0]])
    >>> scatter_add_(torch.zeros(3, 1), torch.tensor([2, 0, 2]), rows).flatten()
    tensor([2., 0., 4.])
    """
    _check(out, class_ids, rows, scale)
    if not torch.compiler.is_compiling() and out.is_neg():
        raise ValueError("out: expected a plain tensor, got a view that negates its memory")
    scale = None if scale is None else scale.resolve_neg()
    torch.ops.fedss_kernels.scatter_add_(out, class_ids, rows.resolve_neg(), scale)
    return out


def _check(out: Tensor, class_ids: Tensor, rows: Tensor, scale: Tensor | None) -> None:
    check_tensor("out", out, (torch.float32, torch.float64))
    check_tensor("class_ids", class_ids, (torch.int64,))
    check_tensor("rows", rows, (out.dtype, torch.float16, torch.bfloat16))
    if out.dim() != 2:
        raise ValueError(f"out: expected shape (C, D), got {tuple(out.shape)}")
    if class_ids.dim() != 1:
        raise ValueError(f"class_ids: expected shape (M,), got {tuple(class_ids.shape)}")
    M, D = len(class_ids), out.shape[1]
    check_shape("rows", rows, (M, D), "(M, D)")
    others = {"class_ids": class_ids, "rows": rows}
    if scale is not None:
        check_tensor("scale", scale, FLOATING)
        check_shape("scale", scale, (M,), "(M,)")
        others["scale"] = scale
    if out.device.type != "cpu":
        raise ValueError(f"out: expected a CPU tensor, got one on {out.device}")
    for name, tensor in others.items():
        check_device(name, tensor, out.device, "out")
    for name, tensor in {"out": out, **others}.items():
        if tensor.requires_grad:
            raise ValueError(f"{name}: expected a tensor that does not require grad; pass {name}.detach()")


@torch.library.impl(_library, "scatter_add_", "CPU")
def _scatter_add_cpu(out: Tensor, class_ids: Tensor, rows: Tensor, scale: Tensor | None) -> None:
    refuse_forward_mode("scatter_add_")
    if out.numel() and _overlaps_itself(out):
        raise ValueError("out: expected a tensor whose elements do not share memory, got an expanded one")
    for name, tensor in {"class_ids": class_ids, "rows": rows, "scale": scale}.items():
        if tensor is not None and _may_overlap(out, tensor):
            raise ValueError(f"{name}: expected memory of its own, got a tensor that overlaps out")
    _C.scatter_add(out, class_ids, rows, scale, threads=torch.get_num_threads())


def _count_the_change(keys, out: Tensor, *arguments) -> None:
    """Raises out's version, as in-place operations do, so that autograd sees that a saved tensor changed."""
    torch.autograd.graph.increment_version(out)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        below = keys & torch._C._after_ADInplaceOrView_keyset
        torch.ops.fedss_kernels.scatter_add_.default.redispatch(below, out, *arguments)


_library.impl("scatter_add_", _count_the_change, "ADInplaceOrView", with_keyset=True)


@torch.library.register_fake("fedss_kernels::scatter_add_", lib=_library)
def _scatter_add_fake(out: Tensor, class_ids: Tensor, rows: Tensor, scale: Tensor | None) -> None:
    return None


def _byte_range(tensor: Tensor) -> tuple[int, int]:
    """[first, last) address; strides of a tensor are never negative."""
    first = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (last + 1) * tensor.element_size()


def _overlaps_itself(out: Tensor) -> bool:
    """Whether two elements share an address: the faster axis must end before the slower one steps."""
    (small, size), (large, steps) = sorted(zip(out.stride(), out.shape, strict=True))
    return (size > 1 and small == 0) or (steps > 1 and large < (size - 1) * small + 1)


def _may_overlap(out: Tensor, other: Tensor) -> bool:
    """Whether `other` may share memory with `out`: no for disjoint ranges or columns of one matrix."""
    if not (out.numel() and other.numel()):
        return False
    (first, last), (other_first, other_last) = _byte_range(out), _byte_range(other)
    if last <= other_first or other_last <= first:
        return False
    pitch = out.stride(0) * out.element_size()
    same_pitch = other.dim() == 2 and other.stride(0) * other.element_size() == pitch
    if same_pitch and pitch > 0 and out.stride(1) == other.stride(1) == 1:
        offset = (other_first - first) % pitch
        columns, other_columns = (t.shape[1] * t.element_size() for t in (out, other))
        return offset < columns or offset + other_columns > pitch
    return True
