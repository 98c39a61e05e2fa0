"""What a data set becomes: images held by clients, and a test set that no client has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .array_file import map_images, mapped_from
from .handed_over import integer, integers, listed, tensor
from .partition import Partition

TASKS = ("classification", "retrieval")


@dataclass(frozen=True)
class Found:
    """What a data set holds; of one from files it is known before any image is read."""

    name: str
    classes: int
    training: int  # images
    test: int
    clients: int  # 0: there are none, as all is in one place
    how: Partition | None = None  # what made the clients, where its numbers were chosen to fit the data
    notes: tuple[str, ...] = ()  # what one should know of how it was found: "left out: 6 files (.txt 6)"

    @property
    def line(self) -> str:
        """As "4 classes, 40 training and 8 test images, 4 clients; left out: 24 files (.jfif 6, ...)"."""
        images = f"{self.training:,} training and {self.test:,} test images"
        classes = _many(self.classes, "class", "classes")
        clients = _many(self.clients, "client", "clients") if self.clients else "in one place"
        return "; ".join([f"{classes}, {images}, {clients}", *self.notes])


def _many(count: int, one: str, several: str) -> str:
    return f"{count:,} {one if count == 1 else several}"


@dataclass(frozen=True, eq=False, repr=False)
class FederatedData:
    """Training images held by clients, and a test set; a ValueError names a part that does not fit.

    Arrays of numpy and lists become tensors, labels and rows of any integer type int64.

    name: what reports call it.
    images: (N, channels, H, W) uint8 in [0, 255], the training images of all clients; a net gets them as
        float32 in [0, 1].
    labels: (N,) int64 in [0, num_classes), the class of each.
    clients: for each client k the rows of `images` that it holds, (n_k,) int64 in [0, N), at least one.
    client_names: a name for each client, as many as `clients`.
    test_images: (T, channels, H, W) uint8, at least 2, of the same size as `images`; held by no client.
    test_labels: (T,) int64. Of a classification in [0, num_classes), numbered as `labels`; of a retrieval of
        at least 0, classes that nobody trains on, numbered apart from `labels`.
    num_classes: C, the classes of training; a class matrix has a row for each, whether a client holds it or
        not.
    class_names: a name for each of the C classes.
    task: "classification", whose test images are of the training classes, or "retrieval", of others.
    how: the Partition that made the clients, where its numbers were chosen to fit; else None.
    notes: what a reader of the results should know of the data, a line each, as what was left out.
    test_clients: for each client k the rows of `test_images` that it is tested on after it has fine-tuned the
        model, (t_k,) int64 in [0, T), some maybe without one, no row twice; () where nobody knows whose they
        are.
    newcomers: people who are no clients and come when the training is over: for each the rows of `images`
        that it can fine-tune on, at least one, and those of `test_images` that it is tested on.
    test_class_names: of a retrieval a name for each of the classes in `test_labels`, if they have names.
    """

    name: str
    images: Tensor  # (N, channels, H, W) uint8
    labels: Tensor  # (N,) int64
    clients: tuple[Tensor, ...]  # of (n_k,) int64
    client_names: tuple[str, ...]
    test_images: Tensor  # (T, channels, H, W) uint8
    test_labels: Tensor  # (T,) int64
    num_classes: int
    class_names: tuple[str, ...]
    task: str
    how: Partition | None = None
    notes: tuple[str, ...] = ()
    test_clients: tuple[Tensor, ...] = ()  # of (t_k,) int64
    newcomers: tuple[tuple[Tensor, Tensor], ...] = ()  # of ((n,) int64, (t,) int64)
    test_class_names: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<FederatedData {self.name}, {self.task}: {self.found.line}>"

    @property
    def found(self) -> Found:
        held = sum(map(len, self.clients)) if self.clients else len(self.images)
        counts = self.num_classes, held, len(self.test_images), len(self.clients)
        return Found(self.name, *counts, self.how, self.notes)

    def __getstate__(self) -> dict[str, Any]:
        """Images that are mapped from a file travel to another process as its name."""
        state = dict(self.__dict__)
        for name in ("images", "test_images"):
            path = mapped_from(state[name])
            if path is not None:
                state[name] = path, tuple(state[name].shape)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in ("images", "test_images"):
            if isinstance(state[name], tuple):
                state[name] = map_images(*state[name])
        self.__dict__.update(state)

    def __post_init__(self) -> None:
        values: dict[str, Any] = {"num_classes": integer("num_classes", self.num_classes)}
        for name in ("images", "test_images"):
            values[name] = tensor(name, getattr(self, name))
        for name in ("labels", "test_labels"):
            values[name] = integers(name, getattr(self, name))
        for name in (
            "clients",
            "client_names",
            "class_names",
            "test_class_names",
            "test_clients",
            "newcomers",
        ):
            values[name] = listed(name, getattr(self, name))
        for name, rows in (("clients", _HELD), ("test_clients", _TESTED)):
            values[name] = tuple(integers(f"{name}[{k}]", of, rows) for k, of in enumerate(values[name]))
        values["newcomers"] = tuple(_newcomer(k, of) for k, of in enumerate(values["newcomers"]))
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
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
            _check_rows(f"clients[{k}]", rows, len(self.images), _HELD)
        if len(self.test_clients) not in (0, len(self.clients)):
            raise ValueError(
                f"test_clients: expected one for each of the {len(self.clients)} clients, or none, "
                f"got {len(self.test_clients)}"
            )
        for k, rows in enumerate(self.test_clients):
            _check_rows(f"test_clients[{k}]", rows, len(self.test_images), _TESTED)
        _check_once("test_clients: expected every row", self.test_clients)
        for k, (held, tested) in enumerate(self.newcomers):
            _check_rows(f"newcomers[{k}][0]", held, len(self.images), _HELD)
            _check_rows(f"newcomers[{k}][1]", tested, len(self.test_images), _TESTED)
        _check_once("newcomers: expected every test row", [tested for _, tested in self.newcomers])


_HELD, _TESTED = "a non-empty (n_k,) tensor of integers", "a (t_k,) tensor of integers"


def _newcomer(number: int, given: Any) -> tuple[Tensor, Tensor]:
    name = f"newcomers[{number}]"
    pair = listed(name, given)
    if len(pair) != 2:
        raise ValueError(f"{name}: expected a pair, rows of images and of test_images, got {len(pair)}")
    return integers(f"{name}[0]", pair[0], _HELD), integers(f"{name}[1]", pair[1], _TESTED)


def _check_rows(name: str, rows: Tensor, limit: int, expected: str) -> None:
    if rows.dim() != 1 or (expected is _HELD and not len(rows)):
        raise ValueError(f"{name}: expected {expected}, got {tuple(rows.shape)}")
    if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= limit):
        raise ValueError(f"{name}: expected rows in [0, {limit}), got {_span(rows)}")


def _check_once(expected: str, parts: Sequence[Tensor]) -> None:
    if parts:
        rows, counts = torch.cat(tuple(parts)).unique(return_counts=True)
        twice = rows[counts > 1]
        if len(twice):
            raise ValueError(f"{expected} once, got row {int(twice[0])} twice")


def _check_images(
    images_name: str, images: Tensor, labels_name: str, labels: Tensor, num_classes: int | None
) -> None:
    if images.dim() != 4 or images.dtype != torch.uint8 or not images.numel():
        raise ValueError(
            f"{images_name}: expected a non-empty (N, channels, H, W) uint8 tensor, "
            f"got {tuple(images.shape)} {images.dtype}"
        )
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"{labels_name}: expected ({len(images)},) int64, one label for each image, "
            f"got {tuple(labels.shape)}"
        )
    if int(labels.min()) < 0 or (num_classes is not None and int(labels.max()) >= num_classes):
        end = "any" if num_classes is None else num_classes
        raise ValueError(f"{labels_name}: expected classes in [0, {end}), got {_span(labels)}")


def _span(values: Tensor) -> str:
    return f"values from {int(values.min())} to {int(values.max())}"
