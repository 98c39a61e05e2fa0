"""Forward and backward of the loss: ours, eager PyTorch, torch.compile of that, the dense softmax.

python -m fedss_kernels.bench.bench_sampled_softmax [--quick] [--out FILE.csv]
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fedss_kernels import sampled_softmax_loss

from .measure import median_seconds, show

# (B, S, D, C): a federated client of the paper's (SOP: C = 11,318), larger batches, a million classes
SHAPES = [
    (32, 100, 64, 11_318),
    (32, 820, 64, 21_000),
    (32, 170, 1280, 2_028),
    (256, 1024, 128, 100_000),
    (1024, 8192, 64, 1_000_000),
]


def eager(input: Tensor, weight: Tensor, target: Tensor, class_ids: Tensor, counts: Tensor) -> Tensor:
    """The same loss in eager PyTorch: gathers, normalises and stores the logits."""
    x, w = F.normalize(input, dim=1), F.normalize(weight[class_ids], dim=1)
    own = 20 * (x * F.normalize(weight[target], dim=1)).sum(1, keepdim=True)
    others = (20 * x @ w.T - counts).masked_fill(class_ids == target[:, None], -torch.inf)
    return F.cross_entropy(torch.cat([own, others], 1), torch.zeros_like(target))


def dense(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The full softmax over all C classes."""
    return F.cross_entropy(20 * F.normalize(input, dim=1) @ F.normalize(weight, dim=1).T, target)


def measure(B: int, S: int, D: int, C: int) -> list[str]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(B, D, generator=g).requires_grad_()
    weight = torch.randn(C, D, generator=g).requires_grad_()
    target = torch.randint(C, (B,), generator=g)
    ids = torch.randperm(C, generator=g)[:S]
    counts = torch.full((S,), S / C).log()

    def step(loss, *arguments, **options):
        x.grad = weight.grad = None
        loss(x, weight, target, *arguments, **options).backward()

    ours = {"sparse_grad": True}
    torch.testing.assert_close(
        sampled_softmax_loss(x, weight, target, ids, counts, **ours), eager(x, weight, target, ids, counts)
    )
    torch.compiler.reset()
    compiled = torch.compile(eager)
    seconds = {
        "ours": median_seconds(lambda: step(sampled_softmax_loss, ids, counts, **ours)),
        "eager": median_seconds(lambda: step(eager, ids, counts)),
        "compile": median_seconds(lambda: step(compiled, ids, counts)),
        "dense": median_seconds(lambda: step(dense)) if B * C < 2**28 else float("nan"),
    }
    own = seconds["ours"]
    ratios = [f"{seconds[name] / own:.2f}" for name in ("eager", "compile", "dense")]
    return [f"{B}, {S}, {D}, {C:,}", f"{own * 1e3:.3f}", *ratios, f"{6 * B * S * D / own / 1e9:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    parser.add_argument("--out", type=Path, default=None, help="save the table as CSV")
    options = parser.parse_args()
    header = ["B, S, D, C", "ours, ms", "eager / ours", "compile / ours", "dense / ours", "ours, GFLOP/s"]
    rows = [measure(*shape) for shape in (SHAPES[:1] if options.quick else SHAPES)]
    show("Sampled-softmax loss, float32, forward and backward", header, rows, options.out)


if __name__ == "__main__":
    main()
