"""What a model is worth to one client: as it is, and after the client has fine-tuned it on its own images.

FedBABU (Oh, Kim and Yun, "FedBABU: Toward Enhanced Representation for Federated Image Classification", ICLR
2022, arXiv:2106.06042) measures methods so; the images are the client's own test images. Of each client:

    initial        the share whose best class, of all C, is right
    restricted     the same of the client's own classes alone: what knowing them is worth, without training
    nearest mean   the same by the means of the embeddings of its training images of each of them
    after E        initial, after E epochs of SGD on its training images

Fine-tuning: v <- 0.9 v + g, theta <- theta - rate v, with v = 0 for each client; g is the gradient of a
batch's mean softmax loss over all the classes, or the client's own; theta are the class rows (head), the net
(body) or both (full). With cosines the gradient to a row goes as 1 / |row|, so how far it turns goes as
1 / |row|^2: rows are made of length 1 first, which changes no prediction, and one rate means the same for all
methods.

The head is trained on embeddings of plain images, made once; the net on images that are changed at random as
they were in training. All is a pure function of (seed, client).
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .any_round import OnTuned
from .clients.extractor import as_embeddings
from .clients.objectives import ClassRows
from .clients.player import Player
from .clients.sgd import sgd_step
from .config import Config
from .data import DATASETS, FederatedData
from .messages import Request
from .metrics import NOTHING, directions, nearest
from .randomness import Purpose, generator

PARTS = ("head", "body", "full")
ROWS = ("all", "own")
EPOCHS = (0, 1, 2, 3, 5, 10)
RATE = 0.01
MOMENTUM = 0.9
# client -> (phi (P,), rows (C, D)), None for what it does not keep for itself
Own = Callable[[int], tuple[Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class Tuning:
    """How clients fine-tune, and after how many epochs they are looked at. ValueError for what cannot be."""

    part: str = "head"  # what moves
    epochs: tuple[int, ...] = EPOCHS  # ascending, each once, however they are given
    rate: float = RATE
    rows: str = "all"  # the classes that the loss sums over: all, or the client's own

    def __post_init__(self) -> None:
        for name, some in {"part": PARTS, "rows": ROWS}.items():
            if getattr(self, name) not in some:
                raise ValueError(f"{name}: expected one of {', '.join(some)}, got {getattr(self, name)!r}")
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise ValueError(f"rate: expected a finite number greater than 0, got {self.rate}")
        if not self.epochs or min(self.epochs) < 0:
            raise ValueError(f"epochs: expected at least one, each at least 0, got {self.epochs}")
        object.__setattr__(self, "epochs", tuple(sorted(set(self.epochs))))


@dataclass(frozen=True)
class Personal:
    """One client's accuracies, shares of its test images."""

    client: int
    images: int  # that it fine-tunes on
    classes: int  # of these
    tested: int  # images
    initial: float
    restricted: float
    nearest_mean: float
    after: dict[int, float]  # by the number of epochs
    not_finite: bool = False  # whether fine-tuning left numbers that are not: then nothing is right

    @property
    def accuracies(self) -> dict[str, float]:
        """By the names that tables have."""
        before = {name: getattr(self, name) for name in ("initial", "restricted", "nearest_mean")}
        return before | {f"after_{epochs}": accuracy for epochs, accuracy in self.after.items()}


def personalise(
    config: Config,
    data: FederatedData,
    model: tuple[Mapping[str, Tensor] | nn.Module, Tensor],  # (net or its state, W (C, D))
    tuning: Tuning = Tuning(),
    *,
    clients: int | None = None,  # of these the first; None: all
    own: Own | None = None,  # what clients keep of the model for themselves
    on_tuned: OnTuned = lambda done, total: None,
) -> list[Personal]:
    """Of each client with test images, or of a trial's newcomers. Of `config` its seed, net, batches, scale.

    Raises ValueError where no client has test images of its own, or the model does not fit or is not finite.
    """
    tuner = FineTuner(config, data, model, tuning, own)
    tested = [client for client, (_, test) in enumerate(tuner.people) if len(test)][:clients]
    found = list[Personal]()
    for client in tested:
        on_tuned(len(found), len(tested))
        found.append(tuner.measure(client))
    return found


