"""The losses of other libraries beside ours, forward with backward, each as its users call it.

ArcFace: pytorch-metric-learning's ArcFaceLoss, which goes over all C classes, beside ours on S sampled ones
and on all. Pairs in a batch, S = C = B: InfoNCE in eager PyTorch, and where items come repeatedly, which
are no negatives of each other. (memeff's InfoNCE runs on GPUs alone: bench.gpu has it.)
"""

import functools
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedss_kernels import SampledSoftmaxLoss, sampled_softmax_loss

from .bench_sampled_softmax import SCALE, Shape
from .machine import Machine
from .measure import time_calls
from .plot import Panel
from .report import Plan, Report
from .results import Figures, Group, Mismatch, Row, Table, decimal, milliseconds, numbers, quotient

MARGIN, ARCFACE_SCALE = 0.5, 64.0  # radians; as in the paper and in most code
TOLERANCE = 1e-5  # of the same loss and gradients, relative to the largest number
SHAPES = [Shape(32, 1024, 64, 20_000), Shape(32, 1024, 64, 200_000), Shape(4096, 4096, 512, 4096)]
QUICK_SHAPES = [Shape(32, 1024, 64, 20_000), Shape(256, 256, 128, 256)]

Results = tuple[Tensor, ...]  # (loss, gradient to the input, gradient to the rows (C, D))
Step = Callable[[], Results]


def operations(shape: Shape) -> tuple[str, ...]:
    """What is timed at a shape."""
    return ("in_batch", "in_batch_repeated") if shape.B == shape.S == shape.C else ("arcface",)


