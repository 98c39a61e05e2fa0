"""The training images that clients hold: of a holdout, and of data of one's own, there may be others."""

import torch
from torch import Tensor

from .federated_data import FederatedData


def rows_held(data: FederatedData) -> Tensor:  # (n,) int64
    """Ascending, each once."""
    return torch.cat(data.clients).unique()


def of_clients(data: FederatedData) -> tuple[Tensor, Tensor]:
    """(images, labels) of these rows; no copies where they are all."""
    rows = rows_held(data)
    if len(rows) == len(data.images):
        return data.images, data.labels
    return data.images[rows], data.labels[rows]
