"""What someone meets before anything works: no compiler, an old torch, a package that was not built."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import fedss_kernels

ROOT = Path(__file__).parents[1]


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_old_torch_is_named_with_what_to_do():
    result = python("import torch; torch.__version__ = '2.9.1+cpu'; import fedss_kernels")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "ImportError: fedss-kernels needs torch >= 2.11, found torch 2.9.1+cpu: "
        'pip install --upgrade "torch>=2.11"'
    )


@pytest.mark.parametrize("number", ["2.11.0", "2.13.0+cpu", "2.14.0a0+gitabc", "3.0"])
def test_new_torch_is_welcome(number):
    assert python(f"import torch; torch.__version__ = {number!r}; import fedss_kernels").returncode == 0


def test_kernels_that_are_not_built_are_named_with_what_to_do():
    result = python("import sys; sys.modules['fedss_kernels._C'] = None; import fedss_kernels")
    assert result.returncode == 1 and "pip install -e ." in result.stderr.splitlines()[-1]


def test_no_compiler_is_named_with_what_to_do(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--force"]
    folders = ["--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib")]
    missing = {"CC": str(tmp_path / "no-gcc"), "CXX": str(tmp_path / "no-g++")}
    result = subprocess.run(
        command + folders, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **missing}
    )
    assert result.returncode != 0
    assert "Install a C++17 compiler (g++ >= 9 or clang >= 10" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_loss_needs_no_extra():
    """The operators import torch and numpy, and nothing of the simulator."""
    code = (
        "import sys; import fedss_kernels;"
        "print({'matplotlib', 'rich', 'PIL', 'fedss_kernels.federated'} & set(sys.modules))"
    )
    assert python(code).stdout.strip() == "set()"


def test_the_version_is_one_number():
    assert version("fedss-kernels") == fedss_kernels.__version__
