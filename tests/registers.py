"""What the kernels of a call need of a GPU: registers, spills, shared memory. No GPU is needed to ask.

    python tests/registers.py 100x820x64x1000000 --dtype bfloat16 --target sm_90

compiles what a call with B = 100 rows, S = 820 gathered classes and D = 64 of C = 1,000,000 launches, in
about ten seconds. sm_80 is an A100, sm_90 an H100 or H200, sm_100 a B200, gfx942 an MI300. A kernel that
spills is slow by itself: its tiles are too large for the registers of its warps. The tiles are in the line
that is printed first, of the table in configurations.py.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent))
os.environ["TRITON_INTERPRET"] = "1"  # launches are noted here, and compiled in another process

from ahead_of_time import DEVICES, compile_all
from test_ahead_of_time import TABLES, complaints, launched

from fedss_kernels.triton_kernels import configurations

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
HEADER = ("kernel", "warps", "registers", "spills", "shared (bytes)")


def entry(B: int, S: int, D: int, dtype: torch.dtype, target: str) -> str:
    """Where the sizes of the tiles come from."""
    table, name = TABLES[target], "AMD" if target.startswith("gfx") else "NVIDIA"
    with mock.patch.object(configurations, "TABLE", table):
        if not configurations.is_small(B, S, D):
            return "in chunks: torch.mm, and one kernel between the products"
    few = B <= table.few[dtype.itemsize].rows
    blocks = (table.few if few else table.many)[dtype.itemsize]
    return f"small: {name}.{'few' if few else 'many'}[{dtype.itemsize}] = {blocks}"


def report(B: int, S: int, D: int, C: int, dtype: torch.dtype, target: str) -> list[str]:
    """A line for each launch, with what is wrong with it below."""
    call = {"B": B, "S": S, "C": C, "D": D, "dtype": dtype, "sparse": True}
    launches = launched(target, [call])
    lines = [entry(B, S, D, dtype, target), "{:28} {:>6} {:>10} {:>8} {:>15}".format(*HEADER)]
    for launch, found in zip(launches, compile_all([(each, target) for each in launches]), strict=True):
        needs = launch.options.get("num_warps", 4), found.registers, found.spills, found.shared
        lines.append("{:28} {:>6} {:>10} {:>8} {:>15,}".format(launch.name, *needs))
        lines += [f"    {complaint.rpartition(': ')[2]}" for complaint in complaints(launch, target, found)]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "shape", metavar="BxSxDxC", help="rows, gathered classes, their length, classes in all"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--target", choices=DEVICES, default="sm_90")
    given = parser.parse_args(arguments)
    try:
        B, S, D, C = (int(size) for size in given.shape.split("x"))
    except ValueError:
        parser.error(f"expected BxSxDxC, as 100x820x64x1000000, got {given.shape!r}")
    print("\n".join(report(B, S, D, C, DTYPES[given.dtype], given.target)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
