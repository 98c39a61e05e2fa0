"""MoCo in one place: what MocoSFL is held against, with no client in between.

Kaiming He, Haoqi Fan, Yuxin Wu, Saining Xie and Ross Girshick, "Momentum Contrast for Unsupervised Visual
Representation Learning", CVPR 2020, arXiv:1911.05722.

The step of mocosfl.py of one client who has all the images, with as many of them in a step as the cohort's
clients take together, and as many steps.
"""

from dataclasses import replace

from .mocosfl import MOCOSFL

_OPTIONS = (
    *("round_steps", "queue_size", "key_dim", "temperature", "ema", "smallest_box", "symmetric"),
    "weight_decay",
)

CENTRAL_MOCO = replace(
    MOCOSFL,
    name="central_moco",
    label="central MoCo",
    summary="No federation: all the images are in one place, and in every step the net learns to tell, of as "
    "many of them as all the clients of a round take together, which two views are of one image.",
    paper='He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", 2020',
    pooled=True,
    options=_OPTIONS,  # the others are of a cut net's
)
