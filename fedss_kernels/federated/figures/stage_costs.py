"""What layer-wise learning costs a client stage by stage, beside training the whole net end to end.

Of one step on a batch: forward and backward, with the mean square of the features for a loss. A head and an
optimiser's velocities are left out of all alike.
"""

import copy
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...plotting import plotting
from ..algorithms import METHODS
from ..algorithms.parts import Part, Parts
from ..algorithms.schedule import Schedule
from ..config import Config
from ..models.layered import check_layered
from ..probes.features import pool_of, stem_and_blocks
from ..reports.page import write_section
from ..reports.styles import COLOURS
from ..reports.tables import write_csv
from . import costs
from .costs import Costs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MB = 1e6
WHOLE, CHECKPOINTED = "end to end", "end to end, with checkpoints"
WORDS = (
    "What one step costs a client, forward and backward, on {images} images (of a contrastive method each "
    "image is there twice). Memory is the parameters that the client has, the peak of the step with its "
    "gradients among it, and not what a library takes for itself; saved is what is kept from forward to "
    "backward. Of several stages memory, saved bytes, multiply-adds and traffic are those of the worst, and"
    " the mean is over the stages: what all of them cost, of what as many steps cost {whole}. With "
    "checkpoints the inside of each block is computed again in backward. The projection head is left out. "
    "It is a model of one client, measured with torch's CPU allocator: a simulation holds the whole net."
)


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


def by_block(blocks: int, budget: int | None = None) -> list[Parts]:
    """A stage for each block of a net, and a depth budget. Raises ConfigError for one that cannot be."""
    config = Config(data="own", method="layerwise", rounds=blocks, depth_budget=budget)
    return parts_of_stages(METHODS["layerwise"].schedule(config, blocks + 2), blocks)


def measure(net: nn.Module, images: Tensor, stages: Sequence[Parts]) -> list[StageCosts]:
    """Of each stage, on images (B, channels, H, W) as the net takes them; parts: of stem and blocks first.

    Blocks before the first that is trained run without a graph, and those that are absent do not run.
    Raises ValueError for a net without several blocks.
    """
    modules, pool = _copied(net)
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


def of_model(
    net: nn.Module, images: Tensor, budget: int | None = None
) -> tuple[dict[str, list[StageCosts]], dict[str, StageCosts]]:
    """(layer-wise, and with a budget beside it: a line a stage; end to end, and that with checkpoints).

    Raises ConfigError for a net that cannot be trained block by block, or with the budget.
    """
    check_layered(net, images[:2], one_shape=budget is not None)
    layers = len(_copied(net)[0]) - 1
    cases = {"layer-wise": measure(net, images, by_block(layers))}
    if budget is not None:
        cases[f"layer-wise, budget {budget}"] = measure(net, images, by_block(layers, budget))
    whole = {WHOLE: end_to_end(net, images), CHECKPOINTED: end_to_end(net, images, checkpointed=True)}
    return cases, whole


def write(
    out: Path,
    model: str,
    images: int,
    cases: Mapping[str, Sequence[StageCosts]],
    whole: Mapping[str, StageCosts],
) -> str:
    """costs.csv, costs.md, costs.png and a section of report.html; returns the table's text."""
    every = {**{name: [line] for name, line in whole.items()}, **cases}
    of_costs = [field.name for field in fields(Costs)]
    write_csv(
        out / "costs.csv",
        [
            ["case", "stage", "held", "trained", *of_costs, "memory", "traffic"],
            *(
                [
                    name,
                    x.stage,
                    x.held,
                    x.trained,
                    *(getattr(x.costs, n) for n in of_costs),
                    x.memory,
                    x.traffic,
                ]
                for name, lines in every.items()
                for x in lines
            ),
        ],
    )
    of_all = whole[WHOLE]
    header = [
        "",
        "memory (MB)",
        "times less",
        "saved (MB)",
        "multiply-adds (G)",
        "mean",
        "traffic (MB)",
        "mean",
    ]
    rows = [[name, *_figures(lines, of_all)] for name, lines in every.items()]
    with plotting():
        plot(cases, whole).savefig(out / "costs.png", dpi=150)
    words = WORDS.format(images=images, whole=WHOLE)
    return write_section(out, "costs", f"What a step of {model} costs a client", words, header, rows)


def _figures(lines: Sequence[StageCosts], of_all: StageCosts) -> list[str]:
    memory = max(line.memory for line in lines)
    computed, moved = [line.costs.multiply_adds for line in lines], [line.traffic for line in lines]
    return [
        f"{memory / MB:.1f}",
        f"{of_all.memory / memory:.1f}",
        f"{max(line.costs.saved for line in lines) / MB:.1f}",
        f"{max(computed) / 1e9:.2f}",
        f"{100 * statistics.fmean(computed) / of_all.costs.multiply_adds:.1f}%",
        f"{max(moved) / MB:.2f}",
        f"{100 * statistics.fmean(moved) / of_all.traffic:.1f}%",
    ]


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
