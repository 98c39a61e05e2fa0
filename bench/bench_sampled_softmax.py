"""The loss beside what a user would write instead: forward, and forward with backward.

In two settings: on the (S, D) rows that a federated client was sent, and gathering them from all C rows.
Corrections, targets and class sets are those of FedSS: the targets' own classes are in the set.
"""

import functools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fedss_kernels import sampled_softmax_loss

from .measure import time_calls
from .peak_memory import Prepared, peak_bytes
from .report import Plan
from .results import Mismatch, Row, mebibytes, numbers

SCALE = 20.0
MEMORY_LIMIT = 2**28  # bytes of float32 logits over all C beyond which the dense softmax is left out


class Shape(NamedTuple):
    B: int
    S: int
    D: int
    C: int


# Federated clients, larger batches, up to a million classes, sizes that no block divides, a call's overhead.
MAIN_SHAPES = [
    Shape(32, 100, 64, 11_318),
    Shape(32, 820, 64, 1_000_000),
    Shape(32, 170, 1280, 2_028),
    Shape(256, 1024, 128, 1_000_000),
    Shape(1024, 8192, 64, 1_000_000),
    Shape(1024, 8192, 256, 100_000),
    Shape(33, 101, 65, 2_028),
    Shape(1, 1, 64, 2_028),
]
# The paper's data sets, Landmarks-User-160k, SOP and ImageNet-21k; D of its models and of MobileNetV3.
PAPER_SHAPES = [
    Shape(32, S, D, C)
    for C, sizes in {2_028: (170,), 11_318: (25, 50, 100), 21_000: (410, 820)}.items()
    for S in sizes
    for D in (64, 1280)
]
SIDE_SHAPES = [shape for shape in PAPER_SHAPES if shape not in MAIN_SHAPES]  # float32 only, no memory
SHAPES = [*MAIN_SHAPES, *SIDE_SHAPES]
QUICK_SHAPES = [Shape(32, 100, 64, 11_318), Shape(256, 1024, 128, 11_318)]
DTYPES = (torch.float32, torch.bfloat16)


class Problem(NamedTuple):
    """Inputs of one shape and dtype. `rows` is weight[class_ids]; both are leaves that require grad."""

    input: Tensor  # (B, D)
    weight: Tensor  # (C, D)
    rows: Tensor  # (S, D)
    class_ids: Tensor  # (S,) ascending
    target: Tensor  # (B,) a row of `rows`
    target_class: Tensor  # (B,) the same row, of `weight`
    counts: Tensor | None  # (S,) log expected counts; None: no correction
    probs: Tensor  # (B, S) stands for the softmax in the bare matrix products
    scale: float = SCALE
    similarity: str = "cosine"
    impl: str = "auto"


def problem(shape: Shape, dtype: torch.dtype, device: str = "cpu", impl: str = "auto") -> Problem:
    B, S, D, C = shape
    g = torch.Generator(device).manual_seed(0)
    input, rows = (torch.randn(n, D, generator=g, device=device).to(dtype).requires_grad_() for n in (B, S))
    class_ids = torch.randperm(C, generator=g, device=device)[:S].sort().values
    weight = rows
    if S < C:  # ones: drawing a million rows would take longer than timing them
        weight = torch.ones(C, D, dtype=dtype, device=device)
        weight = weight.index_copy_(0, class_ids, rows.detach()).requires_grad_()
    target = torch.randint(S, (B,), generator=g, device=device)
    positives = len(target.unique())
    log_count = math.log(max(S - positives, 1) / max(C - positives, 1))
    counts = torch.full((S,), log_count, device=device)
    counts[target] = 0.0
    probs = torch.rand(B, S, generator=g, device=device).to(dtype)
    return Problem(input, weight, rows, class_ids, target, class_ids[target], counts, probs, impl=impl)


def linear_problem(shape: Shape, dtype: torch.dtype, device: str = "cpu", impl: str = "auto") -> Problem:
    """A linear layer's cross-entropy, as of a language model: dot products, no correction."""
    p = problem(shape, dtype, device, impl)
    input = (p.input.detach() * shape.D**-0.5).requires_grad_()  # logits of about 1
    return p._replace(input=input, counts=None, scale=1.0, similarity="dot")


def in_batch_problem(shape: Shape, dtype: torch.dtype, device: str = "cpu", impl: str = "auto") -> Problem:
    """Contrastive pairs: row i of `rows` is the class of row i of `input`, no correction. S = C >= B."""
    p = problem(shape, dtype, device, impl)
    own = torch.arange(shape.B, device=device)
    return p._replace(target=own, target_class=own, counts=torch.zeros(shape.S, device=device))


Results = tuple[Tensor, ...]  # (loss, gradient to the input, gradient to the matrix)

# ---- the contenders ----------------------------------------------------------------------------------------


