"""What the kernels of a call need of a GPU: registers, spills, shared memory. No GPU is needed to ask.

    python tests/registers.py 100x820x64x1000000 --dtype bfloat16 --target sm_90

compiles what a call with B = 100 rows, S = 820 gathered classes and D = 64 of C = 1,000,000 launches, in
about ten seconds of one core. sm_80 is an A100, sm_90 an H100 or H200, sm_100 a B200, gfx942 an MI300.
A kernel that spills is slow by itself: its tiles are too large for the registers of its warps. The tiles are
in the line that is printed first, an entry of the table in configurations.py. To try others in their place,
and in every launch that this entry serves, of whatever dtype and arguments:

    python tests/registers.py 100x820x64x1000000 --blocks 128,32,32,8,1 --every
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent))
os.environ["TRITON_INTERPRET"] = "1"  # launches are noted here, and compiled in another process

from ahead_of_time import DEVICES, Launch, Resources, compile_all
from test_ahead_of_time import TABLES, complaints, launched, shipped_calls

from fedss_kernels.triton_kernels import configurations
from fedss_kernels.triton_kernels.configurations import Blocks

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
LINE = "{:28} {:>8} {:>6} {:>10} {:>8} {:>15}"
HEADER = LINE.format("kernel", "launches", "warps", "registers", "spills", "shared (bytes)")

Entry = tuple[str, int]  # of a table of configurations: "few" or "many", and bytes of a pull


def entries_of(call: dict, target: str) -> list[Entry]:
    """Those that the call's tiles come from; none: it goes in chunks."""
    found: list[Entry] = []
    small = configurations._small

    def noted(table, B, S, D, pull_bytes):
        way = small(table, B, S, D, pull_bytes)
        found.extend([table.entry(B, pull_bytes)] if way else [])
        return way

    anew = {target: replace(TABLES[target])}  # nothing is planned for it yet
    with mock.patch.object(configurations, "_small", noted), mock.patch.dict(TABLES, anew):
        launched(target, [call])
    return found


def report(call: dict, target: str, blocks: Blocks | None = None, every: bool = False) -> list[str]:
    """Where the call's tiles are from; a line for each kernel; and what is wrong with which launch.

    blocks: in place of the entry's own. every: of all shipped launches that it serves, not of this call.
    """
    entries = entries_of(call, target)
    if not entries:
        if blocks or every:
            raise ValueError("the problem goes in chunks, and has no entry in the table")
        return ["in chunks: torch.mm, and one kernel between the products", *_needs([call], target)]
    which, pull_bytes = entries[0]
    table = TABLES[target]
    with ExitStack() as stack:
        if blocks:
            changed = {which: getattr(table, which) | {pull_bytes: blocks}}
            stack.enter_context(mock.patch.dict(TABLES, {target: replace(table, **changed)}))
        served = [call]
        if every:
            served = [each for each in shipped_calls() if entries[0] in entries_of(each, target)]
        used = blocks or getattr(table, which)[pull_bytes]
        name = "AMD" if target.startswith("gfx") else "NVIDIA"
        first = f"small: {name}.{which}[{pull_bytes}] = {used}"
        return [first, *_needs(served, target)]


def _needs(calls: list[dict], target: str) -> list[str]:
    launches = launched(target, calls)
    found = compile_all([(launch, target) for launch in launches])
    kernels: dict[tuple[str, int], list[Resources]] = {}
    wrong = []
    for launch, needs in zip(launches, found, strict=True):
        kernels.setdefault((launch.name, _warps(launch)), []).append(needs)
        wrong += complaints(launch, target, needs)
    lines = [HEADER]
    for (name, warps), of_it in kernels.items():
        most = (max(getattr(each, what) for each in of_it) for what in ("registers", "spills", "shared"))
        lines.append(LINE.format(name, len(of_it), warps, *(f"{number:,}" for number in most)))
    return lines + wrong


def _warps(launch: Launch) -> int:
    return launch.options.get("num_warps", 4)


def _blocks(text: str) -> Blocks:
    numbers = [int(number) for number in text.split(",")]
    if len(numbers) != len(Blocks._fields):
        raise ValueError
    return Blocks(*numbers)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "shape", metavar="BxSxDxC", help="rows, gathered classes, their length, classes in all"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--target", choices=DEVICES, default="sm_90")
    parser.add_argument(
        "--blocks",
        type=_blocks,
        metavar=",".join(Blocks._fields).upper(),
        help="tiles to try in place of the entry's; each but warps and stages a power of two, at least 16",
    )
    parser.add_argument(
        "--every", action="store_true", help="each shipped launch that the entry serves, in a minute or two"
    )
    given = parser.parse_args(arguments)
    try:
        B, S, D, C = (int(size) for size in given.shape.split("x"))
    except ValueError:
        parser.error(f"expected BxSxDxC, as 100x820x64x1000000, got {given.shape!r}")
    call = {"B": B, "S": S, "C": C, "D": D, "dtype": DTYPES[given.dtype], "sparse": True}
    try:
        lines = report(call, given.target, given.blocks, given.every)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
