"""What a contrastive loss sees of an embedding: a small net on top, which training alone has.

Chen, Kornblith, Norouzi and Hinton, "A Simple Framework for Contrastive Learning of Visual Representations",
ICML 2020, arXiv:2002.05709: two layers, thrown away in the end.
"""

import torch
from torch import nn

from ..randomness import NO_CLIENT, Purpose, generator

PROJECTED = 128  # numbers that the loss sees


def projection_head(dim: int, seed: int, stage: int = 0) -> nn.Sequential:
    """(B, dim) to (B, PROJECTED), with numbers that are a function of the seed and the stage.

    Its norm takes the mean and variance of each batch, in all modes: it has no running ones, which clients
    could not average. Without one, layers trained one after the other hardly learn.
    """
    with torch.random.fork_rng(devices=[]):
        rng = generator(seed, stage, 0, NO_CLIENT, Purpose.PROJECTION)
        torch.default_generator.manual_seed(int(rng.integers(2**63)))
        return nn.Sequential(
            nn.Linear(dim, dim, bias=False),
            nn.BatchNorm1d(dim, track_running_stats=False),
            nn.ReLU(inplace=True),
            nn.Linear(dim, PROJECTED, bias=False),
        )


def projection_size(dim: int) -> int:
    """Numbers in it."""
    return dim * dim + 2 * dim + dim * PROJECTED
