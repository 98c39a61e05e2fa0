"""What a server learns from requests alone: the intersection of a client's class sets over rounds.

A client asks for S = P u N. If N is new in every round and P is not, a class that is asked for every time is
more and more probably one that the client holds. After T requests of a client with |P| of C classes,

    posterior = prior / (prior + (1 - prior) * survival),  prior = |P| / C
    survival  = s / (C - |P|) + (1 - s / (C - |P|)) * (f / (C - |P| - s))^T

is the probability that a class in all of them is a positive; s negatives are the same in every round and f
are new: `negatives` = fresh has s = 0, sticky f = 0. The attacker names every class in all T requests.

With shared negatives the server sees no request, but what the secure sum gives it: of each cohort that the
client is in the union of the classes. With pir requests neither of the two servers sees one either; the sum
of the changes, which is 0 but for rows that somebody in the cohort asked for, gives the union of their class
sets. The attacker names every class in all T unions. Who downloads all rows tells nothing.

It looks at requests only. What a client sends back says more: see docs/privacy.md.
"""

import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..algorithms import METHODS
from ..algorithms.parts import Part
from ..clients.player import Player
from ..cohort import draw_cohort
from ..config import PIR, SHARED, STICKY, Config, ConfigError
from ..data import FederatedData
from ..reports.measured import write_figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REQUESTS = (1, 2, 3, 5, 10, 20, 50)
WORDS = (
    "A client asks the server for the rows of its own classes and of others, its negatives, which hide "
    "them. A server that keeps a client's requests names the classes that are in all of them. Precision "
    "is the share of those that the client holds, recall the share of what it holds that is named, "
    "posterior how probable it is by a formula that a named class is held; means over clients. Negatives "
    "are fresh, others in every round; sticky, always the same; mixed, half of each; or shared by a cohort, "
    "of which the server then sees only what classes its clients have together. With pir two servers are "
    "asked for fresh ones, neither of which learns for which; which rows the sum of a cohort's changes moves "
    "is still seen. Beside it what a client moves in a round for its classes: its request, rows both ways, "
    "and what secure sums need; of all rows, whose download tells nothing, too."
)
ALL = "all rows"
UNLIKE = (PIR, ALL)  # the kinds that are none of negatives


@dataclass(frozen=True)
class Line:
    """Means over clients."""

    negatives: str  # fresh, sticky, mixed, shared, PIR or ALL
    requests: int  # T
    named: float  # classes in all of them
    precision: float  # share of those that the client holds
    recall: float  # share of what it holds that is named
    posterior: float | None  # by the formula; shared, PIR: there is none
    bytes: float  # that a client moves in a round for its classes
    top1: float | None = None  # of a run with such negatives
    map_at_10: float | None = None


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
) -> list[Line]:
    """A line for each of `ways` and number of requests, of the first `clients`. Raises as `check`."""
    check(config)
    lines = []
    for name, way in ways(config).items():
        seen = Seen(Player(way, data))
        found = [_attack(seen, client, requests) for client in range(min(clients, len(data.clients)))]
        for place, count in enumerate(requests):
            named, precision, recall, expected, bytes = (
                statistics.fmean(values) for values in zip(*(of[place] for of in found), strict=True)
            )
            bound = None if way.sums else expected
            lines.append(Line(name, count, named, precision, recall, bound, bytes))
    return lines


def ways(config: Config) -> dict[str, Config]:
    """Name -> the same run with requests of that kind; those that its method has."""
    method, config = METHODS[config.method], replace(config, requests="plain")
    kinds = [*STICKY, *([SHARED] if method.common else [])]
    found = {negatives: replace(config, negatives=negatives) for negatives in kinds}
    if method.tells:
        found |= {PIR: replace(config, requests=PIR, negatives="fresh", class_store=None)}
    return found | {ALL: replace(config, method="full_softmax")}


class Seen:
    """seen(round, client): the classes that the server sees in a round of the client's."""

    def __init__(self, player: Player):
        self.player, self.asked = player, cache(self._asked)  # by each client, in whose cohorts it is

    def __call__(self, round: int, client: int) -> Tensor:
        config, num_clients = self.player.config, len(self.player.data.clients)
        if not config.sums:
            return self.asked(round, client)
        cohort = draw_cohort(config.seed, round, 0, num_clients, config.cohort)
        if client not in cohort:
            cohort[0] = client
        if config.shares:
            return self.player.common.among(cohort, round, 0).held
        return torch.cat([self.asked(round, k) for k in cohort]).unique()

    def _asked(self, round: int, client: int) -> Tensor:
        return self.player.request(round, 0, client).class_ids


def _attack(seen_by_server: Seen, client: int, requests: Sequence[int]) -> list[tuple[float, ...]]:
    """(classes named, precision, recall, posterior, bytes for classes) after so many requests of a client."""
    player = seen_by_server.player
    num_classes, positives = player.data.num_classes, player.client.positives(client)
    seen, found = torch.zeros(num_classes, dtype=torch.int64), list[tuple[float, ...]]()
    for round in range(max(requests)):
        asked = seen_by_server(round, client)
        seen[asked] += 1
        if round + 1 in requests:
            named = (seen == round + 1).nonzero()[:, 0]
            right = torch.isin(named, positives).sum().item()
            m = len(asked) - len(positives)
            sticky = int(STICKY.get(player.config.negatives, 0.0) * m)
            expected = posterior(num_classes, len(positives), sticky, m - sticky, round + 1)
            shares = right / len(named), right / len(positives)
            found.append((float(len(named)), *shares, expected, _bytes(player, round, client)))
    return found


def _bytes(player: Player, round: int, client: int) -> float:
    """That the client moves in a round for its classes."""
    moved = player.traffic(round, 0, client, player.request(round, 0, client), answers=True)
    return float(moved.classification + moved.of("shares"))


def write(out: Path, lines: Sequence[Line]) -> str:
    """privacy.csv, privacy.md, privacy.png and a section of report.html; returns the table's text."""
    every = [[field.name for field in fields(Line)], *map(astuple, lines)]
    header = ["negatives", "requests", "named", "precision", "recall", "posterior", "KB", "top-1", "MAP@10"]
    rows = []
    for line in lines:
        shares = map(_percent, (line.precision, line.recall, line.posterior))
        accuracy = map(_percent, (line.top1, line.map_at_10))
        counts = f"{line.requests}", f"{line.named:.1f}"
        rows.append([line.negatives, *counts, *shares, f"{line.bytes / 1000:.1f}", *accuracy])
    title = "What requests tell the server"
    return write_figures(out, "privacy", every, lambda: _plot(lines), title, WORDS, header, rows)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"


def _plot(lines: Sequence[Line]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for negatives, marker in zip(dict.fromkeys(line.negatives for line in lines), "os^Dvx", strict=False):
        mine = [line for line in lines if line.negatives == negatives]
        x = [line.requests for line in mine]
        (drawn,) = axes.plot(
            x, [100 * line.precision for line in mine], marker, label=negatives, linestyle="none"
        )
        bound = [100 * line.posterior for line in mine if line.posterior is not None]
        axes.plot(x[: len(bound)], bound, color=drawn.get_color(), linewidth=1)
    axes.set(
        xscale="log",
        xlabel="requests of a client that the server has seen",
        ylabel="classes in all of them that it holds (%)",
        ylim=(0, 105),
    )
    ticks = sorted({line.requests for line in lines})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    title = "negatives (lines: the posterior)"
    figure.legend(title=title, fontsize=8, title_fontsize=8, loc="outside upper center", ncols=6)
    axes.grid(alpha=0.4)
    return figure
