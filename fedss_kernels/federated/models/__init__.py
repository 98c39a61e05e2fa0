"""Nets from images (B, channels, H, W), floats in [0, 1], to embeddings (B, D). Any such nn.Module serves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from .small import FourConvNet, SmallConvNet
from .vision import mobilenet_v3_large, mobilenet_v3_small, resnet18

MODELS: dict[str, Callable[..., nn.Module]] = {
    "conv4": SmallConvNet,
    "conv4_rgb": partial(SmallConvNet, in_channels=3),
    "conv4_32": FourConvNet,
    "mobilenet_v3_small": mobilenet_v3_small,
    "mobilenet_v3_large": mobilenet_v3_large,
    "resnet18": resnet18,
}
SIDES = {
    "conv4": 32,
    "conv4_rgb": 32,
    "conv4_32": 37,  # it sees 32 of them
}  # pixels on a side of the images that a net is for; the others take any


def build_model(name: str, embedding_dim: int, seed: int, **options: object) -> nn.Module:
    """The model `name`, one of MODELS, with weights that are a function of `seed` alone.

    Raises ValueError for an unknown name, a model that needs torchvision where there is none, or one that
    `refuse_batch_norm` refuses.
    """
    if name not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {name!r}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = MODELS[name](embedding_dim=embedding_dim, **options)
    refuse_batch_norm(model)
    return model


def refuse_batch_norm(model: nn.Module) -> None:
    """Raises ValueError, naming the module, if any norm of `model` keeps running statistics.

    They are no parameters: no gradient moves them, and a client's are of its own few classes, so that their
    average describes nobody's images.
    """
    for name, module in model.named_modules():
        if getattr(module, "track_running_stats", False):
            raise ValueError(
                f"model: {name or 'the model itself'} ({type(module).__name__}) keeps running statistics of "
                f"its batches, which clients with different classes can't average; use GroupNorm instead"
            )
