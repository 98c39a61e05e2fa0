"""The corpus of the fuzz targets, compiled by g++ for the address sanitizer; see fuzz_targets.py."""

import re
import shutil

import pytest
from fuzz_targets import CORPUS, TARGETS, build_replay, replay
from native_build import ROOT


# -O0, and of the sanitizers this one alone: the code is compiled anew and then runs for a second or two.
# `make sanitize` takes the others.
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++ with the address sanitizer, and finds no g++")
    folder = tmp_path_factory.mktemp("replay")
    build_replay(["-O0", "-fsanitize=address"], folder)
    return folder


@pytest.mark.exhaustive
def test_corpus(folder):
    """One test for all targets, as they share the objects of csrc/."""
    for target in TARGETS:
        assert list((CORPUS / target).iterdir()), target
        result = replay(folder, target)
        assert result.returncode == 0, f"{target}: {result.stderr}"


def test_every_function_behind_the_bindings_has_a_target():
    """But those that take no arguments, and the one that measures the machine."""
    bound = set(re.findall(r'm\.def\("(\w+)"', (ROOT / "csrc/bindings.cpp").read_text()))
    assert bound - set(TARGETS) == {"instruction_set", "instruction_sets", "fma_peak"}
