"""What is installed here and what will run: `fedss doctor`. Needs torch alone, as the loss does."""

import importlib
import importlib.util
import os
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist

from . import _C
from .sampled_softmax import chosen_backend

DEVICES = ("cpu", "cuda")
REQUIRED = ("torch", "triton", "numpy")
# of torch.distributed -> which gradients of the loss DistributedDataParallel adds up over it
BACKENDS = {"gloo": "dense and sparse gradients", "nccl": "dense gradients only"}
# extra -> what it brings: (the module that is imported, the distribution that brings it)
EXTRAS = {
    "sim": (
        ("matplotlib", "matplotlib"),
        ("PIL", "pillow"),
        ("rich", "rich"),
        ("safetensors", "safetensors"),
    ),
    "vision": (("torchvision", "torchvision"),),
    "dp": (("dp_accounting", "dp-accounting"),),
    "bench": (("pytest", "pytest"), ("pytest_benchmark", "pytest-benchmark")),
}

Findings = dict[str, dict[str, str]]  # section -> what -> how it is


def examine() -> Findings:
    """Every finding. An extra counts if it can be found; torchvision, which may not fit torch, is tried."""
    return {
        "kernels": {device: _kernels(device) for device in DEVICES} | {"compiled": _C.__file__},
        "instruction set": {
            "in use": _instruction_set(),
            "usable here": ", ".join(_C.instruction_sets()),
            "FEDSS_ISA": os.environ.get("FEDSS_ISA", "not set (it forces one of these)"),
        },
        "threads": {"in use": str(torch.get_num_threads()), "cores": str(os.cpu_count())},
        "versions": {
            "fedss-kernels": _version("fedss-kernels"),
            "python": platform.python_version(),
            **{name: _version(name) for name in REQUIRED},
        },
        "several processes": {backend: _backend_of(backend) for backend in BACKENDS},
        "extras": {name: _extra(name) for name in EXTRAS},
    }


def listing(findings: Findings) -> str:
    """One line for each finding, under its section."""
    width = max(len(what) for section in findings.values() for what in section)
    lines = []
    for section, found in findings.items():
        lines += [section, *(f"  {what:<{width}}  {how}" for what, how in found.items())]
    return "\n".join(lines)


def _kernels(device: str) -> str:
    """What impl="auto" runs on a device."""
    impl = chosen_backend("auto", torch.device(device))
    if device == "cpu":
        return impl
    if importlib.util.find_spec("triton") is None:
        return 'triton not installed; impl="reference" runs there'
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{impl} on {', '.join(names)}" if names else f"{impl}, but torch finds no GPU"


def _backend_of(name: str) -> str:
    there = dist.is_available() and dist.is_backend_available(name)
    return BACKENDS[name] if there else "not in this torch"


def _instruction_set() -> str:
    try:
        return _C.instruction_set()
    except ValueError as error:
        return f"none: {error}"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _extra(name: str) -> str:
    missing = [given for module, given in EXTRAS[name] if importlib.util.find_spec(module) is None]
    if missing:
        return f'{", ".join(missing)} not installed: pip install "fedss-kernels[{name}]"'
    found = ", ".join(f"{given} {_version(given)}" for _, given in EXTRAS[name])
    return (_fault_of_torchvision() if name == "vision" else "") or found


def _fault_of_torchvision() -> str:
    """Why the torchvision that is there cannot be imported; "" where it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        return misfit(error)
    return ""


def misfit(error: Exception) -> str:
    """What is said of a torchvision that is there, where importing it raises this."""
    major, minor = torch.__version__.split(".")[:2]
    fitting = f", 0.{int(minor) + 15}" if major == "2" else ""  # they came out together so far
    return (
        f"torchvision {_version('torchvision')} is installed, but does not fit torch {torch.__version__}: "
        f"importing it fails ({error}); install the torchvision that goes with this torch{fitting}"
    )
