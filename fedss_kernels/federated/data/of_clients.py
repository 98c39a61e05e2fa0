"""The training images that clients hold: of a holdout, and of data of one's own, there may be others."""

import torch
from torch import Tensor

from .federated_data import FederatedData


def rows_held(data: FederatedData) -> Tensor:  # (n,) int64
    """Ascending, each once. Whoever reads images by them reads few at a time: they may be mapped."""
    return torch.cat(data.clients).unique()
