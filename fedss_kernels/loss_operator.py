"""The registered operator of the loss: what torch.compile, autocast and dispatch modes see.

On the CPU, for "mean" and "sum", the kernel makes the gradients in the same pass as the loss, in float32 and
for the touched rows of `weight` only; the backward operator scales and rounds them. For "none" it runs the
kernel again, with each row's upstream gradient. The GPU kernels keep some numbers of each row, and begin
gradients with the loss where that saves a matrix product; else they compute logits again.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from . import _C
from .checks import refuse_forward_mode
from .operator_names import named_by_schema

library = torch.library.Library("fedss_kernels", "FRAGMENT")
ARGUMENTS = (
    "Tensor input, Tensor weight, Tensor target, Tensor? class_ids, Tensor? log_expected_count, "
    "Tensor? target_log_expected_count, Tensor? bias, Tensor scale, str similarity, int ignore_index, "
    "str reduction, bool sparse_grad, str impl, bool[4] wanted, ScalarType? rounding, "
    "Tensor? entry_labels=None, Tensor? target_labels=None, Tensor? target_logit=None, "
    "Tensor? weight_values=None, Tensor? bias_values=None"
)
# wanted: make the gradients of (input, weight, bias, scale) in the forward pass; rounding: autocast's dtype.
# target_logit (B,): the rows' own logits, for reduction "none"; targets are no classes then, but labels.
# weight_values, bias_values: what kernels read for weight and bias, stand-ins then: of a gradient's dtype.
# The results after the loss are for the backward operator. impl="cpp": Gradients, and nothing; "triton": what
# its kernels keep of each row, and sums for gradients where they are begun with the loss.
_LOSS, _loss_schema = named_by_schema(
    f"sampled_softmax_loss({ARGUMENTS}) -> "
    "(Tensor loss, Tensor made_0, Tensor made_1, Tensor made_2, Tensor made_3, Tensor made_4, Tensor made_5)"
)
_BACKWARD, _backward_schema = named_by_schema(
    f"sampled_softmax_loss_backward(Tensor grad_loss, Tensor[] made, bool[4] needed, {ARGUMENTS}) -> "
    "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_scale)"
)
library.define(_loss_schema)
library.define(_backward_schema)


class Operators(NamedTuple):
    """As they are called: OPERATORS.sampled_softmax_loss(...)."""

    sampled_softmax_loss: Any
    sampled_softmax_loss_backward: Any


OPERATORS = Operators(*(getattr(torch.ops.fedss_kernels, name) for name in (_LOSS, _BACKWARD)))


MADE = 6  # results of the operator after the loss
LEARNED, TARGET_LOGIT = (0, 1, 6, 7), 17  # places of input, weight, bias and scale among the arguments


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast rounds to now, or None."""
    if not torch.is_autocast_enabled(device_type):
        return None
    dtype = torch.get_autocast_dtype(device_type)
    return dtype if dtype in (torch.float16, torch.bfloat16) else None


def without_autocast(device_type: str) -> AbstractContextManager:
    """Autocast switched off, where it is on."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class Arguments(NamedTuple):
    """The operator's arguments, in the order of its schema."""

    input: Tensor
    weight: Tensor
    target: Tensor
    class_ids: Tensor | None
    log_expected_count: Tensor | None
    target_log_expected_count: Tensor | None
    bias: Tensor | None
    scale: Any  # a 0-d tensor, or a float on the direct route
    similarity: str
    ignore_index: int
    reduction: str
    sparse_grad: bool
    impl: str
    wanted: list[bool]
    rounding: torch.dtype | None
    entry_labels: Tensor | None = None
    target_labels: Tensor | None = None
    target_logit: Tensor | None = None
    weight_values: Tensor | None = None
    bias_values: Tensor | None = None

    @property
    def read(self) -> "Arguments":
        """With the weight and bias that kernels read."""
        if self.weight_values is None:
            return self
        return self._replace(
            weight=self.weight_values, bias=self.bias_values, weight_values=None, bias_values=None
        )

    @property
    def tensors(self) -> tuple[Any, ...]:
        """Those of the arguments that are."""
        return *self[:8], *self[15:]

    @property
    def options(self) -> tuple[Any, ...]:
        """The others."""
        return self[8:15]

    @classmethod
    def of(cls, tensors: Sequence[Any], options: Sequence[Any]) -> "Arguments":
        return cls(*tensors[:8], *options, *tensors[8:])


