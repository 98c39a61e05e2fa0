"""The last keys, against which new queries are contrasted."""

import torch
from torch import Tensor


class KeyQueue:
    """A ring of M keys: a new one takes the place of the oldest."""

    def __init__(self, keys: Tensor, next: int = 0):  # (M, d)
        if len(keys) < 1:
            raise ValueError("queue: expected at least 1 key")
        self.keys, self.next = keys, next  # where the next key goes; it is the oldest

    def enqueue(self, keys: Tensor) -> None:  # (n, d), the oldest first
        """Of more than M the last M stay."""
        M, n = len(self.keys), len(keys)
        places = torch.arange(self.next, self.next + n, device=keys.device) % M
        self.keys[places[-M:]] = keys[-M:].to(self.keys.dtype)
        self.next = (self.next + n) % M

    @property
    def oldest_first(self) -> Tensor:
        return self.keys.roll(-self.next, 0)
