"""By what a resumed run knows that its method computes what it did: numbers of its functions.

A method of one's own is code in a file, which may be edited between a stop and a resume.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..algorithms.given import Given
from ..algorithms.method import Method
from ..config import Config
from ..messages import Request

_CLASSES, _WIDTH = 7, 3
_HELD, _OTHERS = (1, 3), (0, 5)


def method_numbers(method: Method, config: Config) -> list[float]:
    """Of request, loss and penalty_gradient. One that cannot be asked about made-up inputs has none here."""
    if method.contrastive:  # nobody reads class rows
        return []
    found: list[float] = []
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(0)
        for ask in (_of_request, _of_loss, _of_penalty):
            found += _answer(ask, method, config)
    return found


def _answer(ask: Callable[[Method, Config], Iterator[Tensor]], method: Method, config: Config) -> list[float]:
    try:
        return [number for part in ask(method, config) for number in part.detach().flatten().tolist()]
    except Exception:  # anything: it is not ours, and what is wrong with it shows in the first round
        return []


def _request(method: Method, config: Config) -> Request:
    others = torch.tensor(_OTHERS) if method.samples else torch.tensor([], dtype=torch.int64)
    return method.request(_CLASSES, torch.tensor(_HELD), others, config.correction)


def _of_request(method: Method, config: Config) -> Iterator[Tensor]:
    asked = _request(method, config)
    yield from (asked.class_ids, asked.log_expected_count)
    if asked.denominator is not None:
        yield asked.denominator


def _of_loss(method: Method, config: Config) -> Iterator[Tensor]:
    if method.loss is None:
        return
    asked = _request(method, config)
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


def _of_penalty(method: Method, _: Config) -> Iterator[Tensor]:
    if method.penalty_gradient is None:
        return
    for shape in ((6,), (2, 3)):  # of the net's numbers, and of class rows
        now = torch.linspace(-1, 2, 6).reshape(shape)
        yield method.penalty_gradient(now, now.cos())
