"""What the loss' kernels are given, and the types that they compute in."""

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from .configurations import in_force

LARGEST_FACTOR = {"cosine": 1e20, "dot": 1e30}  # of the scale, for it and scale / |input| in float32


class Traits(NamedTuple):
    """What the kernels are compiled for, besides the arguments' dtypes."""

    operand: torch.dtype  # of products
    precision: str  # of float32 products: "ieee" or "tf32"
    cosine: bool
    reduction: str
    fold: bool  # every class is in the set
    rows: torch.dtype  # what `operand` is but for the scale
    rounding: torch.dtype | None  # autocast's, of all rows but float64's

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.operand == torch.float64 else torch.float32


class Problem(NamedTuple):
    """What the kernels are given. Tensors on one device; those of one dimension contiguous."""

    input: Tensor  # (B, D)
    weight: Tensor  # (C, D)
    target: Tensor  # (B,)
    class_ids: Tensor | None  # (S,)
    log_expected_count: Tensor | None  # (S,)
    target_log_expected_count: Tensor | None  # (B,)
    bias: Tensor | None  # (C,)
    learned: Tensor | None  # (): the scale is this, or 1, times ...
    entry_labels: Tensor | None  # (S,); None: class_ids
    target_labels: Tensor | None  # (B,); None: hits are told by classes
    target_logit: Tensor | None  # (B,): of rows whose target is no class then, see `without_classes`
    factor: float  # ... this
    ignore_index: int
    traits: Traits

    @classmethod
    def of(
        cls,
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        class_ids: Tensor | None,
        log_expected_count: Tensor | None,
        target_log_expected_count: Tensor | None,
        bias: Tensor | None,
        scale: float | Tensor,
        similarity: str,
        ignore_index: int,
        reduction: str,
        rounding: torch.dtype | None,
        entry_labels: Tensor | None = None,
        target_labels: Tensor | None = None,
        target_logit: Tensor | None = None,
    ) -> "Problem":
        learned = None
        if not isinstance(scale, Tensor):
            factor = scale
        elif scale.is_cpu or scale.device != input.device:
            factor = scale.item()
        else:
            learned, factor = scale, 1.0
        rows = operand = dtype_of_products(input, weight, rounding)
        if abs(factor) > LARGEST_FACTOR[similarity]:
            operand = torch.float64
        float32 = operand == torch.float64
        if any(given is not None for given in (entry_labels, target_labels, target_logit)):
            entry_labels = class_ids if entry_labels is None else entry_labels
            target_labels = target if target_labels is None else target_labels
        if target_logit is not None:
            target = without_classes(target, ignore_index)
        return cls(
            input,
            weight,
            target.contiguous(),
            _contiguous(class_ids),
            _contiguous(log_expected_count, float32),
            _contiguous(target_log_expected_count, float32),
            _contiguous(bias, float32),
            _contiguous(learned, float32),
            _contiguous(entry_labels),
            _contiguous(target_labels),
            _contiguous(target_logit),
            factor,
            ignore_index,
            Traits(
                operand,
                "tf32" if operand == torch.float32 and not _exact() else "ieee",
                similarity == "cosine",
                reduction,
                class_ids is None,
                rows,
                rounding,
            ),
        )

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those of the fields that are, in order."""
        return self[:11]

    @property
    def signature(self) -> Hashable:
        """What problems have in common that run the same launches, of the same compiled kernels."""
        matrices = self.input, self.weight  # copies of them, where `operands` are, follow from these
        strides = [matrix.stride() for matrix in matrices]
        aligned = [matrix.data_ptr() % 16 == 0 for matrix in matrices]
        dtypes = [None if tensor is None else tensor.dtype for tensor in self.tensors]
        options = (self.input.device, self.ignore_index, self.traits, in_force())
        return (self.sizes, *strides, *aligned, *dtypes, *options)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, C, S, D"""
        (B, D), C = self.input.shape, self.weight.shape[0]
        return B, C, C if self.class_ids is None else self.class_ids.shape[0], D

    @property
    def operands(self) -> tuple[Tensor, Tensor]:
        """Input and weight for kernels to read."""
        return operand_of(self.input, self.traits), operand_of(self.weight, self.traits)


def without_classes(target: Tensor, ignore_index: int) -> Tensor:
    """`target`, whose rows that count have a number that is no class."""
    no_class = -1 if ignore_index != -1 else -2
    return torch.where(target == ignore_index, ignore_index, no_class)


def _exact() -> bool:
    """Whether float32 products keep all their digits: unless torch is told otherwise."""
    return torch.get_float32_matmul_precision() == "highest"


def dtype_of_products(input: Tensor, weight: Tensor, rounding: torch.dtype | None) -> torch.dtype:
    """rounding: autocast's"""
    alike = input.dtype == weight.dtype
    dtype = input.dtype if alike else torch.promote_types(input.dtype, weight.dtype)
    return dtype if rounding is None or dtype == torch.float64 else rounding


def bytes_of(input: Tensor, weight: Tensor) -> int:
    """Of inputs and gradients."""
    return 2 * (input.numel() * input.dtype.itemsize + weight.numel() * weight.dtype.itemsize)


def operand_of(tensor: Tensor, traits: Traits) -> Tensor:
    """A matrix as kernels read it; beside float64, or for a scale that needs it, perhaps a copy."""
    if traits.operand != torch.float64 or tensor.dtype == torch.float64:
        return tensor
    return widened(tensor if traits.rounding is None else tensor.to(traits.rounding))


def widened(tensor: Tensor) -> Tensor:
    """The same in float32: Triton 3.6 cannot compile float64 products of what comes from 16 bits."""
    return tensor.float() if tensor.itemsize == 2 else tensor


def _contiguous(tensor: Tensor | None, float32: bool = False) -> Tensor | None:
    """float32: not of 16 bits"""
    if tensor is None:
        return None
    return (widened(tensor) if float32 else tensor).contiguous()
