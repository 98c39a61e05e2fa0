"""What one training step costs a client, in memory by two measures and in multiply-adds; the paper's shares.

Saved bytes are what autograd keeps from forward to backward: exact, the same on any device, and blind to what
is computed again in backward, as with checkpoints. The peak is of all that the step has from the allocator:
gradients and passing results too, but not a library's own scratch. Neither counts what is there before the
step: parameters, velocities, images.

The shares are those of federated layer-wise learning (Guo et al., arXiv:2309.05213) of what training L equal
blocks end to end costs, in the stage that trains block l. A client has h blocks, one active and h - 1 fixed;
h is l, or at most a budget. Stem and head are left out.

    compute  (h + 2) / (3 L)         forward 1, backward 2; fixed blocks forward alone
    traffic  (h + 1) / (2 L)         h come, 1 goes back
    memory   (1 + (h - 1) f) / L     f: a fixed block's, of an active one's
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], object]
FIXED_SHARE = 0.15  # f that fits the paper's 22% and 14%


@dataclass(frozen=True)
class Costs:
    saved: int  # bytes
    peak: int  # bytes
    multiply_adds: int


def measure(step: Step, known: Iterable[Tensor], device: torch.device | str = "cpu") -> Costs:
    """Of a step that is called four times, the first to warm up. `known` as in `saved_bytes`."""
    known = list(known)
    step()
    return Costs(saved_bytes(step, known), peak_bytes(step, device), multiply_adds(step))


def saved_bytes(step: Step, known: Iterable[Tensor]) -> int:
    """Of the storages that autograd saves, each once and in whole, however many views of it are saved.

    Those of `known` tensors, as parameters and input, are left out. All are kept alive meanwhile, so a step
    should be one forward and backward: of several it is their sum. Nets that save tensors of no storage, as
    sparse ones, are beyond it.
    """
    there = {_place(tensor) for tensor in known}
    kept = dict[int, torch.UntypedStorage]()

    def pack(tensor: Tensor) -> Tensor:
        if (place := _place(tensor)) not in there:
            kept[place] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storage.nbytes() for storage in kept.values())


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def peak_bytes(step: Step, device: torch.device | str = "cpu") -> int:
    """The most that it has allocated at a time.

    On a CPU what it frees of what was there before is not taken off, as the profiler does not see it.
    """
    if torch.device(device).type == "cuda":
        return _peak_on_gpu(step, device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler says on stderr when it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _peak_on_gpu(step: Step, device: torch.device | str) -> int:
    """Rounded up to 512 bytes an allocation, as its allocator does."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def multiply_adds(step: Step) -> int:
    """Of its matrix products, convolutions and attention, forward, backward and what is computed again."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() // 2


# ---- the paper's shares


def compute_share(stage: int, blocks: int, budget: int | None = None) -> float:
    """Raises ValueError for a stage that is none of the blocks', or a budget below 2. So do the others."""
    return (_held(stage, blocks, budget) + 2) / (3 * blocks)


def traffic_share(stage: int, blocks: int, budget: int | None = None) -> float:
    return (_held(stage, blocks, budget) + 1) / (2 * blocks)


def memory_share(stage: int, blocks: int, budget: int | None = None, *, fixed: float = FIXED_SHARE) -> float:
    """fixed: what a fixed block takes of an active one's, f."""
    return (1 + (_held(stage, blocks, budget) - 1) * fixed) / blocks


def _held(stage: int, blocks: int, budget: int | None) -> int:
    """h, the blocks that a client has."""
    if not 1 <= stage <= blocks:
        raise ValueError(f"stage: expected one in [1, {blocks}], got {stage}")
    if budget is None:
        return stage
    if budget < 2:
        raise ValueError(f"budget: expected at least 2 blocks, got {budget}")
    return min(stage, budget)
