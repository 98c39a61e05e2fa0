"""What a data set becomes: images held by clients, and a test set that no client has seen.

Where the images have authors, an author is a client: that partition is the natural one. Glyphs and Omniglot
are collections of drawings, each of one character of one alphabet by one person, so there a client is an
(alphabet, person) pair. Other partitions are made: so many classes to a client, Dirichlet, IID.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config_error import ConfigError
from .apportion import apportion
from .array_file import map_images, mapped_from
from .handed_over import integer, integers, listed, tensor

TASKS = ("classification", "retrieval")
PARTITIONS = ("natural", "classes", "dirichlet", "iid")


@dataclass(frozen=True)
class Found:
    """What a data set holds; of one from files it is known before any image is read."""

    name: str
    classes: int
    training: int  # images
    test: int
    clients: int
    how: Partition | None = None  # what made the clients, where its numbers were chosen to fit the data
    notes: tuple[str, ...] = ()  # what one should know of how it was found: "left out: 6 files (.txt 6)"

    @property
    def line(self) -> str:
        """As "4 classes, 40 training and 8 test images, 4 clients; left out: 24 files (.jfif 6, ...)"."""
        images = f"{self.training:,} training and {self.test:,} test images"
        classes, clients = _many(self.classes, "class", "classes"), _many(self.clients, "client", "clients")
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

    def __repr__(self) -> str:
        return f"<FederatedData {self.name}, {self.task}: {self.found.line}>"

    @property
    def found(self) -> Found:
        counts = self.num_classes, len(self.images), len(self.test_images), len(self.clients)
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
        for name in ("clients", "client_names", "class_names", "test_clients", "newcomers"):
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
    retrieval.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    of_image = drawings.alphabet[drawings.character]
    if task == "classification":
        test = drawings.in_test
    else:
        test = np.isin(of_image, draw_share(len(drawings.alphabet_names), seed, holdout))
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
    authors, owner = _authors(drawings, of_image, train)
    how = how or Partition("natural")
    rows, names = divide(labels, how, seed, authors, owner)
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
        test_clients=divide_test(labels, rows, test_labels, how, task, seed),
    )


def draw_share(
    count: int, seed: int, share: float, *, name: str = "holdout", of: str = "alphabets"
) -> np.ndarray:
    """Which of `count` are held out: a share of them, at least one, never all."""
    if not 0 < share < 1:
        raise ValueError(f"{name}: expected a share of the {of} between 0 and 1, got {share}")
    if count < 2:
        raise ValueError(f"task 'retrieval': expected at least 2 {of}, to hold one out, got {count}")
    return _random(seed, 0x401D).permutation(count)[: min(max(round(share * count), 1), count - 1)]


def _authors(
    drawings: Drawings, of_image: np.ndarray, train: np.ndarray
) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the (alphabet, person) pairs, and which of them drew each of `train`."""
    pairs, owner = np.unique(np.stack([of_image[train], drawings.person[train]]), axis=1, return_inverse=True)
    return tuple(f"{drawings.alphabet_names[a]}/{p:02d}" for a, p in pairs.T), owner.ravel()


