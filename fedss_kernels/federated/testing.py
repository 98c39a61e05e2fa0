"""Whether a method stands what every method does: `check_method`."""

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .algorithms import METHODS
from .config import Config
from .files.round_metrics import RoundMetrics
from .run_loop import Result, Stopped, run

_SMALL: dict[str, Any] = {
    **{"glyph_classes": 12, "glyph_writers": 4, "partition": "classes", "num_clients": 6},
    **{"classes_per_client": 3, "embedding_dim": 8, "rounds": 3, "cohort": 3, "eval_every": 1},
}


def check_method(name: str, **options: Any) -> None:
    """Trains by a method for a few rounds, in several ways that have to come to the same bits.

    Once more; by two workers, so that a script needs `if __name__ == "__main__":`, and registers the method
    outside of it; stopped, and resumed from its checkpoint. All with clients that drop out. It is on a few
    glyphs, with an embedding_dim of 8, of a method with by_round isotropic and 32; options are Config's,
    where others are wanted. Raises AssertionError for what differs or is not finite, and what `run` raises.
    rounds: at least 2.
    """
    config = Config(**_SMALL | _of_method(name) | {"method": name} | options)
    whole = run(config)
    losses = [metrics.loss for metrics in whole.history]
    assert all(map(math.isfinite, losses)), f"{name}: losses that are not finite: {losses}"
    for way, result in _ways(config):
        assert bits(result) == bits(whole), f"{name}: {way} it comes to other numbers"
        assert history(result) == history(whole), f"{name}: {way} it has other metrics"


def _of_method(name: str) -> dict[str, Any]:
    """What takes effect with it alone."""
    method = METHODS.get(name)
    if method is None or method.pooled:
        return {}
    found: dict[str, Any] = {"dropout_rate": 0.2}
    if "num_negatives" in method.options:
        found |= {"num_negatives": 3}
    if method.by_round:
        found |= {"model": "isotropic:depth=2", "embedding_dim": 32}
    return found


def _ways(config: Config) -> Iterator[tuple[str, Result]]:
    yield "once more", run(config)
    method = METHODS[config.method]
    if not (method.pooled or method.split):
        yield "by two workers", run(dataclasses.replace(config, workers=2))
    with tempfile.TemporaryDirectory() as folder:
        stopped = dataclasses.replace(config, out=Path(folder) / "run")
        with contextlib.suppress(Stopped):
            run(stopped, stop=lambda: True)
        yield "stopped and resumed", run(stopped, resume=True)


def bits(result: Result) -> list[bytes]:
    """Of all that was trained."""
    tensors = [*result.extractor.state_dict().values()]
    if result.weight is not None:
        tensors.insert(0, result.weight)
    if result.homes:
        tensors.append(result.homes.table[:])
    return [tensor.numpy().tobytes() for tensor in tensors]


def history(result: Result) -> list[RoundMetrics]:
    """Without the time that it took."""
    return [dataclasses.replace(metrics, seconds=0.0) for metrics in result.history]
