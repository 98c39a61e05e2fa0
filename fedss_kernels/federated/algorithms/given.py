"""The sampled softmax over class rows, and what a loss of a method's own is given in its place."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...sampled_softmax import sampled_softmax_loss
from ..messages import Request


@dataclass(frozen=True)
class Given:
    """What a method's `loss` knows beside a batch: the same in all steps of a client's round.

    request: what the client asked for.
    counts: (S,) int64, the client's own images of each of request.class_ids; 0 where it has none.
    scale, similarity: the options of these names.

    All tensors are on the device that trains.
    """

    request: Request
    counts: Tensor
    scale: float
    similarity: str

    def logits(self, embeddings: Tensor, rows: Tensor) -> Tensor:  # (b, D), (S, D) -> (b, S)
        """scale * cos(x, w), or scale * (x . w + bias) with the similarity dot, of all the rows."""
        weight, bias = weight_and_bias(rows, self.similarity)
        if bias is None:
            return self.scale * F.normalize(embeddings, dim=1) @ F.normalize(weight, dim=1).T
        return self.scale * (embeddings @ weight.T + bias)

    def sampled_softmax(self, embeddings: Tensor, rows: Tensor, target: Tensor, **options: Any) -> Tensor:
        """The mean loss (), as methods without a loss of their own have it.

        options: arguments of `sampled_softmax_loss` by name, where others are wanted.
        """
        return softmax_over_rows(
            embeddings, rows, target, self.request, self.scale, self.similarity, **options
        )


Loss = Callable[[Tensor, Tensor, Tensor, Given], Tensor]  # (embeddings, rows, target, given) -> ()


def softmax_over_rows(
    embeddings: Tensor,  # (b, D)
    rows: Tensor,  # (S, D), of dot products (S, D + 1), the bias last
    target: Tensor,  # (b,) int64, positions among the rows
    request: Request,  # how the loss uses them
    scale: float,
    similarity: str,
    **options: Any,
) -> Tensor:
    """The mean of the sampled softmax of scale * cos(x, w), or of scale * (x . w + bias)."""
    weight, bias = weight_and_bias(rows, similarity)
    usual = {
        "class_ids": request.denominator,
        "log_expected_count": request.log_expected_count,
        "bias": None if bias is None else scale * bias,
        "scale": scale,
        "similarity": similarity,
    }
    return sampled_softmax_loss(embeddings, weight, target, **usual | options)


def weight_and_bias(rows: Tensor, similarity: str) -> tuple[Tensor, Tensor | None]:
    """((S, D), (S,) or None): what a class row is made of."""
    return (rows, None) if similarity == "cosine" else (rows[:, :-1], rows[:, -1])
