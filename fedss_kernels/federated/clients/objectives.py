"""What a client minimises, and what it trains beside the net."""

from dataclasses import dataclass

from torch import Tensor

from ...sampled_softmax import sampled_softmax_loss
from ..messages import Request


@dataclass
class ClassRows:
    """The sampled softmax over class rows: of scale * cos(x, w), or of scale * (x . w + b)."""

    rows: Tensor  # (S, D), of dot products (S, D + 1), b the last number; on the device that trains
    request: Request  # how the loss uses them, on the same device
    scale: float
    similarity: str

    def loss(self, embeddings: Tensor, target: Tensor) -> Tensor:
        """The mean over a batch (B, D); target (B,): positions among the rows."""
        weight, bias = weight_and_bias(self.rows, self.similarity)
        return sampled_softmax_loss(
            embeddings,
            weight,
            target,
            self.request.denominator,
            self.request.log_expected_count,
            bias=None if bias is None else self.scale * bias,
            scale=self.scale,
            similarity=self.similarity,
        )


def weight_and_bias(rows: Tensor, similarity: str) -> tuple[Tensor, Tensor | None]:
    """((S, D), (S,) or None): what a class row is made of."""
    return (rows, None) if similarity == "cosine" else (rows[:, :-1], rows[:, -1])
