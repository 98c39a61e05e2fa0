"""Where the parts of a model stand round by round, and client by client."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from .parts import Parts


class Settings(Protocol):
    """What a schedule may depend on, of Config."""

    @property
    def seed(self) -> int: ...
    @property
    def rounds(self) -> int: ...
    @property
    def stages(self) -> int | None: ...
    @property
    def depth_budget(self) -> int | None: ...
    @property
    def freeze(self) -> str: ...
    @property
    def settings(self) -> Mapping[str, float]: ...


class Schedule(Protocol):
    """A pure function: the server, each worker and the ledger ask it for themselves.

    All clients of a round train the same blocks, so each is averaged over all of them.
    """

    def stage(self, round: int) -> int:
        """From 0: rounds of one stage have the same parts."""
        ...

    def whole(self, round: int) -> Parts:
        """Of a client that does without nothing: what is trained in the round, and what is there by then."""
        ...

    def parts(self, round: int, attempt: int, client: int) -> Parts:
        """Of this client: `whole`, but that frozen blocks may be absent."""
        ...


@dataclass(frozen=True)
class Always:
    """The same for all, in every round."""

    same: Parts

    def stage(self, round: int) -> int:
        return 0

    def whole(self, round: int) -> Parts:
        return self.same

    def parts(self, round: int, attempt: int, client: int) -> Parts:
        return self.same


ByRound = Callable[..., Schedule]  # (a run's settings, its number of blocks)
