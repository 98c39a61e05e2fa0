"""The app of the server: a run whose rounds are played by the nodes of a federation."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch import Tensor, nn

from ..algorithms import METHODS, Method
from ..config import PIR, SHARED, Config, ConfigError
from ..data import FederatedData
from ..data.handed_over import integers, tensor
from ..files.checkpoint import CheckpointError
from ..files.round_metrics import RoundMetrics
from ..files.run_folder import RUN_FILES, check_folder
from ..run_loop import Result, run_by
from .federation import ROLL, federation
from .network import Network

Test = Callable[[], tuple[Any, Any]]


def app(classes: int, test: Test, model: Callable[[], nn.Module] | None) -> ServerApp:
    found = ServerApp()

    @found.main()
    def main(grid: Grid, context: Context) -> None:
        federate(grid, context.run_config, classes, test, model)

    return found


def federate(
    grid: Grid,
    run_config: Mapping[str, Any],
    classes: int,
    test: Test,
    model: Callable[[], nn.Module] | None = None,
) -> Result:
    """The whole run. Raises as `run`, and Incomplete where nodes are missing as it begins."""
    settings, config = Settings.of(run_config)
    images, labels = _tested(*test())
    about = {"nodes": settings.nodes, "classes": classes, "shape": json.dumps(list(images.shape[1:]))}
    network = Network(grid, about, settings.timeout, settings.nodes)
    if settings.resume:
        network.images = _roll(config, settings.nodes)
    else:
        assert config.out is not None
        check_folder(config.out, RUN_FILES, overwrite=config.overwrite)  # before anybody is waited for
        network.wait_for_all()
    return run_by(
        federation(network),
        config,
        data=_from_afar(network.images, images, labels, classes, config.task),
        model=model() if model else None,
        on_round=_say,
        resume=settings.resume,
        afar=True,
    )


@dataclass(frozen=True)
class Settings:
    """Of a federation, besides the run's options."""

    nodes: int  # clients, with the numbers 0, 1, ...
    timeout: float = 600.0  # seconds that the server waits for answers, and at first for the nodes
    resume: bool = False  # go on from the last checkpoint in `out`

    @classmethod
    def of(cls, run_config: Mapping[str, Any]) -> "tuple[Settings, Config]":
        """Both. Raises ConfigError for all that cannot be."""
        options = {name.replace("-", "_"): value for name, value in run_config.items()}
        own = {
            field.name: options.pop(field.name) for field in dataclasses.fields(cls) if field.name in options
        }
        nodes, timeout, resume = (
            own.get("nodes"),
            own.get("timeout", cls.timeout),
            own.get("resume", cls.resume),
        )
        if type(nodes) is not int or nodes < 1:
            raise ConfigError("nodes", f"expected an integer of at least 1, got {nodes!r}")
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < 1e8:
            raise ConfigError("timeout", f"expected seconds greater than 0, got {timeout!r}")
        if not isinstance(resume, bool):
            raise ConfigError("resume", f"expected true or false, got {resume!r}")
        config = Config.from_dict({"data": "own", "cohort": nodes, **options})
        _check(config, nodes)
        return cls(nodes, float(timeout), resume), config


def _check(config: Config, nodes: int) -> None:
    """Raises ConfigError for what there is in simulations alone."""
    method, over = METHODS[config.method], "over a network"
    if (reason := _simulated(method)) is not None:
        raise ConfigError("method", f"expected another {over}: {reason}")
    if config.workers > 1:
        raise ConfigError("workers", f"expected 1 {over}, where nodes train, got {config.workers}")
    if config.cohort > nodes:
        raise ConfigError("cohort", f"expected at most {nodes}, the nodes, got {config.cohort}")
    if config.poison_rate:
        raise ConfigError("poison_rate", f"expected 0 {over}, got {config.poison_rate}")
    if config.shares and not max(1, config.cohort / 2) < config.min_clients:
        least = max(2, config.cohort // 2 + 1)
        expected = f"expected at least {least}, more than half of the cohort, with {SHARED} negatives {over}"
        raise ConfigError("min_clients", f"{expected}, got {config.min_clients}")
    if config.private:
        raise ConfigError("requests", f"expected plain {over}, where there is one server, got {PIR!r}")
    if config.noise_multiplier:
        expected = f"expected 0 {over}: the noise of a simulation is drawn from a seed that all clients have"
        raise ConfigError("noise_multiplier", f"{expected}, got {config.noise_multiplier:g}")
    if config.personalise_epochs:
        expected = f"expected 0 {over}, where the server has no client's images to fine-tune on"
        raise ConfigError("personalise_epochs", f"{expected}, got {config.personalise_epochs}")
    if config.out is None:
        raise ConfigError("out", "expected a folder for the results, got none")


def _simulated(method: Method) -> str | None:
    """Why there is no federation of it; None where there is."""
    if method.pooled:
        return f"{method.name} has no clients"
    if method.split:
        return f"clients and server of {method.name} step together on every batch"
    if method.contrastive:
        return f"what {method.name} learns is measured with training images, and the server has none"
    return f"each client of {method.name} has a model of its own" if method.personal else None


def _tested(images: Any, labels: Any) -> tuple[Tensor, Tensor]:
    images, labels = tensor("test images", images), integers("test labels", labels)
    if images.dim() != 4:
        raise ValueError(f"test images: expected (T, channels, H, W) uint8, got {tuple(images.shape)}")
    return images, labels


def _roll(config: Config, nodes: int) -> dict[int, int]:
    """Of a run that goes on how many images each client has. Raises ConfigError for other `nodes`."""
    assert config.out is not None
    path = Path(config.out) / ROLL
    try:
        found = {int(client): images for client, images in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError):
        raise CheckpointError(
            f"no federation's checkpoint in {config.out}: there is no sound {ROLL}"
        ) from None
    if len(found) != nodes:
        raise ConfigError("nodes", f"expected {len(found)}, as the run in {config.out} has, got {nodes}")
    return found


def _from_afar(
    held: Mapping[int, int], test_images: Tensor, test_labels: Tensor, classes: int, task: str
) -> FederatedData:
    """What the server knows of the data: its own test images, and how many each client has, not which."""
    blank = torch.zeros_like(test_images[:1])
    return FederatedData(
        name="own",
        images=blank,
        labels=torch.zeros(1, dtype=torch.int64),
        clients=tuple(torch.zeros(held[k], dtype=torch.int64) for k in sorted(held)),
        client_names=tuple(f"node {k}" for k in sorted(held)),
        test_images=test_images,
        test_labels=test_labels,
        num_classes=classes,
        class_names=tuple(f"class {j}" for j in range(classes)),
        task=task,
    )


def _say(metrics: RoundMetrics) -> None:
    told = ", ".join(
        f"{measure.label} {measure.text(value)}"
        for measure in metrics.measures.alike[:1]
        if (value := metrics.measured.get(measure.name)) is not None
    )
    counts = f"{metrics.accepted} answers" + f", {metrics.rejected} left out" * (metrics.rejected > 0)
    lost = metrics.dropped + metrics.late
    print(
        f"round {metrics.round}: loss {metrics.loss:.3f}, {counts}"
        + f", {lost} silent" * (lost > 0)
        + f", {told}" * bool(told)
        + f", {metrics.seconds:.0f} s",
        flush=True,
    )
