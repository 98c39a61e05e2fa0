"""The round loop: Algorithm 1 of the FedSS paper for any of the methods.

data -> cohort -> each client's class set -> server.select -> client.update -> server.aggregate
     -> server.step -> metrics, ledger -> report
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .algorithms import METHODS
from .client import Client, Extractor, Update, as_input
from .config import OWN, Config, ConfigError
from .data import FederatedData, load
from .ledger import Entry, Traffic, client_traffic, over_the_wire
from .metrics import map_at_r, top1
from .models import build_model, refuse_batch_norm
from .randomness import NO_CLIENT, Purpose, generator, initial_rows
from .row_table import SGD, Adagrad, Optimizer
from .run_folder import RoundMetrics, RunFolder, Summary
from .server import Server


@dataclass(frozen=True)
class Result:
    """What `run` returns; the files in `out` say the same."""

    config: Config
    history: list[RoundMetrics]
    summary: Summary
    extractor: nn.Module  # trained; maps images to (B, D)
    weight: Tensor  # (C, D) float32: the trained class matrix
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
    that is not there, was damaged, or is of another configuration or version.
    """
    if resume and config.out is None:
        raise ConfigError("out", "expected the folder of the run to resume, got none")
    if data is not None:
        config = replace(config, data=config.data if data.name == config.data else OWN, task=data.task)
    if model is not None:
        config = replace(config, model=OWN)
    with _torch_settings(config.threads):
        simulation = Simulation(config, data or load_data(config), model)
        folder, history = _open_folder(simulation, resume)
        return _run(simulation, folder, history, on_round or (lambda metrics: None), stop or (lambda: False))


class Stopped(Exception):
    """A run was asked to stop: after how many rounds, and the folder that holds its checkpoint, if any."""

    def __init__(self, rounds: int, folder: Path | None):
        super().__init__(f"stopped after round {rounds}")
        self.rounds, self.folder = rounds, folder


def _open_folder(simulation: "Simulation", resume: bool) -> tuple[RunFolder | None, list[RoundMetrics]]:
    """(where results go, the rounds that are done)"""
    config = simulation.config
    if config.out is None:
        return None, []
    if not resume:
        return RunFolder.new(config.out, config), []
    folder, checkpoint, history = RunFolder.resumed(config.out, config)
    simulation.server.restore(checkpoint.tensors, checkpoint.round)
    return folder, history


def _run(
    simulation: "Simulation",
    folder: RunFolder | None,
    history: list[RoundMetrics],
    on_round: Callable[[RoundMetrics], None],
    stop: Callable[[], bool],
) -> Result:
    config = simulation.config
    begun = time.perf_counter() - (history[-1].seconds if history else 0.0)
    for round in range(len(history), config.rounds):
        updates, entries = simulation.play(round)
        done = round + 1
        measured = done % config.eval_every == 0 or done == config.rounds
        accuracies = simulation.evaluate(last=done == config.rounds) if measured else (None, None)
        history.append(_round_metrics(config, history, updates, entries, accuracies, begun))
        if folder:
            folder.add(history[-1], entries)
        on_round(history[-1])
        stopping = stop() and done < config.rounds
        due = config.checkpoint_every and done % config.checkpoint_every == 0
        if folder and done < config.rounds and (due or stopping):
            folder.save_checkpoint(done, simulation.server.stored())
        if stopping:
            raise Stopped(done, config.out)
    summary = simulation.summarise(history)
    extractor, weight = simulation.trained()
    if folder:
        folder.finish(summary, extractor, weight)
    return Result(config, history, summary, extractor, weight, config.out)


