"""What a client minimises, and what it trains beside the net."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...sampled_softmax import sampled_softmax_loss
from ..algorithms.given import Given, Loss, softmax_over_rows
from ..messages import Request
from .contrast import contrast


class Objective(Protocol):
    rows: Tensor  # what is trained beside the net; none where it is empty

    def loss(self, embeddings: Tensor, target: Tensor) -> Tensor:
        """The mean over a batch; target: as the objective has it."""
        ...


@dataclass
class ClassRows:
    """The sampled softmax over class rows: of scale * cos(x, w), or of scale * (x . w + b)."""

    rows: Tensor  # (S, D), of dot products (S, D + 1), b the last number; on the device that trains
    request: Request  # how the loss uses them, on the same device
    scale: float
    similarity: str

    def loss(self, embeddings: Tensor, target: Tensor) -> Tensor:
        """The mean over a batch (B, D); target (B,): positions among the rows."""
        return softmax_over_rows(embeddings, self.rows, target, self.request, self.scale, self.similarity)


@dataclass
class OwnLoss:
    """A method's own loss over class rows."""

    rows: Tensor  # as those of ClassRows
    given: Given
    function: Loss

    def loss(self, embeddings: Tensor, target: Tensor) -> Tensor:
        """The mean over a batch (B, D); target (B,): positions among the rows."""
        return self.function(embeddings, self.rows, target, self.given)


@dataclass
class TwoViews:
    """SimCLR's NT-Xent, Eq. 1 of Chen et al., ICML 2020, arXiv:2002.05709: two views of an image are alike.

        loss_i = -cos(u_i, u_t) / T + log sum_{j != i} exp(cos(u_i, u_j) / T),  t: the other view of its image

    That is the sampled softmax with the views themselves for rows.
    """

    rows: Tensor  # (0, D): there are no others
    temperature: float  # T

    def loss(self, embeddings: Tensor, target: Tensor) -> Tensor:
        """The mean over (2B, D): the first views of B images, then the second; target (2B,): each one's t."""
        count = len(embeddings)
        image = torch.arange(count, device=embeddings.device) % (count // 2)
        return sampled_softmax_loss(  # of its own image's two views an entry is the target, or left out
            embeddings,
            embeddings,
            target,
            entry_labels=image,
            target_labels=image,
            scale=1 / self.temperature,
        )


@dataclass
class Queued:
    """MoCo's loss (contrast.py), symmetric: against the last `size` keys of the steps before this one."""

    rows: Tensor  # (0, D): there are no others
    temperature: float  # T
    size: int  # M
    keys: Tensor | None = None  # (at most M, d), the oldest first

    def loss(self, embeddings: Tensor, target: Tensor) -> Tensor:
        """The mean over (2B, d): the views of B images; target (2B, d): each one's own key, of length 1."""
        queue = target[:0] if self.keys is None else self.keys
        self.keys = torch.cat([queue, target])[-self.size :]
        return contrast(embeddings, target, queue, self.temperature)
