"""csrc/ compiled without Python, for the tests that are C++: fuzz targets, sanitizers, emulated machines."""

import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
WIDE = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mprefer-vector-width=512".split()
X86 = {"baseline": [], "avx2": ["-mavx2", "-mfma"], "avx512": WIDE, "avx512_bf16": [*WIDE, "-mavx512bf16"]}
NEON: dict[str, list[str]] = {"neon": []}
NATIVE = NEON if platform.machine() == "aarch64" else X86  # what this machine's compiler makes

STEMS = sorted({path.stem for path in (ROOT / "csrc").glob("*.cpp")} - {"bindings", "kernels"})
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-maybe-uninitialized", "-pthread"]


def run_all(commands: list[list[str]]) -> None:
    """As many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))


def compile_csrc(
    compiler: list[str],  # and its flags
    folder: Path,
    sets: dict[str, list[str]],
    stems: list[str] = STEMS,
) -> list[str]:
    """An object for each of `stems`, and one of kernels.cpp for each instruction set; returns their paths."""
    sources = {name: ["-ffp-contract=fast", *flags, "csrc/kernels.cpp"] for name, flags in sets.items()}
    sources |= {stem: ["-ffp-contract=off", f"csrc/{stem}.cpp"] for stem in stems}
    objects = {name: str(folder / f"{name}.o") for name in sources}
    run_all(
        [
            [*compiler, *FLAGS, *options, f"{ROOT}/{source}", "-c", "-o", objects[name]]
            for name, (*options, source) in sources.items()
        ]
    )
    return list(objects.values())
