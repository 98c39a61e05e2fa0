"""SGD for models whose class matrix has sparse gradients (`sparse_grad=True`): steps cost O(touched rows)."""

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from .checks import FLOATING, check_flag, check_number
from .reference import row_momentum_step_ as _plain_row_momentum_step_
from .row_momentum import step_


class RowSGD(torch.optim.Optimizer):
    """SGD with momentum that updates only the rows of a parameter that its sparse gradient lists.

    For a sparse COO gradient of a (C, D) parameter, and each row c that it lists (entries of one row are
    summed first; see `row_momentum_step_`):

        g = grad[c] + weight_decay * weight[c]
        velocity[c] = v = momentum * velocity[c] + g
        weight[c] -= lr * v                             (nesterov: lr * (g + momentum * v))

    Rows that the gradient does not list keep weight and velocity as they are. That is lazy: under
    torch.optim.SGD with a dense gradient such rows coast on with their velocity and decay. When every row is
    listed in every step the two are the same method. Without momentum there is no velocity, and no memory
    for it.

    For a dense gradient it does what torch.optim.SGD does, so one optimiser serves a whole model; the state
    (`momentum_buffer`) has the same name and shape.

    Parameters may be float16, bfloat16, float32 or float64 on any device. For float32 and float64 on the CPU
    and on CUDA the rows are updated by one fused kernel, bit-identical from run to run for any number of
    threads; on CUDA it sums the entries of a row too, and nothing waits for the device. Otherwise they are
    updated by plain torch operations on the listed rows, 16-bit ones in float32 with weight and velocity
    rounded once.

    Args:
        params: parameters, or dicts of them with options of their own, as for any torch.optim optimiser.
        lr: learning rate, a number >= 0; a learning-rate scheduler may change it.
        momentum: >= 0.
        weight_decay: >= 0.
        nesterov: Nesterov's momentum; needs momentum > 0.

    Raises:
        TypeError, ValueError: on construction, an option that is no number or out of range; in `step`, before
            any parameter has changed, a sparse gradient of something other than a floating (C, D) parameter.

    >>> weight = torch.nn.Parameter(torch.zeros(3, 2))
    >>> optimizer = RowSGD([weight], lr=0.5, momentum=0.9)
    >>> weight.grad = torch.sparse_coo_tensor([[2]], torch.ones(1, 2), (3, 2), check_invariants=True)
    >>> for _ in range(2):
    ...     optimizer.step()
    >>> weight.data  # v = 1, then 1.9; 0.5 * (1 + 1.9) = 1.45
    tensor([[ 0.0000,  0.0000],
            [ 0.0000,  0.0000],
            [-1.4500, -1.4500]])
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        _check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters with options of their own; raises as the constructor does."""
        if isinstance(param_group, dict):
            _check_options(self.defaults | param_group)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient; returns the loss, if a `closure` makes it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                _check_gradient(parameter, index)
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            if dense := [p for p in with_gradient if not p.grad.is_sparse]:
                self._step_dense(dense, group)
            for parameter in with_gradient:
                if parameter.grad.is_sparse:
                    self._step_rows(parameter, group)
        return loss

    def _step_dense(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        velocities = [self.state[p].get("momentum_buffer") if group["momentum"] else None for p in parameters]
        sgd(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            velocities,
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            dampening=0.0,
            maximize=False,
        )
        if group["momentum"]:
            for parameter, velocity in zip(parameters, velocities, strict=True):
                self.state[parameter]["momentum_buffer"] = velocity

    def _step_rows(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        velocity = None
        if group["momentum"]:
            state = self.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            velocity = state["momentum_buffer"]
        numbers: dict[str, Any] = {name: float(group[name]) for name in ("lr", "momentum", "weight_decay")}
        numbers["nesterov"] = group["nesterov"]
        weight, grad = parameter.detach(), parameter.grad
        if not _has_kernel(weight):
            _plain_row_momentum_step_(weight, velocity, *_unique_rows(grad), **numbers)
            return
        # On CUDA to coalesce would be to wait; there the kernel sums what is listed twice.
        listed = (grad._indices()[0], grad._values()) if weight.is_cuda else _unique_rows(grad)
        step_(weight, velocity, *listed, **numbers, impl="auto", check_ids=False)


def _has_kernel(weight: Tensor) -> bool:
    here = weight.device.type == "cpu" or (weight.is_cuda and find_spec("triton") is not None)
    return here and weight.dtype in (torch.float32, torch.float64)


def _check_options(options: dict[str, Any]) -> None:
    for name in ("lr", "momentum", "weight_decay"):
        check_number(name, options[name], least=0)
    check_flag("nesterov", options["nesterov"])
    if options["nesterov"] and options["momentum"] == 0:
        raise ValueError("nesterov: expected False without momentum, got True")


def _check_gradient(parameter: Tensor, index: int) -> None:
    grad = parameter.grad
    if grad is None or not grad.is_sparse:
        return
    if parameter.dim() != 2 or grad.sparse_dim() != 1 or parameter.dtype not in FLOATING:
        raise ValueError(
            f"params[{index}]: expected a sparse gradient to list whole rows of a floating (C, D) parameter, "
            f"got {grad.sparse_dim()} sparse dimensions of {tuple(parameter.shape)} {parameter.dtype}"
        )


def _unique_rows(grad: Tensor) -> tuple[Tensor, Tensor]:
    """(class_ids (M,), rows (M, D)) of a sparse gradient, each class once.

    Looks before it sums: rows that ascend, as those of `sparse_grad` do on the CPU, may have lost the flag
    that says so, and summing would copy them all. On another device to look is to wait.
    """
    if not grad.is_coalesced() and not _ascend_on_cpu(grad._indices()[0]):
        grad = grad.coalesce()
    return grad._indices()[0], grad._values()


def _ascend_on_cpu(class_ids: Tensor) -> bool:
    return class_ids.device.type == "cpu" and bool((class_ids[1:] > class_ids[:-1]).all())
