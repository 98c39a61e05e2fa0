"""Which implementation an operator runs: the C++ kernels on CPUs, the Triton kernels on GPUs."""

import importlib
from types import ModuleType

import torch

from .checks import check_choice


def choose_impl(impl: str, device: torch.device) -> str:
    """`impl`, where "auto" is "cpp" on the CPU and else "triton"; raises ValueError for "cpp" elsewhere."""
    check_choice("impl", impl, ("auto", "cpp", "triton"))
    if impl == "cpp" and device.type != "cpu":
        raise ValueError(f'impl: expected "auto" or "triton" for tensors on {device}, got "cpp"')
    if impl == "auto":
        return "cpp" if device.type == "cpu" else "triton"
    return impl


def triton_kernels(stem: str, device: torch.device) -> ModuleType:
    """The GPU kernels of an operator; imported when needed, as triton takes long and is not everywhere.

    Raises ValueError for a CPU device, unless they run interpreted.
    """
    module = importlib.import_module(f".triton_kernels.{stem}", __package__)
    tiles = importlib.import_module(".triton_kernels.tiles", __package__)
    if device.type == "cpu" and not tiles.INTERPRETED.value:
        raise ValueError(
            'impl: expected "auto" or "cpp" for CPU tensors, or TRITON_INTERPRET=1 in the environment when '
            'triton is first imported, got "triton"'
        )
    return module
