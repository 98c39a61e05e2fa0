"""A step of SGD with momentum on the rows of a class matrix that have a gradient; `RowSGD` calls it."""

import torch
from torch import Tensor

from . import _C, inplace
from .checks import as_number, check_flag, check_shape, check_tensor
from .implementations import choose_impl, triton_kernels


def row_momentum_step_(
    weight: Tensor,  # (C, D) float32 | float64
    velocity: Tensor | None,  # (C, D) weight's dtype; None only if momentum is 0
    class_ids: Tensor,  # (M,) int64 in [0, C), each once
    rows: Tensor,  # (M, D) weight's dtype | float16 | bfloat16: the gradient of weight[class_ids]
    *,
    lr: float,
    momentum: float,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    impl: str = "auto",  # "cpp" | "triton"; auto: by the tensors' device
) -> Tensor:
    """For each i, with c = class_ids[i], in place; returns `weight`:

        g = rows[i] + weight_decay * weight[c]
        velocity[c] = v = momentum * velocity[c] + g
        weight[c] -= lr * v                             (nesterov: lr * (g + momentum * v))

    The other rows of `weight` and `velocity` are neither read nor written, so a step costs O(M * D) whatever
    C is. Each operation is rounded by itself in weight's dtype: the bits are the same for any number of
    threads, any instruction set and any GPU. Strided tensors are used as they are. On CUDA the ids are sorted
    first, and one wait for the device checks them; while a CUDA graph is captured nothing can be checked: ids
    out of range are passed over, and the rows of a class that comes twice are summed.

    Raises TypeError or ValueError for a wrong dtype, shape, device, number or `impl`, for arguments that
    share memory with `weight` or `velocity`, for a tensor that requires grad, and for a class that comes
    twice; IndexError for an id out of range. The last two name position and value. A call that raises changes
    nothing.

    >>> weight, velocity = torch.zeros(3, 2), torch.zeros(3, 2)
    >>> for _ in range(2):
    ...     step = row_momentum_step_(
    ...         weight, velocity, torch.tensor([1]), torch.ones(1, 2), lr=1.0, momentum=0.5
    ...     )
    >>> velocity[1], weight[:2]
    (tensor([1.5000, 1.5000]), tensor([[ 0.0000,  0.0000],
            [-2.5000, -2.5000]]))
    """
    numbers = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    lr, momentum, weight_decay = (as_number(name, value) for name, value in numbers.items())
    nesterov = check_flag("nesterov", nesterov)
    if velocity is None and momentum != 0:
        raise ValueError(f"velocity: expected a tensor, as momentum is {momentum}, got None")
    return step_(
        weight, velocity, class_ids, rows, lr, momentum, weight_decay, nesterov, impl=impl, check_ids=True
    )


def step_(
    weight: Tensor,
    velocity: Tensor | None,
    class_ids: Tensor,
    rows: Tensor,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    *,
    impl: str,
    check_ids: bool,
) -> Tensor:
    """`row_momentum_step_`; without `check_ids` a GPU does what it does while a CUDA graph is captured."""
    _check(weight, velocity, class_ids, rows)
    impl = choose_impl(impl, weight.device)
    OPERATOR(
        *(weight, velocity, class_ids, rows.resolve_neg()),
        *(lr, momentum, weight_decay, nesterov, check_ids, impl),
    )
    return weight


def _check(weight: Tensor, velocity: Tensor | None, class_ids: Tensor, rows: Tensor) -> None:
    check_tensor("weight", weight, (torch.float32, torch.float64))
    check_tensor("class_ids", class_ids, (torch.int64,))
    check_tensor("rows", rows, (weight.dtype, torch.float16, torch.bfloat16))
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape (C, D), got {tuple(weight.shape)}")
    if class_ids.dim() != 1:
        raise ValueError(f"class_ids: expected shape (M,), got {tuple(class_ids.shape)}")
    check_shape("rows", rows, (len(class_ids), weight.shape[1]), "(M, D)")
    if velocity is not None:
        check_tensor("velocity", velocity, (weight.dtype,))
        check_shape("velocity", velocity, tuple(weight.shape), "(C, D), weight's")
    inplace.check_arguments(_changed(weight, velocity), {"class_ids": class_ids, "rows": rows})


def _changed(weight: Tensor, velocity: Tensor | None) -> dict[str, Tensor]:
    return {"weight": weight} | ({} if velocity is None else {"velocity": velocity})


def _row_momentum_step(
    weight: Tensor,
    velocity: Tensor | None,
    class_ids: Tensor,
    rows: Tensor,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    check_ids: bool,
    impl: str,
) -> None:
    inplace.check_memory(_changed(weight, velocity), {"class_ids": class_ids, "rows": rows})
    numbers = lr, momentum, weight_decay, nesterov
    if impl == "triton":
        kernels = triton_kernels("row_momentum", weight.device)
        ids, order = inplace.sorted_ids(class_ids, len(weight), check=check_ids, once=True)
        kernels.row_momentum_step(weight, velocity, ids, order, rows, *numbers)
    else:
        threads = torch.get_num_threads()
        _C.row_momentum_step(weight, velocity, class_ids, rows, *numbers, threads=threads)


OPERATOR = inplace.register(
    "row_momentum_step_(Tensor(a!) weight, Tensor(b!)? velocity, Tensor class_ids, Tensor rows, "
    "float lr, float momentum, float weight_decay, bool nesterov, bool check_ids, str impl) -> ()",
    changed=2,
    kernel=_row_momentum_step,
)
