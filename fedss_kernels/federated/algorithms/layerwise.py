"""Federated layer-wise learning, with depth dropout: a net is trained without labels, block after block.

Pengfei Guo, Warren Richard Morningstar, Raviteja Vemulapalli, Karan Singhal, Vishal M. Patel and Philip
Andrew Mansfield, "Towards Federated Learning Under Resource Constraints via Layer-wise Training and Depth
Dropout", arXiv:2309.05213, 2023.

The rounds are cut into stages of equal length (stages.py). In each the next block is trained, the first with
the stem; those before are frozen, and those after are not there yet. The loss is SimCLR's, of the newest
block's output. Depth dropout is the `depth_budget`. Where the paper is silent: a new block begins as it was
drawn with all the net; the projection head goes on from stage to stage, or is new in each; a frozen block has
no velocity on the server, so that its numbers stay to the bit.

With `freeze` no it is progressive growing: Hui-Po Wang, Sebastian Stich, Yang He and Mario Fritz, "ProgFed:
Effective, Communication, and Computation Efficient Federated Learning by Progressive Training", ICML 2022,
arXiv:2110.05323.
"""

from dataclasses import replace

from .simclr import SIMCLR
from .stages import by_stage

LAYERWISE = replace(
    SIMCLR,
    name="layerwise",
    label="layer-wise",
    summary="As SimCLR, but one block of the net after the other: clients train the newest alone, on top of "
    "those that are done, so that a step takes little memory and little is sent back.",
    paper='Guo et al., "Towards Federated Learning Under Resource Constraints via Layer-wise Training and '
    'Depth Dropout", 2023',
    by_block=True,
    by_round=by_stage,
    options=(*SIMCLR.options, "stages", "depth_budget", "freeze", "frozen", "projection"),
)
