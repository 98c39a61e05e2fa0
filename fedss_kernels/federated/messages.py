"""What travels between the server and its clients. They know these messages, and not each other."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Request:
    """What one client asks the server for in one round, and how its loss uses it.

    class_ids: (S,) int64, ascending, each once: the rows of W, those of the client's own classes among them.
    denominator: int64, over which of them the loss sums: positions in class_ids, from 0 to S - 1, each once,
        and not class ids; None: over all.
    log_expected_count: a number for each of these, subtracted from its logit where it is not an image's own
        class: the log of how often its class is expected there, 0 for what always is. An image's own logit
        stays as it is.
    sends_ids: whether class_ids travel to the server, and are counted as traffic; not where all are asked
        for anyway.
    """

    class_ids: Tensor
    denominator: Tensor | None
    log_expected_count: Tensor
    sends_ids: bool = True

    def to(self, device: torch.device) -> "Request":
        """What the loss reads of it on another device."""
        return replace(
            self,
            denominator=None if self.denominator is None else self.denominator.to(device),
            log_expected_count=self.log_expected_count.to(device),
        )


@dataclass(frozen=True)
class Silence:
    """Why a client that was drawn for a round has no part in it, as the ledger has it."""

    outcome: str  # "dropped", "late", "rejected", or "discarded": sound, but the sum it is in is lost
    fault: str = ""  # what was wrong with what it said, where it is rejected


@dataclass(frozen=True)
class Update:
    """What a client sends back: how far it moved, as old minus new, so that the server can step along it.

    Of the parts that travel: class rows that stay where they are, and blocks that do, are not in it.
    """

    client: int
    class_ids: Tensor  # (S,) int64, ascending
    rows: Tensor  # (S, D): W[class_ids] as received minus as trained
    extractor: Tensor  # (P,): phi as received minus as trained
    num_examples: int  # n_k
    loss: float  # mean over its images as they were trained on
    kept: Tensor | None = None  # no message: what stays with the client until its next round, one vector


def numbers(update: Update) -> tuple[Tensor, Tensor]:
    """All that move, as vectors."""
    return update.rows.flatten(), update.extractor


def norm(update: Update) -> float:
    """Of all that was sent: sqrt(|rows|^2 + |extractor|^2)."""
    parts = numbers(update)
    squares = sum(torch.dot(part, part).item() for part in parts)
    if 1e-30 < squares < math.inf:
        return math.sqrt(squares)
    # the squares are too small or too large for float32, or a number is not finite
    return math.hypot(*(torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts))


def clipped(update: Update, bound: float) -> Update:
    """The update, scaled to norm `bound` if it is longer."""
    size = norm(update)
    if size <= bound:
        return update
    return replace(update, rows=update.rows * (bound / size), extractor=update.extractor * (bound / size))
