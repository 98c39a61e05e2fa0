"""By what a resumed run knows that its method computes what it did: numbers of its functions.

A method of one's own is code in a file, which may be edited between a stop and a resume.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..algorithms.given import Given
from ..algorithms.method import Method
from ..config import Config
from ..messages import Request

_CLASSES = 7, 64, 4096  # the first of them that a function can be asked about
_HELD, _OTHERS, _WIDTH = (1, 3), (0, 5), 3
_MANY_HELD, _MANY_OTHERS = tuple(range(0, 40, 2)), tuple(range(1, 60, 2))
_FLAGS = "by_block", "samples", "common", "own_push", "spreads", "queued"
Ask = Callable[[Method, Config, int], Iterator[Tensor]]  # (a method, a run's settings, a size)


def method_numbers(method: Method, config: Config, num_classes: int) -> list[float]:
    """Of its functions and fields, but for where its parts stand (schedule_numbers.py).

    What cannot be asked about made-up inputs has none here.

    num_classes: the run's own, for a function that can be asked about no others.
    """
    found = [float(getattr(method, name)) for name in _FLAGS]
    for moves in method.passes(config.local_epochs, config.head_epochs):
        found += float(moves.blocks), float(moves.rows)
    asked = list[tuple[Ask, Sequence[int]]]()
    if not method.contrastive:  # else nobody reads class rows
        asked += [(ask, [*_CLASSES, num_classes]) for ask in (_of_request, _of_loss, _of_penalty)]
        asked.append((_of_a_request_of_many, [*_CLASSES[1:], num_classes]))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(0)
        for ask, sizes in asked:
            found += _answer(ask, sizes, method, config)
    return found


def _answer(ask: Ask, sizes: Sequence[int], method: Method, config: Config) -> list[float]:
    """By the first size at which there is one."""
    for size in sizes:
        try:
            numbers = torch.cat([part.detach().flatten().double() for part in ask(method, config, size)])
        except Exception:  # anything: it is not ours, and what is wrong with it shows in the first round
            continue
        return _few(numbers)
    return []


def _few(numbers: Tensor) -> list[float]:
    """At most 1,024, in which each of these counts: sums of neighbours, each with a weight of its own."""
    each = 1 + len(numbers) // 1024
    weights = torch.linspace(1, 2, each, dtype=torch.float64)
    return [(part * weights[: len(part)]).sum().item() for part in numbers.split(each)]


def _request(
    method: Method,
    config: Config,
    num_classes: int,
    held: Sequence[int] = _HELD,
    others: Sequence[int] = _OTHERS,
) -> Request:
    drawn = torch.tensor(others if method.samples else [], dtype=torch.int64)
    return method.request(num_classes, torch.tensor(held), drawn, config.correction)


def _of_request(method: Method, config: Config, num_classes: int) -> Iterator[Tensor]:
    yield from _told(_request(method, config, num_classes))


def _of_a_request_of_many(method: Method, config: Config, num_classes: int) -> Iterator[Tensor]:
    """A method may do to many what it does not to two."""
    yield from _told(_request(method, config, num_classes, _MANY_HELD, _MANY_OTHERS))


def _told(asked: Request) -> Iterator[Tensor]:
    yield from (asked.class_ids, asked.log_expected_count)
    if asked.denominator is not None:
        yield asked.denominator


def _of_loss(method: Method, config: Config, num_classes: int) -> Iterator[Tensor]:
    if method.loss is None:
        yield torch.empty(0)
        return
    asked = _request(method, config, num_classes)
    held = torch.isin(asked.class_ids, torch.tensor(_HELD))
    target = held.nonzero()[:, 0]
    embeddings = torch.linspace(-1, 2, len(target) * _WIDTH).reshape(-1, _WIDTH).requires_grad_()
    width = _WIDTH + (config.similarity != "cosine")
    rows = torch.linspace(1, -2, len(held) * width).cos().reshape(-1, width).requires_grad_()
    given = Given(asked, 2 * held.long(), config.scale, config.similarity)
    loss = method.loss(embeddings, rows, target, given)
    yield from (
        loss,
        *torch.autograd.grad(loss, (embeddings, rows), allow_unused=True, materialize_grads=True),
    )


def _of_penalty(method: Method, *_: object) -> Iterator[Tensor]:
    if method.penalty_gradient is None:
        yield torch.empty(0)
        return
    for shape in ((6,), (2, 3)):  # of the net's numbers, and of class rows
        now = torch.linspace(-1, 2, 6).reshape(shape)
        yield method.penalty_gradient(now, now.cos())
