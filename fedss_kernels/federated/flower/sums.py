"""The server's part in the secure sums of a round, over messages; a node's is `member`.

Whoever is silent, or wrong, in one of the exchanges is out of what follows, and his masks are taken out of a
sum by the others' shares of his key. A sum is lost where fewer than `threshold` are left, or where what they
sent does not open it: the server then has learned nothing, and the round is tried again with new keys.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from flwr.app import RecordDict
from torch import Tensor

from ..messages import Silence
from ..secure_sums import KEY_SHARE_BYTES, SEED_SHARE_BYTES, SHARES_BYTES
from .keys import CLASSES, SUMS, Public, agreed, place_of, private_key, rebuilt
from .masks import Integers, opened, stream
from .wire import number_of, word_of

T = TypeVar("T")
Words: TypeAlias = dict[str, Any]
Numbers: TypeAlias = dict[str, Tensor]
SHARES = "shares"  # the fault of whoever has keys or shares that are none
log = logging.getLogger(__name__)


class Ask(Protocol):
    """One exchange: (what these clients answer, in their order; who does not)"""

    def __call__(
        self, kind: str, contents: Mapping[int, tuple[Words, Numbers]]
    ) -> tuple[dict[int, RecordDict], dict[int, Silence]]: ...


class Wrong(ValueError):
    """An answer that is left out, by the name of its fault."""

    def __init__(self, fault: str, words: str):
        super().__init__(words)
        self.fault = fault


class SumLost(Exception):
    """A secure sum that cannot be opened."""


class Sums:
    """Of one attempt at a round."""

    def __init__(self, ask: Ask, threshold: int):
        self.ask, self.threshold = ask, threshold
        self.silent: dict[int, Silence] = {}  # who is out, and why
        self.liars: set[int] = set()  # by whom a sum was lost
        self.members: list[int] = []  # who are in the sums, ascending
        self._clients: list[int] = []  # who hold shares of what is theirs: those and who never dealt any
        self._public: dict[int, list[Public]] = {}
        self._shares: dict[int, list[bytes]] = {}  # of each member to each other client, sum after sum

    def set_up(self, clients: Collection[int]) -> None:
        """Keys, and shares of them. Raises SumLost."""
        shown = self._asked("query.keys", {k: ({}, {}) for k in clients}, _shown)
        self._public = self._unlike(shown)
        self._clients = sorted(self._public)
        self._check(self._clients)
        keys = [key for k in self._clients for each in self._public[k] for key in each.keys]
        words = {"clients": self._clients, "keys": keys, "threshold": self.threshold}
        self._shares = self._asked("query.shares", {k: (words, {}) for k in self._clients}, self._dealt)
        self.members = sorted(self._shares)
        self._check(self.members)

    def joining(self, client: int) -> Words:
        """The others' shares for a member, with which it takes part."""
        others = [k for k in self.members if k != client]
        each = len(self._clients) - 1
        places = {k: [j for j in self._clients if j != k].index(client) for k in others}
        shares = [self._shares[k][number * each + places[k]] for number in range(SUMS) for k in others]
        return {"from": others, "shares": shares}

    def of(
        self,
        number: int,
        kind: str,
        contents: Mapping[int, tuple[Words, Numbers]],
        size: int,
        look: Callable[[int, RecordDict], None] = lambda client, answer: None,  # raises Wrong
    ) -> tuple[list[int], Integers]:
        """(whose integers are in it, their sum, (size,)); what they are asked for is of this kind.

        Raises SumLost.
        """
        complaints = list[tuple[int, int]]()

        def read(client: int, answer: RecordDict) -> Integers | None:
            look(client, answer)
            unsound = word_of(answer, "unsound")
            if unsound is None or number > CLASSES:  # the shares of both sums come with the first
                return _masked(answer, size)
            complaints.extend((client, k) for k in self._others_in(client, unsound))
            return None

        sent = self._asked(kind, contents, read)
        if complaints:
            raise SumLost(self._blamed(complaints))
        self._check(sent)
        vectors = [vector for vector in sent.values() if vector is not None]
        return sorted(sent), self._opened(number, sorted(sent), vectors, size)

    def _asked(
        self,
        kind: str,
        contents: Mapping[int, tuple[Words, Numbers]],
        read: Callable[[int, RecordDict], T],
        *,
        counts: bool = True,  # whether who does not answer now is out
    ) -> dict[int, T]:
        """What these clients answer, as it is read."""
        answers, silent = self.ask(kind, contents)
        found = dict[int, T]()
        for k, answer in answers.items():
            try:
                found[k] = read(k, answer)
            except ValueError as error:
                silent[k] = Silence("rejected", error.fault if isinstance(error, Wrong) else SHARES)
                log.warning("client %d's part in a secure sum is left out: %s", k, error)
        if counts:
            self.silent |= silent
        return found

    def _check(self, left: Collection[int]) -> None:
        if len(left) < self.threshold:
            raise SumLost(f"{len(left)} clients are left, and {self.threshold} are needed")

    def _unlike(self, shown: dict[int, list[Public]]) -> dict[int, list[Public]]:
        """Those with keys that nobody else shows."""
        times = Counter(key for each in shown.values() for public in each for key in public.keys)
        own = {
            k: each
            for k, each in shown.items()
            if all(times[key] == 1 for public in each for key in public.keys)
        }
        self.silent |= {k: Silence("rejected", SHARES) for k in shown.keys() - own.keys()}
        return own

    def _dealt(self, client: int, answer: RecordDict) -> list[bytes]:
        sizes = [SHARES_BYTES] * (SUMS * (len(self._clients) - 1))
        return _pieces(answer, "shares", sizes)

    def _others_in(self, client: int, unsound: Any) -> list[int]:
        """Of a client that says whose shares are not what they should be: whose."""
        others = set(self.members) - {client}
        if not isinstance(unsound, list) or not unsound or not set(unsound) <= others:
            raise ValueError(f"unsound: expected others in the sum, got {unsound!r}")
        return sorted(set(unsound))

    def _blamed(self, complaints: Sequence[tuple[int, int]]) -> str:
        """In words, who is: who complains of many, or is complained of by many; of two alone both."""
        times = Counter(k for pair in complaints for k in pair)
        self.liars |= {k for k, count in times.items() if count == max(times.values())}
        return f"shares of clients {sorted({k for _, k in complaints})} are not what others can use"

    def _opened(self, number: int, active: Sequence[int], vectors: Sequence[Integers], size: int) -> Integers:
        dropped = [k for k in self.members if k not in active]
        words: Words = {"sum": number, "active": list(active), "dropped": dropped}

        def read(client: int, answer: RecordDict) -> list[bytes]:
            sizes = [SEED_SHARE_BYTES if k in active else KEY_SHARE_BYTES for k in self.members]
            shares, place = _pieces(answer, "shares", sizes), self._clients.index(client)
            if any(place_of(share) != place for share in shares):
                raise ValueError("shares: expected this client's own")
            return shares

        shares = self._asked("query.open", {k: (words, {}) for k in active}, read, counts=False)
        self._check(shares)
        secrets = self._secrets(number, active, list(shares.values()))
        own = (stream(secrets[k], size) for k in active)
        return opened(vectors, own, self._left(number, active, dropped, secrets, size))

    def _secrets(
        self, number: int, active: Sequence[int], shares: Sequence[Sequence[bytes]]
    ) -> dict[int, bytes]:
        """Of each in the sum its seed where it is active, else its private key of masks."""
        found = dict[int, bytes]()
        for k, of_k in zip(self.members, zip(*shares, strict=True), strict=True):
            public = self._public[k][number]
            secret = rebuilt(of_k, self.threshold, public.is_of_seed if k in active else public.is_of_key)
            if secret is not None:
                found[k] = secret
        if missing := [k for k in self.members if k not in found]:
            if len(shares) > self.threshold:  # or one false share among just as many may be anybody's
                self.liars |= set(missing)
            raise SumLost(f"the shares of what clients {missing} hide are not of one secret")
        return found

    def _left(
        self,
        number: int,
        active: Sequence[int],
        dropped: Sequence[int],
        secrets: Mapping[int, bytes],
        size: int,
    ) -> Iterator[tuple[int, int, Integers]]:
        """The masks that those who dropped out left in the sum."""
        for absent in dropped:
            theirs = private_key(secrets[absent])
            for k in active:
                yield k, absent, stream(agreed(theirs, self._public[k][number].mask_key), size)


