"""The logits of the rows' own targets, with their margins.

o_i = scale * (cos(theta_i + m_a) - m_c) + bias_t - target_log_expected_count_i
"""

import math

import torch
from torch import Tensor

from .class_table import ClassTable

_FLOOR = 1e-6  # of 1 - cos^2 in the derivative of a margin
_ZERO_NORM = 1e-12


def target_logits(
    input: Tensor,  # (B, D)
    weight: ClassTable,  # (C, D)
    classes: Tensor,  # (B,) int64 in [0, C); any for a row that does not count
    counted: Tensor,  # (B,) bool
    target_log_expected_count: Tensor | None,  # (B,)
    bias: ClassTable | None,  # (C,)
    scale: float | Tensor,
    similarity: str,
    margins: tuple[float | Tensor, float | Tensor],  # angular and cosine: numbers or (B,)
    rounding: torch.dtype | None,
) -> Tensor:
    """(B,) float64; 0 for a row that does not count."""
    rows = weight.rows(classes, torch.float64, counted)
    both = torch.stack([rounded(input, rounding).double(), rounded(rows, rounding, weight.values.dtype)])
    both = both.where(counted[:, None], 0.0)
    if similarity == "cosine" and torch.float64 in (input.dtype, weight.values.dtype):
        both = in_range(both)
    z = scale * with_margins(_products(both, similarity), *margins)
    if bias is not None:
        z = z + bias.rows(classes, torch.float64, counted)
    if target_log_expected_count is not None:
        z = z - target_log_expected_count
    return z.where(counted, 0.0)


def _products(both: Tensor, similarity: str) -> Tensor:
    """(B,) cosines, or dot products, of both[0] and both[1]."""
    if similarity == "cosine":
        both = both * inverse_lengths(both)[..., None]
    return (both[0] * both[1]).sum(1)


def inverse_lengths(rows: Tensor) -> Tensor:
    """1 / |row|, 0 for a row shorter than 1e-12, which passes no gradient then."""
    norm = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
    return ((norm >= _ZERO_NORM).double() / norm.clamp(min=_ZERO_NORM)).to(rows.dtype)


def in_range(rows: Tensor) -> Tensor:
    """float64 rows that point the same way, shorter where their squares pass its largest number.

    By 2^-540: the shortest of these, 1e154, stay longer than 1e-12, the squares of the longest have room.
    """
    overflows = torch.linalg.vector_norm(rows.detach(), dim=-1, keepdim=True) == torch.inf
    return rows * torch.where(overflows, rows.new_full((), 2.0**-540), 1.0)


def widened_rows(
    rows: Tensor, weight: Tensor, rounding: torch.dtype | None
) -> tuple[Tensor, torch.dtype | None]:
    """(16-bit `rows` in float32, so that their gradients are added up in it; what they are read at still)."""
    if rows.itemsize != 2:
        return rows, rounding
    return rows.float(), rounding or (rows.dtype if rows.dtype == weight.dtype else None)


def rounded(rows: Tensor, rounding: torch.dtype | None, dtype: torch.dtype | None = None) -> Tensor:
    """`rows` at the values of `rounding`, unless they are, or were, float64; the gradient passes as it is."""
    if rounding is None or (dtype or rows.dtype) == torch.float64:
        return rows
    return rows + (rows.detach().to(rounding).to(rows.dtype) - rows.detach())


def with_margins(cosine: Tensor, angular: float | Tensor, additive: float | Tensor) -> Tensor:
    """cos(theta + m_a) - m_c; where theta + m_a passes pi, cos(theta) - m_a * sin(m_a) - m_c."""
    if isinstance(angular, Tensor) or angular != 0:
        c = cosine.detach()
        m = angular.double() if isinstance(angular, Tensor) else angular
        cos_m, sin_m = (m.cos(), m.sin()) if isinstance(m, Tensor) else (math.cos(m), math.sin(m))
        square = 1 - c * c
        past = c.clamp(-1, 1).acos() + m > math.pi
        turned = torch.where(past, c - m * sin_m, c * cos_m - square.clamp(min=0).sqrt() * sin_m)
        slope = torch.where(past, 1.0, cos_m + sin_m * c * square.clamp(min=_FLOOR).rsqrt())
        cosine = turned + slope * (cosine - c)
    return cosine - additive
