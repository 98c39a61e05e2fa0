"""FedSS: Federated Sampled Softmax.

Sagar M. Waghmare, Hang Qi, Huizhong Chen, Mikhail Sirotenko and Tomer Meron, "Efficient Image Representation
Learning with Federated Sampled Softmax", arXiv:2203.04888, 2022. Algorithm 1; the loss is Eq. 6.

The client gets the rows of its own classes P and of m others N, drawn afresh every round, and its loss sums
over both.
"""

from torch import Tensor

from ...class_sets import class_set_of
from ..messages import Request
from .method import Method


def request(num_classes: int, positives: Tensor, negatives: Tensor, correction: str) -> Request:
    class_set = class_set_of(num_classes, positives, negatives, correction)
    return Request(class_set.class_ids, None, class_set.log_expected_count)


FEDSS = Method(
    name="fedss",
    label="FedSS",
    summary="Each client receives the rows of its own classes and of a few random others, new ones every "
    "round; the loss weighs the random ones up, so that they stand for all the classes left out.",
    paper='Waghmare et al., "Efficient Image Representation Learning with Federated Sampled Softmax", 2022',
    request=request,
    options=("num_negatives", "negatives", "correction", "min_holders"),
    samples=True,
    common=True,
)
