"""The round of methods that are shaped as federated averaging, and all that their rounds share.

cohort -> each client's class set -> server.select -> client.update -> tally, the updates' mean -> server.step
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ..xor_rows import xor_rows
from . import private_retrieval, secure_sums
from .algorithms.parts import Part
from .any_round import OnTuned, Played, TooFewClients, Trained
from .clients.player import Player
from .cohort import absence, draw_cohort
from .config import Config
from .evaluation import Evaluation, counts_steps, measures_of
from .files.facts import Facts
from .files.run_folder import RunFolder
from .learning_rate import learning_rate
from .ledger import Entry, Traffic
from .messages import Request, Silence
from .privacy_budget import EPSILON, check, epsilon
from .probes.client_work import ClientWork
from .randomness import NO_CLIENT, Purpose, generator
from .server.class_store import ClassStore
from .server.from_config import optimizer, statistic
from .server.frozen_copies import FrozenCopies
from .server.gaussian import noisy
from .server.inspection import Inspection, reasons
from .server.kept_by_clients import Homes
from .server.mean import PseudoGradient
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


class Simulation:
    """A run's state, which is the server's, and everything that is made once."""

    def __init__(self, config: Config, player: Player, workers: int = 1, store: ClassStore | None = None):
        if config.noise_multiplier:
            check()
        data = player.data
        self.config, self.data, self.player, self.method = config, data, player, player.method
        self.rounds = 0  # that are done
        self.not_finite_since: int | None = None  # the round whose step left numbers that are not finite
        self.on_tuned: OnTuned = lambda done, total: None
        self.watch = Stopwatch()
        self.team = self._team_of(player, workers)
        self.server = Server(
            player.extractor.flat.to("cpu"),
            data.num_classes,
            config.row_dim,
            initial_rows=player.known_rows,
            optimizer=optimizer(config),
            denominator=config.denominator,
            blocks=player.extractor.block_sizes,
            statistic=statistic(config),
            clients=config.cohort if config.noise_multiplier else None,
            most=player.most_images if config.shares else None,
            store=None if self.method.personal else store,
        )
        self.store, self.homes = store, None
        self.first = self.server.extractor if self.method.contrastive else None  # phi
        if self.method.personal:
            rows = self.server.weight[:]
            net = self.server.extractor if self.method.alone else None
            self.homes = Homes(len(data.clients), rows, net, store)
        self.copies = FrozenCopies(config, player.schedule, len(data.clients))
        self.evaluation = Evaluation(config, self.team)
        self.work = ClientWork(player) if counts_steps(config) else None
        self.spreadout = Spreadout(
            config.spreadout_weight,
            config.spreadout_margin,
            config.spreadout_neighbours,
            config.spreadout_rows,
        )
        self.inspection = Inspection(
            player.num_trained(0),
            config.row_dim,
            max_examples=player.most_images,
            max_norm=config.max_norm,
            # What goes into a secure sum its client alone can look at; with noise no answer may decide on
            # another.
            max_norm_ratio=math.inf if config.sums or config.noise_multiplier else config.max_norm_ratio,
            largest=secure_sums.RANGE if config.sums else math.inf,
        )

    def _team_of(self, player: Player, workers: int) -> Team:
        """Who plays the clients."""
        return Team(player, workers, self.watch)

    @staticmethod
    def facts(config: Config, player: Player) -> Facts:
        measures, flows = measures_of(config, player.data), player.flows
        size = len(player.extractor.flat) - player.num_projecting
        return Facts.of(player.data, size, measures, flows)

    def play(self, round: int) -> Played:
        """One round. Where fewer than `min_clients` count nothing is applied and another cohort is drawn.

        Raises TooFewClients after ATTEMPTS of them, or a few where all answers are left out.
        """
        config, entries, left_out = self.config, list[Entry](), 0
        for attempt in range(ATTEMPTS):
            tally, moved = self._attempt(round, attempt)
            updates = list(tally.counted().values())
            if len(updates) >= (1 if self.method.pooled else config.min_clients):
                gradient = self._gradient(round, attempt, tally)
                with self.watch("aggregation"):
                    self.server.step(gradient, self.player.schedule.whole(round).trained)
                    if self.homes:
                        self.homes.keep(updates)
                    if (head := self.player.new_head(round + 1)) is not None:
                        self.server.begin(len(self.player.extractor.block_sizes) - 1, head)
                    if self.method.spreads:
                        rng = generator(config.seed, round, attempt, NO_CLIENT, Purpose.SPREADOUT)
                        self.spreadout.step(self.server.weight, learning_rate(config, round), rng)
                self.rounds = round + 1
                self._note_finite(round)
                return Played.of(updates, entries + moved)
            entries += [replace(e, outcome="discarded") if e.outcome == "accepted" else e for e in moved]
            left_out = 0 if updates else left_out + sum(e.outcome == "rejected" for e in moved)
            if attempt + 1 >= HOPELESS_ATTEMPTS and self._hopeless(left_out, entries):
                break
        raise self._too_few(round, attempt + 1, entries)

    def _hopeless(self, left_out: int, entries: Sequence[Entry]) -> bool:
        """Whether the next attempt would go as these; left_out: answers in a row of which none counted."""
        return left_out >= HOPELESS_ANSWERS

    def _too_few(self, round: int, cohorts: int, entries: Sequence[Entry]) -> TooFewClients:
        count, size = self.config.min_clients, self.config.cohort
        answers = "1 answer" if count == 1 else f"{count} answers"
        words = f"round {round + 1}: of {cohorts} cohorts of {size} none had {answers} that counted: "
        words += self._reasons(entries)
        if self.not_finite_since is not None:
            since = f"since round {self.not_finite_since}: is --server-lr too high?"
            words += f"; the model they are sent has had numbers that are not finite {since}"
        return TooFewClients(words, entries)

    def _reasons(self, entries: Sequence[Entry]) -> str:
        return reasons(entries)

    def _note_finite(self, round: int) -> None:
        if self.not_finite_since is None and not self.server.finite:
            self.not_finite_since = round + 1
            log.warning("round %d: from here on the model has numbers that are not finite", round + 1)

    def _attempt(self, round: int, attempt: int) -> tuple[Tally, list[Entry]]:
        """What came back from a cohort, and a line on each client, in order of their ids."""
        config = self.config
        cohort = [0]
        if not self.method.pooled:
            cohort = draw_cohort(config.seed, round, attempt, len(self.data.clients), config.cohort)
        with self.watch("select"):
            requests, silent = self.team.requests(round, attempt, cohort)
        if not self.method.pooled:
            absent = {k: absence(config, round, attempt, k) for k in requests}
            silent |= {k: Silence(outcome) for k, outcome in absent.items() if outcome}
        answering = {k: request for k, request in requests.items() if k not in silent}
        with self.watch("aggregation"):
            tally = self._tally(round, {k: self._travelling(request) for k, request in answering.items()})
        silent |= self._play(round, attempt, answering, tally)
        found = {k: Silence("rejected", fault) if fault else None for k, fault in tally.faults().items()}
        return tally, [self._entry(round, attempt, k, requests.get(k), silent, found) for k in cohort]

    def _entry(
        self,
        round: int,
        attempt: int,
        client: int,
        request: Request | None,  # None: it never asked
        silent: Mapping[int, Silence],
        found: Mapping[int, Silence | None],  # of those who answered, what their answers are left out for
    ) -> Entry:
        """Of a client that was drawn."""
        left_out = silent.get(client) or found[client]
        outcome, fault = (left_out.outcome, left_out.fault) if left_out else ("accepted", "")
        if outcome == "rejected":
            log.warning("round %d: client %d's update was left out: %s", round + 1, client, fault)
        if request is None:
            traffic, num_rows = Traffic.none(self.player.flows), 0
        else:
            answers = client not in silent or outcome == "discarded"
            has = self.copies.held(client, round)
            traffic = self.player.traffic(round, attempt, client, request, answers=answers, has=has)
            num_rows = len(request.class_ids)
        work = None
        if self.work and client not in silent:
            with self.watch("evaluation"):
                work = self.work.of(round, attempt, client)
        return Entry(round + 1, attempt, client, num_rows, outcome, fault, traffic, work)

    def _play(
        self, round: int, attempt: int, requests: Mapping[int, Request], tally: Tally
    ) -> dict[int, Silence]:
        """Who of them sends nothing back."""
        return self.team.play(round, attempt, requests, self.server.extractor, self._giving(), tally.take)

    def _giving(self) -> Callable[[int, Request], Tensor]:
        """(client, request) -> what it needs for its round beside phi, Player.num_given numbers."""
        if self.homes:
            homes = self.homes
            return lambda client, request: homes.read(client)
        if self.config.private:
            with self.watch("select"):
                table = self.server.weight[:]
            return lambda client, request: self._retrieved(table, request.class_ids)
        return lambda client, request: self.server.select(self._travelling(request))[1]

    def _retrieved(self, table: Tensor, class_ids: Tensor) -> Tensor:  # (C, D), (S,) -> (S, D)
        """Rows that a client has of two servers, each with the table as it is in this round."""
        asked = private_retrieval.queries(class_ids, len(table))
        with self.watch("answers"):
            of_a, of_b = (xor_rows(table, bits) for bits in asked)
        return private_retrieval.opened(of_a, of_b)

    def _travelling(self, request: Request) -> Tensor:
        """The class rows of a request that come and go back."""
        return request.class_ids if self.method.rows is Part.TRAINED else request.class_ids[:0]

    def _tally(self, round: int, asked: Mapping[int, Tensor]) -> Tally:
        """For what comes in a round from clients who asked for these rows."""
        config, inside = self.config, self.method.pooled
        inspection = replace(self.inspection, num_parameters=self.player.num_trained(round))
        return Tally(
            self.server,
            asked,
            {k: self.player.num_images(k) for k in asked},
            inspection if self._looks else None,
            clip_norm=None if inside or config.sums else config.clip_norm,
            keeps=self.server.statistic is not None or config.poison_rate > 0 or not self.team.repeats,
        )

    @property
    def _looks(self) -> bool:
        """Whether answers are looked at before they count."""
        config = self.config
        return not self.method.pooled and bool(
            config.sums or config.noise_multiplier or not config.trust_updates
        )

    def _gradient(self, round: int, attempt: int, tally: Tally) -> PseudoGradient:
        """Of the answers that count, with noise where there is to be some."""
        gradient, config = self._mean(round, attempt, tally), self.config
        if not config.noise_multiplier:
            return gradient
        assert config.clip_norm is not None  # or it were refused
        rng = generator(config.seed, round, attempt, NO_CLIENT, Purpose.PRIVACY_NOISE)
        return noisy(gradient, config.noise_multiplier * config.clip_norm / config.cohort, rng)

    def _mean(self, round: int, attempt: int, tally: Tally) -> PseudoGradient:
        with self.watch("aggregation"):
            gradient = tally.gradient()
        if gradient is not None:
            return gradient
        again = tally.again()
        self._play(round, attempt, {k: self.player.request(round, attempt, k) for k in again.asked}, again)
        gradient = again.gradient()
        assert gradient is not None  # as they send what they sent
        return gradient

    def evaluate(self, *, last: bool) -> dict[str, float | None]:
        phi, weight, finite = self.server.extractor, self.server.weight, self.not_finite_since is None
        round = max(self.rounds - 1, 0)
        if self.first is not None:
            found = self.evaluation.of_features(phi, self.first, round, finite=finite, last=last)
        elif self.homes:
            found = self.evaluation.own(phi, self.homes, round, finite=finite)
        else:
            found = self.evaluation.shared(phi, weight, round, finite=finite, last=last)
        if self.config.noise_multiplier:
            found |= {EPSILON.name: epsilon(self.config, len(self.data.clients), self.rounds)}
        if last and finite and self.config.personalise_epochs:
            found |= self.evaluation.personal(phi, weight, self.homes, self.on_tuned)
        return found

    def stored(self) -> dict[str, Tensor]:
        return self.server.stored() | (self.homes.stored() if self.homes else {})

    def restore(self, tensors: Mapping[str, Tensor], rounds: int) -> None:
        self.rounds = rounds
        self.server.restore(tensors, rounds)
        if self.homes:
            self.homes.restore(tensors, rounds)

    def checkpoint(self, folder: RunFolder, rounds: int) -> None:
        store, stored = self.store, self.stored()
        if store:
            store.prepare(rounds)
        folder.save_checkpoint(rounds, stored, store.identity if store else None)
        if store:
            store.mark(rounds)

    def trained(self) -> Trained:
        extractor = self.player.extractor
        extractor.move([True] * len(extractor.block_sizes))
        extractor.flat.copy_(self.server.extractor)
        table = None if self.method.contrastive else self.server.weight
        return Trained(extractor.module.eval().cpu(), table, self.homes)
