"""Does sampling classes without a correction lose accuracy, with margins and without? Partial FC's question.

Partial FC (An et al., CVPR 2022, arXiv:2203.15565) trains CosFace and ArcFace on the batch's own classes and
a tenth of all, as if these were all: it corrects for nothing. Here each margin is trained on all classes, and
on sampled ones with and without the correction. Omniglot, one process, held-out alphabets.

Every setting's rate is the one with the best recall@1 on alphabets that were held out of training's for that.
What was measured is read from margins.csv and not measured again.
"""

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..class_sets import draw_batch_class_set
from ..federated.clients.augment import as_input, random_shift
from ..federated.data import FederatedData, load
from ..federated.data.partition import draw_share
from ..federated.disk import write_whole
from ..federated.metrics import retrieval, top1
from ..federated.models import build_model
from ..federated.randomness import NO_CLIENT, Purpose, generator, initial_rows
from ..federated.reports.mean_sd import mean_sd
from ..federated.reports.tables import markdown, write_csv
from ..plotting import plotting
from ..sampled_softmax import sampled_softmax_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARGINS = {"softmax": {}, "CosFace": {"cosine_margin": 0.35}, "ArcFace": {"angular_margin": 0.5}}
CLASSES = ("all", "sampled, corrected", "sampled, uncorrected")
SHARE = 0.1  # of the classes, sampled beside the batch's own
RATES = (0.001, 0.003, 0.01)  # of Adam, falling to 0
SCALE, DIM, BATCH, SHIFT = 20.0, 64, 32, 2
FIRST_TEST_DRAWER = 17  # of each alphabet, as in the data set's classification
DATA_SEED = 0


@dataclass(frozen=True)
class Setting:
    margin: str  # of MARGINS
    classes: str  # of CLASSES


@dataclass(frozen=True)
class Line:
    """What one trained net measures: a line of margins.csv. Those of the choice of rates are no result."""

    margin: str
    classes: str
    epochs: int
    rate: float
    seed: int
    on: str  # "validation" or "test", the held-out alphabets
    recall_at_1: float  # on these
    map_at_10: float
    top1: float  # of unseen drawings of the classes it trained on, among all of them

    @property
    def setting(self) -> Setting:
        return Setting(self.margin, self.classes)


@dataclass(frozen=True, eq=False)
class Split:
    """Drawings to train on, others of the same classes, and those of held-out alphabets."""

    images: Tensor  # (N, 1, 28, 28) uint8
    labels: Tensor  # (N,) int64 in [0, num_classes)
    unseen: tuple[Tensor, Tensor]  # images and labels of the same classes by other people
    held_out: tuple[Tensor, Tensor]  # of other alphabets
    num_classes: int


SETTINGS = tuple(Setting(margin, classes) for margin in MARGINS for classes in CLASSES)


def split_test(data: FederatedData) -> Split:
    """All the training alphabets, measured on those that the data set holds out."""
    keep = torch.ones(data.num_classes, dtype=torch.bool)
    return _split(data, keep, (data.test_images, data.test_labels))


def split_validation(data: FederatedData) -> Split:
    """Without a quarter of the training alphabets, measured on these."""
    alphabets, of_class = np.unique([n.partition("/")[0] for n in data.class_names], return_inverse=True)
    held = torch.from_numpy(np.isin(of_class, draw_share(len(alphabets), DATA_SEED, 0.25)))
    rows = held[data.labels]
    return _split(data, ~held, (data.images[rows], data.labels[rows]))


def _split(data: FederatedData, keep: Tensor, held_out: tuple[Tensor, Tensor]) -> Split:
    drawer = torch.empty(len(data.images), dtype=torch.int64)
    for name, rows in zip(data.client_names, data.clients, strict=True):
        drawer[rows] = int(name.rpartition("/")[2])
    number = keep.cumsum(0) - 1
    parts = []
    for among in (drawer < FIRST_TEST_DRAWER, drawer >= FIRST_TEST_DRAWER):
        rows = among & keep[data.labels]
        parts.append((data.images[rows], number[data.labels[rows]]))
    return Split(*parts[0], parts[1], held_out, int(keep.sum()))


