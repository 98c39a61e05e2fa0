"""By what a resumed run knows that its data, its net and its method are those that it began with.

Of the data: labels, clients and who is tested on what, the number of classes, and the images, all of them
where they are few, a sample where they are many. Of the net as it begins: names, shapes, dtypes and values of
what is trained, what is frozen and the buffers, saved with the net or not; its modules, with what their repr
says and the plain attributes of classes that are not torch's. What none of these shows, such as another
forward of the same class, shows in the embeddings of two images, which may differ by rounding alone, as on
another machine. Of the method: numbers of its functions (method_numbers.py) and of where its parts stand
(schedule_numbers.py).

Whether modules are in training mode does not count, as clients put all of them in it. What shows in gradients
alone, or in a private attribute and in training alone, is not seen.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data import FederatedData
from ..memory_bytes import memory_bytes

ALL_BYTES = 2**28  # of images that are read as a whole
SAMPLE = 256  # images of more
PROBED = 2  # images that are embedded
NUMBERS = 64  # of their embeddings that are kept, about
TOLERANCE = 0.01  # of the largest of them


@dataclass(frozen=True)
class Fingerprint:
    parts: Mapping[str, str]  # name, as a message says it -> checksum
    embeddings: Sequence[float]
    method: Sequence[float] = ()  # an earlier version's has none

    @classmethod
    def of(
        cls,
        data: FederatedData,
        module: nn.Module,
        embed: Callable[[Tensor], Tensor],
        method: Sequence[float] = (),
    ) -> "Fingerprint":
        """`embed` maps images of the data's (B, channels, H, W) uint8 to the net's embeddings (B, D)."""
        parts = _of_data(data) | _of_net(module)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # for a net that draws even where it is not trained
            numbers = embed(data.images[:PROBED]).flatten().double()
        return cls(parts, numbers[:: max(1, len(numbers) // NUMBERS)].tolist(), method)

    def differences(self, other: "Fingerprint") -> list[str]:
        """Names of what is not the same."""
        shared = self.parts.keys() & other.parts.keys()  # an earlier version's has fewer
        different = [name for name in self.parts if name in shared and self.parts[name] != other.parts[name]]
        if not different and not _near(self.embeddings, other.embeddings):
            different = ["what the net computes"]
        return different + self.other_method(other.method)

    def other_method(self, numbers: Sequence[float]) -> list[str]:
        """What of the method is not the same, with these numbers."""
        if not (self.method and numbers) or _alike(self.method, numbers):
            return []
        different = "what the method computes"
        if len(self.method) != len(numbers):
            different += ", or the version, which noted more or less of it"
        return [different]

    def other_data(self, data: FederatedData) -> list[str]:
        """Names of what of the data is not the same in these."""
        return [name for name, part in _of_data(data).items() if self.parts.get(name, part) != part]


def _near(first: Sequence[float], second: Sequence[float]) -> bool:
    bound = TOLERANCE * max(map(abs, first), default=0.0)
    return len(first) == len(second) and all(
        a == b or abs(a - b) <= bound or math.isnan(a) and math.isnan(b)
        for a, b in zip(first, second, strict=True)
    )


def _alike(first: Sequence[float], second: Sequence[float]) -> bool:
    """One by one, as they are of different sizes."""
    return len(first) == len(second) and all(
        math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-6) or math.isnan(a) and math.isnan(b)
        for a, b in zip(first, second, strict=True)
    )


def _of_data(data: FederatedData) -> dict[str, str]:
    return {
        "the number of classes": _digest([data.num_classes]),
        "the training images": _digest(_sample(data.images)),
        "the training labels": _digest([data.labels]),
        "which client holds which image": _digest(data.clients),
        "the test images": _digest(_sample(data.test_images)),
        "the test labels": _digest([data.test_labels]),
        "who is tested on which image": _digest([*data.test_clients, "newcomers", *sum(data.newcomers, ())]),
    }


def _sample(images: Tensor) -> list[Any]:
    if images.numel() * images.element_size() <= ALL_BYTES:
        return [images]
    return [tuple(images.shape), *images[:: max(1, len(images) // SAMPLE)]]


def _of_net(module: nn.Module) -> dict[str, str]:
    parameters = list(module.named_parameters())
    return {
        "the net's modules": _digest(_described(name, each) for name, each in module.named_modules()),
        "the net's trained parameters": _digest(_named((n, p) for n, p in parameters if p.requires_grad)),
        "the net's frozen parameters": _digest(_named((n, p) for n, p in parameters if not p.requires_grad)),
        "the net's buffers": _digest(_named(module.named_buffers())),
    }


def _named(tensors: Iterable[tuple[str, Tensor]]) -> Iterable[Any]:
    for name, tensor in tensors:
        yield name
        yield tensor


def _described(name: str, module: nn.Module) -> tuple[str, ...]:
    """A module without its children and tensors. What attributes torch's own have depends on its version."""
    own = type(module)
    attributes = {} if own.__module__.startswith("torch.") else vars(module)
    plain = sorted(
        f"{key}={_plain(value)}"
        for key, value in attributes.items()
        if not key.startswith("_") and key != "training" and _plain(value)
    )
    return name, own.__name__, module.extra_repr(), *plain


def _plain(value: Any) -> str:
    """Numbers, text, functions, arrays and lists of them as text; "" for all else."""
    if isinstance(value, Tensor):
        return _digest([value])
    if isinstance(value, np.ndarray | np.generic):
        return _digest([value.dtype.str, value.shape, value.tobytes()])
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_plain(of)}' for key, of in value.items())}}}"
    if value is None or isinstance(value, bool | int | float | str | Enum | torch.dtype):
        return repr(value)
    return getattr(value, "__qualname__", "")


def _digest(parts: Iterable[Any]) -> str:
    """Of tensors, with their shapes and dtypes, and of what can be told by its repr."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(repr((tuple(part.shape), part.dtype)).encode())
            digest.update(memory_bytes(part).numpy().data)
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()
