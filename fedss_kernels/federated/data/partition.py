"""What a data set becomes: images held by clients, and a test set that no client has seen.

Both data sets here are collections of drawings, each of one character of one alphabet by one person. That
alone decides who holds what: a client is an (alphabet, person) pair, so clients differ by authorship as
real ones do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TASKS = ("classification", "retrieval")


@dataclass(frozen=True, eq=False)
class FederatedData:
    """Training images held by clients, and a test set; a ValueError names a part that does not fit."""

    name: str
    images: Tensor  # (N, channels, H, W) uint8, the training images
    labels: Tensor  # (N,) int64 in [0, num_classes)
    clients: tuple[Tensor, ...]  # clients[k] (n_k,) int64: the rows of `images` that client k holds
    client_names: tuple[str, ...]
    test_images: Tensor  # (T, channels, H, W) uint8
    test_labels: (
        Tensor  # (T,) int64; "classification": in [0, num_classes); "retrieval": other classes, own numbering
    )
    num_classes: int  # C, the training classes
    class_names: tuple[str, ...]
    task: str  # "classification" | "retrieval"

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {self.task!r}")
        if self.num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, got {self.num_classes}")
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"class_names: expected {self.num_classes} of them, got {len(self.class_names)}")
        _check_images("images", self.images, "labels", self.labels, self.num_classes)
        limit = self.num_classes if self.task == "classification" else None
        _check_images("test_images", self.test_images, "test_labels", self.test_labels, limit)
        if self.images.shape[1:] != self.test_images.shape[1:]:
            raise ValueError(
                f"test_images: expected images of {tuple(self.images.shape[1:])} like the training's, "
                f"got {tuple(self.test_images.shape[1:])}"
            )
        self._check_clients()

    def _check_clients(self) -> None:
        if not self.clients:
            raise ValueError("clients: expected at least one")
        if len(self.client_names) != len(self.clients):
            raise ValueError(
                f"client_names: expected one for each of the {len(self.clients)} clients, "
                f"got {len(self.client_names)}"
            )
        for k, rows in enumerate(self.clients):
            if rows.dim() != 1 or rows.dtype != torch.int64 or not len(rows):
                raise ValueError(
                    f"clients[{k}]: expected a non-empty (n_k,) int64 tensor, "
                    f"got {tuple(rows.shape)} {rows.dtype}"
                )
            if int(rows.min()) < 0 or int(rows.max()) >= len(self.images):
                raise ValueError(f"clients[{k}]: expected rows in [0, {len(self.images)}), got {_span(rows)}")


def _check_images(
    images_name: str, images: Tensor, labels_name: str, labels: Tensor, num_classes: int | None
) -> None:
    if images.dim() != 4 or images.dtype != torch.uint8 or not images.numel():
        raise ValueError(
            f"{images_name}: expected a non-empty (N, channels, H, W) uint8 tensor, "
            f"got {tuple(images.shape)} {images.dtype}"
        )
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"{labels_name}: expected ({len(images)},) int64, one label for each image, "
            f"got {tuple(labels.shape)} {labels.dtype}"
        )
    if int(labels.min()) < 0 or (num_classes is not None and int(labels.max()) >= num_classes):
        end = "any" if num_classes is None else num_classes
        raise ValueError(f"{labels_name}: expected classes in [0, {end}), got {_span(labels)}")


def _span(values: Tensor) -> str:
    return f"values from {int(values.min())} to {int(values.max())}"


@dataclass(frozen=True, eq=False)
class Drawings:
    """A collection of drawings as a table, one row per drawing; what a loader reads or draws."""

    images: np.ndarray  # (N, H, W) uint8, ink is high
    character: np.ndarray  # (N,) int64: which of `character_names` it shows
    person: np.ndarray  # (N,) int64: who drew it; people of different alphabets are different clients
    in_test: np.ndarray  # (N,) bool: drawn by a person of the test split
    character_names: tuple[str, ...]
    alphabet: np.ndarray  # (characters,) int64: the alphabet of each character
    alphabet_names: tuple[str, ...]


def partition(name: str, drawings: Drawings, task: str, seed: int, holdout: float) -> FederatedData:
    """Gives every (alphabet, person) pair its drawings as a client, and keeps a test set apart.

    "classification": all characters are classes; the people of the test split are the test set.
    "retrieval": whole alphabets, a share `holdout` of them drawn by `seed`, are the test set with
    everybody's drawings of them; the other alphabets, again with everybody's drawings, are the training
    set. Classes are numbered 0, 1, ... in the order of `character_names`, separately in the test set of a
    retrieval.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    of_image = drawings.alphabet[drawings.character]
    if task == "classification":
        test = drawings.in_test
    else:
        test = np.isin(of_image, _held_out(len(drawings.alphabet_names), seed, holdout))
    if test.all() or not test.any():
        raise ValueError(
            f"{name}: nothing is left for {'training' if test.all() else 'the test'} in this data"
        )
    train = np.flatnonzero(~test)
    classes, labels = np.unique(drawings.character[train], return_inverse=True)
    shown = drawings.character[test]
    if task == "classification":
        missing = np.setdiff1d(shown, classes)
        if len(missing):
            raise ValueError(
                f"{name}: nobody in training draws {drawings.character_names[missing[0]]!r} of the test"
            )
        test_labels = np.searchsorted(classes, shown)
    else:
        test_labels = np.unique(shown, return_inverse=True)[1]
    rows, names = _clients(drawings, of_image, train)
    return FederatedData(
        name=name,
        images=torch.from_numpy(drawings.images[train]).unsqueeze(1),
        labels=torch.from_numpy(labels.astype(np.int64)),
        clients=rows,
        client_names=names,
        test_images=torch.from_numpy(drawings.images[test]).unsqueeze(1),
        test_labels=torch.from_numpy(test_labels.astype(np.int64)),
        num_classes=len(classes),
        class_names=tuple(drawings.character_names[c] for c in classes),
        task=task,
    )


def _held_out(alphabets: int, seed: int, share: float) -> np.ndarray:
    if not 0 < share < 1:
        raise ValueError(f"holdout: expected a share of the alphabets between 0 and 1, got {share}")
    if alphabets < 2:
        raise ValueError(f"task 'retrieval': expected at least 2 alphabets, to hold one out, got {alphabets}")
    count = min(max(round(share * alphabets), 1), alphabets - 1)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 0x401D])))
    return rng.permutation(alphabets)[:count]


def _clients(
    drawings: Drawings, of_image: np.ndarray, train: np.ndarray
) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """The rows (positions in `train`) of each (alphabet, person) pair, and its name."""
    pairs, owner = np.unique(np.stack([of_image[train], drawings.person[train]]), axis=1, return_inverse=True)
    order = np.argsort(owner.ravel(), kind="stable")
    ends = np.cumsum(np.bincount(owner.ravel()))[:-1]
    rows = tuple(torch.from_numpy(part.astype(np.int64)) for part in np.split(order, ends))
    return rows, tuple(f"{drawings.alphabet_names[a]}/{p:02d}" for a, p in pairs.T)
