"""Builds csrc/ into fedss_kernels._C: C++17 and pybind11 alone, so one build serves every torch."""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

HEADERS = sorted(str(path) for path in Path("csrc").glob("*.hpp"))
SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
# Never -ffast-math: NaN, infinities and the order of sums are part of what the kernels promise. No
# contraction: the bits of the aggregator must not depend on whether the instruction set has a fused
# multiply-add.
FLAGS = ["-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]


class BuildExtension(build_ext):
    """Says what to do where there is no compiler."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except (CCompilerError, ExecError, PlatformError) as error:
            raise SystemExit(
                f"fedss-kernels: its C++ kernels could not be compiled ({error}).\n"
                "Install a C++17 compiler (g++ >= 9 or clang >= 10; on Debian: apt-get install g++), "
                "or install a wheel, which needs none."
            ) from error


def packages() -> dict[str, str]:
    """Package -> folder: two folders of the top level are installed inside the package."""
    found = {
        name: name.replace(".", "/") for name in find_packages(include=["fedss_kernels", "fedss_kernels.*"])
    }
    return found | {"fedss_kernels.reference": "python_ref", "fedss_kernels.bench": "bench"}


setup(
    packages=list(packages()),
    package_dir=packages(),
    package_data={"fedss_kernels": ["py.typed", "_C.pyi"]},
    ext_modules=[
        Pybind11Extension(
            "fedss_kernels._C",
            SOURCES,
            depends=HEADERS,
            cxx_std=17,
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