def ours(p: Problem) -> Tensor:
    return sampled_softmax_loss(
        *(p.input, p.rows, p.target, None, p.counts),
        scale=p.scale,
        similarity=p.similarity,
        impl=p.impl,
    )


def ours_gather(p: Problem) -> Tensor:
    return sampled_softmax_loss(
        *(p.input, p.weight, p.target_class, p.class_ids, p.counts),
        scale=p.scale,
        similarity=p.similarity,
        sparse_grad=True,
        impl=p.impl,
    )


def eager_loss(input: Tensor, rows: Tensor, target: Tensor, counts: Tensor | None) -> Tensor:
    """Of scaled cosines with a correction, or of dot products without."""
    if counts is None:
        logits = input @ rows.T
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target)
    logits = SCALE * F.normalize(input, dim=1) @ F.normalize(rows, dim=1).T
    return F.cross_entropy(logits - counts, target)  # float32 from here: counts are


def eager(p: Problem) -> Tensor:
    return eager_loss(p.input, p.rows, p.target, p.counts)


def eager_gather(p: Problem) -> Tensor:
    """Its gradient is dense, (C, D)."""
    return eager_loss(p.input, p.weight[p.class_ids], p.target, p.counts)


def eager_gather_sparse(p: Problem) -> Tensor:
    rows = F.embedding(p.class_ids, p.weight, sparse=True)
    return eager_loss(p.input, rows, p.target, p.counts)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(eager_loss, fullgraph=True, dynamic=False)


def compile(p: Problem) -> Tensor:
    return _compiled()(p.input, p.rows, p.target, p.counts)


def lce(p: Problem, options: "torch.nn.LinearCrossEntropyOptions | None" = None) -> Tensor:
    """The correction goes in as the bias, which takes the input's dtype."""
    if p.counts is None:
        return F.linear_cross_entropy(p.input, p.rows, p.target, options=options).float()
    input, rows = SCALE * F.normalize(p.input, dim=1), F.normalize(p.rows, dim=1)
    bias = -p.counts.to(p.input.dtype)
    return F.linear_cross_entropy(input, rows, p.target, linear_bias=bias, options=options).float()


def lce_chunked(p: Problem) -> Tensor:
    return lce(p, torch.nn.LinearCrossEntropyOptions())


def dense(p: Problem) -> Tensor:
    logits = SCALE * F.normalize(p.input, dim=1) @ F.normalize(p.weight, dim=1).T
    return F.cross_entropy(logits.float(), p.target_class)


@dataclass(frozen=True)
class Contender:
    """`forward` alone runs under no_grad; `step` is forward and backward."""

    forward: Callable[[Problem], object]
    step: Callable[[Problem], object]
    loss: Callable[[Problem], Tensor] | None
    over: str  # "rows" | "weight": the matrix that the loss is a function of
    why_not: Callable[[Shape], str] = lambda shape: ""  # why it cannot run, or nothing


def contender(loss: Callable[[Problem], Tensor], over: str, **options) -> Contender:
    def step(p: Problem) -> Results:
        return gradients(loss, p, over)

    return Contender(torch.no_grad()(loss), step, loss, over, **options)


def gradients(loss: Callable[[Problem], Tensor], p: Problem, over: str) -> Results:
    """(loss, its gradients to the input and to the matrix)"""
    value = loss(p)
    return value, *torch.autograd.grad(value, (p.input, getattr(p, over)))


@torch.no_grad()
def first_product(p: Problem) -> Tensor:
    return p.input @ p.rows.T


@torch.no_grad()
def last_products(p: Problem) -> tuple[Tensor, ...]:
    return p.probs @ p.rows, p.probs.T @ p.input


def _products(p: Problem) -> tuple[Tensor, ...]:
    return first_product(p), *last_products(p)


def _no_compiler(shape: Shape) -> str:
    found = any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name)
    return "" if found else "torch.compile finds no C++ compiler"


def _no_lce(shape: Shape) -> str:
    return "" if hasattr(F, "linear_cross_entropy") else "this torch has no F.linear_cross_entropy"


def _too_large(shape: Shape) -> str:
    size = 4 * shape.B * shape.C
    return "" if size <= MEMORY_LIMIT else f"its logits alone take {mebibytes(size)} MiB"


CONTENDERS = {
    "ours": contender(ours, "rows"),
    "eager": contender(eager, "rows"),
    "compile": contender(compile, "rows", why_not=_no_compiler),
    "lce": contender(lce, "rows", why_not=_no_lce),
    "lce_chunked": contender(lce_chunked, "rows", why_not=_no_lce),
    "mm": Contender(first_product, _products, None, "rows"),
    "ours_gather": contender(ours_gather, "weight"),
    "eager_gather": contender(eager_gather, "weight"),
    "eager_gather_sparse": contender(eager_gather_sparse, "weight"),
    "dense": contender(dense, "weight", why_not=_too_large),
}
OURS = ("ours", "ours_gather")
DIRECTIONS = {"forward": 2, "forward_backward": 6}  # operations for each of B·S·D


