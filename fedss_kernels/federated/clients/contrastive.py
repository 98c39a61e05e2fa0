"""Clients that learn without labels: from two views of each image, which are to be alike."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..messages import Request
from .client import Client
from .extractor import Extractor
from .objectives import Objective, Queued, TwoViews
from .views import Views


class ContrastiveClient(Client):
    """Its batches are of B images in 2B views, and nothing reads a label.

    An image that is alone in its batch has no other to be told from: the last of a pass is left out where it
    is.
    """

    def __init__(self, *arguments: Any, views: Views, temperature: float, **options: Any):
        super().__init__(*arguments, **options)
        self.views, self.temperature, self.draws = views, temperature, True

    def objective(self, rows: Tensor, request: Request) -> Objective:
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


class MomentumClient(ContrastiveClient):
    """A view is told from the keys that the round had before, by a momentum copy that begins as the net."""

    def __init__(self, extractor: Extractor, *arguments: Any, queue_size: int, ema: float, **options: Any):
        super().__init__(extractor, *arguments, **options)
        module, head = copy.deepcopy((extractor.module, extractor.head))
        self.copy = Extractor(module, extractor.crop_size, extractor.device, head=head)
        self.queue_size, self.ema = queue_size, ema

    def objective(self, rows: Tensor, request: Request) -> Objective:
        self.copy.flat.copy_(self.extractor.flat)
        self.copy.module.train()
        return Queued(rows, self.temperature, self.queue_size)

    @torch.no_grad()
    def _keys(self, views: Tensor) -> Tensor:
        """The copy steps before it is used, towards a net that has not stepped yet."""
        self.copy.flat.mul_(self.ema).add_(self.extractor.flat, alpha=1 - self.ema)
        return F.normalize(self.copy(views), dim=1)

    def batches(
        self, order: Tensor, request: Request, rng: np.random.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(views (2B, ...), of each the key of its image's other one (2B, d)), made as they are asked for."""
        for views, other in super().batches(order, request, rng):
            yield views, self._keys(views)[other]
