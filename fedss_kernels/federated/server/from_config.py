"""What the server does by a configuration: how it averages, and how it steps."""

from functools import partial

from ..algorithms import METHODS
from ..config import Config
from .robust import Statistic, median, trimmed_mean
from .row_table import SGD, Adagrad, Optimizer


def statistic(config: Config) -> Statistic | None:
    """Of each number over the clients; None: their mean."""
    if config.aggregation == "median":
        return median
    return partial(trimmed_mean, trim=config.trim) if config.aggregation == "trimmed_mean" else None


def optimizer(config: Config) -> Optimizer:
    """Of the net and the class rows."""
    if METHODS[config.method].pooled:
        return SGD(1.0, 0.0)  # what comes back is the model
    if config.server_optimizer == "adagrad":
        return Adagrad(config.server_lr)
    return SGD(config.server_lr, config.server_momentum)
