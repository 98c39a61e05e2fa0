"""What RowSGD and RowAdam have in common: checks of options, clipping, 16-bit parameters, rows and dense."""

import inspect
import math
import numbers
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .checks import FLOATING, as_integer, as_number, check_constant, check_dtype, check_integer, single_item
from .clip_grad import clip_factor, total_norm
from .inplace import overlaps_itself
from .sparse_rows import has_16_bits, is_listed_once, runs_of_entries, unique_rows, widened
from .stochastic_rounding import StochasticRounding

State = dict[str, Any]  # of a parameter, or of the rows of one
Rule = dict[str, Any]  # the options of a step, the numbers as float


class Options(NamedTuple):
    """A group's, checked."""

    rule: Rule
    max_norm: float | None
    seed: int


class RowOptimizer(torch.optim.Optimizer, ABC):
    """An optimiser of torch's for dense gradients that steps only the rows that a sparse gradient lists.

    A subclass says what one step does to dense parameters and to rows. State dicts are those of the optimiser
    of torch's, both ways: a group has all of its options, those that are not ours at the one value that we
    can serve, and any other is refused.
    """

    # Options that must be there, one that no other optimiser's groups have beside these, those that have
    # one value here, those that choose among torch's own implementations, which change nothing here; what
    # there is of each parameter, and of that the moments, with the least that each may be.
    REQUIRED: ClassVar[tuple[str, ...]]
    TELLING: ClassVar[str]
    FIXED: ClassVar[dict[str, Any]]
    UNUSED: ClassVar[dict[str, Any]]
    STATE: ClassVar[tuple[str, ...]]
    MOMENTS: ClassVar[dict[str, float]]

    # The groups' options after a step, if none can change in place, and what the check of them gave.
    _seen: tuple[list[Any], list[Options]] = ([], [])

    def __init__(self, params: Iterable[Any], options: dict[str, Any]) -> None:
        defaults = {**options, "rounding_step": 0, **self.FIXED, **self.UNUSED}
        self._checked(defaults)
        _check_params(params)
        super().__init__(params, _as_pythons(defaults))
        _keep_from_compilers()

    @abstractmethod
    def _checked_rule(self, options: dict[str, Any], where: str) -> Rule:
        """The subclass' own options as numbers; raises TypeError or ValueError."""

    @abstractmethod
    def _checked_state(self, parameter: Tensor, state: State) -> None:
        """Raises TypeError or ValueError unless `state`, which was loaded, is one of `parameter`'s."""

    @abstractmethod
    def _steps_rows(self, parameter: Tensor) -> bool:
        """Whether a dense gradient of this parameter is taken as one that lists every row."""

    @abstractmethod
    def _prepare(self, parameter: Tensor, state: State, rule: Rule, by_rows: bool) -> None:
        """Makes the state that a step needs, where it can be shared by rows and dense gradients."""

    @abstractmethod
    def _step_dense(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: State, rule: Rule
    ) -> None:
        """What torch's optimiser does, in place."""

    @abstractmethod
    def _step_rows(
        self, weight: Tensor, state: State, class_ids: Tensor, rows: Tensor, rule: Rule, fused: bool
    ) -> None:
        """A step of the listed rows of a matrix, in place, its state's tensors (C, ...) too.

        fused: by the kernel, which on a GPU sums rows of one class; else each class is listed once.
        """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters with options of their own; raises as the constructor does."""
        if isinstance(param_group, dict):
            _check_group(param_group)
            self._checked_groups([*self.param_groups, self.defaults | param_group])
            param_group = {name: v if name == "params" else _as_pythons(v) for name, v in param_group.items()}
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What loading and unpickling end in: options that another optimiser or version lacks are added.

        They stay what they are in the groups that are loaded into. Raises before anything changes.
        """
        defaults = {"max_norm": None, "seed": 0, "rounding_step": 0, **self.FIXED, **self.UNUSED}
        defaults |= state.get("defaults") or self.defaults
        loads = "param_groups" in vars(self)  # not as it is unpickled: it is of this class then
        held = self.param_groups if loads else state["param_groups"]
        kept = [name for name in defaults if name not in (*self.REQUIRED, "rounding_step")]
        groups = [
            {"rounding_step": 0} | {name: own.get(name, defaults[name]) for name in kept} | group
            for own, group in zip(held, state["param_groups"], strict=True)
        ]
        self._checked_groups(groups)
        for parameter, of_parameter in state["state"].items():
            if isinstance(parameter, Tensor):  # torch keeps what else was saved
                if others := sorted(of_parameter.keys() - set(self.STATE)):
                    raise ValueError(
                        f"state: expected {', '.join(self.STATE)}, got {', '.join(others)} too: "
                        f"is this the state of another optimiser than {type(self).__name__}?"
                    )
                self._checked_state(parameter, of_parameter)
        if loads:
            self._refuse_groups_of_others(state["param_groups"], defaults)
        super().__setstate__({**state, "defaults": defaults, "param_groups": groups})
        _keep_from_compilers()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimiser's; raises TypeError or ValueError, before anything changes, for what is not ours.

        Options that are not here, state of another optimiser or shape, moments that are not finite.
        """
        loaded = state_dict  # or what hooks made of it: ours is the last before, and the first after

        def check(_: Any, given: dict[str, Any]) -> None:
            nonlocal loaded
            loaded = given
            for parameter, state in self._pairs(loaded):
                self._check_numbers(parameter, state)

        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(lambda _: self._keep_dtypes(loaded), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _pairs(self, state_dict: dict[str, Any]) -> Iterator[tuple[Tensor, State]]:
        """Each parameter, and what a state dict of as many has of it; torch refuses one of other numbers."""
        for parameter, key in with_keys(self, state_dict):
            yield parameter, state_dict["state"].get(key, {})

    def _check_numbers(self, parameter: Tensor, state: State) -> None:
        """Raises TypeError or ValueError unless what is loaded, as it is given, are numbers to go on with."""
        for name, least in self.MOMENTS.items():
            if (moment := state.get(name)) is not None:
                _check_moment(name, moment, least, self._moments_dtype(parameter))

    def _keep_dtypes(self, state_dict: dict[str, Any]) -> None:
        """Undoes what torch did to the dtypes of a state that was loaded, where it is not to be so."""

    def _moments_dtype(self, parameter: Tensor) -> torch.dtype:
        """That in which the moments of a parameter are kept."""
        return parameter.dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient; returns the loss, if a `closure` makes it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held, (seen, checked) = self._options(), self._seen
        changed = not _are_same(held, seen)
        if changed:
            checked = self._checked_groups(self.param_groups)
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                if (grad := parameter.grad) is not None:
                    _check_step(index, parameter, grad, self.state.get(parameter), group)
        factor = self._clip_factor(checked)
        for stream, (group, options) in enumerate(zip(self.param_groups, checked, strict=True)):
            rounding = StochasticRounding(options.seed, as_integer(group["rounding_step"]), stream)
            dense: list[Tensor] = []
            listed: list[Tensor] = []
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_rows = parameter.grad.is_sparse or self._steps_rows(parameter)
                    (listed if by_rows else dense).append(parameter)
            if dense:
                self._step_dense_parameters(dense, group, options.rule, factor, rounding)
            if listed:
                _step_by_rows(self, listed, options.rule, factor, rounding)
            group["rounding_step"] += 1
        if not changed or all(map(_stays, held)):
            self._seen = self._options(), checked
        return loss

    def _options(self) -> list[Any]:
        """Those of all groups, in one list."""
        return [
            value for group in self.param_groups for name, value in group.items() if name not in _NO_OPTIONS
        ]

    def _refuse_groups_of_others(self, groups: list[dict[str, Any]], own: Iterable[str]) -> None:
        """Options tell of another optimiser where no state does, as before its first step."""
        known, in_torch = {*own, *_NO_OPTIONS}.union(*self.param_groups), _options_in_torch()
        for index, group in enumerate(groups):
            foreign = sorted(name for name in group if name not in known and name in in_torch)
            if foreign or self.TELLING not in group:
                found = (
                    f"{foreign[0]} too, which {in_torch[foreign[0]]} has" if foreign else f"no {self.TELLING}"
                )
                kind = type(self).__name__
                raise ValueError(
                    f"param_groups[{index}]: expected the options of {kind}, got {found}: "
                    f"is this the state of another optimiser than {kind}?"
                )

    def _checked_groups(self, groups: list[dict[str, Any]]) -> list[Options]:
        checked = []
        for index, group in enumerate(groups):
            for name in self.REQUIRED:
                if name not in group:
                    raise ValueError(
                        f"param_groups[{index}]: expected an option {name}, got none: "
                        f"is this the state of another optimiser than {type(self).__name__}?"
                    )
            checked.append(self._checked(group, f"param_groups[{index}]: "))
        _check_norms([options.max_norm for options in checked])
        return checked

    def _checked(self, options: dict[str, Any], where: str = "") -> Options:
        rule, max_norm = self._checked_rule(options, where), options["max_norm"]
        if max_norm is not None:
            max_norm = as_number(f"{where}max_norm", max_norm, least=0, infinite=True)
        seed, _ = (check_integer(where + n, options[n], 0) for n in ("seed", "rounding_step"))
        for name, value in self.FIXED.items():
            if options[name] != value:
                kind = type(self).__name__
                raise ValueError(
                    f"{where}{name}: expected {value}, as {kind} has no other, got {options[name]}"
                )
        return Options(rule, max_norm, seed)

    def _clip_factor(self, checked: list[Options]) -> Tensor | None:
        max_norm = checked[0].max_norm if checked else None
        if max_norm is None:
            return None
        parameters = (p for group in self.param_groups for p in group["params"])
        gradients = [p.grad for p in parameters if p.grad is not None]
        return clip_factor(total_norm(gradients, wide=True), max_norm)

    def _step_dense_parameters(
        self,
        parameters: list[Tensor],
        group: dict[str, Any],
        rule: Rule,
        factor: Tensor | None,
        rounding: StochasticRounding,
    ) -> None:
        """16-bit parameters and their state in float32, and rounded back."""
        states = [self.state.get(p) or {} for p in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            self._prepare(parameter, state, rule, by_rows=False)
        weights = [widened(p) for p in parameters]
        grads = [_scaled(_gradient(p), factor) for p in parameters]
        stepped = [
            state if weight is parameter else {n: widened(v) for n, v in state.items() if v is not None}
            for parameter, weight, state in zip(parameters, weights, states, strict=True)
        ]
        self._step_dense(weights, grads, stepped, group, rule)
        for parameter, weight, state, values in zip(parameters, weights, states, stepped, strict=True):
            if weight is not parameter:
                _round_back(parameter, weight, state, values, rounding)
            if state:
                self.state[parameter] = state

    def _step_listed_rows(
        self, parameter: Tensor, rule: Rule, factor: Tensor | None, rounding: StochasticRounding
    ) -> None:
        state: State = self.state.get(parameter) or {}
        self._prepare(parameter, state, rule, by_rows=True)
        if state:
            self.state[parameter] = state
        matrices = {name: _matrix(v) for name, v in state.items() if isinstance(v, Tensor) and v.dim() > 0}
        weight, grad = _matrix(parameter.detach()), _gradient(parameter)
        fused = _has_kernel(weight)
        if fused and not has_16_bits(weight):
            class_ids, rows = _listed(grad)
            self._step_rows(weight, matrices, class_ids, _scaled(_matrix(rows), factor), rule, fused)
            return
        class_ids, rows, first = _summed(grad)
        # Of copies, and written back all at once: where a class comes twice it has the same numbers twice.
        # index_select copies rows; weight[class_ids] would copy numbers, which takes ten times as long.
        part = widened(weight.index_select(0, class_ids))
        parts = {name: widened(matrix.index_select(0, class_ids)) for name, matrix in matrices.items()}
        here = torch.arange(len(class_ids), device=weight.device)
        self._step_rows(part, parts, here, _scaled(_matrix(rows), factor), rule, fused)
        for whole, stepped in ((weight, part), *((matrices[name], parts[name]) for name in matrices)):
            whole[class_ids] = rounding(stepped, whole.dtype)[first]


def _all_by_rows(
    optimizer: RowOptimizer,
    parameters: list[Tensor],
    rule: Rule,
    factor: Tensor | None,
    rounding: StochasticRounding,
) -> None:
    for parameter in parameters:
        optimizer._step_listed_rows(parameter, rule, factor, rounding)


_step_by_rows = _all_by_rows


def _keep_from_compilers() -> None:
    """torch.compile would give the rows of one parameter the state of another, without a word.

    So they are stepped as they are, in a compiled `step` too. From the first optimiser on: torch._dynamo,
    which takes as long to import as torch, is imported by torch's optimisers, not by torch.
    """
    global _step_by_rows
    if _step_by_rows is _all_by_rows:
        _step_by_rows = torch.compiler.disable(_all_by_rows)


def with_keys(optimizer: torch.optim.Optimizer, state_dict: State) -> Iterator[tuple[Tensor, Any]]:
    """Each parameter of an optimiser, and its key in the state of a state_dict of as many."""
    for group, given in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        yield from zip(group["params"], given["params"], strict=False)


_NO_OPTIONS = ("params", "param_names")


def _are_same(options: list[Any], others: list[Any]) -> bool:
    """Whether these are the very same objects."""
    return len(options) == len(others) and all(map(operator.is_, options, others))


def _stays(value: Any) -> bool:
    """Whether it is what it is for good; a tensor, an array or a list may hold something else later."""
    if type(value) is tuple:
        return all(map(_stays, value))
    return value is None or type(value) in (float, int, bool, str)


@cache
def _options_in_torch() -> dict[str, str]:
    """The options of torch's optimisers, each with the name of one that has it."""
    kinds = [kind for kind in vars(torch.optim).values() if isinstance(kind, type)]
    return {
        option: kind.__name__
        for kind in kinds
        if issubclass(kind, torch.optim.Optimizer)
        for option in inspect.signature(kind).parameters
    }


