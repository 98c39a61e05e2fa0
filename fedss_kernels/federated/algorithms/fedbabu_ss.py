"""FedBABU on a sampled softmax: frozen class rows, of which a client draws only its own and a few others.

Nobody's: FedBABU (see fedbabu.py) with the class sets of FedSS (see fedss.py). What FedBABU saves in bytes is
all there is to save; this saves a client's memory and time, which are in the rows that it draws from the seed
and not in C. No request leaves the client either, so the server learns nothing from what it asks for.
With m >= C - |P| it is FedBABU.
"""

from dataclasses import replace

from torch import Tensor

from ..messages import Request
from .fedbabu import FEDBABU
from .fedss import FEDSS


def request(num_classes: int, positives: Tensor, negatives: Tensor, correction: str) -> Request:
    return replace(FEDSS.request(num_classes, positives, negatives, correction), sends_ids=False)


FEDBABU_SS = replace(
    FEDBABU,
    name="fedbabu_ss",
    label="FedBABU, sampled",
    summary="As FedBABU, with a loss that sums over a client's own classes and a few random others: a client "
    "draws just these rows for itself, and neither rows nor what it needs of them leave it.",
    paper="Oh et al., 2022, with the class sets of Waghmare et al., 2022",
    request=request,
    options=FEDSS.options,
    samples=True,
)