class Gradients(NamedTuple):
    """What the kernel makes, in float32 or float64, of `weight` and `bias` of touched rows only.

    None: not made. For a class set, rows U, U + 1, ... are zeros and ids -1.
    """

    input: Any  # (B, D)
    rows: Any  # (capacity, D)
    row_ids: Any  # (capacity,) ascending, then -1; None for all classes too: row i is class i
    bias: Any  # (capacity,)
    scale: Any  # () float64


def _allocator(input: Tensor) -> Callable[..., Tensor]:
    """Makes uninitialised tensors on input's device, of the dtype that results have, by size and strides."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    if dtype == torch.get_default_dtype() and input.is_cpu and torch._C._len_torch_function_stack() == 0:
        return torch.empty_strided  # takes two thirds of the time of empty, and half that of new_empty
    return partial(input.new_empty_strided, dtype=dtype)


def _empty_results(
    input: Tensor,
    weight: Tensor,
    class_ids: Tensor | None,
    reduction: str,
    made: Sequence[bool],
    entry_labels: Tensor | None,
    least: Callable[[int, int], int] = min,
) -> tuple[Tensor, Gradients]:
    """(loss, gradients)"""
    (B, D), C = input.shape, weight.shape[0]
    if class_ids is None:
        capacity = C
    else:  # a class may be listed under several labels, each of them has a row for a while
        entries = class_ids.shape[0] + B
        capacity = least(entries, C) if entry_labels is None else entries
    empty, strides = _allocator(input), (D or 1, 1)
    return empty((B,), (1,)) if reduction == "none" else empty((), ()), Gradients(
        empty((B, D), strides) if made[0] else None,
        empty((capacity, D), strides) if made[1] else None,
        class_ids.new_empty(capacity) if class_ids is not None and (made[1] or made[2]) else None,
        empty((capacity,), (1,)) if made[2] else None,
        input.new_empty((), dtype=torch.float64) if made[3] else None,
    )


def _operator_results(p: Arguments, made: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The operator's: tensors without elements for what is not made."""
    given = (*made, *[None] * (MADE - len(made)))
    return tuple(nothing(p.input) if result is None else result for result in given)


