"""What a model takes a client's images for, among the client's own classes: Fig. 7 of the FedSS paper.

    confusion(i, j) = share of the client's images of class i whose most similar row, of its classes, is j's

Beside it the mean cosine between two of the client's class rows: near 1 they have collapsed onto one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...plotting import as_it_is
from ..algorithms import METHODS
from ..algorithms.given import weight_and_bias
from ..clients.player import Player
from ..config import Config
from ..data import FederatedData
from ..fine_tuning import Own
from ..metrics import NOTHING, directions, nearest
from ..reports.measured import write_figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORDS = (
    "Each image of one client is given the one of the client's classes whose class row fits its embedding "
    "best. A row of a square is a class, a column what its images were taken for: a "
    "bright diagonal is right. The mean cosine says how alike the client's class rows are, 1: all point "
    "the same way."
)


@dataclass(frozen=True)
class Confusion:
    name: str  # of the run
    classes: Tensor  # (P,) the client's, ascending
    shares: Tensor  # (P, P), rows sum to 1, to less where images were taken for nothing
    cosine: float  # mean over pairs of its class rows
    not_finite: int  # images taken for nothing, as their embedding is not finite
    held: tuple[str, ...]  # the data set, its seed, and the class of each of the client's images

    @property
    def right(self) -> float:
        """Mean over its classes of the share taken for themselves."""
        return self.shares.diagonal().mean().item()


def measure(
    config: Config,
    data: FederatedData,
    model: tuple[dict[str, Tensor], Tensor],  # (the net's state, W (C, D))
    client: int,
    own: Own | None = None,  # what clients keep of the model for themselves
) -> Confusion:
    """Of the images that a client trains on, by its own model. ValueError for a client that is none."""
    if not 0 <= client < len(data.clients):
        raise ValueError(f"client: expected one in [0, {len(data.clients)}), got {client}")
    player = Player(config, data)
    player.extractor.module.load_state_dict(model[0])
    phi, rows = own(client) if own else (None, None)
    weight = model[1] if rows is None else rows
    if phi is not None:
        player.extractor.flat.copy_(phi)
    held = data.clients[client]
    classes = data.labels[held].unique()
    rows, finite = directions(weight_and_bias(weight[classes], config.similarity)[0])
    rows = torch.where(finite[:, None], rows, torch.nan)
    embedded = player.extractor.embed(data.images[held])
    found = nearest(embedded, weight[classes], similarity=config.similarity)
    label, taken = torch.searchsorted(classes, data.labels[held]), found != NOTHING
    counts = torch.zeros(len(classes), len(classes), dtype=torch.float64)
    counts.index_put_((label[taken], found[taken]), torch.ones((), dtype=torch.float64), accumulate=True)
    between = (rows @ rows.T).double()
    pairs = len(classes) * (len(classes) - 1)
    cosine = ((between.sum() - between.trace()) / pairs).item() if pairs else 1.0
    shares, missed = counts / label.bincount()[:, None], int((~taken).sum())
    of_images = (data.name, str(config.data_seed), *(data.class_names[c] for c in data.labels[held].tolist()))
    return Confusion(METHODS[config.method].label, classes, shares, cosine, missed, of_images)


def write(out: Path, found: Sequence[Confusion], client: int) -> str:
    """confusion.csv, a line for each run and pair of classes, confusion.md and .png, a section of the report.

    Returns a table's text.
    """
    shares: list[list[object]] = [
        [f"{number}: {each.name}", each.classes[i].item(), each.classes[j].item(), share]
        for number, each in enumerate(found)
        for i, row in enumerate(each.shares.tolist())
        for j, share in enumerate(row)
    ]
    shares.insert(0, ["run", "class", "taken_for", "share"])
    header = ["run", "right", "mean cosine of its class rows"]
    rows = [[each.name, f"{100 * each.right:.1f}%", f"{each.cosine:.2f}"] for each in found]
    if any(each.not_finite for each in found):
        header.append("images not finite")
        rows = [[*row, f"{each.not_finite:,}"] for row, each in zip(rows, found, strict=True)]
    title = f"What client {client}'s images are taken for"
    return write_figures(out, "confusion", shares, lambda: _plot(found, client), title, WORDS, header, rows)


def _plot(found: Sequence[Confusion], client: int) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 3.6 * len(found), 3.9), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, each in zip(panels, found, strict=True):
        image = axes.imshow(100 * each.shares.numpy(), vmin=0, vmax=100, cmap="viridis")
        axes.set_title(as_it_is(f"{each.name}: {100 * each.right:.0f}% right"), fontsize=10)
        axes.set_xlabel(f"taken for, of the {len(each.classes)} classes of client {client}")
        axes.set_xticks([])
        axes.set_yticks([])
    panels[0].set_ylabel("class of the image")
    figure.colorbar(image, ax=list(panels), label="images of the class (%)", shrink=0.8)
    return figure
