"""AdamW for models whose class matrix has sparse gradients: steps cost O(touched rows)."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from . import _C, inplace
from .checks import as_number, check_shape, check_tensor
from .implementations import choose_impl, triton_kernels
from .reference import row_adam_step_ as _plain_row_adam_step_
from .row_optimizer import RowOptimizer, Rule, State, as_rate, check_dense

_COUNTED_TO = "counted_to"  # in a state dict: the `step` at which `row_steps` hold


def row_adam_step_(
    weight: Tensor,  # (C, D) float32 | float64
    exp_avg: Tensor,  # (C, D) weight's dtype
    exp_avg_sq: Tensor,  # (C, D) weight's dtype, >= 0
    row_steps: Tensor,  # (C,) int64 >= 0: the steps that each row has taken
    class_ids: Tensor,  # (M,) int64 in [0, C), each once
    rows: Tensor,  # (M, D) weight's dtype | float16 | bfloat16: the gradient of weight[class_ids]
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    impl: str = "auto",  # "cpp" | "triton"; auto: by the tensors' device
) -> Tensor:
    """For each i, with c = class_ids[i] and g = rows[i], in place; returns `weight`:

        row_steps[c] = n = row_steps[c] + 1
        exp_avg[c] = m = exp_avg[c] + (1 - beta1) * (g - exp_avg[c])
        exp_avg_sq[c] = v = beta2 * exp_avg_sq[c] + (1 - beta2) * g^2
        weight[c] = (1 - lr * weight_decay) * weight[c]
                    - lr / (1 - beta1^n) * m / (sqrt(v) / sqrt(1 - beta2^n) + eps)

    AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", Algorithm 2) on the rows that have
    a gradient: the others are neither read nor written, so a step costs O(M * D) whatever C is, and a row's
    averages are corrected for its own n steps. Each operation on a row is rounded by itself in weight's
    dtype, the row's own numbers are computed in float64: the bits are the same for any number of threads and
    any instruction set. Strided tensors are used as they are. On CUDA as `row_momentum_step_`: one wait
    checks the ids; while a CUDA graph is captured ids out of range are passed over and rows of a class that
    comes twice summed.

    Raises TypeError or ValueError for a wrong dtype, shape, device, number or `impl`, for arguments that
    share memory with one that changes, for a tensor that requires grad, and for a class that comes twice;
    IndexError for an id out of range. The last two name position and value. A call that raises changes
    nothing.

    >>> weight, exp_avg, exp_avg_sq = torch.zeros(3, 3, 1)
    >>> row_steps, rows = torch.zeros(3, dtype=torch.int64), torch.tensor([[5.0]])
    >>> for _ in range(2):  # a constant gradient moves by lr, whatever its size
    ...     step = row_adam_step_(
    ...         weight, exp_avg, exp_avg_sq, row_steps, torch.tensor([1]), rows, lr=0.5, weight_decay=0.0
    ...     )
    >>> weight.flatten(), row_steps
    (tensor([ 0., -1.,  0.]), tensor([0, 2, 0]))
    """
    numbers = _numbers("", lr, betas, eps, weight_decay)
    return step_(weight, exp_avg, exp_avg_sq, row_steps, class_ids, rows, *numbers, impl=impl, check_ids=True)


def step_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row_steps: Tensor,
    class_ids: Tensor,
    rows: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    *,
    impl: str,
    check_ids: bool,
) -> Tensor:
    """`row_adam_step_`; without `check_ids` a GPU does what it does while a CUDA graph is captured."""
    state = {"weight": weight, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "row_steps": row_steps}
    _check(state, class_ids, rows)
    OPERATOR(
        *(*state.values(), class_ids, rows.resolve_neg(), lr, beta1, beta2, eps, weight_decay),
        *(check_ids, choose_impl(impl, weight.device)),
    )
    return weight


def _as_tensor(value: Any) -> Tensor:
    """A tensor as it is, which torch.as_tensor moves to the default device."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


