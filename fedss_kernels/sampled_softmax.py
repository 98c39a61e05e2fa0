"""The sampled-softmax loss: the function. The module around it: sampled_softmax_module.py.

    z(i, j) = scale * cos(input_i, weight_j) + bias_j                 (or the dot product)
    o(i, t) = z(i, t) - target_log_expected_count_i
    o(i, j) = z(i, class_ids_j) - log_expected_count_j                for every j with class_ids_j != t
    loss_i  = -o(i, t) + logsumexp(o(i, t), every o(i, j))

What margins, smoothing and the like make of it: composed_loss.py.

`sampled_softmax_loss` takes the direct route to the kernel in plain eager mode. Else it checks its arguments
and calls the registered operator, which calls the kernel.
"""

import math
import numbers
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import vmapped
from .checks import (
    FLOATING,
    as_integer,
    check_choice,
    check_constant,
    check_device,
    check_flag,
    check_ids,
    check_ignore_index,
    check_shape,
    check_tensor,
    refuse_meta,
    single_item,
    unwrapped,
)
from .composed_loss import composed_loss
from .data_parallel import check_sparse_communication
from .direct_route import NO_LABELS, direct_loss, holds_numbers
from .implementations import triton_kernels
from .loss_extras import NONE, Extras, check_values, checked_extras
from .loss_operator import autocast_dtype, call_operator, scale_tensor, without_autocast
from .reference import sampled_softmax_loss as _reference_loss
from .sparse_rows import check_takes_sparse
from .target_logits import rounded
from .traced_checks import checked_ids, checked_numbers

