"""The fuzz targets in tests/fuzz/, one for each C++ function behind the bindings: built, run, measured.

    python tests/fuzz_targets.py fuzz [--runs 1000000] [target ...]   with clang's libFuzzer
    python tests/fuzz_targets.py replay --sanitize thread             the corpus, on several threads at once
    python tests/fuzz_targets.py coverage                             fails where the corpus misses lines
    python tests/fuzz_targets.py merge                                what fuzzing found goes into the corpus

The corpus is what fuzzing has found to reach every line, a few hundred inputs of some tens of bytes.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from native_build import FLAGS, NATIVE, ROOT, compile_csrc, run_all

FUZZ = ROOT / "tests" / "fuzz"
CORPUS = FUZZ / "corpus"
BUILD = ROOT / "build" / "fuzz"
TARGETS = sorted(path.stem for path in FUZZ.glob("*.cpp") if path.stem != "replay")
STRICT = ["-g", "-fno-sanitize-recover=all"]  # the first error ends the process
LEAST_COVERED = 0.95
# They time the machine for a minute where nothing is optimised, and take no tensor.
NOT_FUZZED = ("fma_peak", "multiply_in_registers")
# They do nothing without a GPU's driver, which takes no bytes of the corpus; tests/test_plan.py runs them
# with a driver that stands in for it.
OF_GPUS = ("gpu_launches.cpp", "gpu_launches.hpp")


def build(compiler: list[str], folder: Path, main: list[str], targets: list[str]) -> None:
    """A program in `folder` for each target; `main`: what its main function is linked from."""
    folder.mkdir(parents=True, exist_ok=True)
    objects = compile_csrc(compiler, folder, NATIVE)
    common = [*compiler, *FLAGS, "-ffp-contract=off", f"-I{ROOT}/csrc"]
    run_all(
        [[*common, str(FUZZ / f"{name}.cpp"), *main, *objects, "-o", str(folder / name)] for name in targets]
    )


def build_replay(flags: list[str], folder: Path) -> None:
    """With the compiler that the extension is built with, too, and without libFuzzer."""
    folder.mkdir(parents=True, exist_ok=True)
    main = str(folder / "replay.o")
    command = ["g++", *flags, *FLAGS, f"-I{ROOT}/csrc", "-c", str(FUZZ / "replay.cpp"), "-o", main]
    subprocess.run(command, check=True)
    build(["g++", *flags], folder, [main], TARGETS)


def replay(folder: Path, target: str, threads: int = 1) -> subprocess.CompletedProcess:
    inputs = sorted(str(path) for path in (CORPUS / target).iterdir())
    return subprocess.run([str(folder / target), str(threads), *inputs], capture_output=True, text=True)


def replay_all(sanitizer: str) -> bool:
    """Of use_instruction_set on one thread alone: there is one choice for all threads."""
    folder = BUILD / sanitizer
    build_replay(["-O1", f"-fsanitize={sanitizer}", *STRICT], folder)
    clean = True
    for target in TARGETS:
        result = replay(folder, target, threads=1 if target == "use_instruction_set" else 3)
        print(f"{target}: {result.stdout.strip() if result.returncode == 0 else result.stderr}", flush=True)
        clean = clean and result.returncode == 0
    return clean


def build_fuzzers(targets: list[str]) -> Path:
    folder = BUILD / "libfuzzer"
    flags = ["-O2", "-fsanitize=fuzzer-no-link,address,undefined", *STRICT]
    slow = (
        "-fno-sanitize-coverage=trace-cmp"  # half of the time, to guess numbers that no input here has to hit
    )
    build(["clang++", *flags, slow], folder, ["-fsanitize=fuzzer"], targets)
    return folder


def fuzz(targets: list[str], runs: int) -> bool:
    """What is new goes into build/fuzz/found/, what crashes into build/fuzz/."""
    folder = build_fuzzers(targets)
    for target in targets:
        found = BUILD / "found" / target
        found.mkdir(parents=True, exist_ok=True)
        limits = ["-max_len=256", f"-runs={runs}", "-timeout=60", "-rss_limit_mb=4096"]
        command = [str(folder / target), *limits, f"-artifact_prefix={BUILD}/{target}-"]
        if subprocess.run([*command, str(found), str(CORPUS / target)]).returncode != 0:
            return False
        print(f"{target}: {runs} executions without a crash", flush=True)
    return True


def merge(targets: list[str]) -> bool:
    folder = build_fuzzers(targets)
    for target in targets:
        least, found = BUILD / "least" / target, BUILD / "found" / target
        shutil.rmtree(least, ignore_errors=True)
        least.mkdir(parents=True)
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        command = [str(folder / target), "-merge=1", "-use_counters=0", str(least)]
        subprocess.run([*command, str(CORPUS / target), str(found)], check=True, stderr=subprocess.DEVNULL)
        shutil.rmtree(CORPUS / target)
        shutil.copytree(least, CORPUS / target)
        print(f"{target}: {len(list(least.iterdir()))} inputs", flush=True)
    return True


def covered_lines(folder: Path) -> dict[str, dict[int, bool]]:
    """File of csrc/ -> line -> whether it ran, in any instruction set's build or instance of a template.

    Without NOT_FUZZED and OF_GPUS.
    """
    lines: dict[str, dict[int, bool]] = defaultdict(dict)
    for counts in sorted(folder.glob("*.gcda")):
        command = ["gcov", "--json-format", "--stdout", str(counts)]
        listing = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
        for file in json.loads(listing)["files"]:
            path = Path(file["file"])
            if path.parent != ROOT / "csrc" or path.name in OF_GPUS:
                continue
            source = path.read_text().splitlines()
            for line in file["lines"]:
                number = line["line_number"]
                unwinds = source[number - 1] == "}"  # what an exception that passes runs
                if unwinds or any(name in line.get("function_name", "") for name in NOT_FUZZED):
                    continue
                lines[path.name][number] = lines[path.name].get(number, False) or line["count"] > 0
    return lines


def coverage() -> bool:
    folder = BUILD / "coverage"
    for counts in folder.glob("*.gcda"):
        counts.unlink()
    build_replay(["-O0", "--coverage", "-fprofile-update=atomic"], folder)
    for target in TARGETS:
        result = replay(folder, target)
        assert result.returncode == 0, result.stderr
    enough = True
    for file, lines in sorted(covered_lines(folder).items()):
        share = sum(lines.values()) / len(lines)
        missed = [number for number, ran in sorted(lines.items()) if not ran]
        print(f"{file:25} {share:7.1%} of {len(lines):3} lines; not: {missed}")
        enough = enough and share >= LEAST_COVERED
    return enough


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["fuzz", "replay", "coverage", "merge"])
    parser.add_argument("targets", nargs="*", default=TARGETS, help=", ".join(TARGETS))
    parser.add_argument("--runs", type=int, default=1_000_000, help="executions of each target")
    parser.add_argument("--sanitize", default="address,undefined")
    arguments = parser.parse_args()
    fine = {
        "fuzz": lambda: fuzz(arguments.targets, arguments.runs),
        "replay": lambda: replay_all(arguments.sanitize),
        "coverage": coverage,
        "merge": lambda: merge(arguments.targets),
    }[arguments.what]()
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
