"""The round loop: Algorithm 1 of the FedSS paper for any of the methods.

data -> cohort -> each client's class set -> server.select -> client.update -> server.aggregate
     -> server.step -> metrics, ledger -> report
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .algorithms import METHODS
from .checkpoint import Checkpoint, CheckpointError
from .class_store import ClassStore, check_free
from .client import Update
from .cohort import absence, draw_cohort
from .config import OWN, Config, ConfigError, learning_rate
from .data import RESIZED, FederatedData, Partition, load
from .data.holdout import held_out
from .inspection import Inspection, clipped
from .ledger import OUTCOMES, Entry, Traffic, client_traffic
from .metrics import Accuracies, retrieval, top1
from .player import Player, check_model, training_device
from .randomness import NO_CLIENT, Purpose, generator, initial_rows
from .robust import Statistic, median, trimmed_mean
from .row_table import SGD, Adagrad, Optimizer, RowTable
from .run_folder import RoundMetrics, RunFolder, Summary
from .server import Server
from .spreadout import Spreadout
from .stopwatch import Stopwatch
from .workers import Team, started

ATTEMPTS = 100  # at a round, before it is given up
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What `run` returns; the files in `out` say the same."""

    config: Config
    history: list[RoundMetrics]
    summary: Summary
    extractor: nn.Module  # trained; maps images to (B, D)
    weight: Tensor | None  # (C, D) float32: the trained class matrix; None where it is in a class store
    table: RowTable  # the same by the row: table.read(class_ids), table[2:5], len(table)
    seconds: dict[str, float]  # by stage: where the time went
    out: Path | None


def run(
    config: Config,
    *,
    data: FederatedData | None = None,
    model: nn.Module | None = None,
    on_round: Callable[[RoundMetrics], None] | None = None,
    resume: bool = False,
    stop: Callable[[], bool] | None = None,
) -> Result:
    """Trains by `config.method` for `config.rounds` rounds, evaluating every `config.eval_every` and at last.

    `data` and `model` replace the ones that config names. `model` is any module from float32 images (B,
    channels, H, W) in [0, 1] to embeddings (B, D); a copy of it is trained, from its present parameters on.
    `on_round` is called after every round. With `config.out` the results are written to that folder,
    otherwise nothing is written. Equal arguments give equal bits on one machine.

    With `resume` it goes on from the last checkpoint in `config.out`, written every
    `config.checkpoint_every` rounds, to the same bits as a run that never stopped (times excepted). When
    `stop()`, asked after every round, is true it saves a checkpoint and raises Stopped.

    Raises ConfigError for settings that do not fit the data, ValueError for a model that cannot be averaged
    (BatchNorm), FileExistsError for a folder already in use, CheckpointError, a ValueError, for a checkpoint
    that is not there, was damaged, or is of another configuration, version, data or net, TooFewClients, a
    RuntimeError, for a round that no cohort makes, WorkerLost, one too, for a process that is gone. With
    `config.workers` a script needs `if __name__ == "__main__":`.
    """
    if resume and config.out is None:
        raise ConfigError("out", "expected the folder of the run to resume, got none")
    if data is not None:
        config = replace(config, data=config.data if data.name == config.data else OWN, task=data.task)
    if model is not None:
        config = replace(config, model=OWN)
    data = data or load_data(config)
    check_data(config, data)
    with _torch_settings(config.threads):
        player = Player(config, data, model, training_device(config))
        folder, checkpoint, history = _open_folder(config, player, resume)
        store = None
        try:
            store = _open_store(config, data.num_classes, checkpoint)
            with started(config, data, model) as workers:
                simulation = Simulation(config, player, workers, store)
                if checkpoint:
                    simulation.server.restore(checkpoint.tensors, checkpoint.round)
                with simulation.team:
                    return _run(
                        simulation,
                        folder,
                        history,
                        on_round or (lambda metrics: None),
                        stop or (lambda: False),
                    )
        finally:
            if folder:
                folder.close()
            if store:
                store.release()


