"""PosOnly: a softmax over the client's own classes.

A comparison of the FedSS paper (Waghmare et al., arXiv:2203.04888, Eq. 8). It moves the least, and the client
never sees a class that it doesn't hold. It is FedSS without negatives.
"""

from torch import Tensor

from ...class_sets import class_set_of
from ..messages import Request
from .method import Method


def request(num_classes: int, positives: Tensor, negatives: Tensor, correction: str) -> Request:
    class_set = class_set_of(num_classes, positives, negatives[:0], correction)
    return Request(class_set.class_ids, None, class_set.log_expected_count)


POS_ONLY = Method(
    name="pos_only",
    label="PosOnly",
    summary="Each client receives the rows of its own classes only, and learns to tell those apart.",
    paper="Waghmare et al., 2022, Eq. 8",
    request=request,
)
