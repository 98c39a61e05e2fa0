import os
import subprocess
import sys
import textwrap

import pytest
import torch

# Before anything imports triton: where there is no GPU its kernels run on CPU tensors, interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Tests of bits over several threads ask for them; the others are too small to gain from any.
torch.set_num_threads(1)


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def peak_memory():
    """Bytes by which a run raises a fresh process' peak memory above what it was after the set-up."""

    def measure(setup: str, run: str) -> int:
        measure_it = """
            def peak():
                with open("/proc/self/status") as status:
                    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
            with open("/proc/self/clear_refs", "w") as clear:
                clear.write("5")  # the peak starts again from what is resident now
            before = peak()
            {run}
            print(peak() - before)
        """
        code = textwrap.dedent(setup) + textwrap.dedent(measure_it).format(run=run)
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
        )
        return int(result.stdout)

    return measure