def _round_back(
    parameter: Tensor, weight: Tensor, state: State, stepped: State, rounding: StochasticRounding
) -> None:
    """What a step made of a 16-bit parameter and its state, into these."""
    parameter.copy_(rounding(weight, parameter.dtype))
    for name, value in stepped.items():
        held = state.get(name)
        if held is None:
            state[name] = rounding(value, parameter.dtype)
        elif value is not held:
            held.copy_(rounding(value, held.dtype))


def _as_pythons(value: Any) -> Any:
    """NumPy's numbers and fractions as Python's, so that torch.load reads the saved state with weights_only.

    In dicts, lists and tuples too.
    """
    if isinstance(value, dict):
        return {name: _as_pythons(option) for name, option in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return (list if type(value) is list else tuple)(map(_as_pythons, value))
    if isinstance(value, np.ndarray):
        value = single_item(value) if value.size == 1 else value.tolist()
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, numbers.Integral):
        return as_integer(value)
    return float(value) if isinstance(value, numbers.Real) else value


def _gradient(parameter: Tensor) -> Tensor:
    """A dense one in the dtype of the step, whatever `grad_dtype` let it be."""
    grad = parameter.grad
    assert grad is not None
    return grad if grad.is_sparse else grad.to(torch.float32 if has_16_bits(parameter) else parameter.dtype)


