"""Random problems for the loss, and the comparison of a kernel with the truth on one of them."""

from dataclasses import dataclass

import pytest
import torch
from fedss_kernels.reference import sampled_softmax_loss as reference_loss
from tolerance import eager_loss, excess, with_features_reversed
from torch import Tensor

from fedss_kernels import sampled_softmax_loss
from fedss_kernels.triton_kernels.chunks import Chunks
from fedss_kernels.triton_kernels.configurations import Blocks, Configuration

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


GPU_IMPLEMENTATIONS = [
    "triton in two launches",
    "triton in chunks",
]  # both ways, interpreted
if torch.cuda.is_available():
    GPU_IMPLEMENTATIONS = [pytest.param("gpu", marks=pytest.mark.gpu)]

gpu_only = pytest.mark.parametrize("sampled_softmax_loss", GPU_IMPLEMENTATIONS, indirect=True)
# For what the CPU kernel alone promises: bits over threads and orders, lengths whose squares pass float32.
cpp_only = pytest.mark.parametrize("sampled_softmax_loss", ["cpp"], indirect=True)


def blocks_of_16(small: bool, B: int, S: int, D: int) -> Configuration | Chunks:
    """Every edge of a block of classes or columns is crossed by sizes past 16.

    Of large problems those of an even number of entries go by blocks of rows with all classes, the others by
    blocks of both.
    """
    if not small:
        return Chunks(16, max(S, 1) if S % 2 == 0 else 32, 16, 16, 32)
    return Configuration(
        Blocks(rows=max(16, 1 << (B - 1).bit_length()), classes=16, columns=16, warps=4, stages=2),
        splits=max(1, min(3, -(-S // 16))),
        column_groups=1 + (D > 32),
        merged_rows=16,
        merged_splits=4,
        merge_warps=4,
        result_columns=32,
        result_tiles=16,
        result_entries=16,
        result_warps=4,
    )


@dataclass(frozen=True)
class Case:
    """One problem, drawn from its seed."""

    seed: int
    B: int = 17
    S: int | None = 65  # None: class_ids=None
    C: int = 80
    D: int = 33
    dtype: torch.dtype = F32
    weight_dtype: torch.dtype | None = None  # None: dtype
    similarity: str = "cosine"
    reduction: str = "mean"
    scale: float = 20.0
    learned_scale: bool = True
    bias: bool = False
    corrections: float = 1.0  # their standard deviation
    left_out: float = 0.0  # share of entries whose correction is +inf
    distinct: int | None = None  # class_ids and target draw from so few classes: many duplicates and hits
    ignored: float = 0.0  # share of the rows
    zero_rows: float = 0.0  # share of the rows of input and of weight
    strided: bool = False
    weight_norm: float = 1.0
    spread: float | None = None  # of all rows around one: nearly parallel, gradients cancel
    first_feature: float | None = None  # of all rows alike

    def build(self) -> tuple[dict[str, Tensor | None], dict[str, object], Tensor]:
        """(tensors, options, upstream gradient)"""
        g = torch.Generator().manual_seed(self.seed)
        weight_dtype = self.weight_dtype or self.dtype
        x = _rows(self.B, self.D, self.dtype, self.zero_rows, self.strided, g, 1.0, self.spread)
        w = _rows(
            self.C, self.D, weight_dtype, self.zero_rows, self.strided, g, self.weight_norm, self.spread
        )
        if self.first_feature is not None:
            x[:, 0] = w[:, 0] = self.first_feature
        among = min(self.distinct or self.C, self.C)
        target = torch.randint(among, (self.B,), generator=g)
        target[torch.rand(self.B, generator=g) < self.ignored] = -100
        ids = None if self.S is None else torch.randint(among, (self.S,), generator=g)
        S = self.C if ids is None else len(ids)
        counts = torch.randn(S, generator=g) * self.corrections
        counts[torch.rand(S, generator=g) < self.left_out] = torch.inf
        scale = torch.tensor(self.scale, requires_grad=True) if self.learned_scale else None
        tensors = {
            "input": x.requires_grad_(),
            "weight": w.requires_grad_(),
            "bias": torch.randn(self.C, generator=g).to(weight_dtype).requires_grad_() if self.bias else None,
            "scale": scale,
        }
        target_counts = torch.randn(self.B, generator=g) * self.corrections
        if self.strided:
            target, target_counts = (torch.stack([t, t], 1)[:, 0] for t in (target, target_counts))
            ids = None if ids is None else torch.stack([ids, ids], 1)[:, 1]
        options = {
            "target": target,
            "class_ids": ids,
            "log_expected_count": counts,
            "target_log_expected_count": target_counts,
            "similarity": self.similarity,
            "reduction": self.reduction,
        }
        upstream = torch.randn(self.B if self.reduction == "none" else (), generator=g)
        return tensors, options, upstream

    def results(self, loss_function, in_float64: bool = False, **extra) -> dict[str, Tensor]:
        """The loss and every gradient, by name."""
        tensors, options, upstream = self.build()
        if in_float64:
            tensors = {
                name: None if t is None else t.detach().double().requires_grad_()
                for name, t in tensors.items()
            }
        given = {name: t for name, t in tensors.items() if t is not None}
        given.setdefault("scale", self.scale)
        loss = loss_function(**given, **options, **extra)
        wanted = {name: t for name, t in tensors.items() if t is not None}
        gradients = torch.autograd.grad(loss, list(wanted.values()), upstream.to(loss.dtype))
        return {"loss": loss.detach(), **dict(zip(wanted, gradients, strict=True))}


def assert_same(result: Tensor, expected: Tensor, loss_function) -> None:
    """The same bits of the CPU kernel, whatever the place of an entry; of tiles on a GPU, within rounding."""
    if loss_function is sampled_softmax_loss:
        assert torch.equal(result, expected)
    else:
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6, equal_nan=False)


def _rows(n, D, dtype, zero_share, strided, g, norm, spread) -> Tensor:
    rows = torch.randn(n, D, generator=g, dtype=F64)
    if spread is not None:
        rows = torch.linspace(-1, 2, D, dtype=F64) + spread * rows
    rows *= norm
    rows[torch.rand(n, generator=g) < zero_share] = 0
    rows = rows.to(dtype)
    if strided:  # neither axis contiguous
        room = torch.full((D * 2, n + 3), torch.nan, dtype=dtype)
        room[::2, 1:-2] = rows.T
        rows = room[::2, 1:-2].T
    return rows


def check(case: Case, loss_function=sampled_softmax_loss, **options) -> None:
    """Every result of the kernel is within the tolerance of the contract, in the dtype it should have.

    Plain PyTorch's error is a draw: of a single number it may be next to nothing, and twenty times as large
    with the features in another order, which changes nothing else. So the larger of two draws counts.
    """
    tensors, _, _ = case.build()
    kernel = case.results(loss_function, **options)
    truth = case.results(reference_loss, in_float64=True)
    plain = case.results(eager_loss)
    assert kernel["loss"].dtype == (F64 if case.dtype == F64 else F32)
    for name, result in kernel.items():
        if name != "loss":
            assert result.dtype == tensors[name].dtype, f"gradient of {name}"
        dtype = case.dtype if name in ("loss", "scale") else result.dtype
        over = excess(result, truth[name], plain[name], dtype)
        if over > 1:
            again = case.results(with_features_reversed(eager_loss))
            over = min(over, excess(result, truth[name], again[name], dtype))
        assert over <= 1, f"{name}: {over:.3g} times the tolerance in {case}"
