"""Bytes that a rank sends for a step of the sharded loss, over classes, rows, dimensions and ranks.

Counted by the operating system (`wchar` of /proc/self/io, which has what gloo writes to its sockets), in a
forward and a backward pass after one that opened the connections; Linux only. Beside it what the docstring of
`ShardedSampledSoftmaxLoss` says, with gloo's reduce-scatter, which is an all-reduce, and what
DistributedDataParallel would send of a dense class matrix's gradient.
"""

import argparse
import csv
import datetime
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from .. import ShardedSampledSoftmaxLoss

WRITTEN = Path("/proc/self/io")
SHAPES = [(1000, 64, 64), (10_000, 64, 64), (100_000, 64, 64), (1000, 256, 64), (1000, 64, 256)]


@dataclass(frozen=True)
class Line:
    """Of one shape: bytes of rank 0 for a step."""

    world: int
    classes: int
    rows: int  # of all ranks together
    dim: int
    sent: int  # measured
    embeddings: int  # computed: all-gathered, and their gradients by gloo's all-reduce
    data_parallel: int  # computed: a ring all-reduce of a dense gradient (C, D) in float32


def _written() -> int:
    text = WRITTEN.read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("wchar"))


def _measure(rank: int, world: int, folder: str, shapes: Sequence[tuple[int, int, int]]) -> None:
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world, timeout=patience)
    sent = []
    for C, B, D in shapes:
        criterion = ShardedSampledSoftmaxLoss(C, D, 100)
        input, target = torch.randn(B // world, D, requires_grad=True), torch.randint(C, (B // world,))
        for _ in range(2):
            before = _written()
            criterion(input, target).backward()
            after = _written()
        sent.append(after - before)
    if rank == 0:
        torch.save(sent, f"{folder}/sent.pt")
    dist.barrier()
    dist.destroy_process_group()


def measure(world: int, shapes: Sequence[tuple[int, int, int]]) -> list[Line]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_measure, (world, folder, shapes), nprocs=world)
        sent = torch.load(f"{folder}/sent.pt")
    share = (world - 1) / world
    return [
        Line(world, C, B, D, number, int(3 * share * 4 * B * D), int(2 * share * 4 * C * D))
        for (C, B, D), number in zip(shapes, sent, strict=True)
    ]


def markdown(lines: Sequence[Line]) -> str:
    header = ["ranks", "C", "B", "D", "sent, measured", "embeddings, computed", "DDP of W, computed"]
    rows = [[f"{value:,}" for value in astuple(line)] for line in lines]
    table = [header, ["---:"] * len(header), *rows]
    title = "Bytes that rank 0 sends for a step, float32 over gloo, 100 negatives:"
    return "\n".join([title, "", *("| " + " | ".join(cells) + " |" for cells in table)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fedss_kernels.bench.sharded", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-sharded"), metavar="DIR")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    lines = [line for world in given.ranks for line in measure(world, SHAPES)]
    (given.out / "sharded.md").write_text(markdown(lines), encoding="utf-8")
    with (given.out / "sharded.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([[field.name for field in fields(Line)], *map(astuple, lines)])
    print(markdown(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
