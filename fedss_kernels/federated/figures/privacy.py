"""What a server learns from requests alone: the intersection of a client's class sets over rounds.

A client asks for S = P u N. If N is new in every round and P is not, a class that is asked for every time is
more and more probably one that the client holds. After T requests of a client with |P| of C classes,

    posterior = prior / (prior + (1 - prior) * survival),  prior = |P| / C
    survival  = s / (C - |P|) + (1 - s / (C - |P|)) * (f / (C - |P| - s))^T

is the probability that a class in all of them is a positive; s negatives are the same in every round and f
are new: `negatives` = fresh has s = 0, sticky f = 0. The attacker names every class in all T requests.

It looks at requests only. What a client sends back says more: see docs/privacy.md.
"""

import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...plotting import plotting
from ..algorithms import METHODS
from ..algorithms.parts import Part
from ..clients.player import Player
from ..config import STICKY, Config, ConfigError
from ..data import FederatedData
from ..reports.page import write_section
from ..reports.tables import write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REQUESTS = (1, 2, 3, 5, 10, 20, 50)
WORDS = (
    "A client asks the server for the rows of its own classes and of others, its negatives, which hide "
    "them. A server that keeps a client's requests names the classes that are in all of them. Precision "
    "is the share of those that the client holds, recall the share of what it holds that is named, "
    "posterior how probable it is by a formula that a named class is held; means over clients. Negatives "
    "are fresh, others in every round; sticky, always the same; or mixed, half of each."
)


@dataclass(frozen=True)
class Line:
    """Means over clients."""

    negatives: str  # fresh, sticky or mixed
    requests: int  # T
    named: float  # classes in all of them
    precision: float  # share of those that the client holds
    recall: float  # share of what it holds that is named
    posterior: float  # by the formula
    top1: float | None  # of a run with such negatives
    map_at_10: float | None


def posterior(num_classes: int, positives: int, sticky: int, fresh: int, requests: int) -> float:
    """Of a class that is in all the requests: how probable it is that the client holds it."""
    others = num_classes - positives
    if others == 0:
        return 1.0
    kept = sticky / others
    renewed = fresh / (others - sticky) if others > sticky else 1.0
    prior, survival = positives / num_classes, kept + (1 - kept) * renewed**requests
    return prior / (prior + (1 - prior) * survival)


def check(config: Config) -> None:
    """Raises ConfigError for a method without clients, or one whose clients ask for nothing."""
    method = METHODS[config.method]
    if method.pooled or method.rows is not Part.TRAINED:
        raise ConfigError("method", f"expected one whose clients ask for rows, got {config.method!r}")


def measure(
    config: Config,
    data: FederatedData,
    *,
    clients: int,
    requests: Sequence[int] = REQUESTS,
    accuracy: dict[str, tuple[float | None, float | None]] | None = None,  # by negatives: top-1, MAP@10
) -> list[Line]:
    """A line for each kind of negatives and number of requests, of the first `clients`. Raises as `check`."""
    check(config)
    lines = []
    for negatives in STICKY:
        player = Player(replace(config, negatives=negatives), data)
        found = [_attack(player, client, requests) for client in range(min(clients, len(data.clients)))]
        for place, count in enumerate(requests):
            named, precision, recall, expected = (
                statistics.fmean(values) for values in zip(*(of[place] for of in found), strict=True)
            )
            costs = (accuracy or {}).get(negatives, (None, None))
            lines.append(Line(negatives, count, named, precision, recall, expected, *costs))
    return lines


def _attack(player: Player, client: int, requests: Sequence[int]) -> list[tuple[float, float, float, float]]:
    """(classes named, precision, recall, posterior) after so many requests of a client."""
    num_classes, positives = player.data.num_classes, player.client.positives(client)
    seen, found = torch.zeros(num_classes, dtype=torch.int64), []
    for round in range(max(requests)):
        asked = player.request(round, 0, client).class_ids
        seen[asked] += 1
        if round + 1 in requests:
            named = (seen == round + 1).nonzero()[:, 0]
            right = torch.isin(named, positives).sum().item()
            m = len(asked) - len(positives)
            sticky = int(STICKY[player.config.negatives] * m)
            expected = posterior(num_classes, len(positives), sticky, m - sticky, round + 1)
            found.append((float(len(named)), right / len(named), right / len(positives), expected))
    return found


def write(out: Path, lines: Sequence[Line]) -> str:
    """privacy.csv, privacy.md, privacy.png and a section of report.html; returns the table's text."""
    write_csv(out / "privacy.csv", [[field.name for field in fields(Line)], *map(astuple, lines)])
    header = ["negatives", "requests", "named", "precision", "recall", "posterior", "top-1", "MAP@10"]
    rows = []
    for line in lines:
        shares = (line.precision, line.recall, line.posterior, line.top1, line.map_at_10)
        rows.append([line.negatives, f"{line.requests}", f"{line.named:.1f}", *map(_percent, shares)])
    with plotting():
        _plot(lines).savefig(out / "privacy.png", dpi=150)
    return write_section(out, "privacy", "What requests tell the server", WORDS, header, rows)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"


def _plot(lines: Sequence[Line]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for negatives, marker in zip(STICKY, ("o", "s", "^"), strict=True):
        mine = [line for line in lines if line.negatives == negatives]
        x = [line.requests for line in mine]
        (drawn,) = axes.plot(
            x, [100 * line.precision for line in mine], marker, label=negatives, linestyle="none"
        )
        axes.plot(x, [100 * line.posterior for line in mine], color=drawn.get_color(), linewidth=1)
    axes.set(
        xscale="log",
        xlabel="requests of a client that the server has seen",
        ylabel="classes in all of them that it holds (%)",
        ylim=(0, 105),
    )
    ticks = sorted({line.requests for line in lines})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    title = "negatives (lines: the posterior)"
    axes.legend(title=title, fontsize=8, title_fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.8))
    axes.grid(alpha=0.4)
    return figure
