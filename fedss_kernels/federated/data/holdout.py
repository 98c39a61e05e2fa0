"""A test set of training clients' images, to choose settings by: the real test images stay unseen."""

from dataclasses import replace

import numpy as np
import torch

from ..config_error import ConfigError
from .partition import FederatedData


def number_held_out(clients: int, share: float) -> int:
    """Of so many, at least one. Raises ConfigError if nobody would be left to train."""
    count = max(1, round(share * clients))
    if count >= clients:
        raise ConfigError("holdout", f"expected to leave some of {clients} clients, got {share}")
    return count


def held_out(data: FederatedData, share: float, seed: int) -> FederatedData:
    """The data without a share of the clients, at least one; their images and labels are the test set.

    Raises ConfigError if nobody would be left to train.
    """
    count = number_held_out(len(data.clients), share)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 0x01DE])))
    out = set(rng.permutation(len(data.clients))[:count].tolist())
    kept = [k for k in range(len(data.clients)) if k not in out]
    test = torch.cat([data.clients[k] for k in sorted(out)])
    return replace(
        data,
        clients=tuple(data.clients[k] for k in kept),
        client_names=tuple(data.client_names[k] for k in kept),
        test_images=data.images[test],
        test_labels=data.labels[test],
    )
