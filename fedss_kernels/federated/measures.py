"""What can be measured of a model, each measure declared once, and which of them a run has.

A run's evaluation gives values by name. Columns, tables, plots and reports go by the names alone, so another
measure is a `declare` here, or wherever it is computed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ON_OWN_IMAGES = "on clients' own test images"


@dataclass(frozen=True)
class Measure:
    name: str  # its column
    label: str  # in tables and plots
    meaning: str  # what it is, after the label, in a few words
    words: str = ""  # the same for a glossary, where there is more to say
    of: str = "on the test images"  # what it was measured on
    share: bool = True  # in [0, 1] and shown in %, or else a number as it is
    more_is_better: bool = True
    compared: bool = True  # whether a comparison has its mean over the seeds
    digits: int = 4  # after the point, of a number below 100
    over_rounds: str = "last"  # what a run has of it: that of its last evaluation, or "most" or "sum" of all

    @property
    def column(self) -> str:
        """Above the figures of a table."""
        return f"{self.label} (%)" if self.share else self.label

    @property
    def axis(self) -> str:
        return f"{self.label} {self.of} (%)" if self.share else f"{self.label} {self.of}"

    @property
    def noun(self) -> str:
        """What a plot of it is about, in a sentence."""
        return "accuracy" if self.share and self.more_is_better else self.label

    @property
    def scale(self) -> int:
        """What a value is multiplied by where it is shown."""
        return 100 if self.share else 1

    def figure(self, value: float) -> str:
        """A value under `column`."""
        if self.share:
            return f"{100 * value:.1f}"
        return (
            f"{value:,}"
            if isinstance(value, int)
            else f"{value:,.{1 if abs(value) >= 100 else self.digits}f}"
        )

    def of_run(self, last: float | None, rounds: Sequence[float | None]) -> float | None:
        """Of what the last evaluation gave, and all rounds did, None for nothing."""
        found = [value for value in rounds if value is not None]
        if self.over_rounds == "last" or not found:
            return last
        return max(found) if self.over_rounds == "most" else sum(found)

    def text(self, value: float | None) -> str:
        """A value where nothing else says what it is; – for one that was not measured."""
        if value is None or self.share:
            return percent(value)
        return self.figure(value)


MEASURES: dict[str, Measure] = {}


def declare(measure: Measure) -> Measure:
    """Raises ValueError where there is another of its name."""
    if MEASURES.setdefault(measure.name, measure) != measure:
        raise ValueError(f"there is a measure {measure.name} already")
    return measure


@dataclass(frozen=True)
class Measures:
    """Those of a run, by name."""

    names: tuple[str, ...]  # all, in the order of metrics.csv
    headline: str  # the one that rates are chosen by, and plots show
    shown: tuple[str, ...]  # in the table of a comparison
    told: tuple[str, ...]  # in a line at the end of a run

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Measures":
        """Of what they are in JSON, where there are no tuples."""
        lists = {name: tuple(values[name]) for name in ("names", "shown", "told")}
        return cls(headline=values["headline"], **lists)

    @property
    def alike(self) -> list[Measure]:
        """The headline, then those that can stand in its place in a plot, or where it is not measured yet."""
        headline = MEASURES[self.headline]
        others = (MEASURES[name] for name in self.names if MEASURES[name].compared)
        kind = headline.share, headline.more_is_better
        return [headline, *(m for m in others if m != headline and (m.share, m.more_is_better) == kind)]


class Measured:
    """What has the values of a run's measures: those of a round, or of a whole run.

    Each is an attribute too, as `run.top1`; None for what was not measured.
    """

    measures: Measures
    measured: Mapping[str, float | None]

    @property
    def headline(self) -> Measure:
        return MEASURES[self.measures.headline]

    @property
    def accuracy(self) -> float | None:
        """The value of the headline: as a rule top-1 of a classification, MAP@10 of a retrieval."""
        return self.measured.get(self.measures.headline)

    @property
    def told(self) -> str:
        """In a line, for people."""
        told = ((MEASURES[name], self.measured.get(name)) for name in self.measures.told)
        return ", ".join(f"{measure.label} {measure.text(value)}" for measure, value in told)

    def __getattr__(self, name: str) -> float | None:
        if name not in MEASURES:
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        return self.measured.get(name)


def percent(share: float | None) -> str:
    """A share in [0, 1] as a percentage with one decimal; – for one that was not measured."""
    return "–" if share is None else f"{100 * share:.1f}%".replace("-0.0%", "0.0%")


_PLACES = {"first": "the first block", "quarter": "a quarter of the blocks", "half": "half of the blocks"}
for _measure in (
    Measure(
        "top1",
        "top-1",
        "unseen images whose class is named rightly",
        "The share of test images that are given their own class, of all of them.",
    ),
    Measure(
        "map_at_10",
        "MAP@10",
        "how right the ten nearest images are",
        "Every test image looks for its ten nearest among the others; 100% if all ten are of its class, and "
        "the more, the earlier the right ones come.",
    ),
    Measure(
        "recall_at_1",
        "recall@1",
        "images whose nearest other is of their class",
        "The share of test images whose nearest other is of their own class.",
    ),
    Measure(
        "own_top1",
        "own top-1",
        "of a client's own test images, those whose class its own model names rightly",
        "The share of a client's own test images whose class the client's own model names rightly, of all "
        "classes; the mean over clients. Of a model that all share the top-1 is on all test images.",
        of=ON_OWN_IMAGES,
    ),
    Measure(
        "initial_top1",
        "initial top-1",
        "of a client's own test images, those whose class is named rightly before it fine-tunes the model",
        "The share of a client's own test images whose class the model names rightly, of all classes, before "
        "the client has fine-tuned it; the mean over clients.",
        of=ON_OWN_IMAGES,
    ),
    Measure(
        "restricted_top1",
        "restricted top-1",
        "of a client's own test images, those whose class is named rightly, of the classes that it has",
        "As the initial top-1, of the client's own classes alone: what it is worth to know them, without any "
        "training. What the personalised top-1 has beyond this is what training adds.",
        of=ON_OWN_IMAGES,
    ),
    Measure(
        "nearest_mean_top1",
        "nearest-mean top-1",
        "of a client's own test images, those nearest to the mean of its training images of their class",
        "The share of a client's own test images whose embedding is nearest to the mean embedding of the "
        "client's training images of their class, of the client's own classes; the mean over clients.",
        of=ON_OWN_IMAGES,
    ),
    Measure(
        "personal_top1",
        "personalised top-1",
        "of a client's own test images, those whose class is named rightly once it has fine-tuned the model",
        "The share of a client's own test images whose class the model names rightly, of all classes, once "
        "the client has fine-tuned it on its own training images; the mean over clients.",
        of=ON_OWN_IMAGES,
    ),
    Measure(
        "personal_not_finite",
        "fine-tuned models not finite",
        "clients whose model has numbers that are not finite once it is fine-tuned; nothing is right then",
        of="of clients",
        share=False,
        more_is_better=False,
        compared=False,
    ),
    Measure(
        "knn",
        "kNN",
        "test images whose class is that of the nearest training images",
        "The share of test images that their 50 nearest training images name rightly, by the features of the "
        "net alone, without training anything on them: the nearer one of them, the more its class counts. Of "
        "at most 1,500 test images and 4,000 training images, the same throughout.",
    ),
    Measure(
        "probe",
        "linear probe",
        "test images whose class one linear layer names rightly by the features of the net",
        "The share of test images that one linear layer names rightly, which is trained on the features of "
        "all training images and their labels, while the net stays as it is.",
    ),
    *(
        Measure(
            f"probe_{place}",
            f"probe of {words}",
            f"the linear probe of the features after {words}",
            f"The linear probe of the features that the net has after {words}.",
        )
        for place, words in _PLACES.items()
    ),
    *(
        Measure(
            f"random_{name}",
            f"{label} before",
            "the same of the net before any training",
            f"The {label} of the net as the run began with it: at random, unless it was given another. Such "
            "a net tells much apart, and what training adds is the difference.",
        )
        for name, label in {"probe": "probe", "map_at_10": "MAP@10", "recall_at_1": "recall@1"}.items()
    ),
    Measure(
        "client_memory",
        "client's memory (MB)",
        "what a client needs for a step, in the stage that needs most",
        "What a client has in memory in a step: the parameters that it was sent, and the most that torch "
        "takes at a time beside them for forward and backward, gradients among it; of several stages in the"
        " one that takes most. It is a model of one client, measured on a net of its own without a "
        "projection head: a simulation has the whole net in memory, whatever the method.",
        of="of a client",
        share=False,
        more_is_better=False,
        digits=1,
        over_rounds="most",
    ),
    Measure(
        "client_saved",
        "saved (MB)",
        "what of it a client keeps from forward to backward, in the stage that keeps most",
        "What a step keeps from its forward to its backward pass, part of the client's memory; of several "
        "stages in the one that keeps most.",
        of="of a client",
        share=False,
        more_is_better=False,
        digits=1,
        over_rounds="most",
    ),
    Measure(
        "client_multiply_adds",
        "multiply-adds (G)",
        "of one step of a client, in the stage that takes most",
        "Multiplications with an addition in one step of a client, forward and backward, in 10^9; "
        "of several stages in the one that takes most.",
        of="of a client",
        share=False,
        more_is_better=False,
        digits=2,
        over_rounds="most",
    ),
    Measure(
        "all_multiply_adds",
        "all multiply-adds (G)",
        "of all steps of all clients who sent an answer, in the whole run",
        "The multiply-adds of all steps of all clients who sent an answer, in 10^9: what the whole run costs,"
        " where those of a step say who can take part.",
        of="of all clients",
        share=False,
        more_is_better=False,
        digits=1,
        over_rounds="sum",
    ),
    Measure("recall_at_10", "recall@10", "images with one of their class in the nearest ten", compared=False),
    Measure(
        "not_finite",
        "not finite",
        "images whose embedding has a number that is not finite, which are misses",
        share=False,
        more_is_better=False,
        compared=False,
    ),
):
    declare(_measure)

_NAMES = ("top1", "map_at_10", "recall_at_1", "recall_at_10", "not_finite")
BY_TASK = {  # of a run whose algorithm has none of its own
    "classification": Measures(_NAMES, "top1", _NAMES[:2], _NAMES[:3]),
    "retrieval": Measures(_NAMES, "map_at_10", ("recall_at_1", "map_at_10"), _NAMES[1:3]),
}
OF_A_STEP = ("client_memory", "client_saved", "client_multiply_adds", "all_multiply_adds")  # of each round
OF_FEATURES = {  # by task, of a run whose model is a net without class rows
    "classification": Measures(
        ("knn", "probe", *(f"probe_{place}" for place in _PLACES), "random_probe", "not_finite"),
        "probe",
        ("random_probe", "knn", "probe"),
        ("probe", "random_probe", "knn"),
    ),
    "retrieval": Measures(
        (*_NAMES[1:], "random_map_at_10", "random_recall_at_1"),
        "map_at_10",
        ("random_recall_at_1", "recall_at_1", "random_map_at_10", "map_at_10"),
        ("map_at_10", "random_map_at_10", "recall_at_1", "random_recall_at_1"),
    ),
}
