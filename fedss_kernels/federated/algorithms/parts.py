"""Where each part of a model stands in one client's round: what comes, what is trained, what goes back."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Part(Enum):
    """Of a block of the net, or of the class rows."""

    TRAINED = "comes, is trained, and goes back"
    FROZEN = "comes, and is used as it is"
    KNOWN = "is drawn from the seed wherever it is needed, and used as it is; it never travels"
    HOME = "stays with the client, who trains it; it never travels"
    ABSENT = "does not come and is not used: the client's model is without it"

    @property
    def moves(self) -> bool:
        """Whether the client trains it."""
        return self in (Part.TRAINED, Part.HOME)


@dataclass(frozen=True)
class Parts:
    """Raises ValueError for what cannot be."""

    blocks: Sequence[Part]  # in the net's order
    rows: Part  # the class rows

    def __post_init__(self) -> None:
        if Part.KNOWN in self.blocks:
            raise ValueError("blocks: expected none KNOWN, as only class rows are a function of the seed")
        if self.rows is Part.FROZEN:
            raise ValueError("rows: expected TRAINED, KNOWN, HOME or ABSENT, got FROZEN")
        if Part.HOME in self.blocks and (set(self.blocks) != {Part.HOME} or self.rows is not Part.HOME):
            raise ValueError("blocks: expected all of them HOME and the class rows too, or none")

    @property
    def anything_at_home(self) -> bool:
        return self.rows is Part.HOME

    @property
    def trained(self) -> list[bool]:
        """Of each block whether it is trained and goes back."""
        return [part is Part.TRAINED for part in self.blocks]

    @property
    def present(self) -> list[bool]:
        """Of each block whether the client has it."""
        return [part is not Part.ABSENT for part in self.blocks]

    @property
    def net_at_home(self) -> bool:
        return Part.HOME in self.blocks


@dataclass(frozen=True)
class Pass:
    """One pass over a client's images: which of the parts that it trains move in it."""

    blocks: bool = True
    rows: bool = True


def all_travel(num_blocks: int) -> Parts:
    """As in federated averaging."""
    return Parts((Part.TRAINED,) * num_blocks, Part.TRAINED)


def all_at_once(local_epochs: int, head_epochs: int) -> list[Pass]:
    """local_epochs passes in which all moves."""
    return [Pass()] * local_epochs
