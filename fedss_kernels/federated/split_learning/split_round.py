"""The round of split learning: so many steps of a cohort and the server together.

cohort -> [views -> clients' forward -> server's step -> clients' backward] x steps, with an average of the
clients' halves every `sync_period` steps and after the last
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from ..algorithms import METHODS
from ..any_round import OnTuned, Played, TooFewClients, Trained
from ..clients.player import Player, views_of
from ..clients.pooled import pooled
from ..config import Config, ConfigError
from ..data import FederatedData
from ..files.facts import Facts
from ..files.run_folder import RunFolder
from ..learning_rate import learning_rate
from ..ledger import Entry, Traffic
from ..measures import OF_FEATURES, Measure, Measures, declare
from ..probes.features import depth_of
from ..probes.of_a_run import at_the_end, before_training, while_training
from ..randomness import NO_CLIENT, Purpose, generator
from ..server.class_store import ClassStore
from ..stopwatch import Stopwatch
from .batches import Batches, next_images
from .costs import FLOWS, Costs, Moved
from .drawn import Cohort
from .from_config import joint_of
from .joint import REASONS, NobodyLeft

ATTEMPTS = 100  # at a cohort of which enough stay to the end, before the round is given up
ALIKE = 0.999  # of the loss of guessing, from which on keys are taken to be all alike
log = logging.getLogger(__name__)
DIVERGENCE = declare(
    Measure(
        "divergence",
        "divergence",
        "how far apart clients' blocks are before they are averaged",
        "How far a client's blocks are from their average, just before they become it: the distances of "
        "their parameters, a tensor at a time, added up; the mean over clients.",
        of="of the clients",
        share=False,
        more_is_better=False,
        compared=False,
    )
)


class SplitRound:
    """A run's state: clients and server, and how many images each client has taken."""

    def __init__(self, config: Config, player: Player, workers: int = 1, store: ClassStore | None = None):
        if workers > 1:  # by torchrun
            raise ConfigError("workers", f"expected 1 with {config.method}, got {workers}")
        inside = METHODS[config.method].pooled
        config, data = in_one_place(config, player.data) if inside else (config, player.data)
        self.config, self.player, self.data = config, player, data
        self.not_finite_since: int | None = None
        self.on_tuned: OnTuned = lambda done, total: None
        self.watch = Stopwatch()
        self.joint = joint_of(config, player)
        self.initial = player.extractor.flat.clone()  # the net as the run began with it
        self.taken = torch.zeros(len(self.data.clients), dtype=torch.int64)
        self.views = views_of(config, self.data)
        clients = self.joint.clients
        with torch.no_grad():
            seen = self.views(self.data.images[:1], generator(0, 0, 0, 0, Purpose.AUGMENTATION))
            latent = clients.half(clients.weights, seen).numel()
        sizes = (0, 0, 0) if inside else (len(clients.weights), latent, config.batch_size)  # nothing moves
        self.costs = Costs(clients.rules, *sizes, config.wire_dtype)
        self.steps = config.round_steps or _epoch([len(held) for held in self.data.clients], config)
        self._collapsed = False
        self._rounds, self._sent_half = 0, set[int]()  # as of _have_half

    @staticmethod
    def facts(config: Config, player: Player) -> Facts:
        usual = OF_FEATURES[player.data.task]
        names = (*usual.names, DIVERGENCE.name)
        measures = Measures(names, usual.headline, usual.shown, usual.told)
        return Facts.of(player.data, len(player.extractor.flat), measures, FLOWS)

    @property
    def team(self) -> AbstractContextManager[object]:
        return nullcontext()  # one process plays all

    # ---- a round

    def play(self, round: int) -> Played:
        """A cohort of which fewer than `min_clients` stay to the end is not begun with: another is drawn.

        Raises TooFewClients where that is so of ATTEMPTS, or where the numbers of all are not finite.
        """
        before = {name: value.clone() for name, value in self.stored().items()}
        with self.watch("select"):
            cohort, passed_over = self._cohort(round)
        self.joint.left_out.clear()
        moved = {client: Moved() for client in cohort.clients}
        try:
            loss, images = self._train(round, cohort, moved)
        except NobodyLeft:
            self.restore(before, round)
            words = f"round {round + 1}: all clients sent numbers that are not finite, or their blocks "
            words += "became so: is --client-lr too high?"
            raise TooFewClients(words, [*passed_over, *self._entries(round, cohort, moved)]) from None
        self._note(round, loss)
        return Played([*passed_over, *self._entries(round, cohort, moved)], loss, images)

    def _cohort(self, round: int) -> tuple[Cohort, list[Entry]]:
        """(who is in it, a line for each client of those that were passed over)"""
        config, entries = self.config, list[Entry]()
        for attempt in range(ATTEMPTS):
            cohort = Cohort.draw(config, len(self.data.clients), round, attempt, self.steps)
            staying = cohort.staying(self.steps)
            if len(staying) >= config.min_clients:
                return cohort, entries
            for client in cohort.clients:
                outcome = "discarded" if client in staying else "dropped"
                entries.append(Entry(round + 1, attempt, client, 0, outcome, "", Traffic.none(FLOWS)))
        words = f"round {round + 1}: of {ATTEMPTS} cohorts of {config.cohort} none had {config.min_clients} "
        raise TooFewClients(f"{words}clients who stayed to the end", entries)

    def _train(self, round: int, cohort: Cohort, moved: Mapping[int, Moved]) -> tuple[float, int]:
        """(mean loss over the images that were trained on, so many)"""
        config, clients, b = self.config, self.joint.clients, self.config.batch_size
        lr, key = learning_rate(config, round), (config.seed, round, cohort.attempt)
        torch.manual_seed(int(generator(*key, NO_CLIENT, Purpose.MODEL).integers(2**63)))
        rows = {k: self._rows(k, steps * b) for k, steps in cohort.steps.items()}
        batches = Batches(self.data.images, rows, b, self.views, key)
        clients.receive(cohort.clients)
        have = self._have_half(round)
        for client in cohort.clients:
            moved[client].downloads += client not in have
        total, images = 0.0, 0
        for step in range(self.steps):
            self._let_go(cohort, step)
            with self.watch("local training"):
                there = clients.clients
                first, second = batches.views_of(step, there)
                loss = self._step(first, second, lr, there, moved)
            total, images = total + loss * len(clients.clients) * b, images + len(clients.clients) * b
            last = step + 1 == self.steps
            if not config.freeze_clients and (last or (step + 1) % config.sync_period == 0):
                with self.watch("aggregation"):
                    self._synchronise(moved, last=last)
        clients.dismiss()
        for client, of in moved.items():
            self.taken[client] += of.sent * b
        return total / images, images

    def _have_half(self, round: int) -> set[int]:
        """Clients that were sent a half which is not trained before this round: it comes once.

        Worked out from the cohorts, and so the same in a run that is resumed; nobody stores it. Who was gone
        before the first step has it too.
        """
        if self.config.freeze_clients:
            for done in range(self._rounds, round):
                self._sent_half |= {*self._cohort(done)[0].clients}
            self._rounds = max(self._rounds, round)
        return self._sent_half

    def _step(
        self, first: Tensor, second: Tensor, lr: float, there: Sequence[int], moved: Mapping[int, Moved]
    ) -> float:
        for client in there:
            moved[client].sent += 1
        loss = self.joint.step(first, second, lr)
        for client in self.joint.clients.clients:
            moved[client].answered += 1
        return loss

    def _rows(self, client: int, count: int) -> Tensor:
        """The images that it takes next."""
        held, taken = self.data.clients[client], int(self.taken[client])
        return next_images(held, taken, count, self.config.seed, client)

    def _let_go(self, cohort: Cohort, step: int) -> None:
        """Of those who are gone from this step on."""
        clients = self.joint.clients
        stay = torch.tensor([cohort.steps[client] > step for client in clients.clients])
        if not stay.all():
            clients.leave(stay)
        if not clients.clients:
            raise NobodyLeft

    def _synchronise(self, moved: Mapping[int, Moved], *, last: bool) -> None:
        for client in self.joint.clients.clients:
            moved[client].uploads += 1
        self.joint.synchronise({k: len(self.data.clients[k]) for k in moved})
        for client in self.joint.clients.clients:
            moved[client].downloads += not last  # of the last average those of the next round's cohort

    def _entries(self, round: int, cohort: Cohort, moved: Mapping[int, Moved]) -> list[Entry]:
        def of(client: int) -> Entry:
            outcome, fault = "accepted", ""
            if client in self.joint.left_out:
                outcome, fault = "rejected", self.joint.left_out[client]
            elif cohort.steps[client] < self.steps:
                outcome = "dropped"
            traffic = self.costs.traffic(moved[client])
            return Entry(round + 1, cohort.attempt, client, 0, outcome, fault, traffic)

        return [of(client) for client in cohort.clients]

    def _note(self, round: int, loss: float) -> None:
        """What a user should know of the model as it is now."""
        server, clients = self.joint.server, self.joint.clients
        for client, fault in self.joint.left_out.items():
            log.warning("round %d: client %d was left out: %s", round + 1, client, REASONS[fault])
        finite = all(bool(numbers.isfinite().all()) for numbers in (server.weights, clients.weights))
        if self.not_finite_since is None and not finite:
            self.not_finite_since = round + 1
            log.warning("round %d: from here on the model has numbers that are not finite", round + 1)
        guessing = server.rules.guessing(len(server.queues[0].keys))
        if not self._collapsed and loss >= ALIKE * guessing:
            self._collapsed = True
            words = "round %d: the loss is %.2f, and would be %.2f if all keys were alike: has it collapsed?"
            log.warning(words, round + 1, loss, guessing)

    # ---- the model

    def evaluate(self, *, last: bool) -> dict[str, float | None]:
        """By the pooled features of the net, before the head."""
        found: dict[str, float | None] = {DIVERGENCE.name: self.joint.clients.divergence}
        if self.not_finite_since is not None:
            return found
        extractor, data = self.player.extractor, self.data
        net, prepared = extractor.module, extractor.as_input
        with self.watch("evaluation"):
            extractor.flat.copy_(self._net())
            found |= while_training(net, data, depth_of(net), self.config.seed, prepared)
            if last:
                found |= at_the_end(net, data, prepared)
                extractor.flat.copy_(self.initial)
                found |= before_training(net, data, prepared)
        return found

    def _net(self) -> Tensor:  # (P,), as the extractor has it
        clients, server = self.joint.clients.weights, self.joint.server.weights
        of_server = len(self.initial) - len(clients)  # what follows is the head
        return torch.cat([clients.to(server.device), server[:of_server]])

    def stored(self) -> dict[str, Tensor]:
        on_server = {name: value.cpu() for name, value in self.joint.server.stored().items()}
        return on_server | self.joint.clients.stored() | {"taken": self.taken}

    def restore(self, tensors: Mapping[str, Tensor], rounds: int) -> None:
        self.joint.server.restore(tensors)
        self.joint.clients.restore(tensors)
        self.taken.copy_(tensors["taken"])

    def checkpoint(self, folder: RunFolder, rounds: int) -> None:
        folder.save_checkpoint(rounds, self.stored())

    def trained(self) -> Trained:
        extractor = self.player.extractor
        extractor.flat.copy_(self._net())
        return Trained(extractor.module.eval().cpu())


def in_one_place(config: Config, data: FederatedData) -> tuple[Config, FederatedData]:
    """A client who has every image, and takes in a step as many as a cohort's clients together."""
    steps = config.round_steps or _epoch([len(held) for held in data.clients], config)
    alone = replace(
        config,
        cohort=1,
        min_clients=1,
        batch_size=config.cohort * config.batch_size,
        round_steps=steps,
        private_queues=False,
        freeze_clients=False,
        momentum_copies="averaged",
        velocities="averaged",
        dropout_rate=0.0,
        wire_dtype="float32",
    )
    return alone, pooled(data)


def _epoch(sizes: Sequence[int], config: Config) -> int:
    """Steps in which a client with the mean number of images goes through them once."""
    return max(1, round(sum(sizes) / len(sizes) / config.batch_size))
