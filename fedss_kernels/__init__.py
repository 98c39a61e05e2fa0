"""A sampled-softmax loss for very many classes, and federated learning with it."""

import re

import torch

_found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
if _found < (2, 11):
    raise ImportError(
        f"fedss-kernels needs torch >= 2.11, found torch {torch.__version__}: "
        'pip install --upgrade "torch>=2.11"'
    )
try:
    from . import _C as _C
except ImportError as error:
    raise ImportError(
        f"fedss-kernels' C++ kernels are not built, or built for another Python ({error}): "
        "pip install fedss-kernels, or in a source tree pip install -e ."
    ) from error

from .class_samplers import FrequencySampler
from .class_sets import ClassSet, draw_batch_class_set, draw_class_set, draw_negatives
from .clip_grad import clip_grad_norm_, clip_grad_value_
from .row_adam import RowAdam, row_adam_step_
from .row_momentum import row_momentum_step_
from .row_sgd import RowSGD
from .sampled_softmax import sampled_softmax_loss
from .sampled_softmax_module import SampledSoftmaxLoss
from .scatter_add import scatter_add_
from .sharded import ShardedSampledSoftmaxLoss

__version__ = "0.2.0"
__all__ = [
    "ClassSet",
    "FrequencySampler",
    "RowAdam",
    "RowSGD",
    "SampledSoftmaxLoss",
    "ShardedSampledSoftmaxLoss",
    "clip_grad_norm_",
    "clip_grad_value_",
    "draw_batch_class_set",
    "draw_class_set",
    "draw_negatives",
    "row_adam_step_",
    "row_momentum_step_",
    "sampled_softmax_loss",
    "scatter_add_",
]
