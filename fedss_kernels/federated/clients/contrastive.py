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

AHEAD = 2**22  # numbers in the views that are made at a time, 16 MiB, or those of one batch


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
        """(views (2B, channels, size, size), of each where the other one of its image is (2B,)).

        Views of a pass, or of as many of its batches as AHEAD has room for, are made in one call: of a few
        images most of the time goes into the calls.
        """
        twice = [torch.cat([batch, batch]) for batch in order.split(self.batch_size) if len(batch) > 1]
        numbers = 2 * self.batch_size * self.data.images.shape[1] * self.views.size**2
        at_once = max(1, AHEAD // numbers)
        for first in range(0, len(twice), at_once):
            rows = twice[first : first + at_once]
            views = self.views(self.data.images[torch.cat(rows)].to(self.extractor.device), rng)
            for of_batch in views.split([len(batch) for batch in rows]):
                count = len(of_batch)
                yield of_batch, torch.arange(count, device=views.device).roll(count // 2)
