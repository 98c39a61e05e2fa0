"""What the loop of rounds knows of an algorithm: whatever does this much can be run, recorded and resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from .clients.player import Player
from .config import Config
from .files.facts import Facts
from .files.run_folder import RunFolder
from .ledger import Entry
from .messages import Update
from .server.class_store import ClassStore
from .server.kept_by_clients import Homes
from .server.row_table import RowTable
from .stopwatch import Stopwatch

if TYPE_CHECKING:
    from typing import Self  # Python 3.10 has none

OnTuned = Callable[[int, int], None]  # (clients that have fine-tuned, of so many), before each


@dataclass(frozen=True)
class Played:
    """What came of a round."""

    entries: Sequence[Entry]  # a line for each client that was drawn, by attempt; what moved is in them
    loss: float  # mean over the images that were trained on
    num_images: int  # so many, of the answers that counted

    @classmethod
    def of(cls, updates: Sequence[Update], entries: Sequence[Entry]) -> Self:
        """Where these are the answers that counted."""
        images = sum(update.num_examples for update in updates)
        loss = sum(update.num_examples * update.loss for update in updates) / images
        return cls(entries, loss, images)


class TooFewClients(RuntimeError):
    """A round that no cohort made, and why; `entries` is what moved for it all the same."""

    def __init__(self, words: str, entries: Sequence[Entry] = ()):
        super().__init__(words)
        self.entries = list(entries)


@dataclass(frozen=True)
class Trained:
    """What a user takes away."""

    net: nn.Module  # on the CPU and in eval mode
    table: RowTable | None = None  # the class matrix, where there is one
    homes: Homes | None = None  # what clients keep with themselves, where they do


class Algorithm(Protocol):
    """A run as it stands: Simulation is one.

    Equal configurations, data and nets play equal rounds to the bit, and a round depends on what `stored`
    gives and its number alone: so a run that is resumed is one that never stopped.
    """

    watch: Stopwatch  # where its time goes
    not_finite_since: int | None  # the round that left numbers that are not finite; set when it is resumed
    on_tuned: OnTuned  # to be called where an evaluation is of clients that train first; set before any round

    def __init__(self, config: Config, player: Player, workers: int, store: ClassStore | None): ...

    @staticmethod
    def facts(config: Config, player: Player) -> Facts:
        """What such a run is of, which measures it has and what moves in it: known before it begins."""
        ...

    @property
    def team(self) -> AbstractContextManager[object]:
        """Who plays it: in other processes too, if there are any, who are let go at its end."""
        ...

    def play(self, round: int) -> Played:
        """The next round, from 0. Raises TooFewClients, with nothing changed, where no cohort makes it."""
        ...

    def evaluate(self, *, last: bool) -> Mapping[str, float | None]:
        """Of the model as it is the values of those of its measures that are due; more in the last round."""
        ...

    def stored(self) -> dict[str, Tensor]:
        """All that the next round depends on but its number, and what is in a class store."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], rounds: int) -> None:
        """In a new one: the state of another after so many rounds."""

    def checkpoint(self, folder: RunFolder, rounds: int) -> None:
        """Saves what is `stored` after so many rounds."""

    def trained(self) -> Trained: ...
