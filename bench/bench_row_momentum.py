"""The momentum step on the rows touched, beside torch's ways to make it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.sgd import sgd

import fedss_kernels

from .results import Mismatch, numbers
from .row_operation import RowContender, RowOperation, Shape

LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 1e-4


class Problem(NamedTuple):
    weight: Tensor  # (C, D)
    velocity: Tensor  # (C, D)
    class_ids: Tensor  # (M,) ascending, no repeats
    rows: Tensor  # (M, D) their gradients
    dense_grad: Tensor  # (C, D) the same, zero elsewhere


def problem(shape: Shape) -> Problem:
    M, D, C = shape
    g = torch.Generator().manual_seed(0)
    class_ids = torch.randperm(C, generator=g)[:M].sort().values
    weight, velocity, grad = (torch.randn(M, D, generator=g) for _ in range(3))

    def among_all(rows: Tensor) -> Tensor:
        return torch.zeros(C, D).index_copy_(0, class_ids, rows)

    return Problem(among_all(weight), among_all(velocity), class_ids, grad, among_all(grad))


def ours(p: Problem) -> None:
    fedss_kernels.row_momentum_step_(
        *(p.weight, p.velocity, p.class_ids, p.rows), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )


def eager(p: Problem) -> None:
    velocity = MOMENTUM * p.velocity[p.class_ids] + p.rows + WEIGHT_DECAY * p.weight[p.class_ids]
    p.velocity.index_copy_(0, p.class_ids, velocity)
    p.weight.index_add_(0, p.class_ids, velocity, alpha=-LR)


def dense(p: Problem) -> None:
    """The step of torch.optim.SGD(fused=True): moves all C rows, those without a gradient too."""
    sgd(
        [p.weight],
        [p.dense_grad],
        [p.velocity],
        fused=True,
        lr=LR,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )


CONTENDERS = {
    "ours": RowContender("row_momentum_step_", ours),
    "eager": RowContender("eager PyTorch on the rows", eager),
    "dense": RowContender("torch.optim.SGD on all C", dense),
}
TOLERANCE = 1e-5


def check(shape: Shape, contenders: Sequence[str]) -> None:
    """Raises Mismatch unless every contender leaves the touched rows where float64 does."""
    start = problem(shape)
    exact = Problem(*(t.double() if t.is_floating_point() else t.clone() for t in start))
    eager(exact)
    for name in contenders:
        p = start._replace(weight=start.weight.clone(), velocity=start.velocity.clone())
        CONTENDERS[name].run(p)
        for what in ("weight", "velocity"):
            got, right = (getattr(q, what)[p.class_ids] for q in (p, exact))
            error = (got - right).abs().max().item()
            if not error <= TOLERANCE:
                raise Mismatch(f"{name} of row_momentum at ({numbers(shape)}): {what} is off by {error:.3g}")


ROW_MOMENTUM = RowOperation(
    name="row_momentum",
    shapes=[
        Shape(64_000, 64, 100_000),
        Shape(16_000, 1280, 50_000),
        Shape(64_000, 64, 1_000_000),
        Shape(820, 64, 21_000),
    ],
    contenders=CONTENDERS,
    problem=problem,
    check=check,
    passes=5,  # reads each gradient row, reads and writes its weight and its velocity
    repeats=False,
)