def train(setting: Setting, split: Split, rate: float, seed: int, epochs: int) -> tuple[nn.Module, Tensor]:
    """(net, class matrix): with one seed all settings begin alike and see the same batches."""
    net = build_model("conv4", DIM, seed)
    weight = initial_rows(seed, torch.arange(split.num_classes), DIM, DIM**-0.5).requires_grad_()
    optimizer = torch.optim.Adam([*net.parameters(), weight], lr=rate)
    steps = epochs * (len(split.images) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    negatives = torch.Generator().manual_seed(seed)
    for images, labels in batches(split, seed, epochs):
        loss = loss_of(setting, net(images), weight, labels, negatives)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval(), weight.detach()


def batches(split: Split, seed: int, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of BATCH drawings, each moved by up to SHIFT pixels; an epoch leaves out what fills no batch."""
    for epoch in range(epochs):
        rng = generator(seed, epoch, 0, NO_CLIENT, Purpose.BATCHES)
        order = torch.from_numpy(rng.permutation(len(split.images)))
        for rows in order[: len(order) // BATCH * BATCH].split(BATCH):
            yield random_shift(as_input(split.images[rows]), SHIFT, rng), split.labels[rows]


def loss_of(
    setting: Setting,
    embeddings: Tensor,  # (B, D)
    weight: Tensor,  # (C, D)
    labels: Tensor,  # (B,) int64
    negatives: torch.Generator,
) -> Tensor:
    """The setting's loss. Without the correction every class of the set counts once."""
    class_ids = log_expected_count = None
    if setting.classes != "all":
        m = round(SHARE * len(weight))
        class_ids, log_expected_count = draw_batch_class_set(labels, len(weight), m, negatives)
        if setting.classes == "sampled, uncorrected":
            there = log_expected_count.isfinite()  # repeated labels are not
            log_expected_count = log_expected_count.masked_fill(there, 0.0)
    margin = MARGINS[setting.margin]
    return sampled_softmax_loss(
        embeddings, weight, labels, class_ids, log_expected_count, scale=SCALE, **margin
    )


def measure(setting: Setting, split: Split, rate: float, seed: int, epochs: int, on: str) -> Line:
    net, weight = train(setting, split, rate, seed, epochs)
    (held_out, characters), (unseen, labels) = split.held_out, split.unseen
    with torch.no_grad():
        found = retrieval(net(as_input(held_out)), characters)
        share = top1(net(as_input(unseen)), weight, labels)
    names = setting.margin, setting.classes
    return Line(*names, epochs, rate, seed, on, found.recall_at_1, found.map_at_r, share)


class Lines:
    """margins.csv: what was measured so far. Each line is written as soon as it is there."""

    def __init__(self, path: Path):
        self.path, self.lines = path, list[Line]()
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self.lines += map(_line, csv.DictReader(file))

    def get(self, setting: Setting, split: Split, rate: float, seed: int, epochs: int, on: str) -> Line:
        """The line, measured now unless it was before."""
        wanted = (setting, epochs, rate, seed, on)
        for line in self.lines:
            if (line.setting, line.epochs, line.rate, line.seed, line.on) == wanted:
                return line
        line = measure(setting, split, rate, seed, epochs, on)
        self.lines.append(line)
        names = [field.name for field in fields(Line)]
        write_csv(self.path, [names, *map(astuple, self.lines)])
        print(f"bench.margins: {' '.join(map(str, astuple(line)))}", file=sys.stderr, flush=True)
        return line


def _line(row: dict[str, str]) -> Line:
    measured = {name: float(row[name]) for name in _MEASURES}
    names, epochs, rate = (row["margin"], row["classes"]), int(row["epochs"]), float(row["rate"])
    return Line(*names, epochs, rate, int(row["seed"]), row["on"], **measured)


def run(data: FederatedData, lines: Lines, seeds: Sequence[int], epochs: int) -> list[Line]:
    """Every setting at its best rate with every seed, a seed at a time."""
    validation, test = split_validation(data), split_test(data)
    best = dict[Setting, float]()
    for setting in SETTINGS:
        tried = [lines.get(setting, validation, rate, seeds[0], epochs, "validation") for rate in RATES]
        best[setting] = max(tried, key=lambda line: line.recall_at_1).rate
    pairs = [(seed, setting) for seed in seeds for setting in SETTINGS]
    return [lines.get(setting, test, best[setting], seed, epochs, "test") for seed, setting in pairs]


def table(found: Sequence[Line]) -> str:
    """A line for each setting: mean and standard deviation over the seeds, in percent."""
    header = ["loss", "classes", "rate", "recall@1", "MAP@10", "top-1 of known classes", "seeds"]
    rows = []
    for setting in SETTINGS:
        own = [line for line in found if line.setting == setting]
        measured = [_percent([getattr(line, name) for line in own]) for name in _MEASURES]
        rows.append([setting.margin, setting.classes, f"{own[0].rate:g}", *measured, str(len(own))])
    return markdown(header, rows)


_MEASURES = ("recall_at_1", "map_at_10", "top1")


def _percent(values: Sequence[float]) -> str:
    mean, sd = mean_sd(values)
    return f"{100 * mean:.1f}%" + ("" if sd is None else f" ± {100 * sd:.1f}")


def plot(found: Sequence[Line]) -> "Figure":
    """A point for every seed, a bar at the mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    names = {"recall_at_1": "recall@1 on held-out alphabets (%)", "top1": "top-1 of known classes (%)"}
    for axes, (measure, title) in zip(panels, names.items(), strict=True):
        for k, classes in enumerate(CLASSES):
            for place, margin in enumerate(MARGINS):
                own = [100 * getattr(e, measure) for e in found if e.setting == Setting(margin, classes)]
                x, label = place + 0.25 * (k - 1), None if place else classes
                axes.plot([x] * len(own), own, "o", color=_COLOURS[k], markersize=5, alpha=0.7, label=label)
                axes.plot([x - 0.08, x + 0.08], [mean_sd(own)[0]] * 2, color=_COLOURS[k], linewidth=2)
        axes.set_xticks(range(len(MARGINS)), list(MARGINS))
        axes.set_title(title, fontsize=10)
        axes.grid(axis="y", alpha=0.3)
    panels[0].legend(fontsize=8, title="classes", title_fontsize=8)
    return figure


_COLOURS = ("#0072B2", "#009E73", "#D55E00")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fedss_kernels.bench.margins", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="the folder that holds Omniglot's files")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-margins"), metavar="DIR")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    data = load("omniglot", data_dir=given.data_dir, seed=DATA_SEED, task="retrieval")
    found = run(data, Lines(given.out / "margins.csv"), given.seeds, given.epochs)
    text = table(found)
    write_whole(given.out / "margins.md", text)
    with plotting():
        plot(found).savefig(given.out / "margins.png", dpi=150)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
