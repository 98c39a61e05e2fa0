"""What layer-wise learning costs a client stage by stage, beside training the whole net end to end.

Of one step on a batch: forward and backward, with the mean square of the features for a loss. A head and an
optimiser's velocities are left out of all alike. Beside it of the blocks alone, as the paper's formulas have
it: each block that is trained passes a gradient on to what came before it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..algorithms.parts import Part, Parts
from ..algorithms.schedule import Schedule
from ..models.copies import trainable
from . import costs
from .costs import Costs
from .features import pool_of, stem_and_blocks


@dataclass(frozen=True)
class OfBlocks:
    """Without stem and pool. Sums with +."""

    multiply_adds: int = 0
    traffic: int = 0  # bytes

    def __add__(self, other: "OfBlocks") -> "OfBlocks":
        return OfBlocks(self.multiply_adds + other.multiply_adds, self.traffic + other.traffic)


@dataclass(frozen=True)
class StageCosts:
    stage: int  # from 1
    held: int  # bytes of the parameters that a client has
    trained: int  # of these that it trains and sends back
    costs: Costs

    @property
    def memory(self) -> int:
        """Parameters and the peak of the step."""
        return self.held + self.costs.peak

    @property
    def traffic(self) -> int:
        """What comes, and what goes back."""
        return self.held + self.trained


def parts_of_stages(schedule: Schedule, rounds: int) -> list[Parts]:
    """Of a client in each stage; which blocks a depth budget leaves out makes no difference to its costs."""
    first = {schedule.stage(round): round for round in reversed(range(rounds))}
    return [schedule.parts(first[stage], 0, 0) for stage in sorted(first)]


def measure(net: nn.Module, images: Tensor, stages: Sequence[Parts]) -> list[StageCosts]:
    """Of each stage, on images (B, channels, H, W) as the net takes them; parts: of stem and blocks first.

    Blocks before the first that is trained run without a graph, and those that are absent do not run.
    Raises ValueError for a net without several blocks.
    """
    modules, pool = _copied(net)
    if len(modules) < 3:
        raise ValueError(f"model: expected a net of several blocks, got {len(modules) - 1} of them")
    found = []
    for stage, parts in enumerate(stages, 1):
        there = [(m, p) for m, p in zip(modules, parts.blocks, strict=False) if p is not Part.ABSENT]
        fixed = [*takewhile(lambda each: not each[1].moves, there)]
        before, active = ([m for m, _ in of] for of in (fixed, there[len(fixed) :]))
        found.append(_measured(stage, before, active, pool, images))
    return found


def end_to_end(net: nn.Module, images: Tensor, *, checkpointed: bool = False) -> StageCosts:
    """Of the whole net at once; with checkpoints each block is computed again in backward."""
    modules, pool = _copied(net)
    if checkpointed:
        modules = [modules[0], *map(_Checkpointed, modules[1:])]
    return _measured(len(modules) - 1, [], modules, pool, images)


def blocks_alone(net: nn.Module, images: Tensor, stages: Sequence[Parts]) -> tuple[list[OfBlocks], OfBlocks]:
    """(of each of these stages; of all the blocks at once): equal blocks make the paper's shares exactly."""
    (stem, *blocks), _ = _copied(net)
    frozen, trained = list[OfBlocks](), list[OfBlocks]()
    with torch.no_grad():
        made = stem(images)
    for block in blocks:
        step, bytes = _block_step(block, made), sum(p.nbytes for p in block.parameters())
        with torch.no_grad():
            frozen.append(OfBlocks(costs.multiply_adds(partial(block, made.clone())), bytes))
            made = block(made)
        trained.append(OfBlocks(costs.multiply_adds(step), 2 * bytes))
    of_stages = []
    for parts in stages:
        there = zip(parts.blocks[1:], frozen, trained, strict=False)
        of = (moving if part.moves else fixed for part, fixed, moving in there if part is not Part.ABSENT)
        of_stages.append(sum(of, OfBlocks()))
    return of_stages, sum(trained, OfBlocks())


def _block_step(block: nn.Module, before: Tensor) -> Callable[[], None]:
    given = before.clone().requires_grad_()

    def step() -> None:
        block(given * 1).square().mean().backward()  # a block may change what it is given in place

    return step


def _copied(net: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    net = trainable(net).train()
    return stem_and_blocks(net), pool_of(net)


def _measured(
    stage: int, fixed: Sequence[nn.Module], active: Sequence[nn.Module], pool: nn.Module, images: Tensor
) -> StageCosts:
    before, trained = nn.Sequential(*fixed), nn.Sequential(*active)

    def step() -> None:
        with torch.no_grad():
            made = before(images)
        pool(trained(made)).square().mean().backward()
        trained.zero_grad()

    parameters = [*before.parameters(), *trained.parameters()]
    held, moved = (sum(p.nbytes for p in of) for of in (parameters, trained.parameters()))
    return StageCosts(stage, held, moved, costs.measure(step, [*parameters, images], images.device))


class _Checkpointed(nn.Module):
    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, made: Tensor) -> Tensor:
        return checkpoint(self.block, made, use_reentrant=False)
