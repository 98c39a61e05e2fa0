"""Launches without Triton, on a driver of our own that writes down what it is asked to launch."""

import ctypes
import shutil
import struct
import subprocess
from types import SimpleNamespace

import pytest
import torch

from fedss_kernels import _C
from fedss_kernels.triton_kernels import launch, plan

DRIVER = r"""
#include <stddef.h>
#include <string.h>
/* Kernels are their numbers: each takes parameters of these sizes. */
static const int kSizes[3][8] = {{0}, {8, 4, 8, 8, 8}, {4, 4, 8}};
char launched[4096];
size_t written = 0;
int refused = 0;
static int size_of(void* f, size_t i) { return i < 8 ? kSizes[(size_t)f][i] : 0; }
int cuFuncGetParamInfo(void* f, size_t index, size_t* offset, size_t* bytes) {
  size_t at = 0, i;
  if (size_of(f, index) == 0) return 1;
  for (i = 0; i <= index; ++i) {
    *bytes = size_of(f, i);
    at = (at + *bytes - 1) / *bytes * *bytes;
    *offset = at;
    at += *bytes;
  }
  return 0;
}
static void note(const void* what, size_t bytes) {
  memcpy(launched + written, what, bytes);
  written += bytes;
}
int cuLaunchKernel(void* f, unsigned x, unsigned y, unsigned z, unsigned tx, unsigned ty, unsigned tz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  unsigned sizes[7] = {x, y, z, tx, ty, tz, shared};
  size_t i;
  if (refused) return 719;
  note(&f, 8); note(sizes, sizeof sizes); note(&stream, 8);
  for (i = 0; size_of(f, i) != 0; ++i) note(parameters[i], size_of(f, i));
  return extra != NULL;
}
int cuGetErrorString(int error, const char** text) {
  *text = "unspecified launch failure";
  return error != 719;
}
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "a C compiler is needed, as for the package itself"
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(DRIVER)
    path = str(folder / "libdriver.so")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, str(folder / "driver.c")], check=True)
    return path


@pytest.fixture
def notes(driver):
    """What was launched since, as bytes."""
    library = ctypes.CDLL(driver)
    written, refused = (
        ctypes.c_size_t.in_dll(library, "written"),
        ctypes.c_int.in_dll(library, "refused"),
    )
    written.value = refused.value = 0

    def read():
        found = bytes((ctypes.c_char * 4096).in_dll(library, "launched")[: written.value])
        written.value = 0
        return found

    read.refuse = lambda: setattr(refused, "value", 1)
    return read


OTHER = torch.zeros(1)
PARAMETERS = [(8, 1, 16), (4, -1, -5), (8, -2, 0)]


def test_launches_get_addresses_and_the_factor(driver, notes):
    launches = _C.GpuLaunches(driver)
    launches.add(1, (3, 2, 1), 128, 512, PARAMETERS)
    launches.add(1, (0, 1, 1), 128, 512, PARAMETERS)  # no programs: not launched
    launches.add(2, (1, 1, 1), 64, 0, [(4, -1, 8), (4, -1, 9), (8, 0, 0)])
    whole = torch.zeros(9)
    for memories, factor in (((whole, whole[3:]), 0.5), ((whole[1:], whole.double()), -2.0)):
        launches.run(7, factor, *memories)
        first = struct.pack("<Q7IQ", 1, 3, 2, 1, 128, 1, 1, 512, 7)
        first += struct.pack("<Qi", memories[1].data_ptr() + 16, -5) + struct.pack("<dQQ", factor, 0, 0)
        second = struct.pack("<Q7IQiiQ", 2, 1, 1, 1, 64, 1, 1, 0, 7, 8, 9, memories[0].data_ptr())
        assert notes() == first + second


@pytest.mark.parametrize(
    "function, parameters, message",
    [
        (1, [(8, 0, 0), (8, -1, 1)], "parameter 1"),
        (2, [(4, -1, 1)], "parameter 1"),  # what is left is no address
        (2, [(4, -1, 1), (4, -1, 1), (8, 0, 0), (8, 0, 0)], "fewer"),
        (2, [(2, -1, 1)], "4 or 8"),
    ],
)
def test_another_layout_is_refused(function, parameters, message, driver):
    with pytest.raises(ValueError, match=message):
        _C.GpuLaunches(driver).add(function, (1, 1, 1), 32, 0, parameters)


def test_too_few_memories_launch_nothing(driver, notes):
    launches = _C.GpuLaunches(driver)
    launches.add(1, (3, 2, 1), 128, 512, PARAMETERS)
    with pytest.raises(ValueError, match="expected 2 memories, got 1"):
        launches.run(7, 1.0, OTHER)
    assert notes() == b""


def test_what_is_no_tensor_launches_nothing(driver, notes):
    launches = _C.GpuLaunches(driver)
    launches.add(1, (3, 2, 1), 128, 512, PARAMETERS)
    with pytest.raises((TypeError, RuntimeError)):
        launches.run(7, 1.0, OTHER, 5)
    assert notes() == b""


def test_what_the_driver_says_is_raised(driver, notes):
    launches = _C.GpuLaunches(driver)
    launches.add(1, (3, 2, 1), 128, 512, PARAMETERS)
    notes.refuse()
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        launches.run(7, 1.0, None, OTHER)


def test_no_driver():
    with pytest.raises(RuntimeError, match="no GPU driver"):
        _C.GpuLaunches("libnothing.so.1")


# ---- plans -------------------------------------------------------------------------------------------------


class Kernel:
    """As triton.jit makes them; launched once, it can be launched without Triton too."""

    arg_names = ("matrix", "D", "factor", "own", "nothing", "BLOCK")

    def __init__(self, **metadata):
        self.params = [SimpleNamespace(do_not_specialize=False) for _ in self.arg_names]
        self.launched = []
        signature = dict(
            zip(self.arg_names, ("*fp32", "i32", "fp64", "*fp64", "constexpr", "constexpr"), strict=True)
        )
        plain = {"num_warps": 4, "num_ctas": 1, "shared": 512, "global_scratch_size": 0}
        self.compiled = SimpleNamespace(
            src=SimpleNamespace(signature=signature), function=1, metadata=SimpleNamespace(**plain | metadata)
        )

    def __getitem__(self, grid):
        def launch(*arguments, **named):
            self.launched.append((grid, arguments, named))
            return self.compiled

        return launch


@pytest.fixture
def on_a_gpu(driver, monkeypatch):
    monkeypatch.setattr(launch, "_LOOKED_UP", True)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    monkeypatch.setattr(plan._C, "GpuLaunches", lambda: REAL(driver))
    empty = torch.empty
    monkeypatch.setattr(plan.torch, "empty", lambda *shape, device, **rest: empty(*shape, **rest))


REAL = _C.GpuLaunches


def planned(kernel):
    made = plan.Plan(torch.device("cuda", 0))
    made.empty(3, dtype=torch.float32)
    own = made.empty(2, 5, dtype=torch.float64)
    variant = launch.Variant(kernel, BLOCK=16)
    made.launch(variant, (3, 2), plan.Given(1), 64, plan.FACTOR, own, None)
    return made


def test_a_plan_runs_by_triton_once(on_a_gpu, notes):
    kernel = Kernel()
    made = planned(kernel)
    given = [OTHER, torch.zeros(4)]
    with torch.no_grad():
        made.run(given, 0.25)
    ((grid, (matrix, D, factor, own, nothing), named),) = kernel.launched
    assert (
        grid == (3, 2)
        and matrix is given[1]
        and (D, factor, nothing, named) == (64, 0.25, None, {"BLOCK": 16})
    )
    assert own.shape == (2, 5) and own.dtype == torch.float64
    assert notes() == b""
    memory, given = torch.zeros(made.bytes, dtype=torch.uint8), [OTHER, torch.zeros(8)[4:]]
    made.run(given, 0.75, memory)
    assert len(kernel.launched) == 1
    expected = struct.pack("<Q7IQ", 1, 3, 2, 1, 128, 1, 1, 512, 7)
    expected += struct.pack("<Qi", given[1].data_ptr(), 64) + struct.pack(
        "<dQQ", 0.75, memory.data_ptr() + 256, 0
    )
    assert notes() == expected


@pytest.mark.parametrize(
    "beyond", [{"num_ctas": 2}, {"launch_pdl": True}, {"global_scratch_size": 8}, {"profile_scratch_size": 8}]
)
def test_what_needs_more_than_a_launch_always_runs_by_triton(beyond, on_a_gpu, notes):
    kernel = Kernel(**beyond)
    made = planned(kernel)
    for _ in range(2):
        made.run([OTHER, torch.zeros(4)], 0.25)
    assert len(kernel.launched) == 2 and notes() == b""


def test_so_does_a_kernel_of_another_layout(on_a_gpu, notes):
    kernel = Kernel()
    kernel.compiled.function = 2
    made = planned(kernel)
    for _ in range(2):
        made.run([OTHER, torch.zeros(4)], 0.25)
    assert len(kernel.launched) == 2 and notes() == b""
