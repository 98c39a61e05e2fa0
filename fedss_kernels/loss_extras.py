"""Margins, label smoothing, class weights, lse: what was given beside the plain loss' arguments, checked."""

import math
from typing import Any, NamedTuple

from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from .checks import (
    FLOATING,
    as_number,
    check_constant,
    check_device,
    check_flag,
    check_shape,
    check_tensor,
    unwrapped,
)


class Extras(NamedTuple):
    """What makes a loss a composed one."""

    angular_margin: float | Tensor  # or (B,)
    cosine_margin: float | Tensor  # or (B,)
    label_smoothing: float
    class_weight: Tensor | None  # (C,)
    return_lse: bool

    @property
    def margins(self) -> tuple[float | Tensor, float | Tensor]:
        return self[:2]

    @property
    def row_margins(self) -> dict[str, Tensor]:
        """Those that rows have of their own, (B,)."""
        return {n: m for n, m in zip(self._fields, self.margins, strict=False) if isinstance(m, Tensor)}

    @property
    def has_margins(self) -> bool:
        return any(isinstance(margin, Tensor) or margin != 0 for margin in self.margins)

    @property
    def of_targets(self) -> bool:
        """Whether the targets' logits are wanted by themselves."""
        return self.has_margins or self.label_smoothing != 0 or self.return_lse


NONE = Extras(0.0, 0.0, 0.0, None, False)


def checked_extras(
    weight: Tensor,  # (C, ...)
    target: Tensor,
    similarity: str,
    angular_margin: Any,
    cosine_margin: Any,
    label_smoothing: Any,
    class_weight: Any,
    return_lse: Any,
) -> Extras:
    """What was given, margins flat; NONE if that is nothing. What tensors hold `check_values` looks at."""
    angular_margin = _checked_margin("angular_margin", angular_margin, target, similarity)
    cosine_margin = _checked_margin("cosine_margin", cosine_margin, target, similarity)
    label_smoothing = check_smoothing(label_smoothing)
    if class_weight is not None:
        _check_class_weight(class_weight, weight.shape[0])
        check_device("class_weight", class_weight, weight.device, "weight")
    return_lse = check_flag("return_lse", return_lse)
    extras = Extras(angular_margin, cosine_margin, label_smoothing, class_weight, return_lse)
    return extras if extras.of_targets or class_weight is not None else NONE


def check_values(
    extras: Extras,
    target: Tensor,  # (B,) classes that there are, or ignore_index
    ignore_index: int,
) -> None:
    """Raises ValueError for a margin or a row's class weight that is not finite or out of range.

    Waits for the device.
    """
    for name, margin in extras.row_margins.items():
        check_numbers(name, unwrapped(margin))
    if extras.class_weight is not None and len(extras.class_weight):
        counted = target != ignore_index
        shares = extras.class_weight.index_select(0, target.where(counted, 0)).where(counted, 0.0)
        if is_functorch_wrapped_tensor(shares):
            check_numbers("class_weight[target]", unwrapped(shares))
        else:
            check_numbers("class_weight", shares, target)


def check_smoothing(label_smoothing: Any) -> float:
    """It as a float; raises TypeError unless it is a number, ValueError unless that is in [0, 1]."""
    return as_number("label_smoothing", label_smoothing, 0.0, most=1.0)


def check_margin(name: str, margin: Any, similarity: str) -> float:
    """That of all rows, as a float; raises TypeError or ValueError."""
    margin = as_number(name, margin)
    if name == "angular_margin" and abs(margin) > math.pi:
        expected = f"{_RANGES[name][1]}, got {margin:g}"
        raise ValueError(f"{name}: expected {expected}; {margin:g} degrees are {math.radians(margin):.4g}")
    if margin != 0 and similarity == "dot":
        _refuse_for_dot(name, margin)
    return margin


def check_class_weights(class_weight: Any, C: int) -> None:
    """Of a module; raises TypeError or ValueError."""
    _check_class_weight(class_weight, C)
    if class_weight.is_meta:
        raise ValueError(
            "class_weight: expected a tensor with numbers, which reset_parameters() gives back, got one on "
            'the device "meta": make it with device="cpu"'
        )
    check_numbers("class_weight", class_weight)


def _check_class_weight(class_weight: Any, C: int) -> None:
    check_tensor("class_weight", class_weight, FLOATING)
    check_shape("class_weight", class_weight, (C,), "(C,)")
    check_constant("class_weight", class_weight)


def _checked_margin(name: str, margin: Any, target: Tensor, similarity: str) -> float | Tensor:
    if not isinstance(margin, Tensor) or (margin.dim() == 0 and target.dim() > 0):
        return check_margin(name, margin, similarity)
    check_tensor(name, margin, FLOATING)
    check_shape(name, margin, target.shape, "target's")
    check_constant(name, margin)
    check_device(name, margin, target.device, "target")
    if similarity == "dot":
        _refuse_for_dot(name, "a tensor")
    return margin.reshape(-1)


def _refuse_for_dot(name: str, found: object) -> None:
    raise ValueError(f'{name}: expected 0 for similarity="dot", as a margin is one of angles, got {found}')


# What a number may be, as least and most, and in words.
_RANGES = {
    "angular_margin": ((-math.pi, math.pi), "radians from -pi to pi"),
    "cosine_margin": ((-math.inf, math.inf), "a finite number"),
    "class_weight": ((0.0, math.inf), "a finite number of at least 0"),
}


def check_numbers(
    name: str,  # one of _RANGES, or a part of one: "class_weight[target]"
    values: Tensor,  # (n,)
    places: Tensor | None = None,  # (n,) where they are in what is called `name`
) -> None:
    """Raises ValueError for one that is not finite or out of range."""
    bounds, expected = _RANGES[name.partition("[")[0]]
    good = values.isfinite() & (values >= bounds[0]) & (values <= bounds[1])
    if not good.all():
        bad = int((~good).nonzero()[0, 0])
        place = bad if places is None else int(places[bad])
        raise ValueError(f"{name}[{place}] = {float(values[bad])}, expected {expected}")
