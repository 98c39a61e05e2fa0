"""ImageNet-21k: a folder for each WordNet synset (Deng, Dong, Socher, Li, Li and Fei-Fei, CVPR 2009).

    n01440764/n01440764_10026.JPEG

As in the FedSS paper (A.4): of every class a fifth of the images, at random, is the test set; the others go
to 25,691 clients of about 400 images and 20 classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from .class_folders import ClassFolders
from .federated_data import FederatedData, Found
from .image_folder import from_files, split_images
from .images import OnProgress
from .partition import Partition

SOURCE = "https://image-net.org/download-images (the full release, each n<number>.tar unpacked to a folder)"
CLIENTS = 25_691
SYNSET = re.compile(r"n\d{8}")


def load_imagenet21k(
    *,
    data_dir: Path | None,
    seed: int,
    task: str = "classification",
    cache_dir: Path | None = None,
    image_size: int = 256,
    skip_damaged: bool = False,
    on_progress: OnProgress | None = None,
    how: Partition | None = None,
    on_found: Callable[[Found], None] | None = None,
) -> FederatedData:
    """The images of every folder n<8 digits> in `data_dir`; `seed` draws the test's fifth and the clients."""
    if task != "classification":
        raise ValueError(f"task: expected classification for imagenet21k, got {task!r}")
    folder, walk = _existing(data_dir), ClassFolders("imagenet21k", skip_damaged=skip_damaged)
    by_class = walk.classes(folder)
    strange = [name for name in by_class if not SYNSET.fullmatch(name)]
    if strange:
        raise ValueError(
            f"imagenet21k: {data_dir}/{strange[0]} is no synset: expected folders n<8 digits> only; other "
            "images are of the data set image_folder"
        )
    train, test = split_images(by_class, seed, 0.2)
    return from_files(
        "imagenet21k",
        train,
        test,
        task=task,
        seed=seed,
        image_size=image_size,
        cache_dir=cache_dir,
        source=SOURCE,
        skip_damaged=skip_damaged,
        on_progress=on_progress,
        how=how or Partition("classes", num_clients=CLIENTS),
        notes=walk.notes,
        on_found=on_found,
    )


def _existing(data_dir: Path | None) -> Path:
    wanted = "a folder for each synset, such as n01440764"
    if data_dir is None:
        raise FileNotFoundError(
            f"imagenet21k: no folder given to look for {wanted} in; get them from {SOURCE}"
        )
    folder = Path(data_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"imagenet21k: {folder} is not a folder; expected {wanted}, from {SOURCE}")
    if not any(SYNSET.fullmatch(child.name) and child.is_dir() for child in folder.iterdir()):
        tars = " (the .tar files in it are to be unpacked)" if any(folder.glob("n*.tar")) else ""
        raise FileNotFoundError(f"imagenet21k: looked for {wanted} in {folder}{tars}; get them from {SOURCE}")
    return folder
