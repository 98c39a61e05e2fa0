"""MoCo, federated: averaging of nets that clients train without labels, each against keys of its own images.

Kaiming He, Haoqi Fan, Yuxin Wu, Saining Xie and Ross Girshick, "Momentum Contrast for Unsupervised Visual
Representation Learning", CVPR 2020, arXiv:1911.05722; as FL-MoCo in Li et al., "MocoSFL", ICLR 2023, whose
code keeps a queue with each client for ever, longer than its images are many, and a momentum copy too.

Here a client has them for a round: the copy begins as the net that it is sent, the queue without a key. So it
keeps nothing, and an image is told from others alone as long as it goes through its images once. A step is

    C' <- tau C' + (1 - tau) C;  keys C'(x1), C'(x2) of two views of its images
    loss = (contrast(C(x1), C'(x2)) + contrast(C(x2), C'(x1))) / 2, against its keys so far in this round
"""

from dataclasses import replace

from .simclr import SIMCLR

FL_MOCO = replace(
    SIMCLR,
    name="fl_moco",
    label="FL-MoCo",
    summary="As SimCLR, but a client tells the views of an image from those that it has seen in this round "
    "before, by a slowly moving copy of the net.",
    paper='He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", 2020, federated '
    'as in Li et al., "MocoSFL", 2023',
    queued=True,
    options=(*SIMCLR.options, "queue_size", "ema"),
    presets={"temperature": 0.1},
)
