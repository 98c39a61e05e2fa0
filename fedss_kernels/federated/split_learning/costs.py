"""What split learning moves between a client and the server: by the ledger, and as the paper counts it."""

from dataclasses import dataclass

from ..ledger import WIRE_DTYPES, Kind, Traffic, declare
from .rules import Rules

declare(Kind("latents", "latents of the images' views", ("up",), by_class=False))
declare(Kind("gradients", "gradients in the latents", ("down",), by_class=False))
declare(Kind("copies", "momentum copies", ("down", "up"), by_class=False))
declare(Kind("velocities", "velocities of the clients' half", ("down", "up"), by_class=False))
FLOWS = (
    *("down_extractor", "up_extractor", "down_copies", "up_copies", "down_velocities", "up_velocities"),
    *("up_latents", "down_gradients"),
)


@dataclass
class Moved:
    """Of a client in a round, counted as it happens."""

    sent: int = 0  # steps whose latents it sent
    answered: int = 0  # steps whose gradients came back
    downloads: int = 0  # of the clients' half
    uploads: int = 0


@dataclass(frozen=True)
class Costs:
    """A client's traffic, by what it did."""

    rules: Rules
    half: int  # P, numbers of the clients' half
    latent: int  # L, numbers of one image's latent
    images: int  # b, in a step
    dtype: str = "float32"  # what numbers travel as

    def traffic(self, moved: Moved) -> Traffic:
        """With the half go its momentum copy and its velocity where the server averages them too.

        >>> Costs(Rules(), 1856, 65536, 1).traffic(Moved(50, 50, 1, 1)).bytes["up_latents"]
        26214400
        """
        rules, number = self.rules, WIRE_DTYPES[self.dtype].itemsize
        each = number * self.half
        copy = each * (rules.momentum_copies == "averaged" and not rules.frozen)
        velocity = each * (rules.velocities == "averaged" and rules.client_momentum > 0 and not rules.frozen)
        image = number * self.latent * self.images
        return Traffic(
            {
                "down_extractor": each * moved.downloads,
                "up_extractor": each * moved.uploads,
                "down_copies": copy * moved.downloads,
                "up_copies": copy * moved.uploads,
                "down_velocities": velocity * moved.downloads,
                "up_velocities": velocity * moved.uploads,
                "up_latents": rules.latents * image * moved.sent,
                "down_gradients": rules.gradients * image * moved.answered,
            }
        )


def in_the_paper(
    *,
    synchronisations: int,
    parameters: int,
    epochs: int = 0,
    images: int = 0,  # of the client
    latent: int = 0,  # numbers of one
    latents: int = 2,  # of an image that are counted: one where the clients' half is frozen
) -> float:
    """Megabytes, of 2^20 bytes, of a client in a whole run as Table 1 of the paper counts them.

    The half goes one way at a synchronisation, and of three latents of an image and step (two up, a gradient
    down) two are counted, of the two where nothing comes back one. The ledger counts all that moves.
    """
    numbers = synchronisations * parameters + epochs * images * latent * latents
    return 4 * numbers / 2**20
