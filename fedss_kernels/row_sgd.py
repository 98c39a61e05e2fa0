"""SGD for models whose class matrix has sparse gradients (`sparse_grad=True`): steps cost O(touched rows)."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from .checks import as_number, check_flag
from .reference import row_momentum_step_ as _plain_row_momentum_step_
from .row_momentum import step_
from .row_optimizer import RowOptimizer, Rule, State, as_rate, check_dense


class RowSGD(RowOptimizer):
    """SGD with momentum that updates only the rows of a parameter that its sparse gradient lists.

    For a sparse COO gradient of a (C, D) or (C,) parameter, and each row c that it lists (entries of one row
    are summed first; see `row_momentum_step_`):

        g = grad[c] + weight_decay * weight[c]
        velocity[c] = v = momentum * velocity[c] + g
        weight[c] -= lr * v                             (nesterov: lr * (g + momentum * v))

    Rows that the gradient does not list keep weight and velocity as they are. That is lazy: under
    torch.optim.SGD with a dense gradient such rows coast on with their velocity and decay. When every row is
    listed in every step the two are the same method. Without momentum there is no velocity, and no memory
    for it.

    For a dense gradient it does what torch.optim.SGD does, so one optimiser serves a whole model. State dicts
    are those of torch.optim.SGD, both ways; what is not here (`dampening`, `maximize`) is refused by name.

    Parameters may be float16, bfloat16, float32 or float64 on any device. For float32 and float64 on the CPU
    and on CUDA the rows are updated by one fused kernel, bit-identical from run to run for any number of
    threads; on CUDA it sums the entries of a row too, and nothing waits for the device.

    16-bit parameters, with dense gradients too, are stepped in float32, and then weight and velocity are
    rounded once, up or down by chance, so that they are right on average: rounded to nearest, a bfloat16 1.0
    would lose every step below 0.002. There is no float32 copy of them. The chances go by `seed` and the
    number of the step, which state dicts hold: the same on each run, for any number of threads, and after a
    stop, though others on a GPU than on a CPU.

    Gradients of several backward passes without a step in between: torch strings sparse ones together, and
    copies all of the list in each pass, so that k passes cost O(k^2). Larger batches are the better way; or
    `weight.grad = weight.grad.coalesce()` every few passes.

    Args:
        params: parameters, or dicts of them with options of their own, as for any torch.optim optimiser.
        lr: learning rate, a number >= 0 or a tensor of one; a learning-rate scheduler may change it. One on
            a GPU costs a wait for it in each step.
        momentum: >= 0.
        weight_decay: >= 0.
        nesterov: Nesterov's momentum; needs momentum > 0.
        max_norm: as `clip_grad_norm_` of all gradients of the optimiser before each step, but the gradients
            stay as they are, and of 16-bit ones the norm is a float32; None: no clipping. With a GradScaler
            it is of the unscaled gradients, as `scaler.step` unscales first. Groups have one and the same.
            Each process of ZeroRedundancyOptimizer or FullyShardedDataParallel steps a part of the model, and
            would clip by the norm of that part: there leave it None, and before each step call
            `clip_grad_norm_` of the model's parameters, or FullyShardedDataParallel's method of that name.
        seed: an integer >= 0, of the rounding of 16-bit parameters.

    Raises:
        TypeError, ValueError: on construction, in `load_state_dict` and in `step`, before anything has
            changed, for an option that is no number or out of range; in `step` for a sparse gradient of
            something other than a floating (C, D) or (C,) parameter.

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

    REQUIRED = ("lr", "momentum", "weight_decay")
    TELLING = "nesterov"  # not in a group of RMSprop's
    FIXED = {"dampening": 0, "maximize": False, "differentiable": False}
    UNUSED = {"foreach": None, "fused": None}
    STATE = ("momentum_buffer",)
    MOMENTS = {"momentum_buffer": -math.inf}

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        max_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, options | {"max_norm": max_norm, "seed": seed})

    def _checked_rule(self, options: dict[str, Any], where: str) -> Rule:
        rule: Rule = {name: as_number(where + name, options[name], least=0) for name in self.REQUIRED[1:]}
        rule["lr"] = as_rate(f"{where}lr", options["lr"])
        nesterov = check_flag(f"{where}nesterov", options["nesterov"])
        if nesterov and rule["momentum"] == 0:
            raise ValueError(f"{where}nesterov: expected False without momentum, got True")
        return rule | {"nesterov": nesterov}

    def _checked_state(self, parameter: Tensor, state: State) -> None:
        velocity = state.get("momentum_buffer")
        if velocity is None:
            return
        check_dense("momentum_buffer", velocity)
        if velocity.shape != parameter.shape:
            raise ValueError(
                f"momentum_buffer: expected shape {tuple(parameter.shape)}, its parameter's, "
                f"got {tuple(velocity.shape)}"
            )

    def _steps_rows(self, parameter: Tensor) -> bool:
        return False

    def _prepare(self, parameter: Tensor, state: State, rule: Rule, by_rows: bool) -> None:
        if by_rows and rule["momentum"] and state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(parameter)

    def _step_dense(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: State, rule: Rule
    ) -> None:
        moves = rule["momentum"] != 0
        velocities = [state.get("momentum_buffer") if moves else None for state in states]
        sgd(weights, grads, velocities, dampening=0.0, maximize=False, **rule)
        if moves:
            for state, velocity in zip(states, velocities, strict=True):
                state["momentum_buffer"] = velocity

    def _step_rows(
        self, weight: Tensor, state: State, class_ids: Tensor, rows: Tensor, rule: Rule, fused: bool
    ) -> None:
        velocity = state.get("momentum_buffer") if rule["momentum"] else None
        if fused:
            step_(weight, velocity, class_ids, rows, **rule, impl="auto", check_ids=False)
        else:
            _plain_row_momentum_step_(weight, velocity, class_ids, rows, **rule)
