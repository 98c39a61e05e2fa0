"""The data sets: images held by clients. `load` one by name, or make a FederatedData of your own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cifar import load_cifar10, load_cifar100
from .damage import DamagedImages, MissingImages
from .federated_data import TASKS, FederatedData, Found
from .glyphs import load_glyphs
from .image_folder import load_image_folder
from .imagenet21k import load_imagenet21k
from .landmarks import load_landmarks
from .omniglot import load_omniglot
from .partition import PARTITIONS, Partition
from .sop import load_sop

__all__ = [
    "DATASETS",
    "PARTITIONS",
    "RESIZED",
    "TASKS",
    "DamagedImages",
    "FederatedData",
    "Found",
    "MissingImages",
    "Partition",
    "load",
]

DATASETS: dict[str, Callable[..., FederatedData]] = {
    "glyphs": load_glyphs,
    "omniglot": load_omniglot,
    "sop": load_sop,
    "landmarks": load_landmarks,
    "imagenet21k": load_imagenet21k,
    "image_folder": load_image_folder,
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
}
RESIZED = ("sop", "landmarks", "imagenet21k", "image_folder")  # whose images are resized, to `image_size`


def load(
    name: str,
    *,
    data_dir: Path | None,
    seed: int,
    task: str = "classification",
    cache_dir: Path | None = None,
    **options: Any,
) -> FederatedData:
    """The data set `name`, one of DATASETS, partitioned among its clients.

    data_dir: the folder that holds its files (glyphs needs none). seed: decides all that is random in it.
    task: "classification", or "retrieval" whose test classes are disjoint from training's. cache_dir: where
    made images are kept (default: $FEDSS_CACHE, else the user's cache folder). options: the keywords of the
    loader in DATASETS; all have `how`, the Partition, by default the data set's own, and all that read files
    have skip_damaged, to go on without those that can't be read, and on_progress, called (what, done, total).

    Raises ValueError for a name, task or option out of range, FileNotFoundError where data isn't there,
    MissingImages or DamagedImages where some images aren't, or can't be read.
    """
    if name not in DATASETS:
        raise ValueError(f"data set: expected one of {', '.join(DATASETS)}, got {name!r}")
    return DATASETS[name](data_dir=data_dir, seed=seed, task=task, cache_dir=cache_dir, **options)
