"""What a finished run's net is worth at several depths, beside the same net as it is drawn from the seed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..algorithms import METHODS
from ..clients.augment import Augmentation
from ..clients.player import Player, training_device
from ..config import Config
from ..data import FederatedData
from ..files.run_folder import as_trained
from ..measures import MEASURES
from ..models.copies import copied
from ..probes import Line, Probing, by_depth
from ..reports.measured import write_figures
from ..reports.styles import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAINED, RANDOM = "trained", "random init"
WORDS = (
    "The features of the net after so many of its blocks, after {rounds} rounds of training, and of the same "
    "net as it is drawn from the seed, at random: what training added is the difference."
)
OF_CLASSES = (
    " Linear probe: the share of test images that one linear layer names rightly, which is trained on the "
    "features of {labels}, while the net stays as it is. kNN: the share that the {neighbours} nearest of "
    "these name rightly."
)
OF_TUNING = " Fine-tuned: blocks and layer trained together on them for {epochs} epochs, as after the last."
OF_RETRIEVAL = " Every test image looks for those of its class among the others; nothing is trained on them."


def check(config: Config) -> None:
    """Raises ValueError for a method whose clients have nets of their own."""
    if METHODS[config.method].alone:
        raise ValueError(
            f"expected a run with one net for all, got one of {config.method}, whose clients have their own"
        )


def check_finite(state: Mapping[str, Tensor]) -> None:
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise ValueError("the net has numbers that are not finite")


def measure(
    config: Config,
    data: FederatedData,
    state: Mapping[str, Tensor],  # of the trained net
    probing: Probing,
    on_measured: Callable[[int, int], None] = lambda done, total: None,
    *,
    at_random: bool = True,
) -> list[Line]:
    """A line for each depth and net, the trained one and, if `at_random`, as it was drawn.

    Raises ValueError as `check` and `check_finite`, and for a depth that the net has not.
    """
    check(config)
    check_finite(state)
    drawn = replace(as_trained(config), freeze_clients=False)
    player = Player(drawn, data, device=training_device(config))
    begun = player.extractor.module
    trained = copied(begun)
    trained.load_state_dict(state)
    return by_depth(
        {TRAINED: trained} | ({RANDOM: begun} if at_random else {}),
        data,
        probing,
        prepared=player.extractor.as_input,
        changed=Augmentation(config.crop_size, config.max_shift, config.flip),
        on_measured=on_measured,
    )


def write(out: Path, lines: Sequence[Line], probing: Probing, config: Config, data: FederatedData) -> str:
    """probe.csv, probe.md, probe.png and a section of report.html; returns the table's text."""
    names = list(lines[0].measured)
    settings = {name: value for name, value in asdict(probing).items() if name != "depths"}
    run = {"method": config.method, "data": data.name, "rounds": config.rounds} | settings
    figures: list[Sequence[object]] = [
        ["net", "depth", "features", *names, "not_finite", *run],
        *([x.weights, x.depth, x.features, *x.measured.values(), x.not_finite, *run.values()] for x in lines),
    ]
    header = ["net", "after block", "features", *(MEASURES[name].column for name in names)]
    rows = [
        [x.weights, f"{x.depth}", f"{x.features:,}", *(MEASURES[n].figure(v) for n, v in x.measured.items())]
        for x in lines
    ]
    title, words = "What the features of the net are worth, block by block", _words(lines, probing, config)
    if words_on_lost := lost(lines):
        words += f" {words_on_lost}."
    return write_figures(out, "probe", figures, lambda: plot(lines), title, words, header, rows)


def lost(lines: Sequence[Line]) -> str:
    """A sentence on the images whose features were not finite; "" where all were."""
    most = max(lines, key=lambda line: line.not_finite)
    if not most.not_finite:
        return ""
    images = "1 image" if most.not_finite == 1 else f"{most.not_finite:,} images"
    return (
        f"The features of {images} are not finite after block {most.depth}, {most.weights}: of training "
        "they are left out, of the test they are misses"
    )


def _words(lines: Sequence[Line], probing: Probing, config: Config) -> str:
    words = WORDS.format(rounds=config.rounds)
    if "probe" not in lines[0].measured:
        return words + OF_RETRIEVAL
    images = "all training images"
    if probing.labels < 1:
        images = f"{100 * probing.labels:g}% of the training images of each class"
    words += OF_CLASSES.format(labels=images, neighbours=probing.neighbours)
    return words + (OF_TUNING.format(epochs=probing.epochs) if probing.epochs else "")


def plot(lines: Sequence[Line]) -> "Figure":
    """Shares over depth: a colour for each measure, the random init dashed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, colour in zip(lines[0].measured, COLOURS, strict=False):
        for weights, dashes in {TRAINED: "-", RANDOM: "--"}.items():
            mine = [(line.depth, 100 * line.measured[name]) for line in lines if line.weights == weights]
            label = f"{MEASURES[name].label}, {weights}"
            axes.plot(*zip(*mine, strict=True), dashes, color=colour, marker="o", label=label)
    axes.set(xlabel="after so many blocks of the net", ylabel="of the test images (%)")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.4)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure
