"""What a federated method is, here: which class rows a client gets, and which of them its loss sums over."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Request:
    """What one client asks the server for in one round, and how its loss uses it."""

    class_ids: Tensor  # (S,) int64, ascending: the rows of W
    denominator: Tensor | None  # positions in class_ids over which the loss sums; None: all of them
    log_expected_count: Tensor  # one for each member of the denominator
    sends_ids: bool = True  # whether class_ids travel to the server

    def to(self, device: torch.device) -> "Request":
        """What the loss reads of it on another device."""
        return replace(
            self,
            denominator=None if self.denominator is None else self.denominator.to(device),
            log_expected_count=self.log_expected_count.to(device),
        )


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