_ROUNDINGS = {None: "none", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def run_kernel(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    class_ids: Tensor | None,
    log_expected_count: Tensor | None,
    target_log_expected_count: Tensor | None,
    bias: Tensor | None,
    scale: float,
    similarity: str,
    ignore_index: int,
    reduction: str,
    made: Sequence[bool],  # which gradients: of input, weight, bias, scale
    rounding: torch.dtype | None = None,
    grad_loss: Tensor | None = None,  # (B,) upstream gradient of each row's loss, for reduction "none"
    labels: Sequence[Tensor | None] = (None, None, None),  # entry_labels, target_labels, target_logit
) -> tuple[Tensor, Gradients, int]:
    """(loss, the gradients in `made`, how many rows of weight were touched)"""
    loss, gradients = _empty_results(input, weight, class_ids, reduction, made, labels[0])
    touched = _C.sampled_softmax(
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
        _ROUNDINGS[rounding],
        reduction,
        grad_loss,
        loss,
        *gradients,
        torch.get_num_threads(),
        *labels,
    )
    return loss, gradients, touched


def run(p: Arguments, made: Sequence[bool], grad_loss: Tensor | None = None) -> tuple[Tensor, Gradients, int]:
    scale = p.scale.item() if isinstance(p.scale, Tensor) else p.scale
    return run_kernel(*p.read[:7], scale, *p[8:11], made, p.rounding, grad_loss, p[15:18])


def _loss(*arguments):
    p = Arguments(*arguments)
    refuse_forward_mode("sampled_softmax_loss")
    if p.impl == "triton":
        loss, made = loss_by_triton(p.read)
        return loss, *_operator_results(p, made)
    loss, gradients, _ = run(p, p.wanted)
    return loss, *_operator_results(p, gradients)


def _triton():
    """The GPU kernels: imported when first wanted."""
    from .triton_kernels import sampled_softmax

    return sampled_softmax


def loss_by_triton(p: Arguments) -> tuple[Tensor, Sequence[Tensor | None]]:
    """(loss, what the gradients are made of)"""
    kernels = _triton()
    wanted = kernels.Wanted(tuple(p.wanted), p.sparse_grad, p.scale.dtype)
    return kernels.loss(kernels.Problem.of(*p[:11], p.rounding, *p[15:18]), wanted)


def gradients_by_triton(
    p: Arguments, made: Sequence[Tensor], grad_loss: Tensor, needed: Sequence[bool]
) -> Sequence[Tensor | None]:
    """Of input, weight, bias and scale."""
    kernels = _triton()
    problem = kernels.Problem.of(*p[:11], p.rounding, *p[15:18])
    kept, *sums = made
    there = (kept, *(None if each.numel() == 0 else each for each in sums))
    return kernels.gradients(
        problem, there, grad_loss, kernels.Wanted(tuple(needed), p.sparse_grad, p.scale.dtype)
    )


@torch.library.register_fake(f"fedss_kernels::{_LOSS}", lib=library)
def _loss_fake(*arguments):
    p = Arguments(*arguments)
    if p.impl == "triton":
        loss, made = _triton().empty_loss(*p.read[:4], p.reduction, p.rounding, p.wanted)
        return loss, *_operator_results(p, made)
    # Python's min would compile for batches on one side of it only.
    given = (p.input, p.weight, p.class_ids, p.reduction, p.wanted, p.entry_labels)
    loss, gradients = _empty_results(*given, least=torch.sym_min)
    return loss, *_operator_results(p, gradients)


def _gradients(grad_loss: Tensor, made: list[Tensor], needed: list[bool], *arguments):
    p = Arguments(*arguments)
    refuse_forward_mode("sampled_softmax_loss")
    results: Sequence[Tensor | None]
    if p.impl == "triton":
        found = gradients_by_triton(p.read, made, grad_loss, needed)
        likes = (p.input, p.weight, p.bias, p.scale)
        results = [g if g is None else g.to(like.dtype) for g, like in zip(found, likes, strict=True)]
    else:
        results = finish_gradients(p, Gradients(*made[:5]), None, grad_loss, needed)
    return tuple(nothing(p.input) if result is None else result for result in results)


for _device in ("CPU", "CUDA"):
    library.impl(_LOSS, _loss, _device)
    library.impl(_BACKWARD, _gradients, _device)


@torch.library.register_fake(f"fedss_kernels::{_BACKWARD}", lib=library)
def _backward_fake(grad_loss: Tensor, made: list[Tensor], needed: list[bool], *arguments):
    p = Arguments(*arguments)
    if (needed[1] or needed[2]) and p.sparse_grad:
        raise RuntimeError(
            "sampled_softmax_loss: sparse_grad=True cannot be compiled, exported or run on fake tensors, as "
            "torch has no sparse ones there; take sparse_grad=False, or leave the loss out of what is traced"
        )
    return (
        torch.empty_like(p.input, memory_format=torch.contiguous_format) if needed[0] else nothing(p.input),
        p.weight.new_empty(p.weight.shape) if needed[1] else nothing(p.input),
        p.weight.new_empty(p.weight.shape[:1]) if needed[2] else nothing(p.input),
        p.input.new_empty((), dtype=p.scale.dtype) if needed[3] else nothing(p.input),
    )


def nothing(like: Tensor) -> Tensor:
    return like.new_empty((0,))


def scale_tensor(scale: float | Tensor) -> Tensor:
    """As the operator takes it: a number as float64, on the CPU whatever the default device is."""
    return scale if isinstance(scale, Tensor) else torch.full((), scale, dtype=torch.float64, device="cpu")


def call_operator(*arguments: Any) -> Tensor:
    """The loss; what torch says of transforms that it does not know, in words about the loss."""
    operator = OPERATORS.sampled_softmax_loss
    if torch.compiler.is_compiling():
        return operator(*arguments)[0]
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "sampled_softmax_loss: torch.jit.trace cannot record it, as it records no operator that takes a "
            'list of flags; take torch.export.export or torch.compile, or impl="reference"'
        )
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


