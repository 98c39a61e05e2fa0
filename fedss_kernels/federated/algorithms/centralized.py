"""Centralized: no federation at all, to show what it costs.

A comparison of the FedSS paper (Waghmare et al., arXiv:2203.04888): minibatch SGD on the full softmax, Eq. 2,
with all the images in one place. As many updates as a client makes in as many rounds, of the images that a
cohort takes for each.
"""

from .full_softmax import request
from .method import Method

CENTRALIZED = Method(
    name="centralized",
    label="Centralized",
    summary="No federation: all the images are in one place, and every step takes as many of them as all the "
    "clients of a round take together.",
    paper="Waghmare et al., 2022, Eq. 2",
    request=request,
    pooled=True,
)