def measures(found: Sequence[Personal]) -> dict[str, float]:
    """The means over clients of what `personalise` found, the last after the most epochs."""

    def mean(of: Callable[[Personal], float]) -> float:
        return statistics.fmean(map(of, found))

    return {
        "initial": mean(lambda each: each.initial),
        "restricted": mean(lambda each: each.restricted),
        "nearest_mean": mean(lambda each: each.nearest_mean),
        "personalised": mean(lambda each: each.after[max(each.after)]),
    }


def check_measurable(data: FederatedData) -> None:
    """Raises ValueError where no client has test images of its own."""
    if data.task != "classification":
        raise ValueError(f"personalise: expected a classification, got a {data.task}")
    name = "newcomers" if data.newcomers else "test_clients"
    tested = [test for _, test in data.newcomers] or data.test_clients
    if any(map(len, tested)):
        return
    if tested:
        people = name.removeprefix("test_")
        raise ValueError(
            f"personalise: {name}: expected test images of some of the {len(tested)} {people}, got none"
        )
    unknown = f"personalise: nobody knows which test images of {data.name} are whose"
    if data.name not in DATASETS:
        raise ValueError(f"{unknown}: expected some in test_clients, got none")
    raise ValueError(
        f"{unknown}: in the natural partition they are of other people. Expected another partition "
        "(dirichlet, classes), or with a holdout clients who do not train"
    )


