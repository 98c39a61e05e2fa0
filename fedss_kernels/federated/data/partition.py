"""Who holds which images: the training images of each client, and the test images that are its own.

Where the images have authors, an author is a client: that partition is the natural one. Other partitions are
made: so many classes to a client, Dirichlet, IID.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..config_error import ConfigError
from .apportion import apportion

PARTITIONS = ("natural", "classes", "dirichlet", "iid")


class Undivided(ConfigError):
    """Images that cannot be divided so, nor among more than `clients`."""

    def __init__(self, option: str, message: str, *more: tuple[str, str], clients: int = 0):
        super().__init__(option, message, *more)
        self.clients = clients


def draw_share(
    count: int, seed: int, share: float, *, name: str = "holdout", of: str = "alphabets"
) -> np.ndarray:
    """Which of `count` are held out: a share of them, at least one, never all."""
    if not 0 < share < 1:
        raise ValueError(f"{name}: expected a share of the {of} between 0 and 1, got {share}")
    if count < 2:
        raise ValueError(
            f"task: expected classification, as for a retrieval one of at least 2 {of} is held out, got "
            f"'retrieval' with {count}"
        )
    return _random(seed, 0x401D).permutation(count)[: min(max(round(share * count), 1), count - 1)]


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

        By default 20 classes and 100 images. Of less than 80 classes a quarter, but at least 2, so that
        clients differ; of less than 1,000 images a tenth, but at least 10, so that there are several.
        """
        images = self.images_per_client or min(100, max(10, int(sizes.sum()) // 10))
        found = replace(self, images_per_client=images)
        if self.kind != "classes":
            return replace(found, classes_per_client=self.classes_per_client or 20)
        shares = _Shares(sizes)
        try:
            count = found.clients_of(shares.images)
        except Undivided as error:
            too_many = shares.too_many(self.classes_per_client)
            raise Undivided(*error.mistakes[0], *too_many, clients=error.clients) from None
        if not self.num_clients and self.images_per_client is None:
            count = shares.nearest_count(count, self.classes_per_client)
            found = replace(found, images_per_client=-(-shares.images // count))
            if found.clients_of(shares.images) != count:  # no number of images makes so many clients
                found = replace(found, num_clients=count)
        low, high = shares.bounds(count)
        few = min(20, max(2, shares.classes // 4))
        return replace(found, classes_per_client=self.classes_per_client or max(1, min(high, max(low, few))))

    def clients_of(self, num_images: int) -> int:
        """How many clients share so many images."""
        assert self.images_per_client is not None
        count = self.num_clients or -(-num_images // self.images_per_client)
        if count > num_images:
            expected = f"expected at most {num_images}, the images there are, got {count}"
            raise Undivided("num_clients", expected, clients=num_images)
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

    def too_many(self, classes_per_client: int | None) -> Iterator[tuple[str, str]]:
        """What is wrong with so many classes of each client, however many clients there are."""
        if classes_per_client and classes_per_client > self.classes:
            expected = f"expected at most {self.classes}, the classes there are"
            yield "classes_per_client", f"{expected}, got {classes_per_client}"

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
        raise Undivided(
            "classes_per_client",
            f"{int(sizes.sum())} images of {int(shards.sum())} classes among {num_clients} clients: expected "
            f"a number from {low} to {high}, got {wanted // num_clients}",
            clients=num_clients,
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
