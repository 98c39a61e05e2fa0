"""Fine-tuning: what a net is worth to begin with, where there are labels to train all of it by."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..clients.augment import as_input
from ..models.copies import trainable
from ..randomness import NO_CLIENT, Purpose, generator
from .features import Prepared, outputs, prefix
from .linear import Standard
from .rows import finite, share

EPOCHS = 20
RATE = 0.03
MOMENTUM = 0.9
CLIP_NORM = 1.0
Changed = Callable[[Tensor, np.random.Generator], Tensor]  # uint8 images -> input to train on


def plain(images: Tensor, rng: np.random.Generator) -> Tensor:
    return as_input(images)


def fine_tuned(
    net: nn.Module,
    depth: int,
    images: Tensor,  # (N, channels, H, W) uint8
    labels: Tensor,  # (N,) int64
    test_images: Tensor,  # (T, channels, H, W) uint8
    test_labels: Tensor,  # (T,) int64
    *,
    rows: Tensor | None = None,  # (n,) of the images that are trained on; None: all
    epochs: int = EPOCHS,
    rate: float = RATE,
    batch_size: int = 32,
    seed: int = 0,
    prepared: Prepared = as_input,
    changed: Changed = plain,  # as an Augmentation
) -> float:
    """The share of test images whose class the stem, the blocks down to a depth and a linear layer name.

    A copy of them is trained on all these images, with SGD of momentum 0.9 whose rate falls to 0 as a cosine
    over the steps; what counts is how it is after the last epoch. The layer begins at 0, on features that are
    standardised as they are before the training. That makes gradients large where features hardly differ, so
    a step's gradient is of length 1 at most. Images whose features are not finite are not trained on. All is
    a function of the arguments. Raises ValueError for a depth that the net has not.
    """
    rng = generator(seed, 0, 0, NO_CLIENT, Purpose.PROBE)
    body = trainable(prefix(net, depth))
    rows = torch.arange(len(images)) if rows is None else rows
    features = outputs(body, prepared, images, rows)
    kept = finite(features)
    if not kept.any():
        return 0.0
    rows, standard = rows[kept], Standard(features[kept])
    classes, targets = labels[rows].unique(return_inverse=True)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(rng.integers(2**63)))  # for a net that draws
        layer = nn.Linear(len(standard.mean), len(classes))
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        whole = nn.Sequential(body, standard, layer)
        _train(whole, images, rows, targets, changed, rng, epochs=epochs, rate=rate, batch_size=batch_size)
    logits = outputs(whole, prepared, test_images)
    return share(classes[logits.argmax(dim=1)], test_labels, finite(logits))


def _train(
    whole: nn.Module,
    images: Tensor,
    rows: Tensor,  # (n,) of the images
    targets: Tensor,  # (n,) in [0, C)
    changed: Changed,
    rng: np.random.Generator,
    *,
    epochs: int,
    rate: float,
    batch_size: int,
) -> None:
    device = next(whole.parameters()).device
    whole.to(device).train()
    optimizer = torch.optim.SGD(whole.parameters(), rate, momentum=MOMENTUM)
    steps = epochs * math.ceil(len(rows) / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for _ in range(epochs):
        for part in torch.from_numpy(rng.permutation(len(rows))).split(batch_size):
            x = changed(images[rows[part]], rng).to(device)
            optimizer.zero_grad()
            cross_entropy(whole(x), targets[part].to(device)).backward()
            nn.utils.clip_grad_norm_(whole.parameters(), CLIP_NORM)
            optimizer.step()
            schedule.step()