class FineTuner:
    """A model that every client fine-tunes from, in turn; it stays as it is."""

    def __init__(
        self,
        config: Config,
        data: FederatedData,
        model: tuple[Mapping[str, Tensor] | nn.Module, Tensor],
        tuning: Tuning,
        own: Own | None = None,
    ):
        check_measurable(data)
        self.config, self.data, self.tuning = config, data, tuning
        self.own = None if data.newcomers else own  # who has just come keeps nothing yet
        net, rows = model
        player = Player(config, data, net if isinstance(net, nn.Module) else None)
        self.extractor, self.changed = player.extractor, player.client.augmentation
        if not isinstance(net, nn.Module):
            self.extractor.module.load_state_dict(net)
        self.phi = self.extractor.flat.clone()
        self.people = data.newcomers or tuple(zip(data.clients, data.test_clients, strict=True))
        self.rows = self._comparable(rows)

    def _comparable(self, rows: Tensor) -> Tensor:
        """Rows to begin with, those of cosines at length 1."""
        expected = self.data.num_classes, self.config.row_dim
        if tuple(rows.shape) != expected:
            raise ValueError(f"model: expected class rows {expected}, got {tuple(rows.shape)}")
        if not (rows.isfinite().all() and self.phi.isfinite().all()):
            raise ValueError("model: it has numbers that are not finite")
        return directions(rows)[0] if self.config.similarity == "cosine" else rows.clone()

    # ---- one client

    def measure(self, client: int) -> Personal:
        held, tested = self.people[client]
        labels, own = self.data.test_labels[tested], self.data.labels[held].unique()
        rows = self._begin(client)
        train, test = self._embedded(self.data.images, held), self._embedded(self.data.test_images, tested)
        initial = _share(self._nearest(test, rows), labels)
        restricted = _of(own, self._nearest(test, rows[own]))
        near = _of(own, self._nearest_mean(test, train, torch.searchsorted(own, self.data.labels[held])))
        after, finite = {0: initial} if 0 in self.tuning.epochs else {}, True
        with torch.random.fork_rng(devices=[]):
            for done, (phi, rows) in enumerate(self.epochs(client, train), start=1):
                if done in self.tuning.epochs:
                    finite = bool(rows.isfinite().all() and phi.isfinite().all())
                    if self.tuning.part != "head":
                        test = self._embedded(self.data.test_images, tested)
                    after[done] = _share(self._nearest(test, rows), labels) if finite else 0.0
        without = initial, _share(restricted, labels), _share(near, labels)
        return Personal(client, len(held), len(own), len(tested), *without, after, not finite)

    @torch.no_grad()
    def _begin(self, client: int) -> Tensor:  # (C, D)
        """Puts the client's net where it is trained; returns its rows."""
        phi, rows = self.own(client) if self.own else (None, None)
        self.extractor.flat.copy_(self.phi if phi is None else phi)
        return (self.rows if rows is None else self._comparable(rows)).clone()

    def epochs(
        self,
        client: int,
        embeddings: Tensor | None = None,  # (n, D) of its plain training images, where they are there
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(phi, rows) after each epoch, up to the most that are looked at; the next changes them in place."""
        (held, _), size = self.people[client], self.config.batch_size
        rows, labels = self._begin(client), self.data.labels[held]
        if self.tuning.part != "head":
            embeddings = None
        elif embeddings is None:
            embeddings = self._embedded(self.data.images, held)
        moved, objective = self._moved(rows), self._objective(rows, labels)
        shuffle, changes = self.shuffle(client), self._random(client, 1)
        for _ in range(max(self.tuning.epochs)):
            order = torch.from_numpy(shuffle.permutation(len(held)))
            batches = (
                self._trained(held[order], changes) if embeddings is None else embeddings[order].split(size)
            )
            for x, target in zip(batches, labels[order].split(size), strict=True):
                for _, gradient, _ in moved:
                    gradient.zero_()
                objective.loss(x, target).backward()
                with torch.no_grad():
                    for values, gradient, velocity in moved:
                        sgd_step(values, gradient, self.tuning.rate, MOMENTUM, velocity)
            yield self.extractor.flat, rows.detach()

    def _moved(self, rows: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(values, gradient, velocity) of what is trained."""
        moved = []
        if self.tuning.part != "body":
            rows.grad = torch.zeros_like(rows.requires_grad_())
            moved.append((rows, rows.grad))
        if self.tuning.part != "head":
            moved.append((self.extractor.flat, self.extractor.gradient))
        return [(values, gradient, torch.zeros_like(gradient)) for values, gradient in moved]

    def shuffle(self, client: int) -> np.random.Generator:
        """What the order of its images in each epoch is drawn from."""
        return self._random(client, 0)

    def _random(self, client: int, stream: int) -> np.random.Generator:
        return generator(self.config.seed, stream, 0, client, Purpose.PERSONALISE)

    # ---- the loss, embeddings, the scores

    def _objective(self, rows: Tensor, labels: Tensor) -> ClassRows:
        """The softmax loss over all the classes, or those that are among the labels."""
        own = labels.unique() if self.tuning.rows == "own" else None
        expected = torch.zeros(len(rows) if own is None else len(own))  # nothing is drawn: no correction
        request = Request(torch.arange(len(rows)), own, expected)
        return ClassRows(rows, request, self.config.scale, self.config.similarity)

    def _embedded(self, images: Tensor, rows: Tensor) -> Tensor:
        """Of plain images."""
        return self.extractor.embed(images[rows])

    def _trained(self, rows: Tensor, rng: np.random.Generator) -> Iterator[Tensor]:
        """Of the training images in these rows, changed at random as in training, in batches with a graph."""
        torch.default_generator.manual_seed(int(rng.integers(2**63)))  # for a net that draws
        images = self.changed(self.data.images[rows], rng)
        self.extractor.module.train()
        for batch in images.split(self.config.batch_size):
            yield as_embeddings(self.extractor.module(batch))

    def _nearest(self, x: Tensor, rows: Tensor) -> Tensor:  # (B, D), (C, D) -> (B,)
        """The best class of each, NOTHING for one that is not finite."""
        return nearest(x, rows, similarity=self.config.similarity)

    def _nearest_mean(self, x: Tensor, train: Tensor, place: Tensor) -> Tensor:  # (B,)
        """The class, as a place among the client's, whose mean embedding is nearest to each of x (B, D).

        By Euclidean distance, with cosines of embeddings of length 1. Of what is not finite nothing counts.
        """
        (x, finite), (train, there) = self._points(x), self._points(train)
        counts = place[there].bincount(minlength=int(place.max()) + 1)
        sums = x.new_zeros(len(counts), x.shape[1]).index_add_(0, place[there], train[there])
        apart = torch.cdist(x, sums / counts[:, None], compute_mode="donot_use_mm_for_euclid_dist")
        near = finite & apart.isfinite().any(dim=1)
        return torch.where(near, apart.nan_to_num(torch.inf).argmin(dim=1), NOTHING)

    def _points(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(where they are, zeros for what is not finite; whether each is finite)."""
        if self.config.similarity == "cosine":
            return directions(x)
        finite = x.isfinite().all(dim=1)
        return torch.where(finite[:, None], x, 0.0), finite


def _share(found: Tensor, labels: Tensor) -> float:
    return (found == labels).double().mean().item()


def _of(classes: Tensor, places: Tensor) -> Tensor:
    """The classes at these places, NOTHING at NOTHING."""
    return torch.where(places == NOTHING, NOTHING, classes[places.clamp(min=0)])
