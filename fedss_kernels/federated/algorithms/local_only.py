"""Local training: every client by itself, the model that federation has to beat.

The clients of a round go on with their own net and class rows, and send nothing. All begin with the same.
"""

from dataclasses import replace

from .full_softmax import FULL_SOFTMAX
from .parts import Part, Parts


def parts(num_blocks: int) -> Parts:
    return Parts((Part.HOME,) * num_blocks, Part.HOME)


LOCAL_ONLY = replace(
    FULL_SOFTMAX,
    name="local_only",
    label="local training",
    summary="Every client trains a model of its own on its own images; nothing is shared and nothing moves.",
    paper="the usual baseline",
    parts=parts,
)
