"""What a federated method is, here: which class rows a client gets, and which of them its loss sums over."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..messages import Request


@dataclass(frozen=True)
class Method:
    """A federated method: all of them share the round, the client and the server, and differ in `request`."""

    name: str
    label: str  # its name in plots and tables
    summary: str  # a sentence for readers who know none of this
    paper: str  # where it is from
    request: Callable[[int, Tensor, Tensor, str], Request]
    # request(num_classes, positives (P,), negatives drawn for the client (m,), correction)
    options: tuple[str, ...] = ()  # of Config, that not every method reads
    samples: bool = False  # whether clients ask for negatives
    own_push: bool = True  # whether an image is pushed from the client's other classes
    spreads: bool = False  # whether the server pushes near class rows apart after each round
    pooled: bool = False  # whether there are no clients: all the images are in one place
