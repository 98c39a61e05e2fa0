"""Nets from images (B, channels, H, W), floats in [0, 1], to embeddings (B, D). Any such nn.Module serves."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from .isotropic import isotropic_net
from .resnet32 import conv4_ws, resnet18_32
from .small import FourConvNet, SmallConvNet
from .vision import mobilenet_v3_large, mobilenet_v3_small, resnet18
from .vit import vision_transformer

MODELS: dict[str, Callable[..., nn.Module]] = {
    "conv4": SmallConvNet,
    "conv4_rgb": partial(SmallConvNet, in_channels=3),
    "conv4_32": FourConvNet,
    "conv4_ws": conv4_ws,
    "isotropic": isotropic_net,
    "vit": vision_transformer,
    "mobilenet_v3_small": mobilenet_v3_small,
    "mobilenet_v3_large": mobilenet_v3_large,
    "resnet18": resnet18,
    "resnet18_32": resnet18_32,
}
# What may follow a name, as in vit:depth=6,patch=8: whole numbers that its net is made with.
SETTINGS = {"isotropic": ("depth", "patch"), "vit": ("depth", "heads", "patch", "side")}
SIDES = {
    "conv4": 32,
    "conv4_rgb": 32,
    "conv4_32": 37,  # these see 32 of them
    "conv4_ws": 37,
    "isotropic": 37,
    "vit": 37,
    "resnet18_32": 37,
}  # pixels on a side of the images that a net is for; the others are for large ones
TAKES = {
    "conv4": (1, 25, 32),
    "conv4_rgb": (3, 25, 32),
    "conv4_32": (3, 32, 47),
}  # (channels, least pixels on a side, most); vit takes those of its setting side, the others any
# D of the nets whose features are the embedding, as no layer follows.
FEATURES = {"conv4_32": 256, "conv4_ws": 128, "resnet18_32": 512}


def build_model(name: str, embedding_dim: int, seed: int, **options: object) -> nn.Module:
    """The model `name`, one of MODELS or with its settings, with weights that are a function of `seed` alone.

    Raises ValueError for an unknown name or setting, a model that needs torchvision where there is none, or
    one that `refuse_batch_norm` refuses.
    """
    family, settings = _read(name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = MODELS[family](embedding_dim=embedding_dim, **settings, **options)
    refuse_batch_norm(model)
    return model


def family_of(name: str) -> str:
    """A model's name without its settings: "vit" of "vit:depth=6"."""
    return name.partition(":")[0]


def _read(name: str) -> tuple[str, dict[str, int]]:
    """The family and the settings: of "vit:depth=6,patch=8" ("vit", {"depth": 6, "patch": 8})."""
    family, colon, text = name.partition(":")
    if family not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {name!r}")
    allowed, settings = SETTINGS.get(family, ()), dict[str, int]()
    for part in text.split(",") if colon else ():
        key, _, value = part.partition("=")
        if key not in allowed or key in settings or not re.fullmatch("[0-9]{1,4}", value):
            some = f"settings of {', '.join(allowed)}, each once, as {family}:depth=6,patch=8"
            raise ValueError(f"model: {family}: expected {some if allowed else 'no settings'}, got {part!r}")
        settings[key] = int(value)
    return family, settings


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