def _matrix(values: Tensor) -> Tensor:
    """(C, D), and (C,) as (C, 1)."""
    return values[:, None] if values.dim() == 1 else values


def _scaled(values: Tensor, factor: Tensor | None) -> Tensor:
    if factor is None:
        return values
    # a factor of float64 makes float64 of one of no dimensions
    return (values * factor.to(values.device)).to(values.dtype)


def _has_kernel(weight: Tensor) -> bool:
    return weight.device.type == "cpu" or (weight.is_cuda and find_spec("triton") is not None)


def _every_row(grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(len(grad), device=grad.device), grad


def _listed(grad: Tensor) -> tuple[Tensor, Tensor]:
    """(class_ids (M,), rows (M, ...)): each class once, but on CUDA, where to sum rows would be to wait."""
    if not grad.is_sparse:
        return _every_row(grad)
    return (grad._indices()[0], grad._values()) if grad.is_cuda else unique_rows(grad)


def _summed(grad: Tensor) -> tuple[Tensor, Tensor, Tensor | slice]:
    """(class_ids (M,), rows (M, ...) in float32 or better, where the first of each class is (M,)).

    Without a wait for the device: a class that comes twice stays listed twice, each time with the sum.
    """
    if not grad.is_sparse or is_listed_once(grad) or len(grad._values()) == 0:
        class_ids, rows = (grad._indices()[0], grad._values()) if grad.is_sparse else _every_row(grad)
        return class_ids, widened(rows), slice(None)
    runs = runs_of_entries(grad)
    return runs.ids, runs.sums(grad._values())[runs.run], runs.starts[runs.run]


def as_rate(name: str, value: object) -> float:
    """A learning rate >= 0; what a schedule that ends at 0 makes of it by rounding, a little below, is 0."""
    rate = single_item(value)
    rounded = isinstance(rate, float) and -_ROUNDING <= rate < 0
    return 0.0 if rounded else as_number(name, value, least=0)


_ROUNDING = 1e-12


def check_dense(name: str, value: object) -> None:
    """Raises TypeError or ValueError unless `value`, a part of a state, can be stepped in place."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        found = f"layout {value.layout}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a dense tensor, got {found}")
    check_constant(name, value)
    if value.numel() and overlaps_itself(value):
        raise ValueError(f"{name}: expected a tensor whose elements do not share memory, got an expanded one")


def _check_moment(name: str, value: object, least: float, dtype: torch.dtype) -> None:
    """Raises TypeError or ValueError unless `value` holds numbers from `least` that `dtype` can hold."""
    check_dense(name, value)
    assert isinstance(value, Tensor)
    check_dtype(name, value.dtype, (dtype,) if dtype.is_complex else FLOATING)
    largest = min(torch.finfo(dtype).max, torch.finfo(value.dtype).max)
    held = value.to_local() if hasattr(value, "to_local") else value
    held = torch.view_as_real(held.resolve_conj()) if held.is_complex() else held
    good = (held >= max(least, -largest)) & (held <= largest)  # not so for NaN
    if held.is_meta or good.all():
        return
    place = (~good).nonzero()[0].tolist()
    found = held[tuple(place)].item()
    expected = "a finite number"
    if math.isfinite(found) and found >= least:
        expected = f"a number that {str(dtype).removeprefix('torch.')} holds, its parameter's"
    elif least == 0 and found != math.inf:
        expected = "at least 0"
    raise ValueError(f"{name}{place}: expected {expected}, got {found:g}")


def _check_params(params: Any) -> None:
    """Raises TypeError for what is neither parameters nor a list of groups of them."""
    if not isinstance(params, dict) and _iterates(params):
        return
    instead = ": take its .parameters()" if isinstance(params, torch.nn.Module) else ""
    raise TypeError(f"params: expected parameters or a list of groups, got {type(params).__name__}{instead}")


def _check_group(group: dict[str, Any]) -> None:
    """Raises ValueError or TypeError for one that does not say which parameters it is of."""
    expected = 'params: expected the parameters of a group in its "params"'
    if "params" not in group:
        raise ValueError(f"{expected}, got one of {', '.join(map(str, group)) or 'nothing'} alone")
    if not _iterates(group["params"]):
        raise TypeError(f"{expected}, got {type(group['params']).__name__}")


def _iterates(params: Any) -> bool:
    return isinstance(params, Iterable) or hasattr(params, "__getitem__")


def _check_norms(norms: list[float | None]) -> None:
    if len(set(norms)) > 1:
        raise ValueError(
            "max_norm: expected the same number in every group, as the norm is that of all gradients, "
            f"got {', '.join(map(str, norms))}"
        )


def _check_step(
    index: int, parameter: Tensor, grad: Tensor, state: State | None, group: dict[str, Any]
) -> None:
    """Raises ValueError unless `parameter` and its state can be stepped by this gradient."""
    if grad.is_sparse:
        _check_lists_rows(index, parameter, grad)
    shape, dtype = parameter.shape, parameter.dtype
    if grad.shape != shape:
        raise ValueError(
            f"{_called(index, group)}: expected a gradient of shape {tuple(shape)}, the parameter's, got one "
            f"of {tuple(grad.shape)}: was it grown since its backward pass?"
        )
    if grad.is_complex() and not dtype.is_complex:
        raise ValueError(
            f"{_called(index, group)}: expected a gradient of real numbers, as {dtype} holds, "
            f"got {grad.dtype}"
        )
    for name, value in state.items() if state else ():
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        casts = value.dtype != dtype and value.is_floating_point() and not has_16_bits(parameter)
        if casts or value.shape != shape[: value.dim()] or value.device != parameter.device:
            raise ValueError(
                f"{_called(index, group)}: {tuple(shape)} {dtype} on {parameter.device}, has another shape, "
                f"dtype or device than at its first step: its {name} is {tuple(value.shape)} {value.dtype} "
                f"on {value.device}; load_state_dict(state_dict()) casts and moves a state, a new optimiser "
                "fits new rows"
            )


def _called(index: int, group: dict[str, Any]) -> str:
    """A parameter's place in its group, and its name where the optimiser was given names."""
    names = group.get("param_names")
    return f"params[{index}]" + (f" ({names[index]})" if names else "")


def _check_lists_rows(index: int, parameter: Tensor, grad: Tensor) -> None:
    """Raises ValueError unless rows of `parameter` can be stepped by this sparse gradient."""
    if parameter.dim() not in (1, 2) or grad.sparse_dim() != 1 or parameter.dtype not in FLOATING:
        raise ValueError(
            f"params[{index}]: expected a sparse gradient to list whole rows of a floating (C, D) or (C,) "
            f"parameter, got {grad.sparse_dim()} sparse dimensions of {tuple(parameter.shape)} "
            f"{parameter.dtype}"
        )
    if grad.dtype not in (parameter.dtype, torch.float16, torch.bfloat16):
        raise ValueError(
            f"params[{index}]: expected a sparse gradient of {parameter.dtype}, as it is, or of 16 bits, "
            f"got {grad.dtype}"
        )
