"""What is freed goes back to the system, whatever lies beside it."""

import platform
import subprocess
import sys

import pytest

# A block of 20 MB is freed, so that glibc keeps such blocks in its heap from now on; then another, below one
# that stays.
SCRIPT = """
import ctypes, sys
from pathlib import Path
from fedss_kernels.federated.given_back import give_back

def resident():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def block():
    found = libc.malloc(20 * 2**20)
    ctypes.memset(found, 1, 20 * 2**20)
    return found

if sys.argv[1] == "yes":
    give_back()
libc.free(block())
before, below, kept = resident(), block(), [libc.malloc(100_000) for _ in range(20)]
libc.free(below)
print(resident() - before)
"""


GLIBC = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc",
    reason="what is set is glibc's threshold; the malloc of this system has none, and nothing is set there",
)


def left(given: str) -> float:
    """MiB that are still there of 20 that were freed."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, given], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.exhaustive
@GLIBC
def test_a_large_block_is_given_back_as_it_is_freed():
    assert left("yes") < 5
    assert left("no") > 15, "glibc gives it back by itself: is this of any use?"


FAULTS = """
import ctypes, resource
from fedss_kernels.federated.given_back import give_back

give_back()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def step():
    found = libc.malloc(4 * 2**20)
    ctypes.memset(found, 1, 4 * 2**20)
    libc.free(found)

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.exhaustive
@GLIBC
def test_a_few_megabytes_that_each_step_takes_and_frees_do_not_go_and_come():
    """They would by pages of 4 KiB, 10,240 in ten steps."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100
