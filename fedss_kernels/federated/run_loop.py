"""The loop of one run, whatever its rounds are: play, evaluate, record, checkpoint; stop, and go on.

What a round is belongs to the algorithm (any_round.py); of methods shaped as federated averaging it is
fedavg_round.py's.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..loss_operator import without_autocast
from . import idle_settings
from .any_round import Algorithm, OnTuned, Played, TooFewClients
from .clients.player import Player, training_device
from .config import Config, ConfigError
from .data import FederatedData
from .defaults import OWN
from .evaluation import check_measured
from .fedavg_round import Simulation
from .files import run_folder
from .files.checkpoint import Checkpoint, CheckpointError
from .files.facts import Facts
from .files.round_metrics import RoundMetrics
from .files.run_folder import RunFolder
from .files.summary import Summary
from .given_data import as_given
from .learning_rate import learning_rate
from .ledger import OUTCOMES, Traffic
from .loading import check_data, dearer, fitted, load_data, other_warmup, trivial
from .models.copies import check_is_net
from .probes.client_work import in_a_round
from .sending import check_sendable
from .server.class_store import ClassStore, check_free
from .server.kept_by_clients import Homes
from .server.row_table import RowTable
from .split_learning.split_round import SplitRound
from .workers import WorkerLost, started

OTHERS: dict[str, type[Algorithm]] = {  # of the methods that have rounds of their own kind
    "mocosfl": SplitRound,
    "central_moco": SplitRound,
}


@dataclass(frozen=True, repr=False)
class Result:
    """What `run` returns; the files in `out` say the same.

    config: every option of the run, with what was chosen to fit the data.
    history: of each round, from the first, the line of metrics.csv.
    summary: the figures at the end; summary.accuracy is the measure of the task, a share in [0, 1].
    extractor: the trained net, in eval mode on the CPU; it maps float32 images (B, channels, H, W) in [0, 1]
        to embeddings (B, D).
    weight: (C, D) float32, the trained class matrix, a row for each class; None where it is in a class store.
    table: the same by the row: table.read(class_ids), table[2:5], len(table); None where there is none.
    homes: where clients keep class rows, or the net too, with themselves: homes.model(client) gives (net's
        parameters or None, rows); else None.
    seconds: where the time went, by stage.
    out: the folder of the run's files; None where nothing was written.
    """

    config: Config
    history: list[RoundMetrics]
    summary: Summary
    extractor: nn.Module
    weight: Tensor | None
    table: RowTable | None
    homes: Homes | None
    seconds: dict[str, float]
    out: Path | None

    def __repr__(self) -> str:
        s = self.summary
        accuracy = "not measured" if s.accuracy is None else s.headline.text(s.accuracy)
        where = f", in {self.out}" if self.out else ""
        of = f"{s.method} on {s.data} after round {s.rounds}"
        return f"<Result of {of}: {s.headline.label} {accuracy}{where}>"


@contextmanager
def _plain_torch() -> Iterator[None]:
    """Torch as it is when it is imported, whatever the caller has it do: no other bits, and gradients."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    on_cpu = torch.get_default_device().type == "cpu"
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            without_autocast("cpu"),
            without_autocast("cuda"),
            nullcontext() if on_cpu else torch.device("cpu"),
        ):
            yield
    finally:
        torch.set_default_dtype(before)


@_plain_torch()
def run(
    config: Config,
    *,
    data: FederatedData | None = None,
    model: nn.Module | None = None,
    on_round: Callable[[RoundMetrics], None] | None = None,
    on_tuned: OnTuned | None = None,
    resume: bool = False,
    stop: Callable[[], bool] | None = None,
) -> Result:
    """Trains by `config.method` for `config.rounds` rounds, evaluating every `config.eval_every` and at last.

    `data` and `model` replace the ones that config names. Data with the name of config's data set are taken
    for what its options say; beside data of one's own these have no effect, which is logged. `model` is any
    module from float32 images (B, channels, H, W) in [0, 1] to embeddings (B, D); a copy of it is trained,
    from its present parameters on.
    `on_round` is called after every round, `on_tuned(done, total)` while clients fine-tune the model at the
    end. With `config.out` the results are written to that folder, otherwise nothing is written. Equal
    arguments give equal bits on one machine, whatever autocast, modes and defaults of torch are around it.
    One run at a time in a process, as nets that draw share torch's default generator.

    With `resume` it goes on from the last checkpoint in `config.out`, written every
    `config.checkpoint_every` rounds, to the same bits as a run that never stopped (times excepted). A run
    that is finished goes on to a larger `config.rounds`, to the bits of a run of so many, and one that was
    stopped to another number than it began with; not where a decay would have given the rounds that are done
    other rates, nor with another `eval_every` or `warmup_rounds`, whose defaults follow the rounds: give
    those of the folder's config.json. When `stop()`, asked after every round, is true it saves a checkpoint
    and raises Stopped.

    Raises ConfigError for settings that do not fit the data, ValueError for a model that cannot be averaged
    (BatchNorm), FileExistsError for a folder already in use, CheckpointError, a ValueError, for a checkpoint
    that is not there, was damaged, or is of another configuration, version, data or net, TooFewClients, a
    RuntimeError, for a round that no cohort makes, WorkerLost, one too, for a process that is gone. With
    `config.workers` a script needs `if __name__ == "__main__":`.
    """
    played_by = OTHERS.get(config.method, Simulation)
    return run_by(
        played_by,
        config,
        data=data,
        model=model,
        on_round=on_round,
        on_tuned=on_tuned,
        resume=resume,
        stop=stop,
    )


