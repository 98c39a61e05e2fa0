"""Clients that learn without labels: from two views of each image, which are to be alike."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..messages import Request
from ..models.copies import copied
from .client import Client
from .extractor import Extractor
from .objectives import Objective, Queued, TwoViews
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

    def objective(self, rows: Tensor, request: Request, held: Tensor) -> Objective:
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
            images = self.data.images.index_select(0, torch.cat(rows))
            views = self.views(images.to(self.extractor.device), rng)
            for of_batch in views.split([len(batch) for batch in rows]):
                count = len(of_batch)
                yield of_batch, torch.arange(count, device=views.device).roll(count // 2)


class MomentumClient(ContrastiveClient):
    """A view is told from the keys that the round had before, by a momentum copy that begins as the net."""

    def __init__(self, extractor: Extractor, *arguments: Any, queue_size: int, ema: float, **options: Any):
        super().__init__(extractor, *arguments, **options)
        head = None if extractor.head is None else copied(extractor.head)
        self.copy = Extractor(copied(extractor.module), extractor.crop_size, extractor.device, head=head)
        self.queue_size, self.ema = queue_size, ema

    def objective(self, rows: Tensor, request: Request, held: Tensor) -> Objective:
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