def matrices(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (B, D), rows (C, D), both requiring grad, and a class of each embedding (B,)."""
    rng = torch.Generator().manual_seed(0)
    input, rows = (torch.randn(n, shape.D, generator=rng) for n in (shape.B, shape.C))
    return input.requires_grad_(), rows.requires_grad_(), torch.randint(shape.C, (shape.B,), generator=rng)


# ---- ArcFace -----------------------------------------------------------------------------------------------


def arcface_ours(shape: Shape, num_sampled: int | None) -> Step:
    input, rows, target = matrices(shape)
    criterion = SampledSoftmaxLoss(
        shape.C,
        shape.D,
        num_sampled,
        scale=ARCFACE_SCALE,
        angular_margin=MARGIN,
        sparse_grad=num_sampled is not None,
    )
    criterion.weight = torch.nn.Parameter(rows.detach())
    return lambda: _with_gradients(criterion(input, target), input, criterion.weight)


def arcface_metric_learning(shape: Shape) -> Step:
    from pytorch_metric_learning.losses import ArcFaceLoss

    input, rows, target = matrices(shape)
    criterion = ArcFaceLoss(shape.C, shape.D, margin=math.degrees(MARGIN), scale=ARCFACE_SCALE)
    criterion.W = torch.nn.Parameter(rows.detach().t().contiguous())  # as it makes its own

    def step() -> Results:
        loss, to_input, to_rows = _with_gradients(criterion(input, target), input, criterion.W)
        return loss, to_input, to_rows.t()

    return step


# ---- pairs in a batch --------------------------------------------------------------------------------------


def in_batch_ours(shape: Shape, repeated: bool) -> Step:
    input, rows, items = matrices(shape)
    own = torch.arange(shape.B)
    labels = {"entry_labels": items, "target_labels": items} if repeated else {}
    return lambda: _with_gradients(sampled_softmax_loss(input, rows, own, scale=SCALE, **labels), input, rows)


def in_batch_eager(shape: Shape, repeated: bool) -> Step:
    input, rows, items = matrices(shape)
    own = torch.arange(shape.B)
    hits = (items[:, None] == items).fill_diagonal_(False)

    def step() -> Results:
        logits = SCALE * F.normalize(input, dim=1) @ F.normalize(rows, dim=1).t()
        if repeated:
            logits = logits.masked_fill(hits, -torch.inf)
        return _with_gradients(F.cross_entropy(logits, own), input, rows)

    return step


def _with_gradients(loss: Tensor, input: Tensor, rows: Tensor) -> Results:
    return loss, *torch.autograd.grad(loss, (input, rows))


# ---- the contenders ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    make: Callable[[Shape], Step]
    package: str = ""  # that it needs


CONTENDERS: dict[str, dict[str, Contender]] = {
    "arcface": {
        "ours": Contender(lambda shape: arcface_ours(shape, shape.S)),
        "ours_all": Contender(lambda shape: arcface_ours(shape, None)),
        "metric_learning": Contender(arcface_metric_learning, "pytorch_metric_learning"),
    },
    "in_batch": {
        "ours": Contender(functools.partial(in_batch_ours, repeated=False)),
        "eager": Contender(functools.partial(in_batch_eager, repeated=False)),
    },
    "in_batch_repeated": {
        "ours": Contender(functools.partial(in_batch_ours, repeated=True)),
        "eager": Contender(functools.partial(in_batch_eager, repeated=True)),
    },
}
NAMES = list(dict.fromkeys(name for of in CONTENDERS.values() for name in of))


def why_not(contender: Contender) -> str:
    """Why it cannot run here, or nothing."""
    if contender.package and importlib.util.find_spec(contender.package) is None:
        return f"not installed (pip install {contender.package.replace('_', '-')})"
    return ""


def check(where: str, operation: str, steps: dict[str, Step]) -> None:
    """Raises Mismatch unless all have the same loss and gradients; sampled ArcFace is another estimate."""
    parts = ("loss", "gradient to input", "gradient to rows")
    same = [name for name in steps if (operation, name) != ("arcface", "ours")]
    results = {name: steps[name]() for name in same}
    for first, name in itertools.pairwise(same):
        for part, mine, theirs in zip(parts, results[first], results[name], strict=True):
            error = ((mine - theirs).abs().max() / theirs.abs().max()).item()
            if not error <= TOLERANCE:
                raise Mismatch(f"{name} at {where}: the {part} differs from {first}'s by {error:.3g} of it")


def measure(plan: Plan) -> Iterator[Row]:
    """Times of every contender in turns, each shape checked before it is timed."""
    shapes = [Shape(*shape) for shape in plan.shapes or (QUICK_SHAPES if plan.quick else SHAPES)]
    for number, shape in enumerate(shapes, 1):
        for operation in operations(shape):
            plan.progress(f"libraries {number}/{len(shapes)}: {numbers(shape)}, {operation}")
            wanted = {name: of for name, of in CONTENDERS[operation].items() if plan.wants(name)}
            excuses = {name: why_not(of) for name, of in wanted.items()}
            steps = {name: of.make(shape) for name, of in wanted.items() if not excuses[name]}
            check(f"{tuple(shape)}, {operation}", operation, steps)
            timings = time_calls(steps, plan.seconds)
            for name, excuse in excuses.items():
                yield Row(shape, operation, "float32", name, timings.get(name), None, excuse)


# ---- the report --------------------------------------------------------------------------------------------

TITLES = {
    "arcface": "ArcFace",
    "in_batch": "pairs in a batch",
    "in_batch_repeated": "pairs in a batch, items come repeatedly",
}
OTHERS = {
    "ours_all": "ours\nall C",
    "metric_learning": "metric\nlearning",
    "eager": "eager",
}
HEADER = ("B, S, D", "C", "ours\nms", *OTHERS.values())
NOTES = (
    "Forward with backward, to the embeddings and the rows; the columns after ours are its time's multiples.",
    f"ArcFace: margin {MARGIN}, scale {ARCFACE_SCALE:g}; ours on S sampled classes with a sparse gradient, "
    "ours on all, pytorch-metric-learning's ArcFaceLoss on all, with the same loss and gradients as that.",
    "Pairs: row i is the positive of row i, InfoNCE's loss; of items that come repeatedly the other copies "
    "are no negatives.",
)


def table(rows: Sequence[Row], machine: Machine) -> Table:
    figures, groups = Figures(rows), []
    for operation, title in TITLES.items():
        shapes = map(Shape._make, figures.shapes(operation, "float32"))
        lines = [_line(figures, shape, operation) for shape in shapes]
        if lines:
            groups.append(Group(title, lines))
    return Table(REPORT.title, HEADER, groups, [*NOTES, *figures.remarks()])


def _line(figures: Figures, shape: Shape, operation: str) -> list[str]:
    def seconds(name: str) -> float | None:
        return figures.seconds(shape, operation, "float32", name)

    ours = seconds("ours")
    relative = [decimal(quotient(seconds(name), ours)) for name in OTHERS]
    return [numbers((shape.B, shape.S, shape.D)), numbers((shape.C,)), milliseconds(ours), *relative]


def panels(rows: Sequence[Row]) -> list[Panel]:
    found = []
    for operation, title in TITLES.items():
        of = [row for row in rows if row.operation == operation]
        if of:
            names = {name: OTHERS[name] for name in CONTENDERS[operation] if name in OTHERS}
            found.append(Panel(f"{title}, with backward", of, "ours", names))
    return found


REPORT = Report(
    name="libraries",
    title="Losses of other libraries",
    axes=Shape._fields,
    contenders=NAMES,
    measure=measure,
    table=table,
    panels=panels,
    wanting=lambda shape: "" if shape[1] <= shape[3] else "S of at most C",
)
