"""A run as it stands: the server, the workers, and everything that is made once; one round of it at a time.

cohort -> each client's class set -> server.select -> client.update -> server.aggregate -> server.step
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from .algorithms import METHODS
from .algorithms.parts import Part
from .clients.player import Player
from .config import Config, learning_rate
from .files.run_folder import Accuracies, RunFolder
from .ledger import Entry, Traffic, client_traffic
from .messages import Request, Update
from .metrics import (
    retrieval,
    top1,
)
from .randomness import NO_CLIENT, Purpose, generator
from .server.class_store import ClassStore
from .server.cohort import absence, draw_cohort
from .server.inspection import BESIDE_OTHERS, REASONS, Inspection
from .server.mean import PseudoGradient
from .server.robust import Statistic, median, trimmed_mean
from .server.row_table import SGD, Adagrad, Optimizer, RowTable
from .server.server import Server
from .server.spreadout import Spreadout
from .server.tally import Tally
from .stopwatch import Stopwatch
from .workers import Team

ATTEMPTS = 100  # at a round, before it is given up
# Who drops out or is late is drawn anew in each; where all answers are left out, they are so in every one. It
# is given up after this many at least, and answers in a row of which none counted.
HOPELESS_ATTEMPTS, HOPELESS_ANSWERS = 3, 48
log = logging.getLogger(__name__)


class TooFewClients(RuntimeError):
    """A round that no cohort made, and why; `entries` is what moved for it all the same."""

    def __init__(self, words: str, entries: Sequence[Entry] = ()):
        super().__init__(words)
        self.entries = list(entries)


class Simulation:
    """A run's state, which is the server's, and everything that is made once."""

    def __init__(self, config: Config, player: Player, workers: int = 1, store: ClassStore | None = None):
        data = player.data
        self.config, self.data, self.player, self.method = config, data, player, player.method
        self.not_finite_since: int | None = None  # the round whose step left numbers that are not finite
        self.watch = Stopwatch()
        self.team = Team(player, workers, self.watch)
        self.server = Server(
            player.extractor.flat.to("cpu"),
            data.num_classes,
            config.row_dim,
            initial_rows=player.known_rows,
            optimizer=_server_optimizer(config),
            blocks=player.extractor.block_sizes,
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
            player.num_travelling,
            config.row_dim,
            max_examples=player.most_images,
            max_norm=config.max_norm,
            max_norm_ratio=config.max_norm_ratio,
        )

    def play(self, round: int) -> tuple[list[Update], list[Entry]]:
        """One round: the updates that counted, and what moved.

        Where fewer than `min_clients` count nothing is applied and another cohort is drawn. Raises
        TooFewClients after ATTEMPTS of them, or a few where all answers are left out.
        """
        config, entries, left_out = self.config, list[Entry](), 0
        for attempt in range(ATTEMPTS):
            tally, moved = self._attempt(round, attempt)
            updates = list(tally.counted().values())
            if len(updates) >= (1 if self.method.pooled else config.min_clients):
                gradient = self._gradient(round, attempt, tally)
                with self.watch("aggregation"):
                    self.server.step(gradient, [part is Part.TRAINED for part in self.player.parts.blocks])
                    if self.method.spreads:
                        rng = generator(config.seed, round, attempt, NO_CLIENT, Purpose.SPREADOUT)
                        self.spreadout.step(self.server.weight, learning_rate(config, round), rng)
                self._note_finite(round)
                return updates, entries + moved
            entries += [replace(e, outcome="discarded") if e.outcome == "accepted" else e for e in moved]
            left_out = 0 if updates else left_out + sum(e.outcome == "rejected" for e in moved)
            if attempt + 1 >= HOPELESS_ATTEMPTS and left_out >= HOPELESS_ANSWERS:
                break
        raise self._too_few(round, attempt + 1, entries)

    def _too_few(self, round: int, cohorts: int, entries: Sequence[Entry]) -> TooFewClients:
        count, size = self.config.min_clients, self.config.cohort
        answers = "1 answer" if count == 1 else f"{count} answers"
        words = f"round {round + 1}: of {cohorts} cohorts of {size} none had {answers} that counted: "
        words += _reasons(entries)
        if self.not_finite_since is not None:
            since = f"since round {self.not_finite_since}: is --server-lr too high?"
            words += f"; the model they are sent has had numbers that are not finite {since}"
        return TooFewClients(words, entries)

    def _note_finite(self, round: int) -> None:
        if self.not_finite_since is None and not self.server.finite:
            self.not_finite_since = round + 1
            log.warning("round %d: from here on the model has numbers that are not finite", round + 1)

    def _attempt(self, round: int, attempt: int) -> tuple[Tally, list[Entry]]:
        """What came back from a cohort, and a line on each client, in order of their ids."""
        config = self.config
        cohort, absent = [0], dict[int, str | None]()
        if not self.method.pooled:
            cohort = draw_cohort(config.seed, round, attempt, len(self.data.clients), config.cohort)
            absent = {k: absence(config, round, attempt, k) for k in cohort}
        with self.watch("select"):
            requests = {k: self.player.request(round, attempt, k) for k in cohort}
        answered = {k: request for k, request in requests.items() if absent.get(k) is None}
        with self.watch("aggregation"):
            tally = self._tally({k: self._travelling(request) for k, request in answered.items()})
        self._play(round, attempt, answered, tally)
        faults, entries = tally.faults(), []
        for k, request in requests.items():
            outcome = absent.get(k) or ("rejected" if faults[k] else "accepted")
            if outcome == "rejected":
                log.warning("round %d: client %d's update was left out: %s", round + 1, k, faults[k])
            traffic = self._traffic(len(self._travelling(request)), request.sends_ids, answers=k in answered)
            if self.method.pooled:
                traffic = Traffic()  # nothing leaves its place
            entries.append(
                Entry(round + 1, attempt, k, len(request.class_ids), outcome, faults.get(k, ""), traffic)
            )
        return tally, entries

    def _play(self, round: int, attempt: int, requests: Mapping[int, Request], tally: Tally) -> None:
        phi = self.server.extractor
        self.team.play(round, attempt, requests, phi, self._given, tally.take)

    def _given(self, client: int, request: Request) -> Tensor:
        """What a client needs for its round beside phi."""
        return self.team.travelled(self.server.select(self._travelling(request))[1])

    def _travelling(self, request: Request) -> Tensor:
        """The rows of a request that come and go back."""
        return request.class_ids if self.player.parts.rows is Part.TRAINED else request.class_ids[:0]

    def _tally(self, asked: Mapping[int, Tensor]) -> Tally:
        """For what comes from clients who asked for these rows."""
        config, inside = self.config, self.method.pooled
        return Tally(
            self.server,
            asked,
            {k: self.player.num_images(k) for k in asked},
            None if config.trust_updates or inside else self.inspection,
            clip_norm=None if inside else config.clip_norm,
            keeps=self.server.statistic is not None or config.poison_rate > 0,
        )

    def _gradient(self, round: int, attempt: int, tally: Tally) -> PseudoGradient:
        """Of the answers that count."""
        with self.watch("aggregation"):
            gradient = tally.gradient()
        if gradient is not None:
            return gradient
        again = tally.again()
        self._play(round, attempt, {k: self.player.request(round, attempt, k) for k in again.asked}, again)
        gradient = again.gradient()
        assert gradient is not None  # as they send what they sent
        return gradient

    def evaluate(self, *, last: bool) -> Accuracies:
        """Of the server's model on the test images.

        In a classification task a retrieval, the dearer and the second thing, is measured in the last round
        only; top-1 of a retrieval task, whose test classes have no rows, never. Of a model that is not finite
        nothing is.
        """
        embeddings = self.team.embed(self.server.extractor)
        labels = self.data.test_labels
        with self.watch("evaluation"):
            not_finite = int((~embeddings.isfinite().all(dim=1)).sum())
            if self.not_finite_since is not None:
                return Accuracies(not_finite=not_finite)
            first = None
            if self.data.task == "classification":
                first = top1(embeddings, self.server.weight, labels, similarity=self.config.similarity)
                if not last:
                    return Accuracies(first, not_finite=not_finite)
            found = retrieval(embeddings, labels)
            return Accuracies(first, found.map_at_r, found.recall_at_1, found.recall_at_r, not_finite)

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
            self.config.row_dim,
            sends_ids=sends_ids,
            answers=answers,
            dtype=self.config.wire_dtype,
        )


def _reasons(entries: Sequence[Entry]) -> str:
    """Why clients' answers did not make a round, each reason with how many, the most frequent first."""
    counts = Counter(entry.fault or entry.outcome for entry in entries)
    words = {
        "dropped": "dropped out",
        "late": "late, after --deadline",
        "discarded": "nothing wrong with, but too few in their cohorts",
    }
    faults = BESIDE_OTHERS if counts["discarded"] else REASONS
    words |= {fault: f"left out: {reason}" for fault, reason in faults.items()}
    return "; ".join(f"{count:,} {words[reason]}" for reason, count in counts.most_common())


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
