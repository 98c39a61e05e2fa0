"""The sampled-softmax loss: the function and the module.

    z(i, j) = scale * cos(input_i, weight_j) + bias_j                 (or the dot product)
    o(i, t) = z(i, t) - target_log_expected_count_i
    o(i, j) = z(i, class_ids_j) - log_expected_count_j                for every j with class_ids_j != t
    loss_i  = -o(i, t) + logsumexp(o(i, t), every o(i, j))

`sampled_softmax_loss` takes the direct route to the kernel in plain eager mode. Else it checks its arguments
and calls the registered operator `fedss_kernels::sampled_softmax_loss`, which calls the kernel.
"""

import math
import numbers
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checks import (
    FLOATING,
    check_choice,
    check_device,
    check_flag,
    check_integer,
    check_shape,
    check_tensor,
)
from .class_sets import GeneratorHandle, draw_batch_class_set
from .direct_route import direct_loss
from .implementations import triton_kernels
from .loss_operator import autocast_dtype
from .reference import sampled_softmax_loss as _reference_loss


def sampled_softmax_loss(
    input: Tensor,  # (..., D) float16 | bfloat16 | float32 | float64
    weight: Tensor,  # (C, D) floating; its dtype may differ from input's
    target: Tensor,  # (...,) int64 in [0, C), or ignore_index
    class_ids: Tensor | None = None,  # (S,) int64 in [0, C); None: all C rows, S = C
    log_expected_count: Tensor | None = None,  # (S,) floating; None: zeros; +inf leaves the entry out
    *,
    target_log_expected_count: Tensor | None = None,  # (...,) floating; None: zeros
    bias: Tensor | None = None,  # (C,) weight's dtype
    scale: float | Tensor = 20.0,
    similarity: str = "cosine",
    ignore_index: int = -100,
    reduction: str = "mean",
    sparse_grad: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Cross-entropy over the target and the classes in `class_ids`, without storing the logits.

    Eq. 6 of the FedSS paper, and by choice of `class_ids` its Eq. 2, 7 and 8:

        loss_i = -o(i, t) + logsumexp(o(i, t), o(i, j) for every j with class_ids_j != t)
        o(i, j) = scale * cos(input_i, weight_j) + bias_j - log_expected_count_j

    The target is in the denominator exactly once, whether or not `class_ids` lists it; each copy of a
    repeated class is a term of its own. With `class_ids=None` this is the full softmax.

    Args:
        scale: multiplies the cosine (an inverse temperature); a 0-d tensor may require grad.
        similarity: "cosine", or "dot" (`scale` then multiplies the dot product).
        ignore_index: rows with this target cost nothing and are not counted by "mean".
        reduction: "mean" over the rows that are not ignored (0 where there are none; torch gives NaN), "sum"
            or "none".
        sparse_grad: the gradients of weight and bias as sparse COO tensors over the classes that take part:
            on the CPU unique and ascending, on CUDA those of `class_ids` and then of `target`, uncoalesced
            (entries that are left out and ignored targets repeat a class that takes part, with zeros).
        impl: "cpp", "triton", "reference" (plain PyTorch, stores the logits), or "auto": by the tensors'
            device.

    Returns:
        float32, or float64 for a float64 `input`: a 0-d tensor, or target's shape for "none". NaN, gradients
        too, where an argument is not finite or a dot product past the largest number. Differentiable
        once, in `input`, `weight`, `bias` and a tensor `scale`; bit-identical for any number of threads.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or name; a correction that requires grad, is NaN
            or -inf.
        IndexError: a class out of range, by position and value, before anything is computed.
            On CUDA nothing waits for the device to look at values: there a class out of range, or a
            correction that is NaN or -inf, makes the losses that it enters NaN, and so does a logit
            or a squared length past the largest number. With FEDSS_VALIDATE=1 in the environment
            wrong classes and corrections raise there too.
        RuntimeError: when differentiated twice, or in forward mode.

    >>> eye = torch.eye(2)
    >>> sampled_softmax_loss(eye[:1], eye, torch.tensor([0]), scale=1.0)
    tensor(0.3133)
    """
    if type(scale) is not float and not isinstance(scale, Tensor):
        scale = _as_float(scale)
    if impl != "reference":
        try:
            loss = direct_loss(
                input,
                weight,
                target,
                class_ids,
                log_expected_count,
                target_log_expected_count,
                bias,
                scale,
                similarity,
                ignore_index,
                reduction,
                sparse_grad,
                impl,
            )
            if loss is not None:
                return loss
        except (TypeError, ValueError):
            pass  # the checks below say what is wrong
    _check(input, weight, target, class_ids, log_expected_count, target_log_expected_count, bias, scale)
    check_choice("similarity", similarity, ("cosine", "dot"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_flag("sparse_grad", sparse_grad)
    backend = _backend(impl, input.device)
    if type(ignore_index) is not int or not -(2**63) <= ignore_index < 2**63:
        raise TypeError(f"ignore_index: expected a 64-bit integer, got {ignore_index!r}")
    if sparse_grad and backend == "reference":
        raise ValueError('sparse_grad: expected False for impl="reference", whose gradients are dense')
    shape = target.shape
    input, target = input.reshape(target.numel(), input.shape[-1]), target.reshape(-1)
    if target_log_expected_count is not None:
        target_log_expected_count = target_log_expected_count.reshape(-1)
    corrections = (class_ids, log_expected_count, target_log_expected_count)
    if backend == "reference":
        loss = _plain_loss(
            input, weight, target, corrections, bias, scale, similarity, ignore_index, reduction
        )
    else:
        if backend == "triton" and os.environ.get("FEDSS_VALIDATE") == "1":
            _check_values(target, len(weight), corrections, ignore_index)
        scale_tensor = (
            scale if isinstance(scale, Tensor) else torch.full((), scale, dtype=torch.float64, device="cpu")
        )
        grad = torch.is_grad_enabled() and reduction != "none"
        wanted = [grad and t is not None and t.requires_grad for t in (input, weight, bias, scale_tensor)]
        loss = _by_operator(
            *(input, weight, target, *corrections, bias, scale_tensor),
            *(similarity, ignore_index, reduction, sparse_grad, backend, wanted, None),
        )
    return loss.reshape(shape) if reduction == "none" else loss


def _by_operator(*arguments: Any) -> Tensor:
    operator = torch.ops.fedss_kernels.sampled_softmax_loss
    if torch.compiler.is_compiling():
        return operator(*arguments)[0]
    try:
        return operator(*arguments)[0]
    except RuntimeError as error:
        if "setup_context" not in str(error):
            raise
        # torch speaks of how the operator is made
        raise RuntimeError(
            "sampled_softmax_loss has no derivative under torch.func.grad and what is made of it: "
            'loss.backward() and torch.autograd.grad differentiate it, torch.func.grad with impl="reference"'
        ) from error


# ---- checks ------------------------------------------------------------------------------------------------


def _check(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    class_ids: Tensor | None,
    log_expected_count: Tensor | None,
    target_log_expected_count: Tensor | None,
    bias: Tensor | None,
    scale: float | Tensor,
) -> None:
    """What can be told from shapes, dtypes and devices alone; values are checked by the kernel."""
    check_tensor("input", input, FLOATING)
    check_tensor("weight", weight, FLOATING)
    check_tensor("target", target, (torch.int64,))
    if input.dim() < 1:
        raise ValueError(f"input: expected shape (..., D), got {tuple(input.shape)}")
    D = input.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != D:
        raise ValueError(f"weight: expected shape (C, D) with D = {D}, got {tuple(weight.shape)}")
    check_shape("target", target, input.shape[:-1], "input's without its last dimension")
    if class_ids is not None:
        check_tensor("class_ids", class_ids, (torch.int64,))
        if class_ids.dim() != 1:
            raise ValueError(f"class_ids: expected shape (S,), got {tuple(class_ids.shape)}")
    S = len(weight) if class_ids is None else len(class_ids)
    _check_constant("log_expected_count", log_expected_count, (S,), "(S,)")
    _check_constant("target_log_expected_count", target_log_expected_count, target.shape, "target's")
    if bias is not None:
        check_tensor("bias", bias, (weight.dtype,))
        check_shape("bias", bias, (len(weight),), "(C,)")
    others = {
        "weight": weight,
        "target": target,
        "class_ids": class_ids,
        "log_expected_count": log_expected_count,
        "target_log_expected_count": target_log_expected_count,
        "bias": bias,
    }
    for name, value in others.items():
        if value is not None:
            check_device(name, value, input.device, "input")
    _check_scale(scale, input.device)


def _check_constant(name: str, value: Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    if value is None:
        return
    check_tensor(name, value, FLOATING)
    check_shape(name, value, shape, meaning)
    if value.requires_grad:
        raise ValueError(
            f"{name}: expected a constant, got a tensor that requires grad; pass {name}.detach()"
        )


def _as_float(scale: Any) -> Any:
    """Any real number, NumPy's too, as a float; what is none comes back, for `_check_scale` to refuse."""
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        return scale
    try:
        return float(scale)
    except OverflowError:
        raise ValueError("scale: expected a finite number, got one past float64's range") from None


def _check_scale(scale: float | Tensor, device: torch.device) -> None:
    if isinstance(scale, Tensor):
        check_tensor("scale", scale, FLOATING)
        if scale.dim() != 0:
            raise ValueError(f"scale: expected a number or a 0-d tensor, got shape {tuple(scale.shape)}")
        if scale.device != device and scale.device.type != "cpu":
            raise ValueError(f"scale: expected a tensor on {device} or cpu, got one on {scale.device}")
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a number or a 0-d tensor, got {type(scale).__name__}")
    elif not abs(scale) < math.inf:  # NaN too; math.isfinite cannot be traced with a symbolic scale
        raise ValueError(f"scale: expected a finite number, got {scale}")


_IMPLS = ("auto", "cpp", "triton", "reference")
_OF_DEVICE = {"cpu": "cpp", "cuda": "triton"}


def _backend(impl: str, device: torch.device) -> str:
    check_choice("impl", impl, _IMPLS)
    found = _OF_DEVICE.get(device.type)
    if impl in ("reference", found):
        return impl
    if impl == "triton" and device.type == "cpu":
        triton_kernels("sampled_softmax", device)
        return impl
    if impl != "auto" or found is None:
        expected = {"cpp": "CPU", "triton": "CUDA"}.get(impl, "CPU or CUDA")
        raise ValueError(
            f'input: expected a {expected} tensor for impl="{impl}", got one on {device}; '
            'impl="reference" runs on any device'
        )
    return found


def _plain_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    corrections: tuple[Tensor | None, Tensor | None, Tensor | None],
    bias: Tensor | None,
    scale: float | Tensor,
    similarity: str,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """impl="reference": the definition, in float32 or better, after the same checks of values."""
    _check_values(target, len(weight), corrections, ignore_index)
    class_ids, log_expected_count, target_log_expected_count = corrections
    device_type, dtype = input.device.type, torch.promote_types(input.dtype, torch.float32)
    rounding = autocast_dtype(device_type)
    with torch.autocast(device_type, enabled=False):
        return _reference_loss(
            _rounded(input, rounding),
            _rounded(weight, rounding),
            target,
            class_ids,
            log_expected_count,
            target_log_expected_count=target_log_expected_count,
            bias=bias,
            scale=scale,
            similarity=similarity,
            ignore_index=ignore_index,
            reduction=reduction,
            dtype=dtype,
        )


def _rounded(rows: Tensor, rounding: torch.dtype | None) -> Tensor:
    """`rows` at the values of `rounding`; the gradient passes as it is."""
    if rounding is None or rows.dtype == torch.float64:
        return rows
    return rows + (rows.detach().to(rounding).to(rows.dtype) - rows.detach())


def _check_values(
    target: Tensor, C: int, corrections: tuple[Tensor | None, Tensor | None, Tensor | None], ignore_index: int
) -> None:
    """Raises for a class out of range and a wrong correction. Waits for the device."""
    class_ids, log_expected_count, target_log_expected_count = corrections
    _check_ids("target", target, C, ignore_index)
    if class_ids is not None:
        _check_ids("class_ids", class_ids, C, None)
    _check_counts("log_expected_count", log_expected_count, of_targets=False)
    _check_counts("target_log_expected_count", target_log_expected_count, of_targets=True)


def _check_ids(name: str, ids: Tensor, C: int, ignore_index: int | None) -> None:
    bad = (ids < 0) | (ids >= C)
    if ignore_index is not None:
        bad &= ids != ignore_index
    if bad.any():
        i = int(bad.nonzero()[0, 0])
        also = "" if ignore_index is None else f" or ignore_index {ignore_index}"
        raise IndexError(f"{name}[{i}] = {int(ids[i])}, expected a class in [0, {C}){also}")


def _check_counts(name: str, counts: Tensor | None, of_targets: bool) -> None:
    if counts is None:
        return
    good = counts.isfinite() if of_targets else counts > -torch.inf
    if not good.all():
        i = int((~good).nonzero()[0, 0])
        expected = "finite number" if of_targets else "number or +inf, which leaves the entry out"
        raise ValueError(f"{name}[{i}] = {float(counts[i])}, expected a {expected}")


# ---- the module --------------------------------------------------------------------------------------------


class TopK(NamedTuple):
    """The k best classes of each row, best first."""

    values: Tensor  # (..., k) logits, float32 or float64
    indices: Tensor  # (..., k) int64 classes


class SampledSoftmaxLoss(nn.Module):
    """A classifier's last layer and its loss: trains on sampled classes, evaluates on all of them.

    In training mode each call's class set is the batch's own classes (expected count 1) and `num_sampled`
    uniform negatives among the others (expected count num_sampled / others); see `draw_batch_class_set`. In
    eval mode, and for `num_sampled=None` or >= num_classes, it is the full softmax. No host synchronisation;
    compiles fullgraph.

    Args:
        num_classes: C.
        embedding_dim: D.
        num_sampled: m, negatives for each batch.
        scale: multiplies the cosine; with `learn_scale=True` the initial value of a parameter.
        similarity: "cosine" or "dot".
        bias: one learned number for each class, initially zero.
        sparse_grad: the gradients of weight and bias as sparse COO tensors over the classes that take part.
        generator: source of the initial weight and the negatives; None: torch's default one.

    Raises ValueError for sizes that are not positive or an unknown name, and as `sampled_softmax_loss` does.

    >>> criterion = SampledSoftmaxLoss(num_classes=1000, embedding_dim=16, num_sampled=50)
    >>> criterion(torch.randn(4, 16), torch.tensor([3, 1, 4, 1])).shape
    torch.Size([])
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        num_sampled: int | None = None,
        *,
        scale: float = 20.0,
        learn_scale: bool = False,
        similarity: str = "cosine",
        bias: bool = False,
        sparse_grad: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
        generator: torch.Generator | None = None,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("num_classes", num_classes, 1)
        check_integer("embedding_dim", embedding_dim, 1)
        if num_sampled is not None:
            check_integer("num_sampled", num_sampled, 0)
        check_choice("impl", impl, _IMPLS)
        check_choice("similarity", similarity, ("cosine", "dot"))
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        check_flag("sparse_grad", sparse_grad)
        scale = _as_float(scale)
        _check_scale(scale, torch.device("cpu"))
        self.num_classes, self.embedding_dim, self.num_sampled = num_classes, embedding_dim, num_sampled
        self.similarity, self.sparse_grad, self.ignore_index = similarity, sparse_grad, ignore_index
        self.reduction, self.impl = reduction, impl
        self.generator = None if generator is None else GeneratorHandle(generator)
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_classes, device=device, dtype=dtype)) if bias else None
        self.scale = nn.Parameter(torch.tensor(float(scale), device=device)) if learn_scale else scale
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gaussian rows of about unit length; zero bias."""
        with torch.no_grad():
            generator = None if self.generator is None else self.generator.generator
            self.weight.normal_(std=self.embedding_dim**-0.5, generator=generator)
            if self.bias is not None:
                self.bias.zero_()

    def forward(
        self,
        input: Tensor,  # (..., D)
        target: Tensor,  # (...,) int64
    ) -> Tensor:
        check_tensor("target", target, (torch.int64,))
        class_ids = log_expected_count = None
        if self.training and self.num_sampled is not None and self.num_sampled < self.num_classes:
            class_ids, log_expected_count = draw_batch_class_set(
                target.reshape(-1), self.num_classes, self.num_sampled, self.generator, self.ignore_index
            )
        return sampled_softmax_loss(
            input,
            self.weight,
            target,
            class_ids,
            log_expected_count,
            bias=self.bias,
            scale=self.scale,
            similarity=self.similarity,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            sparse_grad=self.sparse_grad,
            impl=self.impl,
        )

    @torch.no_grad()
    def topk(
        self,
        input: Tensor,  # (..., D)
        k: int,
        block_size: int = 16384,
    ) -> TopK:
        """The k largest logits scale * cos(input, weight_j) + bias_j of each row, and their classes.

        Goes over the classes in blocks: memory is rows x (block_size + k), never rows x C. Raises ValueError
        for a k outside [1, C].
        """
        check_tensor("input", input, FLOATING)
        check_integer("block_size", block_size, 1)
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k: expected 1 to {self.num_classes}, got {k}")
        if input.dim() < 1 or input.shape[-1] != self.embedding_dim:
            raise ValueError(f"input: expected shape (..., {self.embedding_dim}), got {tuple(input.shape)}")
        dtype = torch.promote_types(torch.promote_types(input.dtype, self.weight.dtype), torch.float32)
        rows = self._unit(input.reshape(-1, self.embedding_dim).to(dtype))
        values = rows.new_empty((len(rows), 0))
        indices = torch.empty((len(rows), 0), dtype=torch.int64, device=rows.device)
        for first in range(0, self.num_classes, block_size):
            block = slice(first, first + block_size)
            logits = self.scale * (rows @ self._unit(self.weight[block].to(dtype)).T)
            if self.bias is not None:
                logits = logits + self.bias[block]
            best = logits.topk(min(k, logits.shape[1]))
            values, order = torch.cat([values, best.values], 1).topk(
                min(k, values.shape[1] + logits.shape[1])
            )
            indices = torch.cat([indices, best.indices + first], 1).gather(1, order)
        shape = (*input.shape[:-1], k)
        return TopK(values.reshape(shape), indices.reshape(shape))

    def _unit(self, rows: Tensor) -> Tensor:
        if self.similarity == "dot":
            return rows
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
        return torch.where(norm < 1e-12, 0.0, rows / norm).to(rows.dtype)

    def extra_repr(self) -> str:
        scale = "learned" if isinstance(self.scale, nn.Parameter) else self.scale
        return (
            f"{self.num_classes}, {self.embedding_dim}, num_sampled={self.num_sampled}, scale={scale}, "
            f"similarity={self.similarity!r}, bias={self.bias is not None}, sparse_grad={self.sparse_grad}"
        )
