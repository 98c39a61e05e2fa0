"""What the two halves of a net agree on, whatever they are halves of."""

import math
from dataclasses import dataclass

from ..algorithms.mocosfl import CLIENT_GRADIENTS, MOMENTUM_COPIES, SYMMETRIC, VELOCITIES


@dataclass(frozen=True)
class Rules:
    """Raises ValueError for a name that is none of algorithms/mocosfl.py's, or a number that cannot be."""

    temperature: float = 0.1  # T
    ema: float = 0.99  # tau: what a momentum copy keeps of itself in a step
    momentum: float = 0.9  # of SGD, at the server
    client_momentum: float = 0.9
    weight_decay: float = 5e-4
    symmetric: str = "server"  # whose second term: of what is there; of a second pass; none
    client_gradient: str = "sent"  # of the mean over the batch, as it comes; or over its own images
    momentum_copies: str = "averaged"  # what a synchronisation makes of the clients' momentum copies
    velocities: str = "averaged"  # and of their velocities
    frozen: bool = False  # whether the clients' half is used as it is: then it is its own momentum copy
    in_turn: bool = False  # whether the server steps on each client's latents by themselves

    def __post_init__(self) -> None:
        for name, names in (
            ("symmetric", SYMMETRIC),
            ("client_gradient", CLIENT_GRADIENTS),
            ("momentum_copies", MOMENTUM_COPIES),
            ("velocities", VELOCITIES),
        ):
            if getattr(self, name) not in names:
                raise ValueError(f"{name}: expected one of {', '.join(names)}, got {getattr(self, name)!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a number greater than 0, got {self.temperature!r}")
        if not 0 <= self.ema <= 1:
            raise ValueError(f"ema: expected a number from 0 to 1, got {self.ema!r}")

    @property
    def latents(self) -> int:
        """That a client sends of one image: of each online view, and of each momentum view."""
        return 4 if self.symmetric == "full" else 2

    def guessing(self, keys: int) -> float:
        """The loss where all keys are alike, those of a queue of so many too."""
        return (1 if self.symmetric == "none" else 2) * math.log(keys + 1)

    @property
    def gradients(self) -> int:
        """That come back to it of one image."""
        return 0 if self.frozen else self.latents // 2
