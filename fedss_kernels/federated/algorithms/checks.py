"""What a method's functions return is looked at before it is used: a wrong request would train on."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..config_error import ConfigError
from ..messages import Request
from .checked_schedule import asked
from .given import Given, Loss
from .method import Method
from .parts import Pass

_SHOWN = 6  # of many numbers


def checked_request(method: Method, found: object, num_classes: int, positives: Tensor) -> Request:
    """What `method.request` returned, for a client that trains on images of `positives`.

    Raises ConfigError, of the method, for what it cannot be.
    """
    wrong = next(_wrong(found, num_classes, positives), "")
    if wrong:
        raise ConfigError("method", f"the request of {method.name}: {wrong}")
    assert isinstance(found, Request)
    return found


def _wrong(found: object, num_classes: int, positives: Tensor) -> Iterator[str]:
    if not isinstance(found, Request):
        yield f"expected a Request, got {type(found).__name__}"
        return
    yield from _not_one_row("class_ids", found.class_ids, whole=True)
    ids, held = found.class_ids.numpy(), positives.numpy()
    if (ids[1:] <= ids[:-1]).any():
        yield f"class_ids: expected them ascending, each once, got {_some(ids)}"
    if len(ids) and (ids[0] < 0 or ids[-1] >= num_classes):
        outside = ids[0] if ids[0] < 0 else ids[-1]
        yield f"class_ids: expected classes from 0 to {num_classes - 1}, got {outside}"
    places = np.searchsorted(ids, held)
    there = places < len(ids)
    there[there] = ids[places[there]] == held[there]
    if not there.all():
        yield f"class_ids: expected the client's own classes among them, without {_some(held[~there])}"
    of, count = "class_ids", len(ids)
    if found.denominator is not None:
        yield from _not_one_row("denominator", found.denominator, whole=True)
        yield from _not_places(found.denominator.numpy(), len(ids))
        of, count = "the denominator", len(found.denominator)
    yield from _not_one_row("log_expected_count", found.log_expected_count, whole=False)
    counts = found.log_expected_count.numpy()
    if len(counts) != count:
        yield f"log_expected_count: expected a number for each of {of}, {count}, got {len(counts)}"
    if not np.isfinite(counts).all():
        yield f"log_expected_count: expected finite numbers, got {_some(counts[~np.isfinite(counts)])}"


def _not_one_row(name: str, found: object, *, whole: bool) -> Iterator[str]:
    kind = "an int64" if whole else "a floating"
    expected = f"{name}: expected {kind} tensor of one dimension in main memory"
    if not isinstance(found, Tensor):
        yield f"{expected}, got {type(found).__name__}"
    elif found.dim() != 1 or not (found.dtype == torch.int64 if whole else found.is_floating_point()):
        yield f"{expected}, got {found.dtype} of shape {tuple(found.shape)}"
    elif not found.is_cpu:
        yield f"{expected}, got one on {found.device}"


def _not_places(places: np.ndarray, size: int) -> Iterator[str]:
    outside = places[(places < 0) | (places >= size)]
    if len(outside):
        yield (
            f"denominator: expected positions in class_ids, from 0 to {size - 1}, not class ids, got "
            f"{outside[0]}"
        )
    if len(np.unique(places)) < len(places):
        yield f"denominator: expected each position once, got {_some(places)}"


def _some(numbers: np.ndarray) -> str:
    shown = ", ".join(str(number) for number in numbers[:_SHOWN].tolist())
    return f"[{shown}{', ...' * (len(numbers) > _SHOWN)}]"


def checked_passes(method: Method, local_epochs: int, head_epochs: int) -> Sequence[Pass]:
    """What `method.passes` returns. Raises ConfigError, of the method, for what cannot be."""
    found = asked(method.name, "passes", method.passes, local_epochs, head_epochs)
    if isinstance(found, Sequence) and found and all(isinstance(each, Pass) for each in found):
        return found
    got = type(found).__name__
    if isinstance(found, Sequence):
        got = ", ".join(sorted({type(each).__name__ for each in found})) or "none"
    raise ConfigError("method", f"the passes of {method.name}: expected a sequence of Pass, got {got}")


def checked_loss(method: Method) -> Loss | None:
    """The method's `loss`, which raises ConfigError where it returns what cannot be minimised; or None."""
    found = method.loss
    if found is None:
        return None

    def loss(embeddings: Tensor, rows: Tensor, target: Tensor, given: Given) -> Tensor:
        mean: object = found(embeddings, rows, target, given)
        if isinstance(mean, Tensor) and mean.dim() == 0 and mean.requires_grad:
            return mean
        got = type(mean).__name__
        if isinstance(mean, Tensor):
            got = f"one of shape {tuple(mean.shape)}" if mean.dim() else "one without a gradient"
        words = f"expected the batch's mean loss, a floating tensor of shape () with a gradient, got {got}"
        raise ConfigError("method", f"the loss of {method.name}: {words}")

    return loss


def checked_penalty(method: Method) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The method's `penalty_gradient`; it raises ConfigError for another shape or changed input. Or None."""
    found = method.penalty_gradient
    if found is None:
        return None

    def gradient(now: Tensor, received: Tensor) -> Tensor:
        before = now._version, received._version
        term: object = found(now, received)
        if (now._version, received._version) != before:
            words = "expected what it is given as it was, got it changed in place"
            raise ConfigError("method", f"the penalty_gradient of {method.name}: {words}")
        if isinstance(term, Tensor) and term.shape == now.shape:
            return term
        got = tuple(term.shape) if isinstance(term, Tensor) else type(term).__name__
        words = f"expected a tensor of shape {tuple(now.shape)}, got {got}"
        raise ConfigError("method", f"the penalty_gradient of {method.name}: {words}")

    return gradient