def run_by(
    played_by: type[Algorithm],
    config: Config,
    *,
    data: FederatedData | None = None,
    model: nn.Module | None = None,
    on_round: Callable[[RoundMetrics], None] | None = None,
    on_tuned: OnTuned | None = None,
    resume: bool = False,
    stop: Callable[[], bool] | None = None,
    afar: bool = False,  # whether clients' images are elsewhere: of those in `data` nothing is said
) -> Result:
    """As `run`, of rounds that this algorithm plays."""
    if resume and config.out is None:
        raise ConfigError("out", "expected the folder of the run to resume, got none")
    config, data = _settled(config, data, model, afar)
    told, stop = on_round or _ignore, stop or (lambda: False)
    with _torch_settings(config.threads):
        player = Player(config, data, model, training_device(config))
        facts = played_by.facts(config, player)
        folder, checkpoint, history = _open_folder(config, player, facts, resume)
        store = None
        try:
            if folder:
                folder.name_classes(data)
            store = _open_store(config, player.store_size, checkpoint)
            with started(config, data, model) as workers:
                algorithm = played_by(config, player, workers, store)
                algorithm.on_tuned = on_tuned or _ignore
                if checkpoint:
                    algorithm.restore(checkpoint.tensors, checkpoint.round)
                    algorithm.not_finite_since = history[-1].not_finite_since
                with algorithm.team:
                    return _run(config, algorithm, facts, folder, store, history, told, stop)
        finally:
            if folder:
                folder.close()
            if store:
                store.release()


def _ignore(*told: object) -> None:
    pass


def _settled(
    config: Config, data: FederatedData | None, model: nn.Module | None, afar: bool
) -> tuple[Config, FederatedData]:
    """Every option as the run has it, and its data. Raises ConfigError for what does not go together."""
    unlike = list[str]()
    if data is not None:
        if not isinstance(data, FederatedData):
            raise TypeError(f"data: expected a FederatedData, got a {type(data).__name__}")
        config, unlike = as_given(config, data)
    if model is not None:
        check_is_net(model)
        config = replace(config, model=OWN)
    data = data or load_data(config)
    config = fitted(config, data.found)
    check_data(config, data)
    check_measured(config, data)
    if model is not None and config.workers > 1:
        check_sendable(model)
    for line in (*unlike, *idle_settings.idle([config]), *trivial(config, data, afar), *dearer(config, data)):
        idle_settings.log.warning(line)
    return config, data


class Stopped(Exception):
    """A run was asked to stop: after how many rounds, and the folder that holds its checkpoint, if any."""

    def __init__(self, rounds: int, folder: Path | None):
        super().__init__(f"stopped after round {rounds}")
        self.rounds, self.folder = rounds, folder


def _open_folder(
    config: Config, player: Player, facts: Facts, resume: bool
) -> tuple[RunFolder | None, Checkpoint | None, list[RoundMetrics]]:
    """(where results go, what is gone on from, the rounds that are done)"""
    if config.class_store and not resume:  # before anything is made
        check_free(config.class_store, run=config.out, overwrite=config.overwrite)
    if config.out is None:
        return None, None, []
    known = config.out, config, player.fingerprint, facts
    if not resume:
        return RunFolder.new(*known), None, []
    folder, checkpoint, history = RunFolder.resumed(*known)
    for line in other_warmup(run_folder.read_config(config.out)[0].rounds, config):
        run_folder.log.warning(line)
    if (checkpoint.store is None) != (config.class_store is None):
        where = "in memory" if checkpoint.store is None else "in a class store"
        folder.close()
        raise CheckpointError(f"the checkpoint in {config.out} has the class matrix {where}: class_store")
    return folder, checkpoint, history


