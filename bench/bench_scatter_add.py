"""The aggregator's scatter-add beside torch's index_add_, against the machine's copy bandwidth.

python -m fedss_kernels.bench.bench_scatter_add [--quick] [--out FILE.csv]
"""

import argparse
from pathlib import Path

import torch

from fedss_kernels import scatter_add_

from .measure import copy_bandwidth, median_seconds, show

SHAPES = [
    (3_520, 64, 2_028),
    (64_000, 64, 100_000),
    (64_000, 64, 1_000_000),
    (4_000, 1280, 11_318),
]  # M, D, C


def measure(M: int, D: int, C: int, bandwidth: float) -> list[str]:
    g = torch.Generator().manual_seed(0)
    out, rows = torch.zeros(C, D), torch.randn(M, D, generator=g)
    ids, scale = torch.randint(C, (M,), generator=g), torch.rand(M, generator=g)
    expected = out.clone().index_add_(0, ids, rows * scale[:, None])
    torch.testing.assert_close(scatter_add_(out.clone(), ids, rows, scale), expected)
    ours = median_seconds(lambda: scatter_add_(out, ids, rows, scale))
    theirs = median_seconds(lambda: out.index_add_(0, ids, rows * scale[:, None]))
    moved = 3 * M * D * 4  # read the row, read and write its class
    share = moved / ours / bandwidth
    return [f"{M:,}, {D}, {C:,}", f"{ours * 1e3:.3f}", f"{theirs / ours:.2f}", f"{share:.0%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    parser.add_argument("--out", type=Path, default=None, help="save the table as CSV")
    options = parser.parse_args()
    bandwidth = copy_bandwidth()
    rows = [measure(*shape, bandwidth) for shape in (SHAPES[:1] if options.quick else SHAPES)]
    header = ["M, D, C", "ours, ms", "index_add_ / ours", "of copy bandwidth"]
    show(
        f"Scatter-add with scale, float32; copies run at {bandwidth / 1e9:.1f} GB/s",
        header,
        rows,
        options.out,
    )


if __name__ == "__main__":
    main()