class Simulation:
    """A run's state, which is the server's, and everything that is made once: client, data, method."""

    def __init__(self, config: Config, data: FederatedData, model: nn.Module | None = None):
        check_data(config, data)
        self.config, self.data, self.method = config, data, METHODS[config.method]
        module = copy.deepcopy(model) if model is not None else _build_model(config)
        _check_model(module, config, data)
        self.extractor = Extractor(module)
        self.client = Client(
            self.extractor,
            data,
            local_epochs=config.local_epochs,
            batch_size=config.batch_size,
            scale=config.scale,
            seed=config.seed,
            max_shift=config.max_shift,
        )
        self.server = Server(
            self.extractor.flat,
            data.num_classes,
            config.embedding_dim,
            initial_rows=partial(
                initial_rows, config.seed, dim=config.embedding_dim, scale=config.weight_init_scale
            ),
            optimizer=_server_optimizer(config),
            denominator=config.denominator,
        )

    def play(self, round: int, attempt: int = 0) -> tuple[list[Update], list[Entry]]:
        """One round: what the clients sent back, and what moved. Clients are played in order of their ids."""
        config, lr = self.config, learning_rate(self.config, round)
        travel = partial(over_the_wire, dtype=config.wire_dtype)
        updates, entries = [], []
        for k in draw_cohort(config.seed, round, attempt, len(self.data.clients), config.cohort):
            rng = generator(config.seed, round, attempt, k, Purpose.NEGATIVES)
            request = self.method.request(
                self.data.num_classes, self.client.positives(k), config.num_negatives, config.correction, rng
            )
            phi, rows = map(travel, self.server.select(request.class_ids))
            update = self.client.update(k, round, attempt, request, phi, rows, lr)
            updates.append(replace(update, rows=travel(update.rows), extractor=travel(update.extractor)))
            entries.append(Entry(round + 1, k, len(rows), self._traffic(len(rows), request.sends_ids)))
        self.server.step(self.server.aggregate(updates))
        self.extractor.check_buffers()
        return updates, entries

    def evaluate(self, *, last: bool) -> tuple[float | None, float | None]:
        """(top-1, MAP@10) of the server's model on the test images.

        Of a classification task MAP@10, the dearer and the second number, is measured in the last round only;
        top-1 of a retrieval task, whose test classes have no rows, never.
        """
        self.extractor.flat.copy_(self.server.extractor)
        embeddings = self.extractor.embed(self.data.test_images)
        labels = self.data.test_labels
        if self.data.task == "retrieval":
            return None, map_at_r(embeddings, labels)
        return top1(embeddings, self.server.weight, labels), map_at_r(embeddings, labels) if last else None

    def trained(self) -> tuple[nn.Module, Tensor]:
        self.extractor.flat.copy_(self.server.extractor)
        return self.extractor.module.eval(), self.server.weight[:]

    def _traffic(self, num_rows: int, sends_ids: bool) -> Traffic:
        """Of one client in one round."""
        config, num_parameters = self.config, len(self.server.extractor)
        return client_traffic(
            num_parameters, num_rows, config.embedding_dim, sends_ids=sends_ids, dtype=config.wire_dtype
        )

    def summarise(self, history: list[RoundMetrics]) -> Summary:
        config, data, last = self.config, self.data, history[-1]
        full = self._traffic(data.num_classes, sends_ids=False)
        updates = len(history) * config.cohort
        return Summary(
            method=config.method,
            data=data.name,
            task=data.task,
            seed=config.seed,
            top1=last.top1,
            map_at_10=last.map_at_10,
            rounds=len(history),
            cohort=config.cohort,
            num_classes=data.num_classes,
            num_clients=len(data.clients),
            num_train_images=sum(len(held) for held in data.clients),
            num_test_images=len(data.test_images),
            num_parameters=len(self.server.extractor),
            embedding_dim=config.embedding_dim,
            mean_class_set=float(np.mean([metrics.mean_class_set for metrics in history])),
            traffic=sum((metrics.traffic for metrics in history), Traffic()),
            full_traffic=Traffic(*(updates * count for count in astuple(full))),
            seconds=last.seconds,
        )


def _server_optimizer(config: Config) -> Optimizer:
    if config.server_optimizer == "adagrad":
        return Adagrad(config.server_lr)
    return SGD(config.server_lr, config.server_momentum)


def draw_cohort(seed: int, round: int, attempt: int, num_clients: int, cohort: int) -> list[int]:
    """`cohort` different clients of [0, num_clients), uniformly, ascending."""
    rng = generator(seed, round, attempt, NO_CLIENT, Purpose.COHORT)
    return sorted(rng.choice(num_clients, cohort, replace=False).tolist())


def learning_rate(config: Config, round: int) -> float:
    """The clients' rate in a round, from 0: a linear rise to client_lr over warmup_rounds, then the decay.

    A linear or cosine decay would reach 0 in the round after the last.
    """
    warmup = config.warmup_rounds
    if round < warmup:
        return config.client_lr * (round + 1) / warmup
    done = (round - warmup) / max(1, config.rounds - warmup)
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return config.client_lr * decay[config.lr_decay]


def load_data(config: Config) -> FederatedData:
    """The data set that `config` names. Raises ConfigError, or ValueError and OSError about its files."""
    if config.data == OWN:
        raise ConfigError("data", f"{OWN!r} data is handed over in Python, as run(config, data=...)")
    if config.data_dir is not None and not config.data_dir.is_dir():
        raise ConfigError("data_dir", f"no such folder: {config.data_dir}")
    glyphs = {"num_classes": config.glyph_classes, "writers": config.glyph_writers}
    return load(
        config.data,
        data_dir=config.data_dir,
        seed=config.data_seed,
        task=config.task,
        cache_dir=config.cache_dir,
        **(glyphs if config.data == "glyphs" else {}),
    )


def check_data(config: Config, data: FederatedData) -> None:
    """Raises ConfigError if the run and the data do not fit."""
    if config.cohort > len(data.clients):
        raise ConfigError(
            "cohort", f"expected at most {len(data.clients)}, the clients there are, got {config.cohort}"
        )
    if len(data.test_images) < 2:
        raise ConfigError("data", f"expected at least 2 test images, got {len(data.test_images)}")


def _build_model(config: Config) -> nn.Module:
    if config.model == OWN:
        raise ConfigError("model", f"{OWN!r} model is handed over in Python, as run(config, model=...)")
    return build_model(config.model, config.embedding_dim, config.seed)


def _check_model(module: nn.Module, config: Config, data: FederatedData) -> None:
    """Raises ValueError unless the module maps these images to (B, D) and can be averaged."""
    refuse_batch_norm(module)
    module.eval()
    with torch.no_grad():
        embeddings = module(as_input(data.images[:2]))
    expected = (len(data.images[:2]), config.embedding_dim)
    if tuple(embeddings.shape) != expected:
        raise ValueError(
            f"model: expected embeddings of shape {expected} for {expected[0]} images (embedding_dim "
            f"{config.embedding_dim}), got {tuple(embeddings.shape)}"
        )


def _round_metrics(
    config: Config,
    history: list[RoundMetrics],
    updates: list[Update],
    entries: list[Entry],
    accuracies: tuple[float | None, float | None],
    begun: float,
) -> RoundMetrics:
    moved = sum((entry.traffic for entry in entries), Traffic())
    images = sum(update.num_examples for update in updates)
    return RoundMetrics(
        round=len(history) + 1,
        loss=sum(update.num_examples * update.loss for update in updates) / images,
        client_lr=learning_rate(config, len(history)),
        top1=accuracies[0],
        map_at_10=accuracies[1],
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
