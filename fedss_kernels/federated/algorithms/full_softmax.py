"""FullSoftmax: federated averaging with every class on every client.

FedAvg (McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS
2017) on the softmax over all C classes, Eq. 2 of the FedSS paper (Waghmare et al., arXiv:2203.04888): what
the other methods save on, and FedSS with m >= C - |P|.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ..messages import Request
from .method import Method


def request(num_classes: int, positives: Tensor, negatives: Tensor, correction: str) -> Request:
    return _everything(num_classes)


@lru_cache(maxsize=1)
def _everything(num_classes: int) -> Request:
    """One for all clients: of 100,000 classes it has 1.6 MB."""
    zeros = torch.zeros(num_classes, dtype=torch.float64)
    return Request(torch.arange(num_classes), None, zeros, sends_ids=False)


FULL_SOFTMAX = Method(
    name="full_softmax",
    label="FullSoftmax",
    summary="Each client receives the rows of all the classes: nothing is left out and nothing is saved.",
    paper='McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", 2017',
    request=request,
)
