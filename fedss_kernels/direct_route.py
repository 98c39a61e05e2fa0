"""The short way from Python to the loss kernel, for plain eager mode.

One autograd.Function around the kernel that the registered operator runs, without the operator's dispatch,
which takes most of the time of a small problem. Only for ordinary tensors with nothing around them that wants
to see operators: no compiler, function transform, dispatch mode or subclass, and no autocast on the CPU. Both
ways give the same bits. GPU tensors go on to direct_triton.py.
"""

import math

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, is_grad_enabled, strided
from torch._C import (
    _get_dispatch_mode,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
    _TorchDispatchModeKey,
)
from torch._C._functorch import peek_interpreter_stack
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.compiler import is_compiling
from torch.nn import Parameter

from .direct_triton import direct_triton_loss
from .loss_operator import (
    OPERATORS,
    Arguments,
    finish,
    finish_gradients,
    refuse_batches,
    run_kernel,
    shaped_like,
)

NO_LABELS = (None, None, None)


def direct_loss(
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
    sparse_grad: bool,
    impl: str,
    labels: tuple[Tensor | None, Tensor | None, Tensor | None] = NO_LABELS,
) -> Tensor | None:
    """The loss, or None for what needs the operator or a closer look: a wrong argument too.

    Raises what the kernel raises: IndexError for an id, TypeError or ValueError for what it cannot compute.
    """
    if not (
        plain_eager()
        and ordinary(input)
        and ordinary(weight)
        and type(target) is Tensor
        and (class_ids is None or type(class_ids) is Tensor)
        and (log_expected_count is None or _constant(log_expected_count))
        and (target_log_expected_count is None or _constant(target_log_expected_count))
        and (bias is None or (ordinary(bias) and bias.dtype == weight.dtype))
        and (math.isfinite(scale) if type(scale) is float else _ordinary_scale(scale))
        and type(ignore_index) is int
        and type(sparse_grad) is bool
        and (labels is NO_LABELS or _ordinary_labels(*labels))
    ):
        return None
    constants = (target, class_ids, log_expected_count, target_log_expected_count)
    if impl == "triton" or (impl == "auto" and input.is_cuda):
        if labels is not NO_LABELS:
            return None
        return direct_triton_loss(
            *(input, weight, constants, bias, scale, similarity, ignore_index, reduction, sparse_grad)
        )
    if (
        impl not in ("auto", "cpp")
        or not input.is_cpu
        or (_is_any_autocast_enabled() and torch.is_autocast_enabled("cpu"))
        or (isinstance(scale, Tensor) and not scale.is_cpu)
    ):
        return None
    learned = None
    if isinstance(scale, Tensor):
        learned, scale = scale, scale.item()
    if is_grad_enabled() and (
        input.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or (learned is not None and learned.requires_grad)
    ):
        options = (scale, similarity, ignore_index, reduction)
        return _apply(input, weight, bias, learned, (constants, options, sparse_grad, labels))
    options = (scale, similarity, ignore_index, reduction)
    loss, _, _ = run_kernel(input, weight, *constants, bias, *options, _NOTHING, None, None, labels)
    return loss


_NOTHING = [False] * 4


def plain_eager() -> bool:
    return unobserved() and peek_interpreter_stack() is None and forward_ad._current_level < 0


def unobserved() -> bool:
    """No compiler and no mode sees which operators run; inside of torch.vmap and torch.func too."""
    return (
        not is_compiling()
        and _len_torch_dispatch_stack() == 0
        and _len_torch_function_stack() == 0
        and _get_tracing_state() is None
    )


def holds_numbers() -> bool:
    """Tensors do: nothing traces. Other modes may be on, such as a default device's or a counter of flops."""
    return unobserved() or not (
        is_compiling()
        or _get_tracing_state() is not None
        or _len_torch_dispatch_stack_pre_dispatch() > 0
        or any(_get_dispatch_mode(mode) is not None for mode in _TRACERS)
    )


