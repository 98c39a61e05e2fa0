"""Builds csrc/ into fedss_kernels._C: C++17 and pybind11 alone, so one build serves every torch."""

import platform
import sysconfig
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

HEADERS = sorted(str(path) for path in Path("csrc").glob("*.hpp"))
KERNELS = "csrc/kernels.cpp"  # compiled once for each instruction set, chosen at run time
SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp") if str(path) != KERNELS)
# Never -ffast-math: NaN, infinities and the order of sums are part of what the kernels promise.
# Nobody reads errno after a square root, which then is an instruction.
COMMON = ["-O3", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra"]
# No contraction: the bits of the aggregator must not depend on whether the instruction set has a fused
# multiply-add.
FLAGS = [*COMMON, "-ffp-contract=off"]
# No vectors cross a function's edge, which is all that -Wpsabi is about; g++ 12 warns of its own headers.
QUIET = ["-Wno-psabi", "-Wno-maybe-uninitialized"]
KERNEL_FLAGS = [*COMMON, *QUIET, "-ffp-contract=fast", "-std=c++17", "-fPIC"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"]
INSTRUCTION_SETS = (
    {"baseline": [], "avx2": ["-mavx2", "-mfma"], "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
    if platform.machine() in ("x86_64", "AMD64")
    else {"native": []}
)


def refusal() -> str | None:
    """Why the kernels are not built for this Python, and what to do instead."""
    if platform.system() == "Windows":
        return (
            "they are written for a GNU or Clang compiler, POSIX threads and dlopen. "
            "Use WSL, where the wheels for Linux install"
        )
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return (
            "they have not been run on a free-threaded Python. "
            f"Use the ordinary build of CPython {platform.python_version()}"
        )
    return None


class BuildExtension(build_ext):
    """Says what to do where there is no compiler, or where the kernels were never run."""

    def run(self):
        if why := refusal():
            raise SystemExit(f"fedss-kernels: its C++ kernels are not built here: {why}.")
        super().run()

    def build_extension(self, ext):
        try:
            ext.extra_objects = [self.compile_kernels(*each) for each in INSTRUCTION_SETS.items()]
            super().build_extension(ext)
        except (CCompilerError, ExecError, PlatformError) as error:
            raise SystemExit(
                f"fedss-kernels: its C++ kernels could not be compiled ({error}).\n"
                "Install a C++17 compiler (g++ >= 9 or clang >= 10; on Debian: apt-get install g++), "
                "or install a wheel, which needs none."
            ) from error

    def compile_kernels(self, name: str, flags: list[str]) -> str:
        folder = Path(self.build_temp) / name
        (object_file,) = self.compiler.compile(
            [KERNELS], output_dir=str(folder), extra_postargs=[*KERNEL_FLAGS, *flags], depends=HEADERS
        )
        return object_file


def packages() -> dict[str, str]:
    """Package -> folder: two folders of the top level are installed inside the package."""
    found = {
        name: name.replace(".", "/") for name in find_packages(include=["fedss_kernels", "fedss_kernels.*"])
    }
    return found | {"fedss_kernels.reference": "python_ref", "fedss_kernels.bench": "bench"}


setup(
    packages=list(packages()),
    package_dir=packages(),
    package_data={"fedss_kernels": ["py.typed", "_C.pyi"], "fedss_kernels.federated": ["presets/*.json"]},
    ext_modules=[
        Pybind11Extension(
            "fedss_kernels._C",
            SOURCES,
            depends=[*HEADERS, KERNELS],
            cxx_std=17,
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread", "-ldl"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