# ---- the check ---------------------------------------------------------------------------------------------

FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # of contenders: that it is the same loss at all


def check(shape: Shape, p: Problem, contenders: Sequence[str]) -> None:
    """Raises Mismatch unless ours has the right loss and gradients, and the others the same loss.

    Right: as near to float64 as twice the error of plain PyTorch in the same dtype, and a floor.
    """
    exact = p._replace(input=_double(p.input), rows=_double(p.rows))
    truth = gradients(eager, exact, "rows")
    plain = gradients(eager, p, "rows")
    for name in contenders:
        loss, where = CONTENDERS[name].loss, f"{name} at {tuple(shape)}, {dtype_name(p.input.dtype)}"
        if loss is None or name == "dense":  # dense: another loss, the one that is being approximated
            continue
        if name in OURS:
            _check_gradients(where, p, gradients(loss, p, CONTENDERS[name].over), truth, plain)
            continue
        value, right = loss(p).item(), truth[0].item()
        if not abs(value - right) <= LOSS_TOLERANCE[p.input.dtype] * (1 + right):
            raise Mismatch(f"{where}: the loss is {value:.6g} instead of {right:.6g}")


def _check_gradients(where: str, p: Problem, ours: Results, truth: Results, plain: Results) -> None:
    loss, to_input, to_matrix = ours
    to_matrix = on_rows(where, p, to_matrix)
    names = ("loss", "gradient to input", "gradient to weight")
    for name, got, right, usual in zip(names, (loss, to_input, to_matrix), truth, plain, strict=True):
        error, usual_error = ((value.double() - right).abs().max().item() for value in (got, usual))
        allowed = 2 * usual_error + FLOOR[p.input.dtype] * right.abs().max().item() + 1e-12
        if not error <= allowed:
            raise Mismatch(f"{where}: the {name} is off by {error:.3g}, more than the {allowed:.3g} allowed")


def on_rows(where: str, p: Problem, gradient: Tensor) -> Tensor:
    """The rows of class_ids, (S, D), of a gradient to them or to all of `weight`, sparse or dense."""
    if not gradient.is_sparse:
        return gradient if len(gradient) == len(p.rows) else gradient[p.class_ids]
    gradient = gradient.coalesce()
    if not torch.equal(gradient.indices()[0], p.class_ids):
        raise Mismatch(f"{where}: the gradient is not on the rows of class_ids")
    return gradient.values()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_()


# ---- measuring ---------------------------------------------------------------------------------------------


def measure(plan: Plan) -> Iterator[Row]:
    """Time and peak memory of every contender, each shape checked before it is timed."""
    shapes = [Shape(*shape) for shape in plan.shapes or (QUICK_SHAPES if plan.quick else SHAPES)]
    contenders = [name for name in CONTENDERS if plan.wants(name)]
    for number, shape in enumerate(shapes, 1):
        torch.compiler.reset()  # compiled code is one shape's; there is a limit to how many are kept
        for dtype in (torch.float32,) if shape in SIDE_SHAPES else DTYPES:
            plan.progress(f"loss {number}/{len(shapes)}: {numbers(shape)}, {dtype_name(dtype)}")
            yield from _measure(shape, dtype, contenders, plan.seconds)


def _measure(shape: Shape, dtype: torch.dtype, contenders: Sequence[str], seconds: float) -> Iterator[Row]:
    excuses = {name: CONTENDERS[name].why_not(shape) for name in contenders}
    running = [name for name in contenders if not excuses[name]]
    p = problem(shape, dtype)
    check(shape, p, running)
    for direction in DIRECTIONS:
        calls = {name: functools.partial(_call, name, direction, p) for name in running}
        timings = time_calls(calls, seconds)
        memory = direction == "forward_backward" and dtype == torch.float32 and shape not in SIDE_SHAPES
        for name in contenders:
            peak = peak_bytes(_prepare, name, shape) if memory and name in running else None
            yield Row(shape, direction, dtype_name(dtype), name, timings.get(name), peak, excuses[name])


def _call(name: str, direction: str, p: Problem) -> object:
    contender = CONTENDERS[name]
    return (contender.forward if direction == "forward" else contender.step)(p)


def _prepare(name: str, shape: Shape) -> Prepared:
    """Forward and backward in float32; what is compiled is compiled in the warm-up, for its own shape."""
    p, step = problem(shape, torch.float32), CONTENDERS[name].step
    tiny = p if name == "compile" else problem(Shape(2, 3, 8, 5), torch.float32)
    return lambda: step(tiny), lambda: step(p)