vmapped.register()


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
    angular_margin: float | Tensor = 0.0,  # a number, or (...,) floating
    cosine_margin: float | Tensor = 0.0,  # a number, or (...,) floating
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,  # (C,) floating
    return_lse: bool = False,
    entry_labels: Tensor | None = None,  # (S,) int64; None: class_ids
    target_labels: Tensor | None = None,  # (...,) int64; None: target
) -> Any:
    """Cross-entropy over the target and the classes in `class_ids`, without storing the logits.

    Eq. 6 of the FedSS paper, and by choice of `class_ids` its Eq. 2, 7 and 8:

        loss_i = -o(i, t) + logsumexp(o(i, t), o(i, j) for every j with class_ids_j != t)
        o(i, j) = scale * cos(input_i, weight_j) + bias_j - log_expected_count_j

    The target is in the denominator exactly once, whether or not `class_ids` lists it (with labels: where the
    entries that are the target have its label); each copy of a repeated class is a term of its own. With
    `class_ids=None` this is the full softmax.

    Args:
        target_log_expected_count: what the target's own logit loses.
        scale: multiplies the cosine (an inverse temperature); a tensor of shape () or (1,) may require grad.
        similarity: "cosine", or "dot" (`scale` then multiplies the dot product).
        ignore_index: rows with this target cost nothing and are not counted by "mean".
        reduction: "mean" over the rows that are not ignored (0 where there are none; torch gives NaN), "sum"
            or "none".
        sparse_grad: the gradients of weight and bias as sparse COO tensors over the classes that take part:
            on the CPU unique and ascending, on CUDA those of `class_ids` and then of `target`, uncoalesced
            (entries that are left out and ignored targets repeat a class that takes part, with zeros).
            A class of the set takes part though labels leave it out of every row, or all rows are ignored:
            it is listed with zeros, and weight decay and momentum move its row, as in a dense step.
            torch forgets that one is coalesced as it puts it into `.grad`: `weight.grad.coalesce()` first to
            call `.indices()` and `.values()`. On CPUs torch adds up no two that are float16, those of several
            calls or backward passes say; bfloat16 and float32 ones it does.
        impl: "cpp", "triton", "reference" (plain PyTorch, stores the logits), or "auto": by the tensors'
            device.
        angular_margin, cosine_margin: the target's cosine becomes cos(theta + m_a) - m_c (m_a
            in radians, -pi to pi; ArcFace has m_a = 0.5, CosFace m_c = 0.35), where theta + m_a passes pi
            cos - m_a * sin(m_a) - m_c. A tensor gives each row its own; one of zeros gives what none does,
            but for rounding (a row's last digits shall not depend on other rows' margins). Constants. In the
            derivative 1 - cos^2 is at least 1e-6.
        label_smoothing: e in [0, 1] makes (1 - e) * loss_i + e * (lse_i - mean_i), mean_i that of all
            classes' logits, estimated from the class set: (o(i, t) + sum_j z(i, j) / count_j) / C, hits left
            out. In float32 that is right to about 1e-7 of sum_j |z(i, j)| / count_j / C: where counts are so
            small that this is millions, as e^-25, the loss has none of its digits left.
        class_weight: row i counts class_weight[t] times, and "mean" divides by the sum over the rows that
            are not ignored (with smoothing too, where F.cross_entropy weights the mean's classes).
        return_lse: returns (loss, lse): lse_i = logsumexp(o(i, t), every o(i, j)), target's shape, 0 for an
            ignored row; both may be differentiated.
        entry_labels, target_labels: entry j is left out of row i where entry_labels_j == target_labels_i, and
            there alone: labels stand for the class ids, so give both, and an entry that is a row's target
            that row's label. One alone is compared with the numbers of classes.

    Returns:
        float32, or float64 for a float64 `input`: a 0-d tensor, or target's shape for "none"; with
        `return_lse` a pair. Not finite
        where a number that takes part is NaN or a logit +inf, past the largest number too; a logit of -inf
        leaves its class out, and the target's makes the loss NaN or +inf. Differentiable once, in `input`,
        `weight`, `bias` and a tensor `scale`; bit-identical for any number of threads.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or name; a correction that requires grad, is NaN
            or -inf; a margin, label_smoothing or class_weight that does or is not finite; an angular margin
            past pi, as one in degrees; a row's class_weight below 0; a margin for "dot"; label_smoothing
            outside [0, 1].
        IndexError: a class out of range, by position and value, before anything is computed.
            On CUDA nothing waits for the device to look at values: there a class out of range, or a
            correction that is NaN or -inf, makes the losses that it enters NaN, and so does a margin or
            class_weight that is, and a logit or a squared length past the largest number. With
            FEDSS_VALIDATE=1 in the environment wrong numbers and classes raise there too.
        RuntimeError: when differentiated twice, or in forward mode; with `sparse_grad` for a weight that is
            computed by what takes dense gradients only, as a slice or a cast.

    >>> eye = torch.eye(2)
    >>> sampled_softmax_loss(eye[:1], eye, torch.tensor([0]), scale=1.0)
    tensor(0.3133)
    """
    if type(scale) is not float and not (isinstance(scale, Tensor) and scale.is_floating_point()):
        scale = as_float(scale)
    if type(ignore_index) is not int:
        ignore_index = as_integer(ignore_index)
    if type(sparse_grad) is not bool:
        sparse_grad = check_flag("sparse_grad", sparse_grad)
    if sparse_grad:
        check_takes_sparse(weight=weight, bias=bias)
        check_sparse_communication(weight, bias)
    plain = (
        type(angular_margin) is type(cosine_margin) is type(label_smoothing) is float
        and angular_margin == cosine_margin == label_smoothing == 0.0
        and class_weight is None
        and return_lse is False
    )
    labels: tuple[Tensor | None, Tensor | None, Tensor | None] = NO_LABELS
    if entry_labels is not None or target_labels is not None:
        labels = (entry_labels, target_labels, None)
    if plain and (type(impl) is not str or impl != "reference"):
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
                labels,
            )
            if loss is not None:
                return loss
        except (IndexError, TypeError, ValueError):
            pass  # the checks below, or the operator, say what is wrong
    check_arguments(
        input, weight, target, class_ids, log_expected_count, target_log_expected_count, bias, scale
    )
    check_choice("similarity", similarity, ("cosine", "dot"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    backend = chosen_backend(impl, input.device)
    check_ignore_index(ignore_index)
    S = weight.shape[0] if class_ids is None else class_ids.shape[0]
    check_labels(input, target, (S, "(S,)"), *labels[:2])
    extras = NONE
    if not plain:
        given = (angular_margin, cosine_margin, label_smoothing, class_weight, return_lse)
        extras = checked_extras(weight, target, similarity, *given)
    if sparse_grad and backend == "reference":
        raise ValueError('sparse_grad: expected False for impl="reference", whose gradients are dense')
    if isinstance(scale, Tensor):
        scale = scale.reshape(())
    shape = target.shape
    input, target = input.reshape(target.numel(), input.shape[-1]), target.reshape(target.numel())
    target_log_expected_count, target_labels = (
        None if each is None else each.reshape(-1) for each in (target_log_expected_count, target_labels)
    )
    corrections = (class_ids, log_expected_count, target_log_expected_count)
    arguments = (input, weight, target, corrections, bias, scale, similarity, ignore_index, reduction)
    loss, lse = _by_backend(backend, sparse_grad, (entry_labels, target_labels), extras, *arguments)
    loss = loss.reshape(shape) if reduction == "none" else loss
    return loss if lse is None else (loss, lse.reshape(shape))


def _by_backend(
    backend: str,
    sparse_grad: bool,
    labels: tuple[Tensor | None, Tensor | None],
    extras: Extras,
    *arguments: Any,
) -> tuple[Tensor, Tensor | None]:
    """(loss, lse where it is asked for); of what is checked and flat."""
    input, weight, target, corrections, bias, scale, similarity, ignore_index, reduction = arguments
    if backend == "reference":
        return _plain_loss(labels, extras, *arguments)
    if backend == "triton" and os.environ.get("FEDSS_VALIDATE") == "1":
        _check_values(target, weight.shape[0], corrections, ignore_index)
        check_values(extras, target, ignore_index)
    if extras is not NONE:
        if target.is_cpu and holds_numbers():
            check_ids("target", target, weight.shape[0], ignore_index)
            check_values(extras, target, ignore_index)
        elif target.is_cpu:
            target = checked_ids("target", target, weight.shape[0], ignore_index)
            margins: Any = {name: checked_numbers(name, m) for name, m in extras.row_margins.items()}
            extras = extras._replace(**margins)
        rounding = autocast_dtype(input.device.type)
        with without_autocast(input.device.type):
            loss, lse = composed_loss(
                *(input, weight, target, corrections, bias, scale, similarity, ignore_index, reduction),
                *(sparse_grad, backend, rounding, labels, extras),
            )
        return loss, lse if extras.return_lse else None
    scale = scale_tensor(scale)
    grad = torch.is_grad_enabled() and reduction != "none"
    wanted = [grad and t is not None and t.requires_grad for t in (input, weight, bias, scale)]
    loss = call_operator(
        *(input, weight, target, *corrections, bias, scale),
        *(similarity, ignore_index, reduction, sparse_grad, backend, wanted, None, *labels),
    )
    return loss, None


# ---- checks ------------------------------------------------------------------------------------------------


def check_arguments(
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
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape (C, D), got {tuple(weight.shape)}")
    if input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input: expected shape (..., D) with D = {weight.shape[1]}, as weight is {tuple(weight.shape)}, "
            f"got {tuple(input.shape)}"
        )
    check_shape("target", target, input.shape[:-1], "input's without its last dimension")
    if class_ids is not None:
        check_tensor("class_ids", class_ids, (torch.int64,))
        if class_ids.dim() != 1:
            raise ValueError(f"class_ids: expected shape (S,), got {tuple(class_ids.shape)}")
    C = weight.shape[0]
    S = C if class_ids is None else class_ids.shape[0]
    _check_correction("log_expected_count", log_expected_count, (S,), "(S,)")
    _check_correction("target_log_expected_count", target_log_expected_count, target.shape, "target's")
    if bias is not None:
        check_tensor("bias", bias, (weight.dtype,))
        check_shape("bias", bias, (C,), "(C,)")
    others = {
        "input": input,
        "target": target,
        "class_ids": class_ids,
        "log_expected_count": log_expected_count,
        "target_log_expected_count": target_log_expected_count,
        "bias": bias,
    }
    for name, value in others.items():
        if value is not None:
            check_device(name, value, weight.device, "weight")
    check_scale(scale, weight.device)
    if input.device.type == "meta":
        refuse_meta("input")


def check_labels(
    input: Tensor,
    target: Tensor,
    entries: tuple[int, str],  # how many, and their shape's meaning
    entry_labels: Tensor | None,
    target_labels: Tensor | None,
) -> None:
    for name, labels, shape, meaning in (
        ("entry_labels", entry_labels, entries[:1], entries[1]),
        ("target_labels", target_labels, target.shape, "target's"),
    ):
        if labels is not None:
            check_tensor(name, labels, (torch.int64,))
            check_shape(name, labels, shape, meaning)
            check_device(name, labels, input.device, "input")


def _check_correction(name: str, value: Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    if value is not None:
        check_tensor(name, value, FLOATING)
        check_shape(name, value, shape, meaning)
        check_constant(name, value)


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def as_float(scale: Any) -> Any:
    """Any real number, NumPy's too, as a float, a tensor of integers as one of float64.

    What is no number comes back, for `check_scale` to refuse.
    """
    if isinstance(scale, Tensor):  # as it is on its device
        return scale.double() if scale.dtype in _INTEGERS else scale
    if isinstance(scale, np.ndarray):
        scale = single_item(scale)
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        return scale
    try:
        return float(scale)
    except OverflowError:
        raise ValueError("scale: expected a finite number, got one past float64's range") from None


def check_scale(scale: float | Tensor, device: torch.device) -> None:
    if isinstance(scale, Tensor):
        check_tensor("scale", scale, FLOATING)
        if scale.dim() > 1 or scale.numel() != 1:
            raise ValueError(
                f"scale: expected a number or a 0-d tensor or (1,), got shape {tuple(scale.shape)}"
            )
        if scale.device != device and scale.device.type != "cpu":
            either = "cpu" if device.type == "cpu" else f"{device} or cpu"
            raise ValueError(f"scale: expected a tensor on {either}, got one on {scale.device}")
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a number or a 0-d tensor, got {type(scale).__name__}")
    elif not abs(scale) < math.inf:  # NaN too; math.isfinite cannot be traced with a symbolic scale
        raise ValueError(f"scale: expected a finite number, got {scale}")


IMPLS = ("auto", "cpp", "triton", "reference")
_OF_DEVICE = {"cpu": "cpp", "cuda": "triton"}


def chosen_backend(impl: str, device: torch.device) -> str:
    check_choice("impl", impl, IMPLS)
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
    labels: tuple[Tensor | None, Tensor | None], extras: Extras, *arguments: Any
) -> tuple[Tensor, Tensor | None]:
    """impl="reference": the definition, in float32 or better, after the same checks of values."""
    input, weight, target, corrections, bias, scale, similarity, ignore_index, reduction = arguments
    _check_values(target, weight.shape[0], corrections, ignore_index)
    check_values(extras, target, ignore_index)
    class_ids, log_expected_count, target_log_expected_count = corrections
    device_type, dtype = input.device.type, torch.promote_types(input.dtype, torch.float32)
    rounding = autocast_dtype(device_type)
    with torch.autocast(device_type, enabled=False):
        result = _reference_loss(
            rounded(input, rounding),
            rounded(weight, rounding),
            target,
            class_ids,
            log_expected_count,
            target_log_expected_count=target_log_expected_count,
            bias=bias,
            scale=scale,
            similarity=similarity,
            ignore_index=ignore_index,
            reduction=reduction,
            entry_labels=labels[0],
            target_labels=labels[1],
            dtype=dtype,
            **extras._asdict(),
        )
    return result if extras.return_lse else (result, None)


def _check_values(
    target: Tensor, C: int, corrections: tuple[Tensor | None, Tensor | None, Tensor | None], ignore_index: int
) -> None:
    """Raises for a class out of range and a wrong correction. Waits for the device."""
    class_ids, log_expected_count, target_log_expected_count = corrections
    check_ids("target", target, C, ignore_index)
    if class_ids is not None:
        check_ids("class_ids", class_ids, C, None)
    _check_counts("log_expected_count", log_expected_count, of_targets=False)
    _check_counts("target_log_expected_count", target_log_expected_count, of_targets=True)


def _check_counts(name: str, counts: Tensor | None, of_targets: bool) -> None:
    if counts is None:
        return
    counts = unwrapped(counts)
    good = counts.isfinite() if of_targets else counts > -torch.inf
    if not good.all():
        i = int((~good).nonzero()[0, 0])
        expected = "finite number" if of_targets else "number or +inf, which leaves the entry out"
        raise ValueError(f"{name}[{i}] = {float(counts[i])}, expected a {expected}")
