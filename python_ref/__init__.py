"""The definition of everything the package computes, in plain PyTorch: slow, short, and in float64 if asked.

Nothing here is tuned and nothing here imports the rest of the package; every kernel is checked against it.
"""

from .class_sets import class_set, draw_negatives
from .rounds import ClientRound, federated_round
from .row_adam import row_adam_step_
from .row_momentum import row_momentum_step_
from .sampled_softmax import sampled_softmax_loss
from .scatter_add import scatter_add_

__all__ = [
    "ClientRound",
    "class_set",
    "draw_negatives",
    "federated_round",
    "row_adam_step_",
    "row_momentum_step_",
    "sampled_softmax_loss",
    "scatter_add_",
]
