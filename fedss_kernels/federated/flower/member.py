"""A node's part in the secure sums of a round, by flwr's primitives (SecAgg: Bonawitz et al., CCS 2017).

    keys     it makes key pairs, and a seed for a mask of its own
    shares   it splits its private key of masks and its seed among all, any `threshold` of whom have them
             again, and encrypts to each what is his
    masked   it has the others' shares, and sends its integers behind its masks
    open     it gives its shares of the seeds of all who sent theirs, and of the keys of all who did not

A round has two sums, each with keys and seeds of its own: what opens one says nothing of the other. Whoever
had both seed and key of a client could read its integers: so a node opens a sum once, for one list of who
sent, and not where two such lists could each find `threshold` nodes.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from cryptography.fernet import InvalidToken
from flwr.app import ConfigRecord, RecordDict
from flwr.common.secure_aggregation.crypto.shamir import create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt
from flwr.common.secure_aggregation.secaggplus_utils import (
    share_keys_plaintext_concat,
    share_keys_plaintext_separate,
)
from flwr.supercore.primitives.asymmetric import generate_key_pairs, private_key_to_bytes, public_key_to_bytes

from ..secure_sums import KEY_SHARE_BYTES, SEED_SHARE_BYTES
from .keys import SUMS, Public, agreed, place_of, private_key
from .masks import KEY_BYTES, Integers, masked, stream

_NAME = "sums"  # of what is kept, in the state that Flower keeps for a node
BEGUN, DEALT, JOINED, MASKED, OPENED = range(5)


@dataclass
class Member:
    """Of one sum, all that a node keeps of it from one message to the next."""

    mask_key: bytes  # private
    share_key: bytes  # private
    seed: bytes
    stage: int = BEGUN
    threshold: int = 0
    clients: list[int] = field(default_factory=list)  # who have shares of what is this node's, ascending
    mask_keys: list[bytes] = field(default_factory=list)  # theirs, public
    pair_keys: list[bytes] = field(default_factory=list)  # of what is encrypted with each; b"" for itself
    seed_shares: list[bytes] = field(default_factory=list)  # of each what this node has; b"" for none
    key_shares: list[bytes] = field(default_factory=list)

    @classmethod
    def new(cls) -> "Member":
        mask_key, share_key = (private_key_to_bytes(generate_key_pairs()[0]) for _ in range(2))
        return cls(mask_key, share_key, os.urandom(KEY_BYTES))

    @property
    def public(self) -> Public:
        mask_key, share_key = (
            public_key_to_bytes(private_key(key).public_key()) for key in (self.mask_key, self.share_key)
        )
        return Public(mask_key, share_key, hashlib.sha256(self.seed).digest())

    def deal(self, client: int, keys: Mapping[int, tuple[bytes, bytes]], threshold: int) -> list[bytes]:
        """For each other client, ascending, its shares, encrypted; keys: of all (of masks, of shares)."""
        self._step(BEGUN, DEALT)
        public, all_keys = self.public, [key for pair in keys.values() for key in pair]
        if keys.get(client) != public.keys or len(set(all_keys)) < len(all_keys):
            raise ValueError("keys: expected this node's own among others, each once")
        if not len(keys) < 2 * threshold <= 2 * len(keys):
            expected = f"expected more than half of {len(keys)} clients, and no more than all"
            raise ValueError(f"threshold: {expected}, got {threshold}")
        self.threshold, self.clients = threshold, sorted(keys)
        self.mask_keys = [keys[k][0] for k in self.clients]
        mine = private_key(self.share_key)
        self.pair_keys = [agreed(mine, keys[k][1], raw=False) if k != client else b"" for k in self.clients]
        dealt = [create_shares(secret, threshold, len(keys)) for secret in (self.seed, self.mask_key)]
        self.seed_shares, self.key_shares = (
            [share if k == client else b"" for k, share in zip(self.clients, shares, strict=True)]
            for shares in dealt
        )
        return [
            encrypt(key, share_keys_plaintext_concat(client, k, of_seed, of_key))
            for k, key, of_seed, of_key in zip(self.clients, self.pair_keys, *dealt, strict=True)
            if k != client
        ]

    def join(self, client: int, packages: Mapping[int, bytes]) -> list[int]:
        """Of these clients, who then are in the sum, keeps the shares. Returns those whose cannot be."""
        self._step(DEALT, JOINED)
        if client in packages or not packages.keys() <= set(self.clients):
            raise ValueError(f"shares: expected those of others, got {sorted(packages)}")
        if len(packages) + 1 < self.threshold:
            raise ValueError(f"shares: expected {self.threshold - 1} or more, got {len(packages)}")
        unsound = []
        for k, package in sorted(packages.items()):
            place = self.clients.index(k)
            try:
                self.seed_shares[place], self.key_shares[place] = self._unpacked(client, k, package)
            except ValueError:
                unsound.append(k)
        return unsound

    def _unpacked(self, client: int, other: int, package: bytes) -> tuple[bytes, bytes]:
        try:
            key = self.pair_keys[self.clients.index(other)]
            source, destination, *shares = share_keys_plaintext_separate(decrypt(key, package))
        except InvalidToken:
            raise ValueError("not encrypted for this node") from None
        sizes = [len(share) for share in shares]
        place = self.clients.index(client)
        if (source, destination) != (other, client) or sizes != [SEED_SHARE_BYTES, KEY_SHARE_BYTES]:
            raise ValueError("not shares of this client, for this node")
        if any(place_of(share) != place for share in shares):
            raise ValueError("another's shares")
        return shares[0], shares[1]

    def masked(self, client: int, numbers: Integers) -> Integers:
        self._step(JOINED, MASKED)
        others = [k for k in self.members if k != client]
        mine = private_key(self.mask_key)
        keys = dict(zip(self.clients, self.mask_keys, strict=True))
        pairs = ((k, stream(agreed(mine, keys[k]), len(numbers))) for k in others)
        return masked(numbers, client, stream(self.seed, len(numbers)), pairs)

    def open(self, client: int, active: Sequence[int], dropped: Sequence[int]) -> list[bytes]:
        """Of each in the sum, ascending: the share of its seed where it is active, else that of its key."""
        self._step(MASKED, OPENED)
        if sorted([*active, *dropped]) != self.members or client not in active:
            raise ValueError("active, dropped: expected each of the sum's clients in one of them")
        if len(active) < self.threshold:
            raise ValueError(f"active: expected at least {self.threshold} clients, got {len(active)}")
        places = [self.clients.index(k) for k in self.members]
        return [
            (self.seed_shares if self.clients[place] in active else self.key_shares)[place]
            for place in places
        ]

    @property
    def members(self) -> list[int]:
        """Clients whose shares this node has: those in the sum, itself among them."""
        return [k for k, share in zip(self.clients, self.seed_shares, strict=True) if share]

    def _step(self, at: int, to: int) -> None:
        """What a node does once it does not do again."""
        if self.stage != at:
            raise ValueError(f"a secure sum: expected what follows its stage {self.stage}, not {at}")
        self.stage = to


class Membership:
    """A node's parts in both sums of a round's attempt: what it answers the server."""

    def __init__(self, state: RecordDict, client: int, round: int, attempt: int):
        """state: what Flower keeps for the node from one message to the next."""
        self.state, self.client, self.attempt = state, client, [round, attempt]

    def keys(self) -> list[bytes]:
        members = [Member.new() for _ in range(SUMS)]
        self._keep(members)
        shown = [member.public for member in members]
        return [part for each in shown for part in (*each.keys, each.seed_hash)]

    def shares(self, clients: Sequence[int], keys: Sequence[bytes], threshold: int) -> list[bytes]:
        """keys: of each client (of masks, of shares) in either sum."""
        members = self._kept()
        each = 2 * len(members)
        if len(keys) != each * len(clients):
            raise ValueError(f"keys: expected {each} for each client, got {len(keys)} for {len(clients)}")
        dealt = list[bytes]()
        for i, member in enumerate(members):
            of_sum = {k: (keys[each * n + 2 * i], keys[each * n + 2 * i + 1]) for n, k in enumerate(clients)}
            dealt += member.deal(self.client, of_sum, threshold)
        self._keep(members)
        return dealt

    def join(self, clients: Sequence[int], shares: Sequence[bytes]) -> list[int]:
        """Has the shares of others, in either sum; of which clients they are not what they should be."""
        members = self._kept()
        if len(shares) != len(members) * len(clients):
            raise ValueError(f"shares: expected {len(members) * len(clients)}, got {len(shares)}")
        unsound = set[int]()
        for i, member in enumerate(members):
            of_sum = shares[i * len(clients) : (i + 1) * len(clients)]
            unsound |= set(member.join(self.client, dict(zip(clients, of_sum, strict=True))))
        self._keep(members)
        return sorted(unsound)

    def masked(self, number: int, numbers: Integers) -> Integers:
        """number: of the sum."""
        members = self._kept()
        found = members[number].masked(self.client, numbers)
        self._keep(members)
        return found

    def open(self, number: int, active: Sequence[int], dropped: Sequence[int]) -> list[bytes]:
        members = self._kept()
        shares = members[number].open(self.client, active, dropped)
        self._keep(members)
        return shares

    def _kept(self) -> list[Member]:
        record = self.state.get(_NAME)
        if not isinstance(record, ConfigRecord) or record["attempt"] != self.attempt:
            round, attempt = self.attempt
            raise ValueError(f"no keys of round {round + 1}, attempt {attempt}: was this node started again?")
        words: dict[str, Any] = dict(record)
        names = [each.name for each in fields(Member)]
        return [Member(**{name: words[f"{name} {i}"] for name in names}) for i in range(SUMS)]

    def _keep(self, members: Sequence[Member]) -> None:
        words = {
            f"{name} {i}": value for i, member in enumerate(members) for name, value in asdict(member).items()
        }
        self.state[_NAME] = ConfigRecord({"attempt": self.attempt, **words})