# ---- from what the kernel made to what autograd wants ------------------------------------------------------


def finish_gradients(
    p: Arguments,
    made: Gradients | None,  # in the forward pass, or None
    touched: int | None,  # rows of weight with a gradient; None: to be counted
    grad_loss: Tensor,
    needed: list[bool],
    owned: bool = False,  # `made` is nobody else's: it may be scaled in place and handed on
) -> list[Tensor | None]:
    """The gradients of input, weight, bias and scale that are needed, in their dtypes."""
    upstream: float | None = None if p.reduction == "none" else grad_loss.item()
    grad_loss = grad_loss.resolve_neg()
    if p.reduction == "none":
        (_, made, touched), owned = run(p, needed, grad_loss), True
    elif upstream is not None and not math.isfinite(upstream):
        # What is 0 must stay 0, not become 0 * inf: each row with its own upstream.
        count = (p.target != p.ignore_index).sum().clamp(min=1) if p.reduction == "mean" else 1
        rows = (grad_loss / count).expand(len(p.input))
        (_, made, touched), upstream = run(p._replace(reduction="none"), needed, rows), None
        owned = True
    elif made is None or (
        needed != p.wanted and any(need and not was for need, was in zip(needed, p.wanted, strict=True))
    ):
        (_, made, touched), owned = run(p, needed), True
    return [
        finish(made.input, upstream, p.input, owned) if needed[0] else None,
        _grad_weight(p, made, touched, upstream, owned) if needed[1] else None,
        _grad_bias(p, made, touched, upstream, owned) if needed[2] else None,
        finish(made.scale, upstream, p.scale, owned) if needed[3] else None,
    ]


def finish(gradient: Tensor, upstream: float | None, of: Tensor, owned: bool) -> Tensor:
    """Scales before it rounds to `of`'s dtype: a float16 gradient of 2e-9 survives a GradScaler's 65536."""
    if of.dtype == torch.bfloat16 and gradient.dtype == torch.float32:
        result = torch.empty_like(gradient, dtype=torch.bfloat16)
        _C.scale_to_bfloat16(gradient, 1.0 if upstream is None else upstream, result, torch.get_num_threads())
        return result
    if upstream is not None and not (owned and upstream == 1):
        gradient = gradient.mul_(upstream) if owned else gradient * upstream
    return gradient if gradient.dtype == of.dtype else gradient.to(of.dtype)


def _grad_weight(
    p: Arguments, made: Gradients, touched: int | None, upstream: float | None, owned: bool
) -> Tensor:
    if p.class_ids is None and not p.sparse_grad:
        return finish(made.rows, upstream, p.weight, owned)
    ids, there = _touched(p, made, touched)
    rows = finish(made.rows[there], upstream, p.weight, owned)
    return _sparse(ids, rows, p.weight) if p.sparse_grad else _spread(ids, rows, p.weight)


def _grad_bias(
    p: Arguments, made: Gradients, touched: int | None, upstream: float | None, owned: bool
) -> Tensor:
    assert p.bias is not None
    ids, there = _touched(p, made, touched)
    values = finish(made.bias[there], upstream, p.bias, owned)
    return _sparse(ids, values, p.bias) if p.sparse_grad else _spread(ids, values, p.bias)


