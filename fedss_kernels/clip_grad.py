"""Clipping of sparse and dense gradients alike: torch's own cannot take the norm of a sparse one."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .checks import as_number
from .sparse_rows import has_16_bits, is_listed_once, runs_of_entries, summed_values


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ for sparse gradients too; returns the norm before.

        grad *= min(1, max_norm / (norm + 1e-6)),   norm = |all gradients as one vector|, of order norm_type

    A sparse gradient counts as the dense one that it stands for: entries of one row are summed first. Nothing
    of a parameter's size is made, and nothing waits for a GPU. Dense gradients have the bits of torch's: the
    norm of one of 16 bits is one of 16 bits, a sparse one's is a float32. Where the powers of finite numbers
    overflow, as a float32's square from 1.8e19 on, the norm on a CPU is the right one, in float64; on a GPU,
    as torch's, it is infinite, and every finite gradient becomes 0: error_if_nonfinite tells.

    accelerate's `clip_grad_norm_` and Lightning's `gradient_clip_val` call torch's, which cannot take the
    norm of a sparse gradient. With those, clip by the optimiser instead, as in `RowSGD(max_norm=1.0)`, or
    call this one: in accelerate after `accelerator.unscale_gradients()`, in Lightning in
    `LightningModule.configure_gradient_clipping`, with `self.parameters()`. With a GradScaler:
    `scaler.unscale_(optimizer)`, then this, then `scaler.step(optimizer)`.

    Args:
        parameters: a parameter or several; those without a gradient are passed over.
        max_norm: >= 0; infinity clips nothing, unless a gradient is infinite itself, and the norm is told.
        norm_type: > 0; may be infinity.
        error_if_nonfinite: whether to raise RuntimeError, before anything changes, if the norm is infinite or
            NaN. On a GPU to ask is to wait.
        foreach: torch's, for dense gradients.

    >>> weight = torch.nn.Parameter(torch.zeros(5, 2))
    >>> rows = torch.tensor([[1.0, 0.0], [2.0, 4.0]])
    >>> weight.grad = torch.sparse_coo_tensor([[3, 3]], rows, (5, 2), check_invariants=True)
    >>> clip_grad_norm_(weight, 2.5)  # of the sum (3, 4)
    tensor(5.)
    >>> weight.grad.to_dense()[3]
    tensor([1.5000, 2.0000])
    """
    gradients = _gradients(parameters)
    max_norm = as_number("max_norm", max_norm, least=0, infinite=True)
    norm = total_norm(gradients, norm_type, error_if_nonfinite, foreach)
    factor = clip_factor(norm, max_norm)
    for values in map(_values, gradients):
        values.mul_(factor.to(values.device))
    return norm


@torch.no_grad()
def clip_grad_value_(
    parameters: Tensor | Iterable[Tensor],
    clip_value: float,
    foreach: bool | None = None,
) -> None:
    """torch.nn.utils.clip_grad_value_ for sparse gradients too: every number into [-clip_value, clip_value].

    A sparse gradient counts as the dense one that it stands for: entries of one row are summed first, and the
    sum, clipped, is then that of the first of them; the others become 0. Nothing waits for a GPU. accelerate
    and Lightning call torch's: see `clip_grad_norm_`.

    Args:
        parameters: a parameter or several; those without a gradient are passed over.
        clip_value: >= 0; infinity clips nothing.
        foreach: torch's; what is clipped is the same.

    >>> weight = torch.nn.Parameter(torch.zeros(5, 1))
    >>> weight.grad = torch.sparse_coo_tensor([[3, 3]], torch.ones(2, 1), (5, 1), check_invariants=True)
    >>> clip_grad_value_(weight, 0.5)
    >>> weight.grad._values().flatten()
    tensor([0.5000, 0.0000])
    """
    gradients = _gradients(parameters)
    clip_value = as_number("clip_value", clip_value, least=0, infinite=True)
    for grad in gradients:
        values = _values(grad)
        if grad.is_sparse and len(values) and not is_listed_once(grad):
            runs = runs_of_entries(grad)
            first = runs.starts[runs.run] == torch.arange(len(values), device=values.device)
            sums = runs.sums(values)[runs.run].to(values.dtype)
            values[runs.order] = sums.where(first.reshape(-1, *[1] * (values.dim() - 1)), 0)
        if clip_value <= torch.finfo(values.dtype).max:  # clamp_ takes no other
            values.clamp_(-clip_value, clip_value)


def total_norm(
    gradients: list[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    wide: bool = False,
) -> Tensor:
    """The norm of all gradients as one vector, a tensor without dimensions.

    On a CPU in float64 where powers of finite numbers overflow; to look at a GPU's would be to wait.
    wide: of a dense gradient of 16 bits in float32, which holds any; torch's is of 16 bits.
    """
    is_word = isinstance(norm_type, str) and norm_type == "inf"
    order = math.inf if is_word else as_number("norm_type", norm_type, infinite=True)
    if order <= 0:
        raise ValueError(f"norm_type: expected a number above 0, got {norm_type}")
    summed = [summed_values(grad) if grad.is_sparse else grad for grad in gradients]
    listed = numbers = [values for values in summed if values.numel()]  # infinity is no norm of nothing
    if wide:
        listed = [
            torch.linalg.vector_norm(values, order, dtype=torch.float32) if has_16_bits(values) else values
            for values in listed
        ]
    sharded = [values for values in listed if hasattr(values, "full_tensor")]
    if 0 < len(sharded) < len(listed):  # torch takes DTensors or others, not both
        plain = [values for values in listed if not hasattr(values, "full_tensor")]
        whole: Any = total_norm(sharded, order, foreach=foreach)
        listed = [total_norm(plain, order, foreach=foreach), whole.full_tensor()]
    norm = torch.nn.utils.get_total_norm(listed, order, foreach=foreach)
    if norm.is_cpu and not sharded and not torch.compiler.is_compiling() and norm.isinf():
        scaled = _scaled_norm(numbers, order)
        norm = scaled if scaled.isfinite() else norm
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"The total norm of order {order} for gradients from `parameters` is non-finite, so it cannot be "
            "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )
    return norm


def _scaled_norm(values: list[Tensor], order: float) -> Tensor:
    """Of numbers whose powers overflow: in float64, as parts of the largest of them."""
    numbers = [each.double() for each in values]
    largest = torch.stack([each.abs().max() for each in numbers]).max()
    return largest * torch.nn.utils.get_total_norm([each / largest for each in numbers], order)


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of that norm are multiplied by, as torch does it."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _values(grad: Tensor) -> Tensor:
    """The numbers that a gradient holds; to change them is to change it."""
    return grad._values() if grad.is_sparse else grad.detach()


def _gradients(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    if not isinstance(parameters, Iterable):  # a tensor is
        raise TypeError(f"parameters: expected a tensor or several, got {type(parameters).__name__}")
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for index, parameter in enumerate(given):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"parameters[{index}]: expected a tensor, got {type(parameter).__name__}")
        grad = parameter.grad
        if grad is not None and grad.layout not in (torch.strided, torch.sparse_coo):
            raise TypeError(
                f"parameters[{index}].grad: expected a dense or sparse COO tensor, got layout {grad.layout}"
            )
    return [parameter.grad for parameter in given if parameter.grad is not None]
