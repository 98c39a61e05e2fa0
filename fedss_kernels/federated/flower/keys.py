"""Keys and shares of the secure sums, as both sides read them: nothing that came is trusted."""

import base64
import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP384R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    public_key_to_bytes,
)

SUMS = 2  # of a round,
CLASSES, CHANGES = range(SUMS)  # by number
_PLACE_BYTES = 4
_NO_KEY = ValueError, TypeError, UnsupportedAlgorithm  # what is raised where there is none, or it is locked


@dataclass(frozen=True)
class Public:
    """What a client shows of its secrets in one sum."""

    mask_key: bytes  # public keys
    share_key: bytes
    seed_hash: bytes  # SHA-256: of 32 random bytes it says nothing, and holds whoever gave it to them

    @classmethod
    def read(cls, mask_key: Any, share_key: Any, seed_hash: Any) -> "Public":
        """Raises ValueError for what is none."""
        for key in (mask_key, share_key):
            public_key(key)
        if type(seed_hash) is not bytes or len(seed_hash) != hashlib.sha256().digest_size:
            raise ValueError("a seed's hash: expected 32 bytes")
        return cls(mask_key, share_key, seed_hash)

    @property
    def keys(self) -> tuple[bytes, bytes]:
        return self.mask_key, self.share_key

    def is_of_seed(self, secret: bytes) -> bool:
        return hashlib.sha256(secret).digest() == self.seed_hash

    def is_of_key(self, secret: bytes) -> bool:
        try:
            return public_key_to_bytes(private_key(secret).public_key()) == self.mask_key
        except ValueError:
            return False


def public_key(content: Any) -> EllipticCurvePublicKey:
    """Raises ValueError for what is none, or not in the one form that flwr gives it."""
    found = None
    if type(content) is bytes:
        with contextlib.suppress(*_NO_KEY):
            found = bytes_to_public_key(content)
    on_curve = isinstance(found, EllipticCurvePublicKey) and isinstance(found.curve, SECP384R1)
    if found is None or not on_curve or public_key_to_bytes(found) != content:
        raise ValueError("a key: expected a public one of P-384")
    return found


def private_key(content: bytes) -> EllipticCurvePrivateKey:
    """Raises ValueError for what is none."""
    try:
        return bytes_to_private_key(content)
    except _NO_KEY:
        raise ValueError("a key: expected a private one") from None


def agreed(mine: EllipticCurvePrivateKey, theirs: bytes, *, raw: bool = True) -> bytes:
    """What two have in common: 32 bytes, or as flwr encrypts with them."""
    found = generate_shared_key(mine, public_key(theirs))
    return base64.urlsafe_b64decode(found) if raw else found


def place_of(share: bytes) -> int:
    """From 0, among those of one secret; Shamir's x, less 1."""
    return int.from_bytes(share[:_PLACE_BYTES], "little") - 1


def rebuilt(shares: Sequence[bytes], threshold: int, sound: Callable[[bytes], bool]) -> bytes | None:
    """The secret that `threshold` of these shares, one after the other in a circle, have in common.

    None where no such run gives a `sound` one. With more than `threshold` shares there is one where any one
    of them is false.
    """
    for first in range(len(shares) if len(shares) > threshold else 1):
        run = [*shares[first:], *shares[:first]][:threshold]
        try:
            secret = combine_shares(list(run))
        except ValueError:
            continue
        if sound(secret):
            return secret
    return None
