"""All the images in one place: the training without federation that the others are compared with."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..algorithms.parts import Pass
from ..data import FederatedData
from .client import Client
from .extractor import Extractor


def pooled(data: FederatedData) -> FederatedData:
    """The same data with one client, who has every image."""
    images = torch.cat(data.clients)
    return replace(data, clients=(images,), client_names=("everyone",), test_clients=())


class PooledClient(Client):
    """That client: a round is as many steps as a client makes in one on average, each of fresh IID images."""

    def __init__(
        self,
        extractor: Extractor,
        data: FederatedData,  # among its clients
        *,
        cohort: int,
        schedule: Sequence[Pass],
        batch_size: int,
        **options: Any,
    ):
        batches = [-(-len(held) // batch_size) for held in data.clients]
        self.mean_steps = len(schedule) * sum(batches) / len(batches)
        super().__init__(
            extractor, pooled(data), schedule=[Pass()], batch_size=cohort * batch_size, **options
        )

    def passes(self, held: Tensor, round: int, shuffle: np.random.Generator) -> Iterator[tuple[Pass, Tensor]]:
        """After `round` rounds floor(round * mean_steps) steps are done, each of different images."""
        steps = int((round + 1) * self.mean_steps) - int(round * self.mean_steps)
        for _ in range(steps):
            size = min(self.batch_size, len(held))
            yield Pass(), held[torch.from_numpy(shuffle.choice(len(held), size, replace=False))]