# ---- who holds what ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Partition:
    """How the training images are divided among clients, every image to one of them.

    "natural": to their authors. "classes": every client has `classes_per_client` classes and about as many
    images as the others, as in the FedSS paper. "dirichlet": every client has as many images, of classes by
    its own draw from Dirichlet(alpha * shares of the classes), as in Hsu, Qi and Brown, arXiv:1909.06335.
    "iid": as many images, at random.
    """

    kind: str = "natural"  # one of PARTITIONS
    num_clients: int = 0  # 0: one for every `images_per_client` images
    images_per_client: int | None = 100  # None: as `fitted` finds, so for classes_per_client
    classes_per_client: int | None = 20
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in PARTITIONS:
            raise ValueError(f"partition: expected one of {', '.join(PARTITIONS)}, got {self.kind!r}")
        for name, low in (("num_clients", 0), ("images_per_client", 1), ("classes_per_client", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name}: expected at least {low}, got {value}")
        if not self.alpha > 0:
            raise ValueError(f"dirichlet_alpha: expected a number greater than 0, got {self.alpha}")

    def fitted(self, sizes: np.ndarray) -> Partition:  # (C,) images of each class
        """With a number where None stands, such that these images can be divided, if the others let them be.

        By default 20 classes, or all there are where they are fewer, and 100 images; of less than 1,000
        images a tenth, but at least 10, so that there are several clients.
        """
        images = self.images_per_client or min(100, max(10, int(sizes.sum()) // 10))
        found = replace(self, images_per_client=images)
        if self.kind != "classes":
            return replace(found, classes_per_client=self.classes_per_client or 20)
        shares = _Shares(sizes)
        count = found.clients_of(shares.images)
        if not self.num_clients and self.images_per_client is None:
            count = shares.nearest_count(count, self.classes_per_client)
            found = replace(found, images_per_client=-(-shares.images // count))
            if found.clients_of(shares.images) != count:  # no number of images makes so many clients
                found = replace(found, num_clients=count)
        low, high = shares.bounds(count)
        return replace(found, classes_per_client=self.classes_per_client or max(1, min(high, max(low, 20))))

    def clients_of(self, num_images: int) -> int:
        """How many clients share so many images."""
        assert self.images_per_client is not None
        count = self.num_clients or -(-num_images // self.images_per_client)
        if count > num_images:
            raise ConfigError(
                "num_clients", f"expected at most {num_images}, the images there are, got {count}"
            )
        return count


class _Shares:
    """What numbers of clients and of classes of each can be, in the partition "classes".

    K clients of exactly P classes need a shard for each, K * P: at least one of every class, and of a class
    at most one for each of its images and one for each client.
    """

    def __init__(self, sizes: np.ndarray):
        self.sizes = np.sort(sizes[sizes > 0])
        self.classes, self.images = len(self.sizes), int(sizes.sum())
        self._below = np.concatenate([[0], np.cumsum(self.sizes)])

    def most(self, num_clients: int) -> int:
        """Shards: the sum of min(size, K)."""
        small = int(np.searchsorted(self.sizes, num_clients))
        return int(self._below[small]) + (self.classes - small) * num_clients

    def bounds(self, num_clients: int) -> tuple[int, int]:
        """(least, most) classes of each client; the least is the greater where there is no such number."""
        return -(-self.classes // num_clients), self.most(num_clients) // num_clients

    def nearest_count(self, wanted: int, classes_per_client: int | None) -> int:
        """The number of clients that can be which is nearest to `wanted`; `wanted` where none can."""
        if classes_per_client is None:
            return next(count for count in range(wanted, 0, -1) if self._can_be(count))  # one client can
        least = -(-self.classes // classes_per_client)
        count = max(wanted, least)
        while count > least and self.most(count) < count * classes_per_client:
            count -= 1
        return count if self.most(count) >= count * classes_per_client else wanted

    def _can_be(self, num_clients: int) -> bool:
        low, high = self.bounds(num_clients)
        return low <= high


Clients = tuple[tuple[Tensor, ...], tuple[str, ...]]  # the rows that each holds, ascending; their names


def divide(
    labels: np.ndarray,  # (N,) of the training images
    how: Partition,
    seed: int,
    authors: Sequence[str] | None = None,
    owner: np.ndarray | None = None,  # (N,): whose of `authors` an image is
) -> Clients:
    """Raises ConfigError where the images have no authors, or the numbers can't be had."""
    if how.kind == "natural":
        if authors is None or owner is None:
            raise ConfigError(
                "partition",
                "these images have no authors to be clients: expected one of "
                f"{', '.join(PARTITIONS[1:])}, got 'natural'",
            )
        if how.num_clients:
            raise ConfigError(
                "num_clients",
                f"expected 0 for the natural partition, whose clients are the {len(authors)} authors, "
                f"got {how.num_clients}",
            )
        return _held(owner, len(authors)), tuple(authors)
    how = how.fitted(np.bincount(labels))
    count = how.clients_of(len(labels))
    if how.kind == "classes":
        assert how.classes_per_client is not None  # as it is fitted
        holder = by_classes(labels, count, how.classes_per_client, seed)
    elif how.kind == "dirichlet":
        holder = by_dirichlet(labels, count, how.alpha, seed)
    else:
        holder = iid(len(labels), count, seed)
    return _held(holder, count), tuple(f"client {k}" for k in range(count))


def divide_test(
    labels: np.ndarray,  # (N,) of the training images
    clients: Sequence[Tensor],  # the training images that each holds
    test_labels: np.ndarray,  # (T,)
    how: Partition,
    task: str,
    seed: int,
) -> tuple[Tensor, ...]:  # the test images of each, ascending
    """Each class' test images cut among its holders, in proportion to their training images of it.

    Every image goes to one of them, drawn by `seed`. None does, as (), in the natural partition, whose test
    images are other people's, and of a retrieval, whose classes nobody holds.
    """
    if how.kind == "natural" or task != "classification":
        return ()
    count, rng = len(clients), _random(seed, 0x7E57)
    holder = np.repeat(np.arange(count), [len(held) for held in clients])
    pairs, images = np.unique(labels[torch.cat(tuple(clients)).numpy()] * count + holder, return_counts=True)
    of_class = np.bincount(test_labels, minlength=int(labels.max()) + 1)
    parts = apportion(of_class, pairs // count, images, rng)
    order = rng.permutation(len(test_labels))
    order = order[np.argsort(test_labels[order], kind="stable")]
    tester = np.full(len(test_labels), count)  # of the classes that nobody holds
    tester[order[np.isin(test_labels[order], labels)]] = np.repeat(pairs % count, parts)
    return _held(tester, count + 1)[:count]


def _held(holder: np.ndarray, count: int) -> tuple[Tensor, ...]:
    order = np.argsort(holder, kind="stable").astype(np.int64)
    ends = np.cumsum(np.bincount(holder, minlength=count))[:-1]
    return tuple(torch.from_numpy(part) for part in np.split(order, ends))


def iid(num_images: int, num_clients: int, seed: int) -> np.ndarray:  # (N,): the client of each image
    """At random; numbers of images differ by one at most."""
    order = _random(seed, 0x11D).permutation(num_images)
    holder = np.empty(num_images, dtype=np.int64)
    holder[order] = np.arange(num_images) % num_clients
    return holder


def by_classes(
    labels: np.ndarray,  # (N,) int64 in [0, C)
    num_clients: int,
    classes_per_client: int,
    seed: int,
) -> np.ndarray:  # (N,): the client of each image
    """Every client has exactly `classes_per_client` classes, and about as many images as the others.

    Classes are cut into num_clients * classes_per_client shards, the largest into most. Clients take a shard
    each in turn, from the largest to the smallest, so that their numbers of images differ by little more
    than the largest shard and the smallest. A class' shards are neighbours in that order and no more than
    there are clients, so none comes to one client twice. Raises ValueError where that many shards can't be.
    """
    rng = _random(seed, 0xC1A)
    sizes = np.bincount(labels)
    shards = _shards(sizes, num_clients, num_clients * classes_per_client)
    classes = np.flatnonzero(shards)
    classes = rng.permutation(classes)
    classes = classes[np.argsort(-sizes[classes] / shards[classes], kind="stable")]
    first = np.zeros(len(sizes), dtype=np.int64)  # of each class' shards, in the order of dealing
    first[classes] = np.cumsum(shards[classes]) - shards[classes]
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    place = np.arange(len(labels)) - (np.cumsum(sizes) - sizes)[labels[order]]  # among its class' images
    own = labels[order]
    holder = np.empty(len(labels), dtype=np.int64)
    holder[order] = rng.permutation(num_clients)[(first[own] + place % shards[own].clip(1)) % num_clients]
    return holder


def _shards(sizes: np.ndarray, num_clients: int, wanted: int) -> np.ndarray:
    """(C,): into how many shards each class is cut, `wanted` in all, none of them empty."""
    shards = (sizes > 0).astype(np.int64)
    most = np.minimum(sizes, num_clients)
    if not shards.sum() <= wanted <= most.sum():
        low, high = _Shares(sizes).bounds(num_clients)
        raise ConfigError(
            "classes_per_client",
            f"{int(sizes.sum())} images of {int(shards.sum())} classes among {num_clients} clients: expected "
            f"a number from {low} to {high}, got {wanted // num_clients}",
        )
    heap = [(-size, c) for c, size in enumerate(sizes.tolist()) if size]
    heapq.heapify(heap)
    for _ in range(wanted - int(shards.sum())):
        while shards[heap[0][1]] >= most[heap[0][1]]:
            heapq.heappop(heap)
        c = heap[0][1]
        shards[c] += 1
        heapq.heapreplace(heap, (-sizes[c] / shards[c], c))
    return shards


def by_dirichlet(
    labels: np.ndarray,  # (N,) int64 in [0, C)
    num_clients: int,
    alpha: float,
    seed: int,
) -> np.ndarray:  # (N,): the client of each image
    """Client k draws q ~ Dirichlet(alpha * shares of the classes), then its images by q, without replacement.

    Once a class is used up, the rest of q stands for the others; once q is, another is drawn of the classes
    that are left. Numbers of images differ by one at most.
    """
    rng = _random(seed, 0xD12)
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    left = np.bincount(labels)
    classes = np.flatnonzero(left)
    left, prior = left[classes], left[classes] / len(labels)
    following = np.cumsum(left) - left  # the place in `order` of each class' next image
    holder = np.empty(len(labels), dtype=np.int64)
    for k, needed in enumerate(np.diff(np.linspace(0, len(labels), num_clients + 1).astype(np.int64))):
        taken = _draw(alpha * prior, left, int(needed), rng)
        for c in np.flatnonzero(taken):
            holder[order[following[c] : following[c] + taken[c]]] = k
        following += taken
        left = left - taken
    return holder


def _draw(
    alphas: np.ndarray,  # (C,)
    left: np.ndarray,  # (C,) images
    needed: int,
    rng: np.random.Generator,
) -> np.ndarray:  # (C,) images, `needed` in all
    taken = np.zeros_like(left)
    q = rng.dirichlet(alphas)
    while needed:
        shares = np.where(left > taken, q, 0.0)
        if not shares.sum() > 0:  # all that q has a share in is used up
            some = np.flatnonzero(left > taken)
            q[some] = rng.dirichlet(alphas[some])
            continue
        found = np.minimum(rng.multinomial(needed, shares / shares.sum()), left - taken)
        taken += found
        needed -= int(found.sum())
    return taken


def _random(seed: int, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, purpose])))
