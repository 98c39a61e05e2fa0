"""What the server asks of an update before it counts. Nothing from outside is trusted.

An update that fails is dropped whole, and the round goes on with the others.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .client import Update


@dataclass(frozen=True)
class Inspection:
    num_parameters: int  # P, of the extractor
    embedding_dim: int  # D
    max_examples: int
    max_norm: float

    def fault(self, update: Update, asked: Tensor) -> str | None:
        """The first thing wrong with an update from a client that asked for rows `asked` (S,); None: nothing.

        "dtype", "shape", "ids", "examples", "loss", "not finite" or "norm".
        """
        shapes = {
            "class_ids": (torch.int64, (len(asked),)),
            "rows": (torch.float32, (len(asked), self.embedding_dim)),
            "extractor": (torch.float32, (self.num_parameters,)),
        }
        for name, (dtype, shape) in shapes.items():
            sent = getattr(update, name)
            if not isinstance(sent, Tensor) or sent.dtype != dtype or sent.layout != torch.strided:
                return "dtype"
            if sent.shape != shape:
                return "shape"
        if not torch.equal(update.class_ids, asked):  # as asked: ascending, each once
            return "ids"
        n = update.num_examples
        if type(n) is not int or not 1 <= n <= self.max_examples:
            return "examples"
        if not isinstance(update.loss, float) or not math.isfinite(update.loss):
            return "loss"
        size = norm(update)
        if not math.isfinite(size):
            return "not finite"
        return "norm" if size > self.max_norm else None


def norm(update: Update) -> float:
    """Of all that was sent: sqrt(|rows|^2 + |extractor|^2), in float64, where no float32 overflows."""
    return math.hypot(
        *(torch.linalg.vector_norm(part, dtype=torch.float64) for part in (update.rows, update.extractor))
    )


def clipped(update: Update, bound: float) -> Update:
    """The update, scaled to norm `bound` if it is longer."""
    size = norm(update)
    if size <= bound:
        return update
    return replace(update, rows=update.rows * (bound / size), extractor=update.extractor * (bound / size))
