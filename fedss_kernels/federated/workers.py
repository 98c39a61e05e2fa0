"""The processes that play a round's clients: ranks of torch.distributed, of which rank 0 is the server too.

They speak through gloo wherever clients train, as what they send, phi and class rows, comes from the server's
state in main memory and goes back there.

Every choice is a function of the round and the client, so a worker is told only which clients to play, and is
sent phi and, as their turn comes, their class rows. Updates are taken in the clients' order, so the bits are
the same for any number of workers.
"""

import contextlib
import math
import multiprocessing
import os
import pickle
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import IntEnum
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path
from typing import ClassVar, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .algorithms.parts import Part
from .clients.player import Player, training_device
from .config import Config, ConfigError
from .data import FederatedData
from .given_back import give_back
from .interrupts import deaf, ending, ignore
from .ledger import over_the_wire
from .messages import Request, Silence, Update
from .plugins import load_in_process_of
from .scratch import scratch
from .stopwatch import Stopwatch

# Numbers of clients whose rows are read one after the other, and whose updates are taken so: what the server
# does for a small client costs a third of what it does with the caches full of the training before.
TOGETHER = 2**20
AHEAD = 2  # clients whose rows are on their way to a rank, or whose updates are on their way from it
FOREVER = timedelta(days=365)  # how long a worker waits for the others: an evaluation may take any time


class WorkerLost(RuntimeError):
    """A process that plays clients is gone."""


class Call(IntEnum):
    """What rank 0 wants of the others."""

    PLAY = 0
    EMBED = 1
    END = 2


