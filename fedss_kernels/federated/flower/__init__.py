"""A real federation, on Flower: the simulator's server, and clients who are somewhere else.

`client_app` makes the app of a node, `server_app` that of the server; `fedss flower new FOLDER` writes both
for a start. All needs flwr, which is imported when an app is made: pip install "fedss-kernels[flower]".
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

__all__ = ["client_app", "server_app"]


def client_app(
    data: Callable[[Mapping[str, Any]], tuple[Any, Any]], model: Callable[[], nn.Module] | None = None
) -> ClientApp:
    """The app of a node: it trains on this data, which never leaves it.

    data(node) -> (images (n, channels, H, W) uint8, labels (n,) in [0, classes)), as tensors, arrays or
        lists; `node` is the node's own configuration, with its number "partition-id" and whatever else it was
        started with, as a path.
    model() -> the net, as the server's; None: the one that the run's options name.

    What a node says is which class rows it asks for, where the method has it ask, and its update: how far the
    net and those rows moved, how many images it has, and its mean loss. Raises ImportError without flwr.
    """
    _check_installed()
    from .node import app

    return app(data, model)


def server_app(
    classes: int, test: Callable[[], tuple[Any, Any]], model: Callable[[], nn.Module] | None = None
) -> ServerApp:
    """The app of the server: rounds, checks, ledger, checkpoints and files as `run` has them.

    classes: C, the classes of all nodes together; a class matrix has a row for each.
    test() -> (images (T, channels, H, W) uint8, labels (T,) in [0, classes)) that the server has, at least 2.
    model() -> the net, as the nodes'; None: the one that the run's options name.

    The run's configuration, [tool.flwr.app.config] of pyproject.toml, is `nodes`, how many there are;
    `timeout`, seconds that the server waits for answers; `resume`; and any options of Config, with dashes for
    underscores. Every option that is equal to a simulated run's, on the same images, gives the same bits.
    Raises ImportError without flwr.
    """
    _check_installed()
    from .federate import app

    return app(classes, test, model)


def _check_installed() -> None:
    if importlib.util.find_spec("flwr") is None:
        raise ImportError('flwr is not installed, and needs Python 3.11: pip install "fedss-kernels[flower]"')
