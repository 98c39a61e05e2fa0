"""What a step costs a client who learns block by block, beside training the whole net end to end."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..algorithms import METHODS
from ..algorithms.parts import Parts
from ..config import Config
from ..measures import percent
from ..models.layered import check_layered
from ..probes.costs import Costs
from ..probes.features import depth_of
from ..probes.stage_costs import (
    OfBlocks,
    StageCosts,
    blocks_alone,
    end_to_end,
    measure,
    parts_of_stages,
)
from ..reports.measured import write_figures
from ..reports.styles import COLOURS

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
    "checkpoints the inside of each block is computed again in backward. The projection head is left out; "
    "blocks alone is the worst stage's share without the stem too, where each block that is trained passes a "
    "gradient on: what the paper's formulas count, of equal blocks (h + 2) / 3L of the multiply-adds and "
    "(h + 1) / 2L of the traffic with h of L blocks held. "
    "It is a model of one client, measured with torch's CPU allocator: a simulation holds the whole net."
)


def by_block(blocks: int, budget: int | None = None) -> list[Parts]:
    """A stage for each block of a net, and a depth budget. Raises ConfigError for one that cannot be."""
    config = Config(data="own", method="layerwise", rounds=blocks, depth_budget=budget)
    return parts_of_stages(METHODS["layerwise"].schedule(config, blocks + 2), blocks)


def cases_of(blocks: int, budget: int | None = None) -> dict[str, list[Parts]]:
    """The stages of each case, by its name. Raises ConfigError for a budget that cannot be."""
    found = {"layer-wise": by_block(blocks)}
    return found if budget is None else found | {f"layer-wise, budget {budget}": by_block(blocks, budget)}


def of_model(
    net: nn.Module, images: Tensor, budget: int | None = None
) -> tuple[dict[str, list[StageCosts]], dict[str, StageCosts]]:
    """(layer-wise, and with a budget beside it: a line a stage; end to end, and that with checkpoints).

    Raises ConfigError for a net that cannot be trained block by block, or with the budget.
    """
    check_layered(net, images[:2], one_shape=budget is not None)
    cases = {name: measure(net, images, of) for name, of in cases_of(depth_of(net), budget).items()}
    whole = {WHOLE: end_to_end(net, images), CHECKPOINTED: end_to_end(net, images, checkpointed=True)}
    return cases, whole


def of_blocks(net: nn.Module, images: Tensor, budget: int | None = None) -> dict[str, list[OfBlocks]]:
    """The same of the blocks alone, but for checkpoints; of a net that `of_model` takes."""
    cases = cases_of(depth_of(net), budget)
    stages, whole = blocks_alone(net, images, [parts for of in cases.values() for parts in of])
    each = iter(stages)
    return {WHOLE: [whole]} | {name: [next(each) for _ in of] for name, of in cases.items()}


def write(
    out: Path,
    model: str,
    images: int,
    cases: Mapping[str, Sequence[StageCosts]],
    whole: Mapping[str, StageCosts],
    blocks: Mapping[str, Sequence[OfBlocks]],
) -> str:
    """costs.csv, costs.md, costs.png and a section of report.html; returns the table's text."""
    every = {**{name: [line] for name, line in whole.items()}, **cases}
    of_costs = [field.name for field in fields(Costs)]
    columns = ["case", "stage", "held", "trained", *of_costs, "memory", "traffic"]
    columns += [f"blocks_{field.name}" for field in fields(OfBlocks)]
    alone = {name: [astuple(line) for line in of_stages] for name, of_stages in blocks.items()}
    lines = [
        [name, x.stage, x.held, x.trained, *astuple(x.costs), x.memory, x.traffic, *y]
        for name, of_stages in every.items()
        for x, y in zip(of_stages, alone.get(name, [("", "")]), strict=True)
    ]
    counted = ["multiply-adds (G)", "mean", "blocks alone", "traffic (MB)", "mean", "blocks alone"]
    header = ["training", "memory (MB)", "times less", "saved (MB)", *counted]
    rows = [
        [name, *_figures(of_stages, whole[WHOLE], blocks.get(name, ()), blocks[WHOLE][0])]
        for name, of_stages in every.items()
    ]
    title, words = f"What a step of {model} costs a client", WORDS.format(images=images, whole=WHOLE)
    lines.insert(0, columns)
    return write_figures(out, "costs", lines, lambda: plot(cases, whole), title, words, header, rows)


def _figures(
    lines: Sequence[StageCosts], of_all: StageCosts, blocks: Sequence[OfBlocks], all_blocks: OfBlocks
) -> list[str]:
    memory = max(line.memory for line in lines)
    computed, moved = [line.costs.multiply_adds for line in lines], [line.traffic for line in lines]
    return [
        f"{memory / MB:.1f}",
        f"{of_all.memory / memory:.1f}",
        f"{max(line.costs.saved for line in lines) / MB:.1f}",
        _number(max(computed) / 1e9),
        f"{100 * statistics.fmean(computed) / of_all.costs.multiply_adds:.1f}%",
        _worst([line.multiply_adds / all_blocks.multiply_adds for line in blocks]),
        _number(max(moved) / MB),
        f"{100 * statistics.fmean(moved) / of_all.traffic:.1f}%",
        _worst([line.traffic / all_blocks.traffic for line in blocks]),
    ]


def _number(value: float) -> str:
    """To hundredths; what is less than a tenth to two digits, as of small nets."""
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def _worst(shares: Sequence[float]) -> str:
    return percent(max(shares, default=None))


def plot(cases: Mapping[str, Sequence[StageCosts]], whole: Mapping[str, StageCosts]) -> "Figure":
    """Shares of the first of `whole` over the stages: a line for each case, a level one for each of these."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    of_all = next(iter(whole.values()))
    quantities = {
        "memory": lambda line: line.memory,
        "saved for backward": lambda line: line.costs.saved,
        "multiply-adds": lambda line: line.costs.multiply_adds,
        "traffic": lambda line: line.traffic,
    }
    panels = figure.subplots(1, len(quantities), sharey=True)
    for axes, (title, of) in zip(panels, quantities.items(), strict=True):
        for (name, lines), colour, size in zip(cases.items(), COLOURS, (8, 4), strict=False):
            shares, stages = [100 * of(line) / of(of_all) for line in lines], [line.stage for line in lines]
            # hollow, and smaller than those below: where two are the same both are seen
            mark = {"marker": "o", "markersize": size, "markerfacecolor": "white"}
            axes.plot(stages, shares, color=colour, label=name, **mark)
        for (name, line), dashes in zip(whole.items(), ("-", "--", ":"), strict=False):
            axes.axhline(100 * of(line) / of(of_all), color="grey", linestyle=dashes, label=name)
        axes.set(title=title, xlabel="stage")
        axes.set_xticks(sorted({1, *(round(of_all.stage * i / 4) for i in range(1, 5))}))
        axes.grid(alpha=0.4)
    panels[0].set_ylim(bottom=0)  # of all, once all is drawn
    panels[0].set_ylabel(f"of {next(iter(whole))} (%)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure
