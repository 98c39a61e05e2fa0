"""What a net is worth at several depths, and beside it the same net without its training.

Random features are strong: without them beside it any number looks good.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..clients.augment import as_input
from ..data import FederatedData
from ..data.of_clients import rows_held
from ..measures import Measure, declare
from ..metrics import retrieval
from . import tuned
from .features import Prepared, depths, features, prefix
from .labelled import labelled
from .linear import linear_probe
from .neighbours import NEIGHBOURS, TEMPERATURE, knn
from .rows import finite
from .tuned import Changed, fine_tuned

declare(
    Measure(
        "fine_tuned",
        "fine-tuned",
        "test images whose class the net and a linear layer name rightly, trained together",
    )
)


@dataclass(frozen=True)
class Probing:
    """How a net is measured. Raises ValueError for what cannot be."""

    depths: tuple[int, ...] = ()  # none: the first block, a quarter, half and all of them
    neighbours: int = NEIGHBOURS
    temperature: float = TEMPERATURE  # of their votes
    labels: float = 1.0  # the share of training images of each class whose labels are known
    epochs: int = 0  # of fine-tuning; 0: there is none
    rate: float = tuned.RATE
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.labels <= 1:
            raise ValueError(f"labels: expected a share greater than 0 and at most 1, got {self.labels:g}")
        for name, least in {"neighbours": 1, "epochs": 0, "batch_size": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name in ("temperature", "rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a finite number greater than 0, got {value:g}")


@dataclass(frozen=True)
class Line:
    weights: str  # which net: as "trained" or "random"
    depth: int
    features: int  # F
    measured: dict[str, float]  # shares in [0, 1]
    not_finite: int = 0  # images whose features are not: of training left out, of the test misses


def by_depth(
    nets: Mapping[str, nn.Module],
    data: FederatedData,
    probing: Probing = Probing(),
    *,
    prepared: Prepared = as_input,
    changed: Changed = tuned.plain,
    on_measured: Callable[[int, int], None] = lambda done, total: None,  # before each line
) -> list[Line]:
    """A line for each depth and net. Of a classification "probe", "knn" and, where asked for, "fine_tuned".

    A probe is trained on the clients' images and their labels, or a share of them, and measured on the test
    images. Of a retrieval, whose test classes nobody trains on, what metrics.retrieval measures on those.
    Raises ValueError for a depth that a net has not.
    """
    at = probing.depths or depths(next(iter(nets.values())))
    for net in nets.values():
        prefix(net, max(at))  # before anything is measured
    rows = rows_held(data)
    if probing.labels < 1:
        rows = rows[labelled(data.labels[rows], probing.labels, probing.seed)]
    found = list[Line]()
    for depth in at:
        for weights, net in nets.items():
            on_measured(len(found), len(at) * len(nets))
            found.append(_line(weights, net, depth, rows, data, probing, prepared, changed))
    return found


def _line(
    weights: str,
    net: nn.Module,
    depth: int,
    rows: Tensor,  # (n,) of the training images
    data: FederatedData,
    probing: Probing,
    prepared: Prepared,
    changed: Changed,
) -> Line:
    test = features(net, data.test_images, depth, prepared=prepared)
    if data.task == "retrieval":
        found = retrieval(test, data.test_labels)
        return Line(weights, depth, test.shape[1], found.measured, found.not_finite)
    labels, tested = data.labels[rows], data.test_labels
    bank = features(net, data.images, depth, rows=rows, prepared=prepared)
    k, temperature = probing.neighbours, probing.temperature
    measured = {
        "probe": linear_probe(bank, labels, test, tested),
        "knn": knn(bank, labels, test, tested, k=k, temperature=temperature),
    }
    if probing.epochs:
        measured["fine_tuned"] = fine_tuned(
            *(net, depth, data.images, data.labels, data.test_images, tested),
            rows=rows,
            epochs=probing.epochs,
            rate=probing.rate,
            batch_size=probing.batch_size,
            seed=probing.seed,
            prepared=prepared,
            changed=changed,
        )
    lost = sum(int((~finite(each)).sum()) for each in (bank, test))
    return Line(weights, depth, test.shape[1], measured, lost)
