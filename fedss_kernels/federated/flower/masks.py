"""What hides integers in a secure sum, and what the server takes out of the sum again.

With x_k the integers of client k, modulo m, it sends

    y_k = x_k + b_k + sum_{l > k} s_kl - sum_{l < k} s_kl

with a mask b_k of its own and one s_kl = s_lk with each other client, all uniform and independent. The server
adds those up that come, of clients A, and learns b_k of each of them and s_kd of each d that is not in A:

    sum_{k in A} x_k = sum_{k in A} (y_k - b_k - sum_{d not in A} +- s_kd)

Among the y_k with these sums all are as likely as any other, so of the x_k it has their sum alone.
"""

from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from ..secure_sums import INTEGER_BYTES, MODULUS

Integers = NDArray[np.int64]
KEY_BYTES = 32


def stream(key: bytes, size: int) -> Integers:
    """So many integers in [0, 2^32), uniform for whoever has not the key: AES-256 in counter mode.

    key: KEY_BYTES, for one mask alone, as the same twice would hide neither. (Flower's own generator of masks
    folds its seed to 32 bits, which can all be tried.)
    """
    cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(cipher.update(bytes(INTEGER_BYTES * size)), dtype="<u4").astype(np.int64)


def marks(held: NDArray[np.int64], num_classes: int, numbers: Integers) -> Integers:
    """(C,): of a client these numbers at the classes that it holds, 0 at all others.

    Where they are uniform below the modulus m, so is their sum over any number of clients, one at least: it
    tells that somebody holds the class, and not how many do. It is 0, and the class is missed, with chance
    1 / m = 2^-32, for one holder as for many.
    """
    found = np.zeros((*numbers.shape[:-1], num_classes), np.int64)
    found[..., held] = numbers
    return found


def masked(
    numbers: Integers,
    client: int,
    own: Integers,
    pairs: Iterable[tuple[int, Integers]],  # (another client, the mask with it)
    modulus: int = MODULUS,
) -> Integers:
    """y_k"""
    total = numbers + own
    for other, mask in pairs:
        total += _sign(client, other) * mask
    return total % modulus


def opened(
    sent: Iterable[Integers],
    own: Iterable[Integers],
    left: Iterable[tuple[int, int, Integers]],  # (a client that sent, one that did not, their mask)
    modulus: int = MODULUS,
) -> Integers:
    """The sum of the numbers of all who sent."""
    total = sum(sent, start=np.int64(0)) - sum(own, start=np.int64(0))
    for client, absent, mask in left:
        total -= _sign(client, absent) * mask
    return np.asarray(total % modulus)


def _sign(client: int, other: int) -> int:
    return 1 if other > client else -1