_TRACERS = (_TorchDispatchModeKey.FAKE, _TorchDispatchModeKey.PROXY, _TorchDispatchModeKey.FUNCTIONAL)


def ordinary(tensor: Tensor) -> bool:
    return (
        (type(tensor) is Tensor or type(tensor) is Parameter)
        and tensor.layout is strided
        and not tensor.is_nested
        and not tensor.is_neg()
    )


def _constant(tensor: Tensor) -> bool:
    return (
        type(tensor) is Tensor
        and tensor.layout is strided
        and not tensor.requires_grad
        and not tensor.is_neg()
    )


def _ordinary_labels(*labels: Tensor | None) -> bool:
    return all(each is None or type(each) is Tensor for each in labels)


def _ordinary_scale(scale: float | Tensor) -> bool:
    return (
        isinstance(scale, Tensor)
        and ordinary(scale)
        and (scale.dim() == 0 or scale.shape == (1,))
        and scale.is_floating_point()
    )


class _Loss(torch.autograd.Function):
    """Differentiable in its first four arguments; `rest` travels as one, as each argument costs time."""

    @staticmethod
    def forward(ctx, input, weight, bias, learned, rest):
        constants, options, sparse_grad, labels = rest
        reduction = options[-1]
        wanted = ctx.needs_input_grad[:4] if reduction != "none" else _NOTHING
        loss, made, touched = run_kernel(
            *(input, weight, *constants, bias, *options, wanted, None, None, labels)
        )
        kept = () if labels is NO_LABELS else labels
        ctx.save_for_backward(input, weight, bias, learned, *constants, *kept)
        # Whether what was made needs no more than a factor and rounding.
        dense = reduction != "none" and constants[1] is None and not (sparse_grad or wanted[2] or wanted[3])
        ctx.made, ctx.rest = made, (options, sparse_grad, wanted, touched, dense)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        input, weight, bias, learned, *constants = ctx.saved_tensors
        refuse_batches(grad_loss)
        options, sparse_grad, wanted, touched, dense = ctx.rest
        made, ctx.made = ctx.made, None  # handed on; a second backward makes them again
        grad_mode = is_grad_enabled()
        if dense and made is not None and not grad_mode and math.isfinite(upstream := grad_loss.item()):
            if upstream == 1 and input.dtype is weight.dtype is grad_loss.dtype:
                return made.input, made.rows, None, None, None
            return (
                None if made.input is None else finish(made.input, upstream, input, owned=True),
                None if made.rows is None else finish(made.rows, upstream, weight, owned=True),
                *(None,) * 3,
            )
        scale = options[0] if learned is None else learned
        p = Arguments(
            *(input, weight, *constants[:4], bias, scale),
            *(*options[1:], sparse_grad, "cpp", list(wanted), None, *constants[4:]),
        )
        needed = list(ctx.needs_input_grad[:4])
        if grad_mode:  # create_graph: the operator refuses a second derivative
            found = gradients_by_operator(p, grad_loss, needed)
        else:
            found = finish_gradients(p, made, touched, grad_loss, needed, owned=True)
        return *shaped_like(learned, found), None


# Function.apply without what it does for function transforms, which do not come here.
_apply = super(torch.autograd.Function, _Loss).apply


def gradients_by_operator(p: Arguments, grad_loss: Tensor, needed: list[bool]) -> list[Tensor | None]:
    """Of a loss whose gradients are to be differentiated again, which the operator refuses."""
    scale = (
        torch.tensor(p.scale, dtype=torch.float64, device="cpu") if isinstance(p.scale, float) else p.scale
    )
    p = p._replace(scale=scale, wanted=_NOTHING)
    made = [p.input.new_empty(0)] * 5
    results = OPERATORS.sampled_softmax_loss_backward(grad_loss, made, needed, *p)
    return [result if need else None for result, need in zip(results, needed, strict=True)]
