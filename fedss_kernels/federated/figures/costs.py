"""What a step costs a client who learns block by block, beside training the whole net end to end."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ...plotting import plotting
from ..algorithms import METHODS
from ..algorithms.parts import Parts
from ..config import Config
from ..models.layered import check_layered
from ..probes.costs import Costs
from ..probes.features import depth_of
from ..probes.stage_costs import StageCosts, end_to_end, measure, parts_of_stages
from ..reports.page import write_section
from ..reports.styles import COLOURS
from ..reports.tables import write_csv

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


def by_block(blocks: int, budget: int | None = None) -> list[Parts]:
    """A stage for each block of a net, and a depth budget. Raises ConfigError for one that cannot be."""
    config = Config(data="own", method="layerwise", rounds=blocks, depth_budget=budget)
    return parts_of_stages(METHODS["layerwise"].schedule(config, blocks + 2), blocks)


def of_model(
    net: nn.Module, images: Tensor, budget: int | None = None
) -> tuple[dict[str, list[StageCosts]], dict[str, StageCosts]]:
    """(layer-wise, and with a budget beside it: a line a stage; end to end, and that with checkpoints).

    Raises ConfigError for a net that cannot be trained block by block, or with the budget.
    """
    check_layered(net, images[:2], one_shape=budget is not None)
    layers = depth_of(net)
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
    columns = [
        "case",
        "stage",
        "held",
        "trained",
        *(field.name for field in fields(Costs)),
        "memory",
        "traffic",
    ]
    lines = [
        [name, x.stage, x.held, x.trained, *astuple(x.costs), x.memory, x.traffic]
        for name, of_stages in every.items()
        for x in of_stages
    ]
    write_csv(out / "costs.csv", [columns, *lines])
    of_all = whole[WHOLE]
    counted = ["multiply-adds (G)", "mean", "traffic (MB)", "mean"]
    header = ["training", "memory (MB)", "times less", "saved (MB)", *counted]
    rows = [[name, *_figures(of_stages, of_all)] for name, of_stages in every.items()]
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
