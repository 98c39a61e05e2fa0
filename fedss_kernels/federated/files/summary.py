"""The figures of a run, at its end or so far: summary.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from ..algorithms import METHODS
from ..config import Config
from ..ledger import OUTCOMES, Traffic, client_traffic
from ..measures import BY_TASK, MEASURES, ON_OWN_IMAGES, Measured, Measures
from ..models.projection import projection_size
from .facts import Facts
from .round_metrics import RoundMetrics


@dataclass(frozen=True)
class Summary(Measured):
    """The figures of a run, at its end or so far. Bytes are those of all clients and rounds."""

    method: str
    data: str
    task: str
    seed: int
    measures: Measures  # not in summary.json
    measured: Mapping[str, float | None]  # as Measure.over_rounds has them of its rounds; an entry each
    rounds: int
    cohort: int
    accepted: int
    dropped: int
    late: int
    rejected: int
    discarded: int
    num_classes: int  # C
    num_clients: int
    num_train_images: int
    num_test_images: int
    num_parameters: int  # of the extractor
    embedding_dim: int
    mean_class_set: float  # mean |S_k|
    traffic: Traffic
    full_traffic: Traffic  # what the method's baseline moves in as many rounds
    seconds: float
    not_finite_since: int | None = None
    notes: list[str] = field(default_factory=list)  # as in Facts
    num_own_test_images: int | None = None  # as in Facts

    @property
    def num_headline_images(self) -> int | None:
        """How many images the headline rests on."""
        of_own = self.headline.of == ON_OWN_IMAGES
        return self.num_own_test_images if of_own else self.num_test_images

    def to_dict(self) -> dict[str, Any]:
        """The entries of summary.json."""
        found = dict[str, Any]()
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name == "measured":
                found |= value
            elif each.name != "measures":
                found[each.name] = dict(value.bytes) if isinstance(value, Traffic) else value
        return found

    @classmethod
    def of(cls, config: Config, facts: Facts, history: Sequence[RoundMetrics]) -> "Summary":
        """Of the rounds that are done, one at least. Measures are those of the last evaluation."""
        counts = {outcome: sum(getattr(metrics, outcome) for metrics in history) for outcome in OUTCOMES}
        evaluated = [m for m in history if m.round % config.eval_every == 0 or m.round == config.rounds]
        last = evaluated[-1] if evaluated else history[-1]
        return cls(
            method=config.method,
            seed=config.seed,
            measured={
                name: MEASURES[name].of_run(value, [metrics.measured.get(name) for metrics in history])
                for name, value in last.measured.items()
            },
            rounds=len(history),
            cohort=config.cohort,
            **counts,
            **{each.name: getattr(facts, each.name) for each in fields(Facts) if each.name != "flows"},
            embedding_dim=config.embedding_dim,
            mean_class_set=float(np.mean([metrics.mean_class_set for metrics in history])),
            traffic=sum((metrics.traffic for metrics in history), Traffic.none(facts.flows)),
            full_traffic=_full_traffic(config, facts, counts, len(history)),
            seconds=history[-1].seconds,
            not_finite_since=history[-1].not_finite_since,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Summary":
        """Of what an earlier version wrote, which had the measures of a task alone."""
        measures = BY_TASK[values["task"]]
        measured = {name: values[name] for name in measures.names if name in values}
        traffic = {name: Traffic(values[name]) for name in ("traffic", "full_traffic")}
        others = {name: value for name, value in values.items() if name not in measured}
        return cls(**others | traffic, measures=measures, measured=measured)


def _full_traffic(config: Config, facts: Facts, counts: Mapping[str, int], rounds: int) -> Traffic:
    """What the baseline moves in as many rounds, of clients that answer and of those that do not."""
    absent = counts["dropped"] + counts["late"]
    numbers = {True: sum(counts.values()) - absent, False: absent}
    if METHODS[config.method].pooled:
        numbers = {True: rounds * config.cohort}  # of the clients that there would be
    options: dict[str, Any] = {"sends_ids": False, "dtype": config.wire_dtype}
    sizes = facts.num_parameters, facts.num_classes, config.row_dim
    if METHODS[METHODS[config.method].baseline].contrastive:
        options |= {"rows": "none", "projection": projection_size(config.embedding_dim)}
    each = {answers: client_traffic(*sizes, answers=answers, **options) for answers in numbers}
    return sum((each[answers].times(n) for answers, n in numbers.items()), Traffic())
