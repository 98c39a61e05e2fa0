"""A run as it stands: the server, the workers, and everything that is made once; one round of it at a time.

cohort -> each client's class set -> server.select -> client.update -> server.aggregate -> server.step
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from .algorithms import METHODS
from .class_store import ClassStore
from .client import Update
from .cohort import absence, draw_cohort
from .config import Config, learning_rate
from .inspection import Inspection, clipped
from .ledger import Entry, Traffic, client_traffic
from .metrics import Accuracies, retrieval, top1
from .player import Player
from .randomness import NO_CLIENT, Purpose, generator, initial_rows
from .robust import Statistic, median, trimmed_mean
from .row_table import SGD, Adagrad, Optimizer, RowTable
from .run_folder import RunFolder
from .server import Server
from .spreadout import Spreadout
from .stopwatch import Stopwatch
from .workers import Team

ATTEMPTS = 100  # at a round, before it is given up
log = logging.getLogger(__name__)


class TooFewClients(RuntimeError):
    """A round that no cohort made."""


class Simulation:
    """A run's state, which is the server's, and everything that is made once."""

    def __init__(self, config: Config, player: Player, workers: int = 1, store: ClassStore | None = None):
        data = player.data
        self.config, self.data, self.player, self.method = config, data, player, player.method
        self.watch = Stopwatch()
        self.team = Team(player, workers, self.watch)
        self.server = Server(
            player.extractor.flat.to("cpu"),
            data.num_classes,
            config.embedding_dim,
            initial_rows=partial(
                initial_rows, config.seed, dim=config.embedding_dim, scale=config.weight_init_scale
            ),
            optimizer=_server_optimizer(config),
            denominator=config.denominator,
            statistic=_statistic(config),
            store=store,
        )
        self.spreadout = Spreadout(
            config.spreadout_weight,
            config.spreadout_margin,
            config.spreadout_neighbours,
            config.spreadout_rows,
        )
        self.inspection = Inspection(
            len(self.server.extractor),
            config.embedding_dim,
            max_examples=player.most_images,
            max_norm=config.max_norm,
            max_norm_ratio=config.max_norm_ratio,
        )

    def play(self, round: int) -> tuple[list[Update], list[Entry]]:
        """One round: the updates that counted, and what moved.

        Where fewer than `min_clients` count nothing is applied and another cohort is drawn. Raises
        TooFewClients after ATTEMPTS of them.
        """
        config, entries = self.config, list[Entry]()
        for attempt in range(ATTEMPTS):
            updates, moved = self._attempt(round, attempt)
            if len(updates) >= (1 if self.method.pooled else config.min_clients):
                with self.watch("aggregation"):
                    self.server.step(self.server.aggregate(updates))
                    if self.method.spreads:
                        rng = generator(config.seed, round, attempt, NO_CLIENT, Purpose.SPREADOUT)
                        self.spreadout.step(self.server.weight, learning_rate(config, round), rng)
                return updates, entries + moved
            entries += [replace(e, outcome="discarded") if e.outcome == "accepted" else e for e in moved]
        raise TooFewClients(
            f"round {round + 1}: of {ATTEMPTS} cohorts of {config.cohort} none had "
            f"{config.min_clients} answers that counted"
        )

    def _attempt(self, round: int, attempt: int) -> tuple[list[Update], list[Entry]]:
        """A cohort's updates that count, in order of the clients' ids, and a line on each client."""
        config = self.config
        cohort, absent = [0], dict[int, str | None]()
        if not self.method.pooled:
            cohort = draw_cohort(config.seed, round, attempt, len(self.data.clients), config.cohort)
            absent = {k: absence(config, round, attempt, k) for k in cohort}
        with self.watch("select"):
            requests = {k: self.player.request(round, attempt, k) for k in cohort}
        answered = {k: request for k, request in requests.items() if absent.get(k) is None}
        updates = self.team.play(round, attempt, answered, self.server)
        with self.watch("aggregation"):
            faults = self._faults(updates, [request.class_ids for request in answered.values()])
        accepted, entries = [], []
        for k, request in requests.items():
            outcome = absent.get(k) or ("rejected" if faults[k] else "accepted")
            if outcome == "accepted":
                accepted.append(self._clipped(updates[k]))
            elif outcome == "rejected":
                log.warning("round %d: client %d's update was left out: %s", round + 1, k, faults[k])
            traffic = self._traffic(len(request.class_ids), request.sends_ids, answers=k in answered)
            if self.method.pooled:
                traffic = Traffic()  # nothing leaves its place
            entries.append(
                Entry(round + 1, attempt, k, len(request.class_ids), outcome, faults.get(k, ""), traffic)
            )
        return accepted, entries

    def _faults(self, updates: Mapping[int, Update], asked: Sequence[Tensor]) -> dict[int, str]:
        """Of each client that answered what is wrong with its answer, or ""."""
        if self.config.trust_updates or self.method.pooled:
            return dict.fromkeys(updates, "")
        return dict(zip(updates, self.inspection.faults(list(updates.values()), asked), strict=True))

    def _clipped(self, update: Update) -> Update:
        bound = None if self.method.pooled else self.config.clip_norm
        return update if bound is None else clipped(update, bound)

    def evaluate(self, *, last: bool) -> Accuracies:
        """Of the server's model on the test images.

        In a classification task a retrieval, the dearer and the second thing, is measured in the last round
        only; top-1 of a retrieval task, whose test classes have no rows, never.
        """
        embeddings = self.team.embed(self.server.extractor)
        labels = self.data.test_labels
        with self.watch("evaluation"):
            first = None
            if self.data.task == "classification":
                first = top1(embeddings, self.server.weight, labels)
                if not last:
                    return Accuracies(first)
            found = retrieval(embeddings, labels)
            return Accuracies(first, found.map_at_r, found.recall_at_1, found.recall_at_r)

    def checkpoint(self, folder: RunFolder, rounds: int) -> None:
        store = self.server.weight.store
        stored = self.server.stored()
        if store:
            store.prepare(rounds)
        folder.save_checkpoint(rounds, stored, store.identity if store else None)
        if store:
            store.mark(rounds)

    def trained(self) -> tuple[nn.Module, RowTable]:
        extractor = self.player.extractor
        extractor.flat.copy_(self.server.extractor)
        return extractor.module.eval().cpu(), self.server.weight

    def _traffic(self, num_rows: int, sends_ids: bool, answers: bool) -> Traffic:
        """Of one client in one round."""
        return client_traffic(
            len(self.server.extractor),
            num_rows,
            self.config.embedding_dim,
            sends_ids=sends_ids,
            answers=answers,
            dtype=self.config.wire_dtype,
        )


def _statistic(config: Config) -> Statistic | None:
    if config.aggregation == "median":
        return median
    return partial(trimmed_mean, trim=config.trim) if config.aggregation == "trimmed_mean" else None


def _server_optimizer(config: Config) -> Optimizer:
    if METHODS[config.method].pooled:
        return SGD(1.0, 0.0)  # what comes back is the model
    if config.server_optimizer == "adagrad":
        return Adagrad(config.server_lr)
    return SGD(config.server_lr, config.server_momentum)
