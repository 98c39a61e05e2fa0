"""SimCLR, federated: averaging of nets that clients train without labels.

Ting Chen, Simon Kornblith, Mohammad Norouzi and Geoffrey Hinton, "A Simple Framework for Contrastive Learning
of Visual Representations", ICML 2020, arXiv:2002.05709; federated as in Guo et al., arXiv:2309.05213, who
call it end-to-end learning.

A client tells two views of an image from those of the other images in its batch. What it minimises is

    mean over the 2B views of  -cos(u, u') / T + log sum_{v != u} exp(cos(u, v) / T)

u' the other view of the same image, u what a projection head makes of its embedding. The net and the head
are trained and averaged; the head is left out of what is measured and taken away. There are no class rows.
"""

import torch
from torch import Tensor

from ..messages import Request
from .method import Method
from .parts import Part, Parts

_NOTHING = torch.empty(0, dtype=torch.int64), None, torch.empty(0, dtype=torch.float64)


def request(num_classes: int, positives: Tensor, negatives: Tensor, correction: str) -> Request:
    return Request(*_NOTHING, sends_ids=False)


def parts(num_blocks: int) -> Parts:
    return Parts((Part.TRAINED,) * num_blocks, Part.ABSENT)


SIMCLR = Method(
    name="simclr",
    label="SimCLR",
    summary="Clients train the net without labels: two random views of an image are to have like embeddings, "
    "and those of different images unlike ones. All of the net is trained in every round.",
    paper='Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020',
    request=request,
    parts=parts,
    options=("temperature", "smallest_box"),
    contrastive=True,
    baseline="simclr",
)