class TooFewClients(RuntimeError):
    """A round that no cohort made."""


class Stopped(Exception):
    """A run was asked to stop: after how many rounds, and the folder that holds its checkpoint, if any."""

    def __init__(self, rounds: int, folder: Path | None):
        super().__init__(f"stopped after round {rounds}")
        self.rounds, self.folder = rounds, folder


def _open_folder(
    config: Config, player: Player, resume: bool
) -> tuple[RunFolder | None, Checkpoint | None, list[RoundMetrics]]:
    """(where results go, what is gone on from, the rounds that are done)"""
    if config.class_store and not resume:  # before anything is made
        check_free(config.class_store, run=config.out, overwrite=config.overwrite)
    if config.out is None:
        return None, None, []
    if not resume:
        return RunFolder.new(config.out, config, player.fingerprint), None, []
    folder, checkpoint, history = RunFolder.resumed(config.out, config, player.fingerprint)
    if (checkpoint.store is None) != (config.class_store is None):
        where = "in memory" if checkpoint.store is None else "in a class store"
        folder.close()
        raise CheckpointError(f"the checkpoint in {config.out} has the class matrix {where}: class_store")
    return folder, checkpoint, history


def _open_store(config: Config, num_classes: int, checkpoint: Checkpoint | None) -> ClassStore | None:
    if config.class_store is None:
        return None
    size = num_classes, config.embedding_dim
    if checkpoint is None:
        try:
            return ClassStore.new(config.class_store, *size, run=config.out, overwrite=config.overwrite)
        except FileExistsError:
            raise
        except OSError as error:
            raise ConfigError("class_store", f"cannot write to {config.class_store}: {error}") from None
    return ClassStore.opened(config.class_store, *size, checkpoint.store)


