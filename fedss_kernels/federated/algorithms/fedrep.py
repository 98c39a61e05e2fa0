"""FedRep: federated representation learning.

Liam Collins, Hamed Hassani, Aryan Mokhtari and Sanjay Shakkottai, "Exploiting Shared Representations for
Personalized Federated Learning", ICML 2021, arXiv:2102.07078, Algorithm 1.

In its round a client first trains its own class rows on the net as it came, `head_epochs` passes, then the
net against these rows, `local_epochs` passes. The net is averaged; the rows stay with the client. The paper
averages the nets unweighted; here they weigh n_k / n as everywhere, the same for clients of equal size.
"""

from dataclasses import replace

from .fedper import FEDPER
from .parts import Pass


def passes(local_epochs: int, head_epochs: int) -> list[Pass]:
    return [Pass(blocks=False)] * head_epochs + [Pass(rows=False)] * local_epochs


FEDREP = replace(
    FEDPER,
    name="fedrep",
    label="FedRep",
    summary="Each client keeps its own class rows; it first trains these on the net as it comes, and then "
    "the net against them.",
    paper='Collins et al., "Exploiting Shared Representations for Personalized Federated Learning", 2021',
    passes=passes,
    options=("head_epochs",),
)
