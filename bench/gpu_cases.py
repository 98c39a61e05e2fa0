"""What the GPU benchmark measures: problems, and who is timed at them.

Other libraries are imported when they are first called, and left out, with the reason in the table, where
they are not installed or cannot do the problem.
"""

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import bench_sampled_softmax as loss_bench
from .bench_sampled_softmax import SCALE, Contender, Problem, Shape, contender, dtype_name
from .device import CUDA, DEVICE, Stage
from .results import numbers

IMPL = "auto" if CUDA else "triton"  # as users call it; on a CPU that would be the C++ kernel
MOST_LOGITS_OF_A_GRAPH = 2**25  # beyond, a call's own time does not count beside the device's


class Case(NamedTuple):
    shape: Shape
    dtype: torch.dtype = torch.float32
    # "cosines": corrected ones with a class set, FedSS' loss; "linear": dot products with all rows, a linear
    # layer's; "in_batch": cosines with all rows, of which row i is its own class, InfoNCE's. S = C in the
    # last two, and S = B in the last: so a shape says which it is.
    kind: str = "cosines"

    def __str__(self) -> str:
        return f"{numbers(self.shape)}, {dtype_name(self.dtype)}"

    @property
    def graphed(self) -> bool:
        """Whether it is timed as a CUDA graph too."""
        return self.shape.B * self.shape.S <= MOST_LOGITS_OF_A_GRAPH

    def problem(self) -> Problem:
        make = {
            "cosines": loss_bench.problem,
            "linear": loss_bench.linear_problem,
            "in_batch": loss_bench.in_batch_problem,
        }[self.kind]
        return make(self.shape, self.dtype, DEVICE, IMPL)


CLIENT = Case(Shape(32, 100, 64, 11_318))
LARGE = Case(Shape(4096, 8192, 512, 1_000_000), torch.bfloat16)
# The foremost first, should the time not suffice: a language model's last layer, large batches, a federated
# client, wide rows; then another dtype, contrastive batches, more clients, ten million classes.
CASES = [
    Case(Shape(4096, 128_256, 4096, 128_256), torch.bfloat16, "linear"),
    LARGE,
    Case(Shape(256, 1024, 128, 1_000_000)),
    CLIENT,
    Case(Shape(32, 170, 1280, 2_028)),
    Case(Shape(256, 1024, 128, 1_000_000), torch.bfloat16),
    Case(Shape(4096, 4096, 512, 4096), torch.bfloat16, "in_batch"),
    Case(Shape(32, 820, 64, 1_000_000)),
    Case(Shape(32, 820, 1280, 21_000)),
    Case(Shape(32, 170, 64, 2_028)),
    Case(Shape(32, 410, 64, 21_000)),
    Case(Shape(1024, 8192, 64, 10_000_000)),
]
QUICK_CASES = [LARGE, CLIENT]
INTERPRETED_CASES = [
    Case(Shape(3, 5, 16, 9)),
    Case(Shape(3, 7, 16, 7), kind="linear"),
    Case(Shape(4, 4, 16, 4), kind="in_batch"),
    Case(Shape(130, 5, 16, 9)),  # more rows than the small path holds: in chunks
]

# ---- the bare products -------------------------------------------------------------------------------------


@functools.cache
def _float32_out(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The argument with which torch.mm keeps its float32 sums of 16-bit operands, where it has one here."""
    if dtype.itemsize != 2:
        return {}
    operand = torch.zeros(16, 16, dtype=dtype, device=DEVICE)
    try:
        torch.mm(operand, operand, out_dtype=torch.float32)
    except (NotImplementedError, RuntimeError, TypeError):  # this device, or this torch
        return {}
    return {"out_dtype": torch.float32}


@torch.no_grad()
def first_product(p: Problem) -> Tensor:
    return torch.mm(p.input, p.rows.T, **_float32_out(p.input.dtype))


@torch.no_grad()
def last_products(p: Problem) -> tuple[Tensor, Tensor]:
    options = _float32_out(p.input.dtype)
    return torch.mm(p.probs, p.rows, **options), torch.mm(p.probs.T, p.input, **options)


def products(p: Problem) -> tuple[Tensor, ...]:
    return first_product(p), *last_products(p)


# ---- the contenders ----------------------------------------------------------------------------------------


def liger(p: Problem) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(p.input, p.rows, p.target)


def cce(p: Problem) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(p.input, p.rows, p.target)


def quack(p: Problem) -> Tensor:
    if any(size % 8 for size in (*p.input.shape, len(p.rows))):
        raise ValueError("it needs B, S and D that 8 divides")  # else an assertion of its own, without words
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(p.input, p.rows, p.target)


def memeff(p: Problem) -> Tensor:
    """Its one-sided loss, without what it adds by default: a margin, and another scale of the gradient."""
    from memeff import MemoryEfficientQwen3Loss

    return MemoryEfficientQwen3Loss(temperature=1 / SCALE, margin=2.0, stable=False)(p.input, p.rows)


class Library(NamedTuple):
    loss: Callable[[Problem], Tensor]
    kind: str  # of the only problems that it can express
    module: str
    package: str  # as pip calls it


LIBRARIES = {
    "liger": Library(liger, "linear", "liger_kernel", "liger-kernel"),
    "cce": Library(cce, "linear", "cut_cross_entropy", "cut-cross-entropy"),
    "quack": Library(quack, "linear", "quack", "quack-kernels"),
    "memeff": Library(memeff, "in_batch", "memeff", "memeff"),
}
# Heads of columns.
ON_ROWS = {
    **{"eager": "eager", "compile": "compile", "lce": "LCE", "lce_chunked": "LCE\nchunks"},
    **{"liger": "Liger", "cce": "CCE", "quack": "QuACK", "memeff": "memeff"},
}
GATHERING = {"eager_gather": "eager", "eager_gather_sparse": "eager\nsparse"}
CONTENDERS = {
    "ours": loss_bench.CONTENDERS["ours"],
    **{name: loss_bench.CONTENDERS[name] for name in ON_ROWS if name not in LIBRARIES},
    "products": Contender(first_product, products, None, "rows"),
    **{name: contender(library.loss, "rows") for name, library in LIBRARIES.items()},
    **{name: loss_bench.CONTENDERS[name] for name in ("ours_gather", *GATHERING)},
}


def contenders(case: Case) -> dict[str, Contender]:
    """Those that can express the case. Nothing is gathered where all rows are in the class set."""
    kinds = {name: library.kind for name, library in LIBRARIES.items()}
    return {
        name: c
        for name, c in CONTENDERS.items()
        if kinds.get(name, case.kind) == case.kind and (c.over == "rows" or case.kind == "cosines")
    }


def why_not(name: str, case: Case) -> str:
    if name == "compile":
        return "" if CUDA else "nothing is compiled where kernels are interpreted"
    if name not in LIBRARIES:
        return CONTENDERS[name].why_not(case.shape)
    library = LIBRARIES[name]
    found = importlib.util.find_spec(library.module) is not None
    return "" if found else f"not installed (pip install {library.package})"


def versions() -> dict[str, str]:
    """Of the libraries that are installed."""
    found = {}
    for library in LIBRARIES.values():
        try:
            found[library.package] = importlib.metadata.version(library.package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def stages(c: Contender, p: Problem) -> tuple[Stage, Stage]:
    """Forward and backward."""
    if c.loss is None:
        return lambda _: first_product(p), lambda _: last_products(p)
    loss, leaves = c.loss, (p.input, getattr(p, c.over))
    return lambda _: loss(p), lambda value: torch.autograd.grad(value, leaves)
