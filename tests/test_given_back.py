"""What is freed goes back to the system, whatever lies beside it."""

import platform
import subprocess
import sys

import pytest

# musl and macOS have no mallopt, so that there is nothing to set, and give_back sets nothing.
pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(
        platform.libc_ver()[0] != "glibc",
        reason="what is set is glibc's threshold: this system's malloc has none, and nothing is set there",
    ),
]

MALLOC = """
import ctypes, resource, sys
from pathlib import Path
from fedss_kernels.federated.given_back import give_back

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def block(mebibytes):
    found = libc.malloc(mebibytes * 2**20)
    ctypes.memset(found, 1, mebibytes * 2**20)
    return found
"""


def printed(script: str, *arguments: str) -> float:
    command = [sys.executable, "-c", MALLOC + script, *arguments]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


# A block of 20 MB is freed, so that glibc keeps such blocks in its heap from now on; then another, below one
# that stays.
LEFT = """
def resident():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024

if sys.argv[1] == "yes":
    give_back()
libc.free(block(20))
before, below, kept = resident(), block(20), [libc.malloc(100_000) for _ in range(20)]
libc.free(below)
print(resident() - before)
"""


def left(given: str) -> float:
    """MiB that are still there of 20 that were freed."""
    return printed(LEFT, given)


def test_a_large_block_is_given_back_as_it_is_freed():
    assert left("yes") < 5
    assert left("no") > 15, "glibc gives it back by itself: is this of any use?"


FAULTS = """
give_back()
libc.free(block(4))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    libc.free(block(4))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_a_few_megabytes_that_each_step_takes_and_frees_do_not_go_and_come():
    """They would by pages of 4 KiB, 10,240 in ten steps."""
    assert printed(FAULTS) < 100