def _numbers(where: str, lr: Any, betas: Any, eps: Any, weight_decay: Any) -> tuple[float, ...]:
    """(lr, beta1, beta2, eps, weight_decay)"""
    pair = tuple(betas) if isinstance(betas, (Tensor, np.ndarray)) and betas.ndim else betas
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
        raise TypeError(f"{where}betas: expected two numbers, got {betas!r}")
    beta1, beta2 = (as_number(f"{where}betas[{i}]", beta, least=0, below=1) for i, beta in enumerate(pair))
    lr = as_rate(f"{where}lr", lr)
    eps, weight_decay = (
        as_number(where + name, value, least=0)
        for name, value in (("eps", eps), ("weight_decay", weight_decay))
    )
    return lr, beta1, beta2, eps, weight_decay


def _check(state: dict[str, Tensor], class_ids: Tensor, rows: Tensor) -> None:
    weight = state["weight"]
    check_tensor("weight", weight, (torch.float32, torch.float64))
    check_tensor("class_ids", class_ids, (torch.int64,))
    check_tensor("rows", rows, (weight.dtype, torch.float16, torch.bfloat16))
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape (C, D), got {tuple(weight.shape)}")
    if class_ids.dim() != 1:
        raise ValueError(f"class_ids: expected shape (M,), got {tuple(class_ids.shape)}")
    check_shape("rows", rows, (len(class_ids), weight.shape[1]), "(M, D)")
    for name in ("exp_avg", "exp_avg_sq"):
        check_tensor(name, state[name], (weight.dtype,))
        check_shape(name, state[name], tuple(weight.shape), "(C, D), weight's")
    check_tensor("row_steps", state["row_steps"], (torch.int64,))
    check_shape("row_steps", state["row_steps"], (len(weight),), "(C,)")
    inplace.check_arguments(state, {"class_ids": class_ids, "rows": rows})


def _row_adam_step(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row_steps: Tensor,
    class_ids: Tensor,
    rows: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    check_ids: bool,
    impl: str,
) -> None:
    changed = {
        "weight": weight,
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
        "row_steps": row_steps[:, None],
    }
    inplace.check_memory(changed, {"class_ids": class_ids, "rows": rows})
    state, numbers = (weight, exp_avg, exp_avg_sq, row_steps), (lr, beta1, beta2, eps, weight_decay)
    if impl == "triton":
        kernels = triton_kernels("row_adam", weight.device)
        ids, order = inplace.sorted_ids(class_ids, len(weight), check=check_ids, once=True)
        kernels.row_adam_step(*state, ids, order, rows, *numbers)
    else:
        _C.row_adam_step(*state, class_ids, rows, *numbers, threads=torch.get_num_threads())


OPERATOR = inplace.register(
    "row_adam_step_(Tensor(a!) weight, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) row_steps, "
    "Tensor class_ids, Tensor rows, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "bool check_ids, str impl) -> ()",
    changed=4,
    kernel=_row_adam_step,
)


