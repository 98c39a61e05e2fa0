"""NegOnly: the sampled softmax without the client's other classes in the denominator.

A comparison of the FedSS paper (Waghmare et al., arXiv:2203.04888, Eq. 7): the same rows travel as in FedSS,
but each image's loss sums over its own class and the negatives N only, so nothing tells the client's own
classes apart.
"""

from torch import Tensor

from ...class_sets import class_set_of
from ..messages import Request
from .method import Method


def request(num_classes: int, positives: Tensor, negatives: Tensor, correction: str) -> Request:
    class_set = class_set_of(num_classes, positives, negatives, correction)
    negatives = class_set.is_negative.nonzero().flatten()
    return Request(class_set.class_ids, negatives, class_set.log_expected_count[negatives])


NEG_ONLY = Method(
    name="neg_only",
    label="NegOnly",
    summary="Each client receives the same rows as in FedSS, but compares an image's class with the random "
    "others only, never with the client's other classes.",
    paper="Waghmare et al., 2022, Eq. 7",
    request=request,
    options=("num_negatives", "negatives", "correction", "equal_pushes"),
    samples=True,
    own_push=False,
)
