"""Collections of drawings, as Glyphs and Omniglot are: each of one character of one alphabet by one person.

So there a client is an (alphabet, person) pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .federated_data import TASKS, FederatedData
from .known_classes import of_known, say_unknown, untested
from .partition import Partition, divide, divide_test, draw_share


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


def partition(
    name: str, drawings: Drawings, task: str, seed: int, holdout: float, how: Partition | None = None
) -> FederatedData:
    """Gives every (alphabet, person) pair its drawings as a client, and keeps a test set apart.

    "classification": all characters are classes; the people of the test split are the test set.
    "retrieval": whole alphabets, a share `holdout` of them drawn by `seed`, are the test set with
    everybody's drawings of them; the other alphabets, again with everybody's drawings, are the training
    set. Classes are numbered 0, 1, ... in the order of `character_names`, separately in the test set of a
    retrieval. Characters of a classification that nobody in training draws are left out of the test.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    of_image = drawings.alphabet[drawings.character]
    if task == "classification":
        test = drawings.in_test
    else:
        test = np.isin(of_image, draw_share(len(drawings.alphabet_names), seed, holdout))
    train, tested = np.flatnonzero(~test), np.flatnonzero(test)
    shown = drawings.character[tested]
    classes, labels, known, test_labels = of_known(drawings.character[train], shown)
    notes = tuple[str, ...]()
    if task == "classification":
        unknown = np.setdiff1d(shown, classes)
        notes = say_unknown(name, [drawings.character_names[c] for c in unknown])
        notes += untested(len(np.setdiff1d(classes, shown)))
        tested = tested[known]
    else:
        test_labels = np.unique(shown, return_inverse=True)[1]
    if not (len(train) and len(tested)):
        raise ValueError(
            f"{name}: nothing is left for {'the test' if len(train) else 'training'} in this data"
        )
    authors, owner = _authors(drawings, of_image, train)
    how = how or Partition("natural")
    rows, names = divide(labels, how, seed, authors, owner)
    return FederatedData(
        name=name,
        images=torch.from_numpy(drawings.images[train]).unsqueeze(1),
        labels=torch.from_numpy(labels),
        clients=rows,
        client_names=names,
        test_images=torch.from_numpy(drawings.images[tested]).unsqueeze(1),
        test_labels=torch.from_numpy(test_labels.astype(np.int64)),
        num_classes=len(classes),
        class_names=tuple(drawings.character_names[c] for c in classes),
        task=task,
        notes=notes,
        test_clients=divide_test(labels, rows, test_labels, how, task, seed),
    )


def _authors(
    drawings: Drawings, of_image: np.ndarray, train: np.ndarray
) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the (alphabet, person) pairs, and which of them drew each of `train`."""
    pairs, owner = np.unique(np.stack([of_image[train], drawings.person[train]]), axis=1, return_inverse=True)
    return tuple(f"{drawings.alphabet_names[a]}/{p:02d}" for a, p in pairs.T), owner.ravel()