@dataclass
class Team:
    """Rank 0's view of the workers, itself among them. With one, nothing is sent."""

    repeats: ClassVar[bool] = True  # whether a round can be played once more, to the same bits

    player: Player
    size: int
    watch: Stopwatch
    _busy: bool = False  # the others are in a call
    _lost: WorkerLost | None = None  # noticed in an evaluation, which rank 0 then did alone

    def requests(
        self, round: int, attempt: int, clients: Sequence[int]
    ) -> tuple[dict[int, Request], dict[int, Silence]]:
        """(what these clients ask for, in their order; those of them who do not ask)"""
        return {k: self.player.request(round, attempt, k) for k in clients}, {}

    def play(
        self,
        round: int,
        attempt: int,
        requests: Mapping[int, Request],
        phi: Tensor,  # (P,)
        given: Callable[[int, Request], Tensor],  # (client, request) -> what it needs beside phi
        take: Callable[[int, Update], None],  # (client, what it sends back)
    ) -> dict[int, Silence]:
        """Has the clients who make these requests trained, and `take`s what they send back, in their order.

        Returns who of them sends nothing back: here nobody.

        Rows are asked for as a client's turn comes, and an update is let go as it is taken: in one process
        there are those of one client at a time, or of as many as have few numbers (TOGETHER). Raises
        WorkerLost.
        """
        if self._lost:
            raise self._lost
        own, *shares = divided(list(requests), self.player.num_images, self.size)
        phi = self._travelled(phi)
        self._call(Call.PLAY, phi, round, attempt, list(requests))

        def given_to(k: int) -> Tensor:
            with self.watch("select"):
                numbers = given(k, requests[k])
                return self._travelled(numbers) if self.player.method.rows is Part.TRAINED else numbers

        others = [
            _Elsewhere(self, rank, share, round, requests, given_to) for rank, share in enumerate(shares, 1)
        ]
        line = _Line(requests, take)
        trained = 0  # images, of this rank's clients
        sizes = [2 * self.player.num_given(requests[k]) + self.player.num_trained(round) for k in own]
        for group in _together(own, sizes):
            of_group = deque((k, given_to(k)) for k in group)
            updates = deque[tuple[int, Update]]()
            while of_group:
                k, numbers = of_group.popleft()
                before, trained = trained, trained + self.player.num_images(k)
                for other in others:
                    other.send(until=trained)
                with self.watch("local training"):
                    update = self.player.update(round, attempt, k, requests[k], phi, numbers)
                del numbers
                updates.append((k, self.arrived(update)))
                del update
                for other in others:
                    other.receive(line, until=before)
            while updates:
                line.come(*updates.popleft())
        with self.watch("local training"):
            self.player.extractor.check_buffers()
        for other in others:
            other.send()
        for other in others:
            other.receive(line)
        self._busy = False
        return {}

    def embed(self, phi: Tensor, round: int) -> Tensor:
        """(T, D): the test images' embeddings by the net of a round, each worker's batches by its own.

        Where one is lost rank 0 makes them all, as the server has made its step: the round becomes whole, and
        can be saved. The next call to `play` says that it is lost.
        """
        try:
            return self._embed(phi, round)
        except WorkerLost as lost:
            self._lost = lost
            with self.watch("evaluation"):
                return torch.cat(list(self.player.embed(phi, round)))

    def _embed(self, phi: Tensor, round: int) -> Tensor:
        self._call(Call.EMBED, phi, round)
        with self.watch("evaluation"):
            batches = {0: self.player.embed(phi, round, 0, self.size)}
        for rank in range(1, self.size):
            with self.communication():
                batches[rank] = [_receive(shape, rank) for shape in self.player.embedded(rank, self.size)]
        self._busy = False
        total = sum(map(len, batches.values()))
        return torch.cat([batches[i % self.size][i // self.size] for i in range(total)])

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *error: object) -> None:
        """Lets the others go, if they wait for a call; in the middle of one they are ended."""
        if self.size > 1 and not self._busy:
            with contextlib.suppress(RuntimeError):  # they are gone already
                dist.broadcast(torch.tensor([Call.END, 0, 0, 0]), 0)

    def _travelled(self, numbers: Tensor) -> Tensor:
        if self.player.method.pooled:  # nothing leaves its place
            return numbers
        return over_the_wire(numbers, self.player.config.wire_dtype)

    def _call(
        self, call: Call, phi: Tensor, round: int = 0, attempt: int = 0, clients: Sequence[int] = ()
    ) -> None:
        if self.size == 1:
            return
        self._busy = True
        with self.communication():
            dist.broadcast(torch.tensor([call, round, attempt, len(clients)]), 0)
            if clients:
                dist.broadcast(torch.tensor(clients), 0)
            dist.broadcast(phi.contiguous(), 0)

    def arrived(self, update: Update) -> Update:
        rows, extractor = self._travelled(update.rows), self._travelled(update.extractor)
        if rows is update.rows and extractor is update.extractor:
            return update
        return replace(update, rows=rows, extractor=extractor)

    @contextlib.contextmanager
    def communication(self) -> Iterator[None]:
        try:
            with self.watch("communication"):
                yield
        except RuntimeError as error:
            raise WorkerLost(f"a worker was lost: {error}") from error


class _Line:
    """Updates that are there, handed on in the clients' order: one waits for those before it."""

    def __init__(self, clients: Iterable[int], take: Callable[[int, Update], None]):
        self.clients, self.take = deque(clients), take
        self.waiting: dict[int, Update] = {}

    def come(self, client: int, update: Update) -> None:
        self.waiting[client] = update
        del update
        while self.clients and self.clients[0] in self.waiting:
            first = self.clients.popleft()
            self.take(first, self.waiting.pop(first))


class _Elsewhere:
    """The clients that another rank plays. Rank 0 sends them their rows, and receives what they send back.

    It does so between its own clients, in step: all ranks train on about as many images in as much time. A
    client's rows go out before the other rank can be done with the one before it, and what it sends back is
    waited for once this rank is a client past it. So there are the rows and updates of few at a time, and
    who waits for another does so for one who will not be done before him.
    """

    def __init__(
        self,
        team: Team,
        rank: int,
        share: Sequence[int],
        round: int,
        requests: Mapping[int, Request],
        given_to: Callable[[int], Tensor],
    ):
        self.team, self.rank, self.round = team, rank, round
        self.requests, self.given_to = requests, given_to
        ends = list(accumulate(map(team.player.num_images, share)))
        self.unsent = deque(
            zip(share, [0, *ends], ends, strict=False)
        )  # (client, images before, and with it)
        self.sending: deque[tuple[dist.Work, Tensor]] = deque()
        self.coming: deque[tuple[int, _Incoming]] = deque()

    def send(self, until: float = math.inf) -> None:
        """What they need, to the clients that begin before so many images."""
        while self.unsent and self.unsent[0][1] < until:
            k, _, end = self.unsent.popleft()
            numbers = self.given_to(k).flatten()
            with self.team.communication():
                self.coming.append(
                    (end, _Incoming(k, self.rank, self.requests[k], self.round, self.team.player))
                )
                self.sending.append((_started(dist.isend(numbers, self.rank)), numbers))
                while len(self.sending) > AHEAD:
                    self.sending.popleft()[0].wait()

    def receive(self, line: _Line, until: float = math.inf) -> None:
        """What the clients send back that end with so many images."""
        while self.coming and self.coming[0][0] <= until:
            _, incoming = self.coming.popleft()
            with self.team.communication():
                update = incoming.wait()
            line.come(incoming.client, self.team.arrived(update))
            del incoming, update


def serve(player: Player, rank: int, size: int) -> None:
    """What every rank but 0 does until the run ends."""
    header = torch.empty(4, dtype=torch.int64)
    phi = torch.empty(len(player.extractor.flat))
    while True:
        try:
            dist.broadcast(header, 0)
        except RuntimeError:  # rank 0 is gone, and with it whom to tell
            return
        call, round, attempt, count = header.tolist()
        if call == Call.END:
            return
        clients = torch.empty(count, dtype=torch.int64)
        if count:
            dist.broadcast(clients, 0)
        dist.broadcast(phi, 0)
        if call == Call.EMBED:
            for batch in player.embed(phi, round, rank, size):
                dist.send(batch, 0)
        else:
            share = divided(clients.tolist(), player.num_images, size)[rank]
            _play_share(player, round, attempt, share, phi)


def _play_share(player: Player, round: int, attempt: int, share: list[int], phi: Tensor) -> None:
    coming = (_Given(k, player.request(round, attempt, k), player) for k in share)
    following = next(coming, None)
    sending = deque[tuple[dist.Work, Tensor]]()  # on its way while the next is trained
    while own := following:
        following = next(coming, None)  # what the next client needs comes while this one is trained
        update = player.update(round, attempt, own.client, own.request, phi, own.wait())
        sending += [(_started(dist.isend(part, 0)), part) for part in _packed(update)]
        del own, update
        while len(sending) > 2 * AHEAD:
            sending.popleft()[0].wait()
    player.extractor.check_buffers()
    for work, _ in sending:
        work.wait()


class _Given:
    """What a client needs beside phi, and rank 0 is going to send."""

    def __init__(self, client: int, request: Request, player: Player):
        self.client, self.request = client, request
        self.numbers = torch.empty(player.num_given(request))
        self.work = _started(dist.irecv(self.numbers, 0))

    def wait(self) -> Tensor:
        self.work.wait()
        return self.numbers


def _packed(update: Update) -> tuple[Tensor, Tensor]:
    """(all of its numbers, one after the other; class_ids, n_k and the bits of the loss)"""
    loss = torch.tensor([update.loss], dtype=torch.float64).view(torch.int64)
    kept = [] if update.kept is None else [update.kept]
    numbers = torch.cat([update.rows.flatten(), update.extractor, *kept])
    return numbers, torch.cat([update.class_ids, torch.tensor([update.num_examples]), loss])


class _Incoming:
    """An update that another rank is going to send."""

    def __init__(self, client: int, rank: int, request: Request, round: int, player: Player):
        num_rows = len(request.class_ids) if player.method.rows is Part.TRAINED else 0
        self.client, self.shape = client, (num_rows, player.config.row_dim)
        self.sizes = [math.prod(self.shape), player.num_trained(round), player.num_at_home]
        self.numbers = torch.empty(sum(self.sizes))
        self.integers = torch.empty(num_rows + 2, dtype=torch.int64)
        self.works = [_started(dist.irecv(part, rank)) for part in (self.numbers, self.integers)]

    def wait(self) -> Update:
        for work in self.works:
            work.wait()
        rows, extractor, kept = self.numbers.split(self.sizes)
        class_ids, (num_examples, _) = self.integers[:-2], self.integers[-2:].tolist()
        loss = self.integers[-1:].view(torch.float64).item()
        stays = kept if len(kept) else None
        return Update(self.client, class_ids, rows.view(self.shape), extractor, num_examples, loss, stays)


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None  # as both ranks are of the group
    return work


def _receive(shape: tuple[int, ...], rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    found = torch.empty(shape, dtype=dtype)
    dist.recv(found, rank)
    return found


def _together(clients: Iterable[int], sizes: Iterable[int]) -> Iterator[list[int]]:
    """In their order, as many at a time as have at most TOGETHER numbers, or one with more."""
    group, total = list[int](), 0
    for k, size in zip(clients, sizes, strict=True):
        if group and total + size > TOGETHER:
            yield group
            group, total = [], 0
        group.append(k)
        total += size
    if group:
        yield group


def divided(clients: Sequence[int], size_of: Callable[[int], int], parts: int) -> list[list[int]]:
    """The clients in `parts` shares of about as many images: the largest first, to the least burdened."""
    shares: list[list[int]] = [[] for _ in range(parts)]
    burdens = [0] * parts
    for k in sorted(clients, key=lambda k: (-size_of(k), k)):
        least = burdens.index(min(burdens))
        shares[least].append(k)
        burdens[least] += size_of(k)
    return [sorted(share) for share in shares]


# ---- processes ---------------------------------------------------------------------------------------------


def launched() -> tuple[int, int]:
    """(rank, number of processes) that torchrun gave this one; (0, 1) where it did not start it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@contextlib.contextmanager
def started(config: Config, data: FederatedData, model: nn.Module | None) -> Iterator[int]:
    """The number of workers, this process among them, all ready to `serve`: torchrun's, or config.workers."""
    _, size = launched()
    if size > 1 and config.workers not in (1, size):
        raise ConfigError("workers", f"expected {size}, as many as torchrun started, got {config.workers}")
    if size > 1:
        dist.init_process_group("gloo", timeout=FOREVER)
        try:
            yield size
        finally:
            dist.destroy_process_group()
    elif config.workers > 1:
        with _local(config, data, model):
            yield config.workers
    else:
        yield 1


@dataclass
class _Worker:
    """A process that plays clients, as the one that started it sees it."""

    rank: int
    process: multiprocessing.process.BaseProcess
    failure: Connection  # gives (when, in a line, traceback) if Python fails there

    def cause(self) -> tuple[float, str, str] | None:
        """(when, why in a line, its traceback) it ended before the others; None while it runs."""
        if self.process.exitcode is None:
            return None
        with contextlib.suppress(EOFError, OSError):
            if self.failure.poll():
                when, line, trace = self.failure.recv()
                return when, f"rank {self.rank} failed: {line}", trace
        # A signal is the first cause: what fails for want of others fails in Python.
        when = 0.0 if self.process.exitcode < 0 else math.inf
        return when, f"rank {self.rank} {ending(self.process.exitcode)}", ""


@contextlib.contextmanager
def _local(config: Config, data: FederatedData, model: nn.Module | None) -> Iterator[None]:
    """Workers on this machine, which end with the run or with this process.

    They are spawned, so a script that starts some needs `if __name__ == "__main__":`.
    """
    others, patience = list[_Worker](), 0  # whatever they wait for after an error does not come
    # In a file, not in the pipe to a new process, which may end before it has read it.
    given = pickle.dumps((config, data, model))
    try:
        with scratch("given", given) as folder:  # until all have read it
            for rank in range(1, config.workers):
                others.append(_start(folder, rank, config.workers))
            _join(folder, 0, config.workers, others)
        yield
        patience = 5
    except WorkerLost as lost:
        _explain(lost, others)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for worker in others:
            worker.process.join(timeout=patience)
            worker.process.kill()
            worker.process.join()
            worker.failure.close()


def _start(folder: Path, rank: int, size: int) -> _Worker:
    context = multiprocessing.get_context("spawn")
    failure, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(folder, rank, size, os.getpid(), sender), daemon=True)
    with deaf():  # to stop is for rank 0, which finishes the round
        process.start()
    sender.close()
    return _Worker(rank, process, failure)


def _explain(lost: WorkerLost, others: Sequence[_Worker]) -> NoReturn:
    """Raises it with the first cause, once those that ended have."""
    end = time.monotonic() + 2
    for worker in others:
        worker.process.join(timeout=max(0, end - time.monotonic()))
    causes = sorted(cause for worker in others if (cause := worker.cause()))
    if not causes:
        raise lost
    when, line, trace = causes[0]
    what, _, _ = str(lost).partition(": ")
    there = RuntimeError(f"\n{trace}") if trace else lost
    raise WorkerLost(f"{lost} ({line})" if math.isinf(when) else f"{what}: {line}") from there


def _work(folder: Path, rank: int, size: int, parent: int, failure: Connection) -> None:
    ignore()
    give_back()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        config, data, model = pickle.loads((folder / "given").read_bytes())
        load_in_process_of(config)
        _join(folder, rank, size)
        work(config, data, model, rank, size)
    except Exception as error:
        line = f"{type(error).__name__}: {' '.join(str(error).split())}"
        with contextlib.suppress(OSError):  # rank 0 is gone: nobody asks for the cause
            failure.send((time.monotonic(), line, traceback.format_exc()))
        raise SystemExit(1) from None


def _end_with(parent: int) -> None:
    """Ends this process soon after its parent, whatever it is doing."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _join(folder: Path, rank: int, size: int, others: Sequence[_Worker] = ()) -> None:
    """Meets the other ranks. Raises WorkerLost if one of `others` ends before it comes."""
    store = dist.FileStore(str(folder / "store"), size)
    store.set(f"here {rank}", "")
    while others and not store.check([f"here {other}" for other in range(1, size)]):
        if not all(worker.process.is_alive() for worker in others):
            raise WorkerLost(
                "a worker ended before the run began: a script that starts workers is a file, and needs "
                'if __name__ == "__main__":'
            )
        time.sleep(0.02)
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=FOREVER)
        dist.barrier()  # from now on nobody reads what is in the folder
    except RuntimeError as error:
        raise WorkerLost(f"a worker ended before the run began: {error}") from error


def help_out(config: Config, data: FederatedData, rank: int, size: int) -> None:
    """What a process that torchrun gave a rank but 0 does, until rank 0's run ends."""
    ignore()  # to stop is for rank 0, which finishes the round
    dist.init_process_group("gloo", timeout=FOREVER)
    work(config, data, None, rank, size)


def work(config: Config, data: FederatedData, model: nn.Module | None, rank: int, size: int) -> None:
    """All that a rank but 0 does, in a process group that is there."""
    torch.set_num_threads(config.threads)
    serve(Player(config, data, model, training_device(config, rank)), rank, size)
    dist.destroy_process_group()