def _open_store(config: Config, size: tuple[int, int], checkpoint: Checkpoint | None) -> ClassStore | None:
    if config.class_store is None:
        return None
    if checkpoint is None:
        try:
            return ClassStore.new(config.class_store, *size, run=config.out, overwrite=config.overwrite)
        except FileExistsError:
            raise
        except OSError as error:
            raise ConfigError("class_store", f"cannot write to {config.class_store}: {error}") from None
    return ClassStore.opened(config.class_store, *size, checkpoint.store)


def _run(
    config: Config,
    algorithm: Algorithm,
    facts: Facts,
    folder: RunFolder | None,
    store: ClassStore | None,
    history: list[RoundMetrics],
    on_round: Callable[[RoundMetrics], None],
    stop: Callable[[], bool],
) -> Result:
    begun = time.perf_counter() - (history[-1].seconds if history else 0.0)
    saved = len(history)  # rounds in the last checkpoint
    if folder:
        folder.begin()
    for round in range(len(history), config.rounds):
        try:
            played = algorithm.play(round)
        except WorkerLost:
            if folder and round > saved:
                algorithm.checkpoint(folder, round)
            raise
        except TooFewClients as error:
            if folder and round > saved:
                algorithm.checkpoint(folder, round)
            if folder:  # after the checkpoint: a run that goes on from it writes its own lines of this round
                folder.add_entries(error.entries)
            raise
        done = round + 1
        evaluated = done % config.eval_every == 0 or done == config.rounds
        measured = algorithm.evaluate(last=done == config.rounds) if evaluated else {}
        history.append(_round_metrics(config, algorithm, facts, history, played, measured, begun))
        if folder:
            with algorithm.watch("files"):
                folder.add(history[-1], played.entries)
        on_round(history[-1])
        stopping = stop() and done < config.rounds
        due = config.checkpoint_every and (done % config.checkpoint_every == 0 or done == config.rounds)
        if folder and (due or stopping):
            with algorithm.watch("files"):
                algorithm.checkpoint(folder, done)
            saved = done
        if stopping:
            raise Stopped(done, config.out)
    summary = Summary.of(config, facts, history)
    trained = algorithm.trained()
    table, homes = trained.table, trained.homes
    weight = None if table is None or table.store else table[:]
    own = homes.trained() if homes and not homes.table.store else {}
    if store:
        store.sync()
    if folder:
        # without what clients keep, the rows that they began with would be taken for theirs
        folder.finish(summary, trained.net, weight if own or not homes else None, own)
    if store and not config.checkpoint_every:
        store.forget_journals()
    seconds = algorithm.watch.seconds
    return Result(config, history, summary, trained.net, weight, table, homes, seconds, config.out)


def _round_metrics(
    config: Config,
    algorithm: Algorithm,
    facts: Facts,
    history: list[RoundMetrics],
    played: Played,
    measured: Mapping[str, float | None],
    begun: float,
) -> RoundMetrics:
    entries = played.entries
    moved = sum((entry.traffic for entry in entries), Traffic.none(facts.flows))
    values = dict.fromkeys(facts.measures.names) | dict(measured) | in_a_round(entries)
    _refuse_others("measures", values, facts.measures.names)
    _refuse_others("flows", moved.bytes, facts.flows)
    return RoundMetrics(
        round=len(history) + 1,
        loss=played.loss,
        client_lr=learning_rate(config, len(history)),
        measures=facts.measures,
        measured=values,
        not_finite_since=algorithm.not_finite_since,
        attempts=entries[-1].attempt + 1,
        **{outcome: sum(entry.outcome == outcome for entry in entries) for outcome in OUTCOMES},
        mean_class_set=sum(entry.num_rows for entry in entries) / len(entries),
        traffic=moved,
        bytes_so_far=moved.total + (history[-1].bytes_so_far if history else 0),
        seconds=time.perf_counter() - begun,
    )


def _refuse_others(what: str, found: Mapping[str, object], known: Sequence[str]) -> None:
    """Raises ValueError for an algorithm that gives more than its facts say, for which there is no column."""
    if len(found) > len(known):
        raise ValueError(f"{what}: expected some of {', '.join(known)}, got {', '.join(found)}")


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
