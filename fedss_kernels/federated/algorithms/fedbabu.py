"""FedBABU: federated averaging with body aggregation and body update.

Jaehoon Oh, Sangmook Kim and Se-Young Yun, "FedBABU: Toward Enhanced Representation for Federated Image
Classification", ICLR 2022, arXiv:2106.06042.

The class rows, the head, are drawn once, the same for all, and never trained in federation: clients train the
net, the body, against them. The head is trained on each client's images afterwards, by `fedss personalise`.

The rows are a function of the seed, so none travels. The body is averaged by the clients' images, n_k / n;
the authors' code has clients of equal size, where that is the plain mean.
"""

from dataclasses import replace

from .full_softmax import FULL_SOFTMAX
from .parts import Part, Parts


def parts(num_blocks: int) -> Parts:
    return Parts((Part.TRAINED,) * num_blocks, Part.KNOWN)


FEDBABU = replace(
    FULL_SOFTMAX,
    name="fedbabu",
    label="FedBABU",
    summary="The class rows are random, the same for all, and are never trained: clients train the net "
    "alone, to meet them, so no row travels. Each client's own rows can be trained on its images at the end.",
    paper='Oh et al., "FedBABU: Toward Enhanced Representation for Federated Image Classification", 2022',
    parts=parts,
)
