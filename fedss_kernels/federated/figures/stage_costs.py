"""What layer-wise learning costs a client stage by stage, beside training the whole net end to end.

Of one step on a batch: forward and backward, with the mean square of the features for a loss. A head, a
second view of each image and an optimiser's velocities are left out of all alike.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..probes.features import pool_of, stem_and_blocks
from ..reports.styles import COLOURS
from . import costs
from .costs import Costs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class StageCosts:
    stage: int  # the block that is trained, from 1; of end to end the last
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


def measure(net: nn.Module, images: Tensor, budget: int | None = None) -> list[StageCosts]:
    """Of each stage, on images (B, channels, H, W) as the net takes them.

    In stage l stem and blocks 1 to l - 1 are fixed, without a graph, and block l is trained, the first with
    the stem. With a budget a client has so many blocks at most: the first, the last fixed ones, the active.
    Raises ValueError for a net without several blocks or a budget below 2.
    """
    modules, pool = _copied(net)
    found = []
    for stage in range(1, len(modules)):
        kept = modules[:stage]
        if budget is not None:
            if budget < 2:
                raise ValueError(f"budget: expected at least 2 blocks, got {budget}")
            kept = kept[:2] + kept[max(2, stage + 2 - budget) :]
        fixed, active = ([], modules[:2]) if stage == 1 else (kept, modules[stage : stage + 1])
        found.append(_measured(stage, fixed, active, pool, images))
    return found


def end_to_end(net: nn.Module, images: Tensor, *, checkpointed: bool = False) -> StageCosts:
    """Of the whole net at once; with checkpoints each block is computed again in backward."""
    modules, pool = _copied(net)
    if checkpointed:
        modules = [modules[0], *map(_Checkpointed, modules[1:])]
    return _measured(len(modules) - 1, [], modules, pool, images)


def _copied(net: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    net = copy.deepcopy(net).requires_grad_(True).train()
    modules = stem_and_blocks(net)
    if len(modules) < 3:
        raise ValueError(f"model: expected a net of several blocks, got {len(modules) - 1} of them")
    return modules, pool_of(net)


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


def plot(cases: Mapping[str, Sequence[StageCosts]], whole: Mapping[str, StageCosts]) -> "Figure":
    """Shares of the first of `whole` over the stages: a line for each case, a level one for each of these."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    of_all = next(iter(whole.values()))
    quantities = {
        "memory": lambda line: line.memory,
        "multiply-adds": lambda line: line.costs.multiply_adds,
        "traffic": lambda line: line.traffic,
    }
    for axes, (title, of) in zip(figure.subplots(1, 3), quantities.items(), strict=True):
        for (name, lines), colour in zip(cases.items(), COLOURS, strict=False):
            shares = [100 * of(line) / of(of_all) for line in lines]
            axes.plot([line.stage for line in lines], shares, marker="o", color=colour, label=name)
        for (name, line), dashes in zip(whole.items(), ("-", "--", ":"), strict=False):
            axes.axhline(100 * of(line) / of(of_all), color="grey", linestyle=dashes, label=name)
        axes.set(title=title, xlabel="stage")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.4)
    figure.axes[0].set_ylabel(f"of {next(iter(whole))} (%)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure
