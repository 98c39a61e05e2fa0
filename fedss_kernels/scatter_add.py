"""The aggregator's face: a deterministic scatter-add of the rows that many clients send back."""

import torch
from torch import Tensor

from . import _C, inplace
from .checks import FLOATING, check_shape, check_tensor
from .implementations import choose_impl, triton_kernels


def scatter_add_(
    out: Tensor,  # (C, D) float32 | float64
    class_ids: Tensor,  # (M,) int64 in [0, C)
    rows: Tensor,  # (M, D) out's dtype | float16 | bfloat16
    scale: Tensor | None = None,  # (M,) floating; rounded to out's dtype
    *,
    impl: str = "auto",  # "cpp" | "triton"; auto: by the tensors' device
) -> Tensor:
    """out[class_ids[i]] += scale[i] * rows[i] for i = 0, 1, ..., M - 1, in place; returns `out`.

    The order of addition is the order of i, and each step is multiply, round, add, round in out's dtype, so
    the bits are the same for any number of threads, any instruction set and any GPU. Strided tensors are used
    as they are. On CUDA the ids are sorted first, and one wait for the device checks them; while a CUDA graph
    is captured nothing can be checked, and ids out of range are passed over.

    Raises TypeError or ValueError for a wrong dtype, shape, device or `impl`, for `rows`, `scale` or
    `class_ids` sharing memory with `out`, and for a tensor that requires grad; IndexError for an id out of
    range, naming position and value. A call that raises leaves `out` untouched.

    >>> rows = torch.tensor([[1.0], [2.0], [3.0]])
    >>> scatter_add_(torch.zeros(3, 1), torch.tensor([2, 0, 2]), rows).flatten()
    tensor([2., 0., 4.])
    """
    _check(out, class_ids, rows, scale)
    scale = None if scale is None else scale.resolve_neg()
    impl = choose_impl(impl, out.device)
    OPERATOR(out, class_ids, rows.resolve_neg(), scale, impl)
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
    read = {"class_ids": class_ids, "rows": rows}
    if scale is not None:
        check_tensor("scale", scale, FLOATING)
        check_shape("scale", scale, (M,), "(M,)")
        read["scale"] = scale
    inplace.check_arguments({"out": out}, read)


def _scatter_add(out: Tensor, class_ids: Tensor, rows: Tensor, scale: Tensor | None, impl: str) -> None:
    read = {"class_ids": class_ids, "rows": rows} | ({} if scale is None else {"scale": scale})
    inplace.check_memory({"out": out}, read)
    if impl == "triton":
        kernels = triton_kernels("scatter_add", out.device)
        ids, order = inplace.sorted_ids(class_ids, len(out), check=True)
        kernels.scatter_add(out, ids, order, rows, scale)
    else:
        _C.scatter_add(out, class_ids, rows, scale, threads=torch.get_num_threads())


OPERATOR = inplace.register(
    "scatter_add_(Tensor(a!) out, Tensor class_ids, Tensor rows, Tensor? scale, str impl) -> ()",
    changed=1,
    kernel=_scatter_add,
)
