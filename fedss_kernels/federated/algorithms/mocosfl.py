"""MocoSFL: contrastive learning by clients that hold only the first layers of the net.

Jingtao Li, Lingjuan Lyu, Daisuke Iso, Chaitali Chakrabarti and Michael Spranger, "MocoSFL: enabling
cross-client collaborative self-supervised learning", ICLR 2023.

A step, of all clients k of the cohort at once, who have the first blocks C and the server the rest S:

    client k:  h = C_k(x1), then C'_k <- tau C'_k + (1 - tau) C_k and h' = C'_k(x2); h and h' go up
    server:    S' <- tau S' + (1 - tau) S; queries S(h) and S(h'), their keys S'(h') and S'(h)
               loss = contrast(S(h), S'(h')) + contrast(S(h'), S'(h)), each against the queue as it was
               the keys are enqueued; S steps; the loss' gradient in h goes down
    client k:  C_k steps along its rows of it
    every `sync_period` steps: C <- sum_k (n_k / n) C_k, and all C_k <- C

The queue is all clients'. Labels are for the measures alone. Of C' and of velocities the paper is silent, and
its authors' code keeps every client's own; here both are averaged as C is, unless they are to be kept. The
clients' gradients are of the mean over all clients' images, as in that code: `client_gradient`.
"""

from .method import Method
from .simclr import parts, request

SYMMETRIC = ("server", "full", "none")
MOMENTUM_COPIES = ("averaged", "kept", "reset")
CLIENT_GRADIENTS = ("sent", "own")
VELOCITIES = ("averaged", "kept", "zeroed")

MOCOSFL = Method(
    name="mocosfl",
    label="MocoSFL",
    summary="Clients have the first blocks of the net and the server the rest: in every step they send what "
    "theirs make of two views of their images, and the server learns to tell which are of one image.",
    paper='Li et al., "MocoSFL: enabling cross-client collaborative self-supervised learning", 2023',
    request=request,
    parts=parts,
    split=True,
    baseline="simclr",
    options=(
        *(
            "cut",
            "bottleneck",
            "sync_period",
            "round_steps",
            "queue_size",
            "private_queues",
            "key_dim",
            "temperature",
            "ema",
            "smallest_box",
        ),
        *("symmetric", "in_turn", "client_gradient", "momentum_copies", "velocities", "freeze_clients"),
        *("half_checkpoint", "weight_decay"),
    ),
    presets={
        "rounds": 200,
        "batch_size": 1,
        "client_lr": 0.06,
        "client_momentum": 0.9,
        "warmup_rounds": 0,
        "lr_decay": "cosine",
        "temperature": 0.1,
    },
)
