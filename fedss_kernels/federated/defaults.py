"""Defaults, of options that are left out, that depend on the data set, the method and the similarity."""

import math
from collections.abc import Callable
from typing import Any

from .algorithms import METHODS

OWN = "own"  # the data set or model that a caller hands to run() as an object
EVAL_EVERY = 10  # rounds, at most
FITTED = None  # a default that is chosen when the data are found: see loading.py

# By data set; "own" data take those of glyphs.
#
# Those of glyphs and omniglot were found by trial, the same for all methods. What mattered: a small initial
# W, as with cosines a row's step goes as client_lr / |w|^2; a softmax flatter than at the paper's scale of
# 20, where probably a few hard negatives carry the denominator and FedSS seldom draws them; shifts, where
# images are few; more rounds of fewer clients rather than the reverse.
_SMALL: dict[str, Any] = {
    "task": "classification",
    "image_size": 0,
    "crop_size": 0,
    "partition": "natural",
    "num_clients": 0,
    "images_per_client": 100,
    "classes_per_client": 20,
    "model": "conv4",
    "embedding_dim": 64,
    "warmup_rounds": 20,
    "lr_decay": "cosine",
    "client_lr": 0.05,
    "client_momentum": 0.0,
    "temperature": 0.2,
    "weight_init_scale": 0.01,
}
# The FedSS paper's (4 and A), but for what it does not say: the initial W, ImageNet-21k's cohort.
# num_negatives is for its S of 100 (SOP), 170 (Landmarks) and 220 (ImageNet-21k).
_PAPER = _SMALL | {
    "image_size": 256,
    "crop_size": 224,
    "partition": "classes",
    "model": "mobilenet_v3_large",
    "num_negatives": 80,
    "batch_size": 32,
    "warmup_rounds": 0,
    "lr_decay": "constant",
    "client_lr": 0.01,
    "max_shift": 0,
    "scale": 20.0,
}
# Nobody's: a beginning. 100 clients by Dirichlet as in Hsu, Qi and Brown, arXiv:1909.06335.
_CIFAR = _SMALL | {
    "partition": "dirichlet",
    "num_clients": 100,
    "model": "conv4_rgb",
    "rounds": 500,
    "cohort": 10,
    "batch_size": 32,
    "max_shift": 4,
    "scale": 10.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "glyphs": _SMALL
    | {"num_negatives": 38, "rounds": 250, "cohort": 16, "batch_size": 10, "max_shift": 0, "scale": 8.0},
    "omniglot": _SMALL
    | {"num_negatives": 60, "rounds": 800, "cohort": 16, "batch_size": 16, "max_shift": 2, "scale": 10.0},
    "sop": _PAPER | {"task": "retrieval", "rounds": 2000, "cohort": 32},
    "landmarks": _PAPER | {"partition": "natural", "rounds": 5000, "cohort": 64},
    "imagenet21k": _PAPER
    | {
        "num_clients": 25_691,
        "images_per_client": 400,
        "num_negatives": 200,
        "rounds": 25_000,
        "cohort": 64,
        "client_lr": 0.001,
    },
    "image_folder": _PAPER
    | {
        "rounds": 2000,
        "num_negatives": FITTED,
        "cohort": FITTED,
        "images_per_client": FITTED,
        "classes_per_client": FITTED,
        "model": FITTED,
        "image_size": FITTED,
        "crop_size": FITTED,
        "client_lr": FITTED,
        "scale": FITTED,
        "warmup_rounds": FITTED,
    },
    "cifar10": _CIFAR | {"num_negatives": 2},
    "cifar100": _CIFAR | {"num_negatives": 20},
}
PRESETS[OWN] = PRESETS["glyphs"]
FITTED_OPTIONS = {name for of in PRESETS.values() for name, value in of.items() if value is FITTED}


def preset(data: str, method: str) -> dict[str, Any]:
    """The defaults that are by data set, or by the method where it has its own."""
    return PRESETS[data] | dict(METHODS[method].presets if method in METHODS else {})


# Of the similarity dot, whatever the data: those of torch's linear layer, whose numbers are uniform in
# +-1 / sqrt(D).
LINEAR: dict[str, Callable[[Any], float]] = {
    "scale": lambda dim: 1.0,
    "weight_init_scale": lambda dim: 1 / math.sqrt(3 * dim) if isinstance(dim, int) and dim > 0 else 1.0,
}
