"""What the features of a net are worth: measured by labels that it was not, or not only, trained by."""

from .features import depth_of, depths, features, prefix
from .linear import linear_probe
from .neighbours import knn
from .tuned import fine_tuned

__all__ = ["depth_of", "depths", "features", "fine_tuned", "knn", "linear_probe", "prefix"]
