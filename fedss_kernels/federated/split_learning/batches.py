"""Which images a client takes in a step, and the two views of each."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..clients.views import Views
from ..randomness import Purpose, generator


def next_images(
    held: Tensor,  # (n_k,) rows of the images
    taken: int,  # images so far
    count: int,
    seed: int,
    client: int,
) -> Tensor:  # (count,) of held
    """A client goes through all its images in an order of its own, and again in another."""
    n, parts = len(held), [torch.empty(0, dtype=torch.int64)]
    while count > 0:
        rng = generator(seed, taken // n, 0, client, Purpose.BATCHES)
        order = torch.from_numpy(rng.permutation(n))[taken % n :][:count]
        parts.append(order)
        taken, count = taken + len(order), count - len(order)
    return held[torch.cat(parts)]


class Batches:
    """Of a cohort in a round: in each step `batch_size` images of each client, and two views of each.

    What a client sees depends on it, the round and its images alone, not on who else is there.
    """

    def __init__(
        self,
        images: Tensor,  # (N, channels, H, W) uint8
        rows: Mapping[int, Tensor],  # client -> (steps * b,), those of the round in order
        batch_size: int,  # b
        views: Views,
        key: tuple[int, int, int],  # seed, round, attempt
    ):
        self.images, self.rows, self.batch_size, self.views = images, rows, batch_size, views
        self.changes = {k: generator(*key, k, Purpose.AUGMENTATION) for k in rows}

    def views_of(self, step: int, clients: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(K, b, channels, size, size) each; steps are to be asked for one after the other."""
        b = self.batch_size
        rows = torch.cat([self.rows[k][step * b : (step + 1) * b] for k in clients])
        draws = [self.views.draw(2 * b, self.changes[k]).reshape(2, b, -1) for k in clients]
        pixels = self.images[rows]
        numbers = np.stack(draws, axis=1).reshape(2 * len(rows), -1)
        first, second = self.views.made(torch.cat([pixels, pixels]), numbers).view(
            2, len(clients), b, -1, self.views.size, self.views.size
        )
        return first, second
