"""Federated learning with very many classes: a simulator of FedSS and the methods it is compared with.

>>> from fedss_kernels.federated import Config, run
>>> result = run(Config(method="fedss", num_negatives=40, rounds=300))  # doctest: +SKIP
>>> result.summary.top1  # doctest: +SKIP
"""

from .any_round import TooFewClients
from .config import Config, ConfigError
from .data import FederatedData
from .files.checkpoint import CheckpointError
from .plugins import register
from .run_loop import Result, Stopped, run
from .trained_net import load_net
from .workers import WorkerLost

__all__ = [
    "CheckpointError",
    "Config",
    "ConfigError",
    "FederatedData",
    "Result",
    "Stopped",
    "TooFewClients",
    "WorkerLost",
    "load_net",
    "register",
    "run",
]
