"""The measures of a run whose model is a net without class rows, by name: measures.OF_FEATURES.

`prepared` is the extractor's as_input, net its module with the parameters to be measured.
"""

from torch import nn

from ..clients.augment import as_input
from ..data import FederatedData
from ..data.of_clients import rows_held
from ..metrics import retrieval
from .features import Prepared, depth_of, depths, features, places
from .labelled import some
from .linear import linear_probe
from .neighbours import knn
from .rows import finite

BANK, QUERIES = 4_000, 1_500  # images that are looked at while training goes on


def while_training(
    net: nn.Module, data: FederatedData, depth: int, seed: int, prepared: Prepared = as_input
) -> dict[str, float]:
    """At the depth that training has come to: nearest neighbours on a few images, or a retrieval on all."""
    if data.task == "retrieval":
        return retrieval(features(net, data.test_images, depth, prepared=prepared), data.test_labels).measured
    held, queries = rows_held(data), some(len(data.test_images), QUERIES, seed, 1)
    bank = held[some(len(held), BANK, seed, 0)]
    made = (
        features(net, images, depth, rows=rows, prepared=prepared)
        for images, rows in ((data.images, bank), (data.test_images, queries))
    )
    near, asked = made
    return {"knn": knn(near, data.labels[bank], asked, data.test_labels[queries])}


def at_the_end(net: nn.Module, data: FederatedData, prepared: Prepared = as_input) -> dict[str, float]:
    """Linear probes on all images after the first block, a quarter, half and all of them, or a retrieval."""
    test = features(net, data.test_images, depth_of(net), prepared=prepared)
    lost = {"not_finite": int((~finite(test)).sum())}
    if data.task == "retrieval":
        return retrieval(test, data.test_labels).measured | lost
    found = {depth: _probe(net, data, depth, prepared) for depth in depths(net)}
    probes = {f"probe_{place}": found[depth] for place, depth in places(net).items()}
    return {"probe": probes.pop("probe_whole")} | probes | lost


def before_training(net: nn.Module, data: FederatedData, prepared: Prepared = as_input) -> dict[str, float]:
    """Of the net as the run began with it, at its whole depth."""
    whole = depth_of(net)
    if data.task == "classification":
        return {"random_probe": _probe(net, data, whole, prepared)}
    found = retrieval(features(net, data.test_images, whole, prepared=prepared), data.test_labels).measured
    return {f"random_{name}": found[name] for name in ("map_at_10", "recall_at_1")}


def _probe(net: nn.Module, data: FederatedData, depth: int, prepared: Prepared) -> float:
    held = rows_held(data)
    train = features(net, data.images, depth, rows=held, prepared=prepared)
    test = features(net, data.test_images, depth, prepared=prepared)
    return linear_probe(train, data.labels[held], test, data.test_labels)
