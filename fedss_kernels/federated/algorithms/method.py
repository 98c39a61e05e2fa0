"""What a federated method is, here: which parts of the model a client gets, and what it does with them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..messages import Request
from .parts import Part, Parts, Pass, all_at_once, all_travel
from .schedule import Always, ByRound, Schedule, Settings

STICKY = {"fresh": 0.0, "sticky": 1.0, "mixed": 0.5}  # the share of its negatives that a client keeps
SHARED = "shared"  # negatives that all clients of a cohort have
PIR = "pir"  # requests of two servers, neither of which learns what is in them


@dataclass(frozen=True)
class Method:
    """A federated method: all of them share the round, the client and the server, and differ in what is here.

    A method in which all travels and all is trained at once needs a `request` alone.
    """

    name: str
    label: str  # its name in plots and tables
    summary: str  # a sentence for readers who know none of this
    paper: str  # where it is from
    request: Callable[[int, Tensor, Tensor, str], Request]
    # request(num_classes, positives (P,), negatives drawn for the client (m,), correction)
    parts: Callable[[int], Parts] = all_travel  # parts(num_blocks)
    by_round: ByRound | None = None  # where they are others from round to round; None: as in `parts` in all
    passes: Callable[[int, int], Sequence[Pass]] = all_at_once  # passes(local_epochs, head_epochs)
    by_block: bool = False  # whether parts differ from block to block; if not, any net is one block
    options: tuple[str, ...] = ()  # of Config, that not every method reads
    samples: bool = False  # whether clients ask for negatives
    common: bool = False  # whether a cohort may have one class set in common
    own_push: bool = True  # whether an image is pushed from the client's other classes
    spreads: bool = False  # whether the server pushes near class rows apart after each round
    contrastive: bool = False  # whether clients learn without labels, with a projection head on the net
    queued: bool = False  # whether these tell a view from keys that they had before, by a momentum copy
    baseline: str = "full_softmax"  # the method, by name, that its traffic is held against
    pooled: bool = False  # whether there are no clients: all the images are in one place
    split: bool = False  # whether clients and server each have a part of the net, and step together
    presets: Mapping[str, Any] = field(default_factory=dict, hash=False)  # options -> their defaults

    def schedule(self, settings: Settings, num_blocks: int) -> Schedule:
        """Of a run. Raises ConfigError for settings that do not fit a net of so many blocks."""
        return self.by_round(settings, num_blocks) if self.by_round else Always(self.parts(num_blocks))

    @cached_property
    def rows(self) -> Part:
        """Where the class rows stand, whatever the net."""
        return self.parts(1).rows

    @property
    def stores(self) -> bool:
        """Whether there are class rows for a class store to hold."""
        return self.rows in (Part.TRAINED, Part.HOME)

    @property
    def rowless(self) -> bool:
        """Whether there are no class rows."""
        return self.rows is Part.ABSENT

    @cached_property
    def tells(self) -> bool:
        """Whether the rows that a client asks for and sends depend on the classes that it holds."""
        one, none = torch.tensor([0]), torch.tensor([], dtype=torch.int64)
        return self.rows is Part.TRAINED and len(self.request(2, one, none, "none").class_ids) < 2

    @cached_property
    def alone(self) -> bool:
        """Whether clients never meet, as their nets are their own too."""
        return self.parts(1).net_at_home

    @cached_property
    def personal(self) -> bool:
        """Whether every client has a model of its own, so that there is none to try on everybody's images."""
        return self.parts(1).anything_at_home
