"""What the features of a net are worth: measured by labels that it was not, or not only, trained by."""

from .by_depth import Line, Probing, by_depth
from .features import depth_of, depths, features, prefix
from .linear import linear_probe
from .neighbours import knn
from .of_a_run import at_the_end, before_training, while_training
from .tuned import fine_tuned

__all__ = [
    "Line",
    "Probing",
    "at_the_end",
    "before_training",
    "by_depth",
    "depth_of",
    "depths",
    "features",
    "fine_tuned",
    "knn",
    "linear_probe",
    "prefix",
    "while_training",
]
