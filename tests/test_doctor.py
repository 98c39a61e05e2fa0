"""fedss doctor: what it finds, and that it needs nothing beyond what the loss needs."""

import errno
import fcntl
import importlib
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tempfile

import pytest
import torch

from fedss_kernels import _C, doctor
from fedss_kernels.federated import cli
from fedss_kernels.federated.models.vision import unavailable
from fedss_kernels.federated.surroundings import surroundings


@pytest.fixture(autouse=True)
def instruction_sets(monkeypatch):
    monkeypatch.setattr(_C, "instruction_set", lambda: "avx2", raising=False)
    monkeypatch.setattr(_C, "instruction_sets", lambda: ["baseline", "avx2"], raising=False)


def test_the_findings(monkeypatch, set_threads):
    set_threads(3)
    monkeypatch.setenv("FEDSS_ISA", "avx2")
    found = doctor.examine()
    assert found["kernels"]["cpu"] == "cpp" and found["kernels"]["cuda"].startswith("triton")
    assert found["kernels"]["compiled"] == _C.__file__
    assert found["instruction set"] == {
        "in use": "avx2",
        "usable here": "baseline, avx2",
        "FEDSS_ISA": "avx2",
    }
    assert found["threads"]["in use"] == "3"
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["versions"]["python"] in sys.version
    assert found["extras"]["bench"].startswith("pytest ")
    monkeypatch.delenv("FEDSS_ISA")
    assert doctor.examine()["instruction set"]["FEDSS_ISA"].startswith("not set")


def test_the_gpu_kernels_say_where_they_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert doctor.examine()["kernels"]["cuda"] == "triton, but torch finds no GPU"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    assert doctor.examine()["kernels"]["cuda"] == "triton on GPU 0, GPU 1"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    assert doctor.examine()["kernels"]["cuda"].startswith("triton not installed")


def test_a_missing_extra_is_named_with_what_to_do(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "PIL" else found(name, *rest)
    )
    assert doctor.examine()["extras"]["sim"] == 'pillow not installed: pip install "fedss-kernels[sim]"'


def test_a_torchvision_that_does_not_fit_is_said_and_so_is_what_helps(monkeypatch, tmp_path):
    """Not an extra to install, which is there: neither by the doctor nor where a net of it is asked for."""
    (tmp_path / "torchvision").mkdir()
    broken = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "torchvision" / "__init__.py").write_text(broken)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    found = doctor.examine()["extras"]["vision"]
    assert re.fullmatch(
        rf"torchvision .+ is installed, but does not fit torch {re.escape(torch.__version__)}: "
        r"importing it fails \(operator torchvision::nms does not exist\); install the torchvision that goes "
        rf"with this torch, 0\.{int(torch.__version__.split('.')[1]) + 15}",  # as 0.28 with 2.13
        found,
    )
    assert unavailable("resnet18") == f"model: resnet18 needs torchvision: {found}"
    monkeypatch.setitem(sys.modules, "torchvision", importlib.util)  # any that can be imported
    assert "fit" not in doctor.examine()["extras"]["vision"]


def test_the_extras_are_those_of_the_package():
    requirements = importlib.metadata.requires("fedss-kernels") or []
    for extra, modules in doctor.EXTRAS.items():
        of_it = [line for line in requirements if line.endswith(f'"{extra}"')]
        brought = {re.split(r"[^\w-]", line)[0] for line in of_it} - {"fedss-kernels"}
        assert brought == {distribution for _, distribution in modules}, extra


def test_the_listing_is_aligned(capsys):
    assert cli.main(["doctor"]) == 0
    out, err = capsys.readouterr()
    found = doctor.examine() | {"simulator": surroundings()}
    assert err == "" and out == doctor.listing(found) + "\n"
    lines = [line for line in out.splitlines() if line.startswith("  ")]
    width = max(len(what) for section in found.values() for what in section)
    assert all(line[2 + width : 4 + width] == "  " and line[4 + width] != " " for line in lines)


def test_the_findings_as_json(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == doctor.examine() | {"simulator": surroundings()}


def test_which_gradients_go_between_processes(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda name: name == "gloo")
    assert doctor.examine()["several processes"] == {
        "gloo": "dense and sparse gradients",
        "nccl": "not in this torch",
    }


def test_what_a_simulation_meets(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDSS_CACHE", str(tmp_path / "to" / "be"))
    found = surroundings()
    assert found["cache"].startswith(f"{tmp_path / 'to' / 'be'}, ") and found["cache"].endswith(" GB free")
    assert found["locks"] == "kept there" and " endings" in found["images"] and ".svg" in found["images"]
    assert not list(tmp_path.iterdir())

    def no_locks(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    def read_only(**options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert surroundings()["locks"] == "none there: nothing keeps two runs out of one folder"
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", read_only)
    assert surroundings()["cache"].endswith("which cannot be written: Read-only file system")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "PIL" else found(name, *rest)
    )
    assert surroundings()["images"] == "none: pillow is not installed"


def test_nothing_but_torch_numpy_and_triton_is_needed():
    """As python -m, in a process where nothing of an extra can be imported."""
    code = (
        "import runpy, sys\n"
        "for name in ('matplotlib', 'rich', 'PIL', 'pytest', 'pytest_benchmark'):\n"
        "    sys.modules[name] = None\n"
        "from fedss_kernels import _C\n"
        "_C.instruction_set, _C.instruction_sets = lambda: 'avx2', lambda: ['avx2']\n"
        "sys.argv = ['fedss', 'doctor']\n"
        "runpy.run_module('fedss_kernels', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "matplotlib, pillow, rich not installed" in done.stdout and torch.__version__ in done.stdout
