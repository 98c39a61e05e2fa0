"""A client that learns without labels: from two views of each image, which are to be alike."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..messages import Request
from .client import Client
from .objectives import TwoViews
from .views import Views


class ContrastiveClient(Client):
    """Its batches are of B images in 2B views, and nothing reads a label.

    An image that is alone in its batch has no other to be told from: the last of a pass is left out where it
    is.
    """

    def __init__(self, *arguments: Any, views: Views, temperature: float, **options: Any):
        super().__init__(*arguments, **options)
        self.views, self.temperature, self.draws = views, temperature, True

    def objective(self, rows: Tensor, request: Request) -> TwoViews:
        return TwoViews(rows, self.temperature)

    def batches(
        self, order: Tensor, request: Request, rng: np.random.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(views (2B, channels, size, size), of each where the other one of its image is (2B,))."""
        for batch in order.split(self.batch_size):
            if len(batch) > 1:
                images = self.data.images[batch].to(self.extractor.device)
                other = torch.arange(2 * len(batch), device=images.device).roll(len(batch))
                yield torch.cat([self.views(images, rng), self.views(images, rng)]), other