def _shown(client: int, answer: RecordDict) -> list[Public]:
    parts = word_of(answer, "keys")
    if not isinstance(parts, list) or len(parts) != 3 * SUMS:
        raise ValueError(f"keys: expected {3 * SUMS} of them")
    return [Public.read(*parts[3 * i : 3 * i + 3]) for i in range(SUMS)]


def _pieces(answer: RecordDict, name: str, sizes: Sequence[int]) -> list[bytes]:
    """As many bytes as these, each of its size."""
    found = word_of(answer, name)
    if not isinstance(found, list) or len(found) != len(sizes):
        count = len(found) if isinstance(found, list) else "none"
        raise ValueError(f"{name}: expected {len(sizes)}, got {count}")
    if any(type(p) is not bytes or len(p) != size for p, size in zip(found, sizes, strict=True)):
        raise ValueError(f"{name}: expected {sorted(set(sizes))} bytes each")
    return found


def _masked(answer: RecordDict, size: int) -> Integers:
    found = number_of(answer, "masked")
    if found is None or found.dtype != torch.int32:
        raise Wrong("dtype", "masked: expected integers of 32 bits")
    if found.shape != (size,):
        raise Wrong("shape", f"masked: expected ({size},), got {tuple(found.shape)}")
    return found.numpy().view(np.uint32).astype(np.int64)
