"""A sampled-softmax loss for very many classes, a deterministic row aggregator, and federated learning with them."""

import re

import torch

_REQUIRED_TORCH = (2, 11)
_found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
if _found < _REQUIRED_TORCH:
    raise ImportError(
        f"fedss-kernels needs torch >= {'.'.join(map(str, _REQUIRED_TORCH))}, found torch {torch.__version__}: "
        'pip install --upgrade "torch>=2.11"'
    )
try:
    from . import _C as _C
except ImportError as error:
    raise ImportError(
        "fedss-kernels' C++ kernels are not built in this folder, or for another Python "
        f"({error}): install the package with pip install fedss-kernels, or from a source tree with pip install -e ."
    ) from error

from .class_sets import ClassSet, draw_batch_class_set, draw_class_set, draw_negatives
from .sampled_softmax import SampledSoftmaxLoss, sampled_softmax_loss
from .scatter_add import scatter_add_

__version__ = "0.1.0"
__all__ = [
    "ClassSet",
    "SampledSoftmaxLoss",
    "draw_batch_class_set",
    "draw_class_set",
    "draw_negatives",
    "sampled_softmax_loss",
    "scatter_add_",
]
