"""Every instruction set that this machine runs or emulates: the choice, and the same tolerances on each."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loss_cases import BF16, F16, F32, Case, check
from native_build import FLAGS, NATIVE, NEON, ROOT, compile_csrc
from test_sampled_softmax import random_case

from fedss_kernels import _C, sampled_softmax_loss, scatter_add_

SETS = _C.instruction_sets()

# Large enough for products in float32 or bfloat16: below 65,536 multiply-adds everything is float64.
LARGE = {"B": (33, 64, 65, 130), "S": (130, 200, 321, None), "C": (200, 350, 700), "D": (33, 64, 65, 130)}


@pytest.fixture
def use():
    """_C.use_instruction_set, undone afterwards."""
    before = _C.instruction_set()
    yield _C.use_instruction_set
    _C.use_instruction_set(before)


@pytest.mark.parametrize("name", SETS)
def test_within_tolerance_on_every_instruction_set(name, use):
    use(name)
    for seed in range(60):
        check(random_case(seed, LARGE | {"dtype": (F32, F32, BF16, F16)}))


@pytest.mark.parametrize("name", SETS)
def test_bfloat16_without_bias(name, use):
    """The products that have an instruction of their own on some machines."""
    use(name)
    odd = {"ignored": (0.0, 0.3), "zero_rows": (0.0, 0.2), "left_out": (0.0, 0.3), "distinct": (None, 3, 40)}
    for seed in range(40):
        check(random_case(seed, LARGE | odd | {"dtype": (BF16,), "bias": (False,)}))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1])
def test_nan_from_above_stays_one_in_bfloat16(name, bits, use):
    """Whatever its bits: rounding to bfloat16 must not carry into its exponent."""
    use(name)
    input = torch.randn(70, 60).to(BF16).requires_grad_()
    weight = torch.randn(200, 60).to(BF16).requires_grad_()
    loss = sampled_softmax_loss(input, weight, torch.arange(70), reduction="none")
    loss.backward(torch.full((70,), bits, dtype=torch.int32).view(F32))
    assert input.grad.isnan().all() and weight.grad.isnan().all()


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_same_bits_for_any_number_of_threads_on_every_instruction_set(name, dtype, use, set_threads):
    use(name)
    case = Case(0, B=200, S=900, C=1200, D=65, dtype=dtype, corrections=0.5)
    set_threads(1)
    expected = case.results(sampled_softmax_loss)
    for threads in (2, 3):
        set_threads(threads)
        for key, result in case.results(sampled_softmax_loss).items():
            assert torch.equal(result, expected[key]), key


@pytest.mark.parametrize("name", SETS)
def test_aggregator_has_the_same_bits_on_every_instruction_set(name, use):
    g = torch.Generator().manual_seed(0)
    ids, rows, scale = torch.randint(50, (300,), generator=g), torch.randn(300, 33), torch.rand(300)
    expected = scatter_add_(torch.zeros(50, 33), ids, rows, scale)
    use(name)
    assert torch.equal(scatter_add_(torch.zeros(50, 33), ids, rows, scale), expected)


def in_new_process(code: str, isa: str | None) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "FEDSS_ISA"}
    if isa is not None:
        environment["FEDSS_ISA"] = isa
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_environment_chooses():
    load = f"util.spec_from_file_location('_C', {_C.__file__!r})"  # without torch, which takes seconds
    code = (
        f"from importlib import util; spec = {load}; module = util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module); print(module.instruction_set())"
    )
    for name in SETS:
        assert in_new_process(code, name).stdout.strip() == name
    assert in_new_process(code, None).stdout.strip() == SETS[-1]


@pytest.mark.exhaustive
def test_unknown_name_is_refused():
    code = """
import torch, fedss_kernels
fedss_kernels.sampled_softmax_loss(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([0]))
"""
    result = in_new_process(code, "sse9")
    assert "ValueError: FEDSS_ISA: expected an instruction set of this machine" in result.stderr
    with pytest.raises(ValueError, match="got sse9"):
        _C.use_instruction_set("sse9")


# ---- without Python: the C++ test, also for a machine that is only emulated --------------------------------


def build(compiler: str, folder: Path, sets: dict[str, list[str]], *link: str) -> Path:
    """tests/test_kernels.cpp with kernels.cpp compiled for each of `sets`."""
    stems = ["class_rows", "instruction_sets", "sampled_softmax", "thread_pool"]
    objects = compile_csrc([compiler, "-O2"], folder, sets, stems)
    program = folder / "test_kernels"
    test = ["-O2", *FLAGS, "-ffp-contract=off", f"-I{ROOT}/csrc", str(ROOT / "tests/test_kernels.cpp")]
    subprocess.run([compiler, *test, *objects, *link, "-o", str(program)], check=True)
    return program


def run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.exhaustive
def test_kernels_in_cpp(tmp_path):
    run([str(build("g++", tmp_path, NATIVE)), "60"])


CROSS, EMULATOR = "aarch64-linux-gnu-g++", shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


# Nothing else here needs another machine's compiler and an emulator of it, so a developer may lack them;
# .ci/run installs both.
@pytest.mark.exhaustive
@pytest.mark.skipif(
    shutil.which(CROSS) is None or EMULATOR is None,
    reason="code for another machine: needs g++-aarch64-linux-gnu and qemu-user-static",
)
def test_kernels_in_cpp_on_neon(tmp_path):
    run([EMULATOR, str(build(CROSS, tmp_path, NEON, "-static")), "30"])


@pytest.mark.exhaustive
def test_no_code_of_one_instruction_set_can_serve_another(tmp_path):
    """What the linker may merge with other files' code lies in the namespace of its instruction set."""
    for name, flags in NATIVE.items():
        target = tmp_path / f"{name}.o"
        compile_it = ["g++", "-std=c++17", "-O0", "-Wno-psabi", *flags, "-c", "-o", str(target)]
        subprocess.run([*compile_it, str(ROOT / "csrc/kernels.cpp")], check=True)
        listing = subprocess.run(
            ["nm", "-C", "--defined-only", str(target)], capture_output=True, text=True, check=True
        )
        shared = [line for line in listing.stdout.splitlines() if line.split()[1] in "WVTDBRu"]
        foreign = [line for line in shared if f"fedss::{name}::" not in line]
        assert shared and not foreign, foreign[:3]
