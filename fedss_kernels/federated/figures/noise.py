"""How far FedSS' gradient is from FullSoftmax', over the number of negatives: Fig. 9 of the FedSS paper, A.3.

    noise(m) = E || g_FedSS(m) - g_full ||,  g: the mean over clients of the gradient to (phi, W)
    bias(m)  = sqrt(E || E_N g_FedSS(m) - g_full ||^2)

All clients of a cohort have the same batch, as in the paper, and each its own negatives N_k, |N_k| = m. The
expectation is over batches, each of one client's images, and E_N over draws of the negatives. With
m = C - |P| the two are one. Where a cohort shares its negatives all have the same class set, with the classes
of other clients drawn for it; so the noise of one is the noise of all.

Of n draws d_i, mean d, || d ||^2 - s^2 / n is an estimate of the squared bias without one of its own,
s^2 = sum || d_i - d ||^2 / (n - 1); below 0 it is taken as 0.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...class_sets import draw_negatives
from ..algorithms import METHODS
from ..clients.extractor import as_embeddings
from ..clients.objectives import ClassRows
from ..clients.player import Player
from ..cohort import draw_cohort
from ..config import Config
from ..data import FederatedData
from ..loading import fitted
from ..randomness import NO_CLIENT, Purpose, generator
from ..reports.mean_sd import mean_sd
from ..reports.measured import write_figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORDS = (
    "A client of FedSS sums its loss over its own classes and a few others, the negatives, instead of "
    "all. So the step it makes is an estimate of FullSoftmax'. The noise is the length of the difference "
    "between the two, for a whole cohort, a mean over batches and draws with its standard deviation; "
    "beside it its share of the length of FullSoftmax' step. Bias is the length of what is left of the "
    "difference in the mean over draws. With all the other classes as negatives nothing is left but rounding."
)


@dataclass(frozen=True)
class Line:
    num_negatives: int  # asked for; a client with fewer other classes takes those
    noise: float  # mean over batches and draws
    noise_sd: float | None  # None: of one draw
    full_norm: float  # mean norm of FullSoftmax' gradient
    instances: int
    bias: float | None = None  # of one draw there is no estimate


def default_counts(num_classes: int) -> list[int]:
    """Seven of them, doubling, the last all the classes."""
    return sorted({max(1, num_classes >> shift) for shift in range(6, -1, -1)})


def measure(
    config: Config,
    data: FederatedData,
    counts: Sequence[int],
    *,
    batches: int,
    draws: int,
    model: tuple[dict[str, Tensor], Tensor] | None = None,  # (net, W); None: as they are drawn
    on_line: Callable[[Line], None] = lambda line: None,
) -> list[Line]:
    """A line for each of `counts`, on `batches` clients and `draws` of negatives for each."""
    config = fitted(config, data.found)
    player = Player(config, data)
    if model is None:
        weight = player.known_rows(torch.arange(data.num_classes))
    else:
        player.extractor.module.load_state_dict(model[0])
        weight = model[1]
    instances = [_Batch(player, weight, number) for number in range(batches)]
    lines = []
    for count in counts:
        found = [batch.noise(count, draws) for batch in instances]
        mean, sd = mean_sd([length for lengths, _ in found for length in lengths])
        squares = [square for _, square in found if square is not None]
        bias = math.sqrt(max(statistics.fmean(squares), 0.0)) if squares else None
        full = statistics.fmean(batch.full_norm for batch in instances)
        lines.append(Line(count, mean, sd, full, len(instances) * draws, bias))
        on_line(lines[-1])
    return lines


class _Batch:
    """Images of one client, their embeddings, and FullSoftmax' gradient."""

    def __init__(self, player: Player, weight: Tensor, number: int):
        self.player, self.weight, self.number = player, weight, number
        config, data = player.config, player.data
        rng = generator(config.seed, number, 0, 0, Purpose.NOISE)
        self.client = int(rng.integers(len(data.clients)))
        held = data.clients[self.client]
        chosen = torch.from_numpy(rng.permutation(len(held))[: config.batch_size])
        self.positives = data.labels[held[chosen]].unique()
        self.labels = data.labels[held[chosen]]
        player.extractor.module.eval()  # no draws but those of the negatives
        returned = player.extractor.module(player.extractor.as_input(data.images[held[chosen]]))
        self.embeddings = as_embeddings(returned)
        negatives = self.positives[:0]
        self.full = self._gradient("full_softmax", self.positives, negatives)
        self.full_norm = self._norm(*self.full)

    def noise(self, num_negatives: int, draws: int) -> tuple[list[float], float | None]:
        """(lengths of the difference, of a cohort each; an estimate of the squared bias)"""
        lengths, sums = [], [torch.zeros_like(part) for part in self.full]
        for draw in range(draws):
            difference = self._difference(num_negatives, draw)
            lengths.append(self._norm(*difference))
            for total, part in zip(sums, difference, strict=True):
                total += part
        if draws == 1:
            return lengths, None
        square = self._norm(*(total / draws for total in sums)) ** 2
        spread = (sum(length**2 for length in lengths) - draws * square) / (draws - 1)
        return lengths, square - spread / draws

    def _difference(self, num_negatives: int, draw: int) -> tuple[Tensor, Tensor]:
        """Of a cohort's mean gradient to FullSoftmax'."""
        sets = self._class_sets(num_negatives, draw)
        of_embeddings, of_weight = (-part for part in self.full)
        for positives, negatives in sets:
            found = self._gradient("fedss", positives, negatives)
            of_embeddings += found[0] / len(sets)
            of_weight += found[1] / len(sets)
        return of_embeddings, of_weight

    def _class_sets(self, num_negatives: int, draw: int) -> list[tuple[Tensor, Tensor]]:
        """(positives, negatives) of each client of a cohort; once where all have the same."""
        config, data = self.player.config, self.player.data
        if config.shares:
            cohort = draw_cohort(config.seed, self.number, draw, len(data.clients), config.cohort)
            others = [k for k in cohort if k != self.client][: config.cohort - 1]
            held = torch.cat([self.positives, *(self.player.client.positives(k) for k in others)]).unique()
            rng = generator(config.seed, self.number, draw, NO_CLIENT, Purpose.COMMON_NEGATIVES)
            return [(held, draw_negatives(data.num_classes, held, num_negatives, rng))]
        sets = []
        for client in range(config.cohort):
            rng = generator(config.seed, self.number, draw, client, Purpose.NEGATIVES)
            negatives = draw_negatives(data.num_classes, self.positives, num_negatives, rng)
            sets.append((self.positives, negatives))
        return sets

    def _gradient(self, method: str, positives: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        """With respect to the embeddings (B, D) and to all of W (C, D), float64."""
        config, num_classes = self.player.config, len(self.weight)
        request = METHODS[method].request(num_classes, positives, negatives, config.correction)
        embeddings = self.embeddings.detach().double().requires_grad_()
        rows = self.weight[request.class_ids].double().requires_grad_()
        objective = ClassRows(rows, request, config.scale, config.similarity)
        loss = objective.loss(embeddings, torch.searchsorted(request.class_ids, self.labels))
        of_embeddings, of_rows = torch.autograd.grad(loss, [embeddings, rows])
        of_weight = torch.zeros(num_classes, rows.shape[1], dtype=torch.float64)
        of_weight[request.class_ids] = of_rows
        return of_embeddings, of_weight

    def _norm(self, of_embeddings: Tensor, of_weight: Tensor) -> float:
        """Of (phi, W): the net's gradient is linear in that of the embeddings, so one pass gives it."""
        extractor = self.player.extractor
        trained = [p for p in extractor.module.parameters() if p.requires_grad]
        of_phi = torch.autograd.grad(
            self.embeddings, trained, of_embeddings.to(self.embeddings.dtype), retain_graph=True
        )
        squares = sum(part.double().square().sum().item() for part in (*of_phi, of_weight))
        return math.sqrt(squares)


def write(out: Path, lines: Sequence[Line], num_classes: int) -> str:
    """noise.csv, noise.md, noise.png and a section of report.html; returns the table's text."""
    every = [[field.name for field in fields(Line)], *map(astuple, lines)]
    header = ["|N_k|", "of C", "noise", "sd", "of the full gradient's norm", "bias"]
    rows = []
    for line in lines:
        share = f"{100 * line.num_negatives / num_classes:.1f}%"
        ratio = _percent(line.noise / line.full_norm) if line.full_norm else "–"
        bias = "–" if line.bias is None else f"{line.bias:.2g}"
        counts = f"{line.num_negatives:,}", share
        sd = "–" if line.noise_sd is None else f"{line.noise_sd:.2g}"
        rows.append([*counts, f"{line.noise:.3g}", sd, ratio, bias])
    title = "Gradient noise by number of negatives"
    return write_figures(out, "noise", every, lambda: _plot(lines), title, WORDS, header, rows)


def _percent(share: float) -> str:
    """Two digits of it, or all before the point."""
    return f"{100 * share:,.0f}%" if share >= 0.995 else f"{100 * share:.2g}%"


def _plot(lines: Sequence[Line]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.add_subplot()
    axes.errorbar(
        [line.num_negatives for line in lines],
        [line.noise for line in lines],
        [line.noise_sd or 0.0 for line in lines],
        marker="o",
        capsize=3,
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks([line.num_negatives for line in lines], [f"{line.num_negatives:,}" for line in lines])
    axes.set(
        xlabel=r"negatives of a client, $|N_k|$",
        ylabel="gradient noise (L2 norm, mean ± sd)",
        ylim=(0, None),
    )
    axes.grid(alpha=0.4)
    return figure