def _touched(p: Arguments, made: Gradients, touched: int | None) -> tuple[Tensor, Tensor | slice]:
    """((U,) the classes whose rows have a gradient, ascending; where these rows are in what was made)"""
    if p.class_ids is not None:
        U = int((made.row_ids >= 0).sum()) if touched is None else touched
        return made.row_ids[:U], slice(U)
    ids = torch.arange(len(p.weight), device=p.weight.device)
    if p.sparse_grad and p.log_expected_count is not None:
        takes_part = p.log_expected_count < math.inf
        if p.target_logit is None:  # targets are labels then
            takes_part[p.target[p.target != p.ignore_index]] = True
        ids = ids[takes_part]
    return ids, slice(None) if len(ids) == len(p.weight) else ids


def _sparse(ids: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(ids[None], rows, like.shape, check_invariants=False, is_coalesced=True)


def shaped_like(learned: Tensor | None, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """`gradients`, the last of them, which is made of shape (), with the shape of the learned scale."""
    if learned is None or learned.dim() == 0 or gradients[3] is None:
        return gradients
    return *gradients[:3], gradients[3].reshape(learned.shape)


def _spread(ids: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    return like.new_zeros(like.shape).index_copy_(0, ids, rows)


# ---- autograd and autocast ---------------------------------------------------------------------------------

_TENSORS = 13


def _setup_context(ctx, inputs, output) -> None:
    p, (loss, *made) = Arguments(*inputs), output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*made)
    ctx.save_for_backward(*p.tensors, *made, *(() if p.target_logit is None else (loss,)))
    ctx.options = p.options


def _backward(ctx, grad_loss, *_):
    saved = ctx.saved_tensors  # read once: each access runs the unpack hooks, of checkpointing say
    p, made = Arguments.of(saved[:_TENSORS], ctx.options), saved[_TENSORS : _TENSORS + MADE]
    needed = [ctx.needs_input_grad[position] for position in LEARNED]
    result: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if grad_loss is not None:
        refuse_batches(grad_loss)
        gradients = OPERATORS.sampled_softmax_loss_backward(grad_loss, list(made), needed, *p)
        for position, need, gradient in zip(LEARNED, needed, gradients, strict=True):
            result[position] = gradient if need else None
        if p.target_logit is not None and ctx.needs_input_grad[TARGET_LOGIT]:
            result[TARGET_LOGIT] = grad_target_logit(grad_loss, saved[-1], p.target_logit)
    return tuple(result)


def grad_target_logit(grad_loss: Tensor, loss: Tensor, target_logit: Tensor) -> Tensor:
    """d loss / d o_t = -(1 - p_t), and p_t = exp(-loss): an ignored row's is 0."""
    return (grad_loss * torch.expm1(-loss)).to(target_logit.dtype)


def refuse_batches(grad_loss: Tensor) -> None:
    """Raises RuntimeError for several upstream gradients at once: torch cannot go through them one by one."""
    if is_legacy_batchedtensor(grad_loss):
        raise RuntimeError(
            "sampled_softmax_loss: expected one upstream gradient at a time, got a batch of them, as of "
            "is_grads_batched=True or torch.autograd.functional.jacobian(..., vectorize=True); take False, "
            'or impl="reference"'
        )


def refuse_double_backward(ctx, *_):
    raise RuntimeError(
        "sampled_softmax_loss cannot be differentiated twice (a gradient penalty does that too); "
        'impl="reference" can'
    )


torch.library.register_autograd(
    f"fedss_kernels::{_LOSS}", _backward, setup_context=_setup_context, lib=library
)
torch.library.register_autograd(f"fedss_kernels::{_BACKWARD}", refuse_double_backward, lib=library)


def _register_autocast(device_type: str, key: str) -> None:
    """Rounds rows to the autocast dtype as they are read; nothing is cast as a whole."""
    without_autocast = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def with_rounding(*arguments):
        p = Arguments(*arguments)
        if p.rounding is None:
            p = p._replace(rounding=autocast_dtype(device_type))
        with torch._C._ExcludeDispatchKeyGuard(without_autocast):
            return OPERATORS.sampled_softmax_loss(*p)

    library.impl(_LOSS, with_rounding, key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")
