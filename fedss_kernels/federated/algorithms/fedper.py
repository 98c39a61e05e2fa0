"""FedPer: federated learning with personalisation layers.

Manoj Ghuhan Arivazhagan, Vinay Aggarwal, Aaditya Kumar Singh and Sunav Choudhary, "Federated Learning with
Personalization Layers", arXiv:1912.00818, 2019.

Clients train the net and the class rows together; the net is averaged, and each client keeps its own rows
from one of its rounds to the next. They begin as everybody's do.
"""

from dataclasses import replace

from .full_softmax import FULL_SOFTMAX
from .parts import Part, Parts


def parts(num_blocks: int) -> Parts:
    return Parts((Part.TRAINED,) * num_blocks, Part.HOME)


FEDPER = replace(
    FULL_SOFTMAX,
    name="fedper",
    label="FedPer",
    summary="Clients train the net together, and each keeps the class rows that it trains to itself.",
    paper='Arivazhagan et al., "Federated Learning with Personalization Layers", 2019',
    parts=parts,
)