class RowAdam(RowOptimizer):
    """AdamW that updates only the rows of a parameter that its sparse gradient lists: lazy AdamW.

    For a sparse COO gradient of a (C, D) or (C,) parameter, and each row c that it lists (entries of one row
    are summed first; see `row_adam_step_`):

        n = row_steps[c] + 1
        m = beta1 * m + (1 - beta1) * g;    v = beta2 * v + (1 - beta2) * g^2
        weight[c] = (1 - lr * weight_decay) * weight[c]
                    - lr / (1 - beta1^n) * m / (sqrt(v) / sqrt(1 - beta2^n) + eps)

    Rows that the gradient does not list keep weight and averages as they are: they neither coast nor decay. A
    row is corrected for its own n steps, so the first step of a class that is seen late is as long as any
    class' first. (torch.optim.SparseAdam counts the parameter's steps: there it is longer by
    (1 - beta1) / sqrt(1 - beta2), 3.2 by default, for a class first seen after thousands. It has no decay.)
    When every row is listed in every step this is torch.optim.AdamW.

    For a dense gradient it does what torch.optim.AdamW does, bit for bit, so one optimiser serves a whole
    model. A parameter whose rows are counted, as it has had a sparse gradient, takes a dense one as one that
    lists every row.

    State dicts are those of torch.optim.AdamW, both ways. `step` counts the parameter's steps, as there;
    `row_steps` (C,) those of each row, up to the step `counted_to`: AdamW carries both along, and what steps
    it takes are every row's. Where they are missing every row has taken `step` steps. Options that are not
    here (`amsgrad`, `maximize`, an Adam's decay that is not decoupled) are refused by name.
    torch.distributed.checkpoint loads what the optimiser that it loads into has, and for one without a state
    its get_state_dict makes a state of dense gradients, without `row_steps`: give such an optimiser one
    training step first, which loading then undoes.

    Parameters may be float16, bfloat16, float32 or float64 on any device; 16-bit ones, clipping, numbers and
    waits are those of `RowSGD`. The averages of a 16-bit parameter are float32: squares of gradients leave
    float16's range. Both averages are allocated once, in the parameter's size.

    Args:
        params: parameters, or dicts of them with options of their own, as for any torch.optim optimiser.
        lr: learning rate, a number >= 0 or a tensor of one; a learning-rate scheduler may change it.
        betas: of the averages of the gradient and of its square; in [0, 1).
        eps: >= 0.
        weight_decay: >= 0; times lr, the share of itself that a row loses in each of its steps.
        max_norm: as for `RowSGD`.
        seed: as for `RowSGD`.

    Raises:
        TypeError, ValueError: on construction, in `load_state_dict` and in `step`, before anything has
            changed, for an option that is no number or out of range; in `step` for a sparse gradient of
            something other than a floating (C, D) or (C,) parameter.

    >>> weight = torch.nn.Parameter(torch.zeros(3, 2))
    >>> optimizer = RowAdam([weight], lr=0.5, weight_decay=0.0)
    >>> weight.grad = torch.sparse_coo_tensor([[2]], torch.full((1, 2), 7.0), (3, 2), check_invariants=True)
    >>> for _ in range(2):
    ...     optimizer.step()
    >>> weight.data  # a constant gradient moves by lr, whatever its size
    tensor([[ 0.,  0.],
            [ 0.,  0.],
            [-1., -1.]])
    """

    REQUIRED = ("lr", "betas", "eps", "weight_decay")
    TELLING = "amsgrad"  # not in a group of RAdam's or Adamax'
    FIXED = {"amsgrad": False, "maximize": False, "differentiable": False, "decoupled_weight_decay": True}
    UNUSED = {"foreach": None, "capturable": False, "fused": None}
    STATE = ("step", "exp_avg", "exp_avg_sq", "row_steps", _COUNTED_TO)
    MOMENTS = {"exp_avg": -math.inf, "exp_avg_sq": 0}

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options | {"max_norm": max_norm, "seed": seed})

    def state_dict(self) -> dict[str, Any]:
        """As any optimiser's; of rows that are counted with the step up to which they are."""
        saved = super().state_dict()
        state = {
            key: {**held, _COUNTED_TO: int(held["step"])} if "row_steps" in held else held
            for key, held in saved["state"].items()
        }
        return {**saved, "state": state}

    def _keep_dtypes(self, state_dict: dict[str, Any]) -> None:
        """What torch gave the parameter's dtype has its own: counts, and averages of 16-bit parameters."""
        for parameter, state in self._pairs(state_dict):
            for name, value in state.items():
                if name == _COUNTED_TO:
                    continue
                own = {"step": torch.float32, "row_steps": torch.int64}
                dtype = own.get(name, self._moments_dtype(parameter))
                device = "cpu" if name == "step" else parameter.device
                # a copy: torch copies what it casts, and nothing else
                self.state[parameter][name] = _as_tensor(value).to(device, dtype, copy=True)
            if "row_steps" in state:  # what another optimiser took since, all rows took
                since = int(state["step"]) - int(self.state[parameter].pop(_COUNTED_TO, state["step"]))
                self.state[parameter]["row_steps"] += since

    def _checked_rule(self, options: dict[str, Any], where: str) -> Rule:
        lr, beta1, beta2, eps, weight_decay = _numbers(where, *(options[name] for name in self.REQUIRED))
        return {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}

    def _checked_state(self, parameter: Tensor, state: State) -> None:
        if not state:
            return
        shapes = dict.fromkeys(("exp_avg", "exp_avg_sq"), tuple(parameter.shape)) | {"step": ()}
        if "row_steps" in state:
            shapes["row_steps"] = tuple(parameter.shape[:1])
        for name, shape in shapes.items():
            held = state.get(name)
            found = "none" if held is None else tuple(_as_tensor(held).shape)
            if found != shape:
                raise ValueError(f"state: expected {name} of shape {shape}, got {found}")
        for name in self.MOMENTS:
            check_dense(name, state[name])
        step = as_number("step", state["step"], least=0, below=2.0**53)
        as_number(_COUNTED_TO, state.get(_COUNTED_TO, 0), least=0, most=step)

    def _check_numbers(self, parameter: Tensor, state: State) -> None:
        super()._check_numbers(parameter, state)
        if state.get("row_steps") is None:
            return
        held = _as_tensor(state["row_steps"])
        held = (held.to_local() if hasattr(held, "to_local") else held).to(torch.float64)
        for good, expected in (
            (held >= 0, "at least 0"),  # not so for NaN
            (held < 2**53, "less than 2**53"),
            (held == held.trunc(), "a whole number"),
        ):
            if not held.is_meta and not good.all():
                place = (~good).nonzero()[0].tolist()
                raise ValueError(f"row_steps{place}: expected {expected}, got {held[tuple(place)].item():g}")

    def _moments_dtype(self, parameter: Tensor) -> torch.dtype:
        return torch.promote_types(parameter.dtype, torch.float32)

    def _steps_rows(self, parameter: Tensor) -> bool:
        return "row_steps" in self.state.get(parameter, {})

    def _prepare(self, parameter: Tensor, state: State, rule: Rule, by_rows: bool) -> None:
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
            for name in self.MOMENTS:
                state[name] = torch.zeros_like(parameter, dtype=self._moments_dtype(parameter))
        if by_rows:
            if "row_steps" not in state:
                state["row_steps"] = torch.full(
                    (len(parameter),), int(state["step"]), dtype=torch.int64, device=parameter.device
                )
            state["step"] += 1

    def _step_dense(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: State, rule: Rule
    ) -> None:
        averages, squares, steps = (
            [state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")
        )
        lr = group["lr"]  # a tensor as it is: torch computes in its dtype
        rule = rule | ({"lr": lr} if isinstance(lr, Tensor) else {})
        adamw(weights, grads, averages, squares, [], steps, amsgrad=False, maximize=False, **rule)

    def _step_rows(
        self, weight: Tensor, state: State, class_ids: Tensor, rows: Tensor, rule: Rule, fused: bool
    ) -> None:
        averages, row_steps = (state["exp_avg"], state["exp_avg_sq"]), state["row_steps"].squeeze(1)
        if fused:
            step_(weight, *averages, row_steps, class_ids, rows, **rule, impl="auto", check_ids=False)
        else:
            rule = dict(rule)
            betas = rule.pop("beta1"), rule.pop("beta2")
            _plain_row_adam_step_(weight, *averages, row_steps, class_ids, rows, betas=betas, **rule)
