"""A test set of training clients' images, to choose settings by: the real test images stay unseen."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..config_error import ConfigError
from .apportion import apportion
from .federated_data import FederatedData

TEST_SHARE = 6  # a newcomer is tested on one image of so many, and fine-tunes on the others


def number_held_out(clients: int, share: float) -> int:
    """Of so many, at least one. Raises ConfigError if nobody would be left to train."""
    count = max(1, round(share * clients))
    if count >= clients:
        raise ConfigError("holdout", f"expected to leave some of {clients} clients, got {share}")
    return count


def held_out(data: FederatedData, share: float, seed: int, *, alone: bool = False) -> FederatedData:
    """The data without a share of the clients, at least one; their images and labels are the test set.

    They are its newcomers, who fine-tune on most of their images and are tested on the others: one of
    TEST_SHARE of each class, at least one in all where there are two of a class. With `alone`, for methods
    whose clients never meet, it is they who are the clients, of these images, and nobody else is there.

    Raises ConfigError if nobody would be left to train.
    """
    count = number_held_out(len(data.clients), share)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 0x01DE])))
    out = sorted(rng.permutation(len(data.clients))[:count].tolist())
    kept = [k for k in range(len(data.clients)) if k not in set(out)]
    held = [data.clients[k] for k in out]
    newcomers = _newcomers(held, data.labels, rng)
    test = torch.cat(held)
    clients = [data.clients[k] for k in kept]
    if alone:
        kept, clients = out, [train for train, _ in newcomers]
    return replace(
        data,
        clients=tuple(clients),
        client_names=tuple(data.client_names[k] for k in kept),
        test_images=data.images[test],
        test_labels=data.labels[test],
        test_clients=tuple(tested for _, tested in newcomers) if alone else (),
        newcomers=() if alone else newcomers,
    )


def _newcomers(
    held: Sequence[Tensor], labels: Tensor, rng: np.random.Generator
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Of each the rows it fine-tunes on, and its places in all the rows together that it is tested on.

    Of every class an image stays to fine-tune on, so one of which it has a single image is not tested.
    """
    person = np.repeat(np.arange(len(held)), [len(rows) for rows in held])
    rows = torch.cat(tuple(held)).numpy()
    pairs = person * (int(labels.max()) + 1) + labels.numpy()[rows]  # of a person and a class
    found, pair, images = np.unique(pairs, return_inverse=True, return_counts=True)
    owner = found // (int(labels.max()) + 1)
    spare = np.bincount(owner, images - 1).astype(np.int64)
    wanted = np.array([max(1, round(len(of) / TEST_SHARE)) for of in held])
    parts = apportion(np.minimum(wanted, spare), owner, images - 1, rng)
    order = rng.permutation(len(rows))
    order = order[np.argsort(pair[order], kind="stable")]
    place = np.arange(len(rows)) - (np.cumsum(images) - images)[pair[order]]  # among its pair's
    tested = np.zeros(len(rows), dtype=bool)
    tested[order] = place < parts[pair[order]]
    places, ends = np.arange(len(rows)), np.cumsum([len(of) for of in held])[:-1]
    return tuple(
        (torch.from_numpy(rows[of[~tested[of]]]), torch.from_numpy(of[tested[of]]))
        for of in np.split(places, ends)
    )