def _run(
    simulation: "Simulation",
    folder: RunFolder | None,
    history: list[RoundMetrics],
    on_round: Callable[[RoundMetrics], None],
    stop: Callable[[], bool],
) -> Result:
    config = simulation.config
    begun = time.perf_counter() - (history[-1].seconds if history else 0.0)
    saved = len(history)  # rounds in the last checkpoint
    for round in range(len(history), config.rounds):
        try:
            updates, entries = simulation.play(round)
        except TooFewClients:
            if folder and round > saved:
                simulation.checkpoint(folder, round)
            raise
        done = round + 1
        measured = done % config.eval_every == 0 or done == config.rounds
        accuracies = simulation.evaluate(last=done == config.rounds) if measured else Accuracies()
        history.append(_round_metrics(config, history, updates, entries, accuracies, begun))
        if folder:
            with simulation.watch("files"):
                folder.add(history[-1], entries)
        on_round(history[-1])
        stopping = stop() and done < config.rounds
        due = config.checkpoint_every and done % config.checkpoint_every == 0
        if folder and done < config.rounds and (due or stopping):
            with simulation.watch("files"):
                simulation.checkpoint(folder, done)
            saved = done
        if stopping:
            raise Stopped(done, config.out)
    summary = simulation.summarise(history)
    extractor, table = simulation.trained()
    weight = None if table.store else table[:]
    if table.store:
        table.store.sync()
    if folder:
        folder.finish(summary, extractor, weight)
    if table.store:
        table.store.forget_journals()
    return Result(config, history, summary, extractor, weight, table, simulation.watch.seconds, config.out)


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

    def summarise(self, history: list[RoundMetrics]) -> Summary:
        config, data, last = self.config, self.data, history[-1]
        full = [
            self._traffic(data.num_classes, sends_ids=False, answers=answers) for answers in (True, False)
        ]
        counts = {outcome: sum(getattr(metrics, outcome) for metrics in history) for outcome in OUTCOMES}
        absent = counts["dropped"] + counts["late"]
        answered = sum(counts.values()) - absent, absent
        if self.method.pooled:
            answered = len(history) * config.cohort, 0  # of the clients that there would be
        return Summary(
            method=config.method,
            data=data.name,
            task=data.task,
            seed=config.seed,
            top1=last.top1,
            map_at_10=last.map_at_10,
            recall_at_1=last.recall_at_1,
            recall_at_10=last.recall_at_10,
            rounds=len(history),
            cohort=config.cohort,
            **counts,
            num_classes=data.num_classes,
            num_clients=len(data.clients),
            num_train_images=sum(len(held) for held in data.clients),
            num_test_images=len(data.test_images),
            num_parameters=len(self.server.extractor),
            embedding_dim=config.embedding_dim,
            mean_class_set=float(np.mean([metrics.mean_class_set for metrics in history])),
            traffic=sum((metrics.traffic for metrics in history), Traffic()),
            full_traffic=sum((each.times(n) for each, n in zip(full, answered, strict=True)), Traffic()),
            seconds=last.seconds,
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


def load_data(config: Config) -> FederatedData:
    """The data set that `config` names. Raises ConfigError, or ValueError and OSError about its files."""
    if config.data == OWN:
        raise ConfigError("data", f"{OWN!r} data is handed over in Python, as run(config, data=...)")
    if config.data_dir is not None and not config.data_dir.is_dir():
        raise ConfigError("data_dir", f"no such folder: {config.data_dir}")
    options: dict[str, Any] = {}
    if config.data == "glyphs":
        options = {"num_classes": config.glyph_classes, "writers": config.glyph_writers}
    if config.data in RESIZED:
        options = {"image_size": config.image_size}
    elif config.image_size:
        raise ConfigError(
            "image_size",
            f"expected 0 for {config.data}, whose images keep their size, got {config.image_size}",
        )
    data = load(
        config.data,
        data_dir=config.data_dir,
        seed=config.data_seed,
        task=config.task,
        cache_dir=config.cache_dir,
        how=Partition(
            config.partition,
            num_clients=config.num_clients,
            images_per_client=config.images_per_client,
            classes_per_client=config.classes_per_client,
            alpha=config.dirichlet_alpha,
        ),
        **options,
    )
    return held_out(data, config.holdout, config.data_seed) if config.holdout else data


def check_data(config: Config, data: FederatedData) -> None:
    """Raises ConfigError if the run and the data do not fit."""
    if config.cohort > len(data.clients):
        raise ConfigError(
            "cohort", f"expected at most {len(data.clients)}, the clients there are, got {config.cohort}"
        )
    if len(data.test_images) < 2:
        raise ConfigError("data", f"expected at least 2 test images, got {len(data.test_images)}")
    if config.model != OWN:
        check_model(config, data)


def _round_metrics(
    config: Config,
    history: list[RoundMetrics],
    updates: list[Update],
    entries: list[Entry],
    accuracies: Accuracies,
    begun: float,
) -> RoundMetrics:
    moved = sum((entry.traffic for entry in entries), Traffic())
    images = sum(update.num_examples for update in updates)
    return RoundMetrics(
        round=len(history) + 1,
        loss=sum(update.num_examples * update.loss for update in updates) / images,
        client_lr=learning_rate(config, len(history)),
        **asdict(accuracies),
        attempts=entries[-1].attempt + 1,
        **{outcome: sum(entry.outcome == outcome for entry in entries) for outcome in OUTCOMES},
        mean_class_set=sum(entry.num_rows for entry in entries) / len(entries),
        **{f"bytes_{kind}": count for kind, count in asdict(moved).items()},
        bytes_so_far=moved.total + (history[-1].bytes_so_far if history else 0),
        seconds=time.perf_counter() - begun,
    )


@contextmanager
def _torch_settings(threads: int) -> Iterator[None]:
    """A run's number of threads and its use of torch's global generator end with it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before)
