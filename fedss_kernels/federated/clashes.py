"""Options of a run that cannot be beside others."""

import contextlib
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

from .algorithms import METHODS
from .algorithms.method import PIR, SHARED, STICKY
from .config_error import ConfigError
from .models.bottleneck import Bottleneck
from .secure_sums import MOST_CLIENTS

LEAST_NOISE = 1e-12  # in clip_norms, but for none


def clashes(config: Any, wrong: Container[str] = ()) -> Iterator[ConfigError]:
    """Of a Config; none that an option has part in whose value cannot be, one of these."""
    known = _Known(config, wrong)
    for look in (_in_cohort, _of_method, _of_negatives, _with_noise, _of_split):
        with contextlib.suppress(_Unknown):
            yield from look(known)


class _Unknown(Exception):
    """An option has no value."""


class _Known:
    """A Config in which to read one of the options that are `wrong` raises _Unknown."""

    def __init__(self, config: Any, wrong: Container[str]):
        self._config, self._wrong = config, wrong

    def __getattr__(self, name: str) -> Any:
        if name in self._wrong:
            raise _Unknown(name)
        made = getattr(type(self._config), name, None)  # of others
        return made.__get__(self) if isinstance(made, property) else getattr(self._config, name)


def _in_cohort(config: Any) -> Iterator[ConfigError]:
    if config.cohort is not None and config.min_clients > config.cohort:
        yield ConfigError(
            "min_clients", f"expected at most {config.cohort}, the cohort, got {config.min_clients}"
        )
    if config.cohort is not None and config.shares and config.min_holders > config.cohort:
        expected = f"expected at most {config.cohort}, the cohort, of which so many must hold a class"
        yield ConfigError("min_holders", f"{expected}, got {config.min_holders}")


def _of_method(config: Any) -> Iterator[ConfigError]:
    method = METHODS[config.method]
    if method.spreads and config.similarity != "cosine":
        yield ConfigError(
            "similarity",
            f"expected cosine with {config.method}, whose server turns rows apart, got {config.similarity!r}",
        )
    if not method.stores and config.class_store is not None:
        yield no_store([config.method], config.class_store)
    if method.rowless and config.personalise_epochs:
        expected = f"expected 0 with {config.method}, which has no class rows to name a class by"
        yield ConfigError("personalise_epochs", f"{expected}, got {config.personalise_epochs}")
    if method.contrastive and config.batch_size == 1:
        expected = f"expected at least 2 with {config.method}, as an image alone has no other to be told from"
        yield ConfigError("batch_size", f"{expected}, got 1")


def _of_negatives(config: Any) -> Iterator[ConfigError]:
    if config.sums:
        yield from _with_sums(config, f"{SHARED} negatives" if config.shares else f"{PIR} requests")
    if config.private:
        yield from _in_private(config)
    if not config.shares and config.negatives == SHARED and "negatives" in METHODS[config.method].options:
        expected = f"expected one of {', '.join(STICKY)} with {config.method}"
        yield ConfigError("negatives", f"{expected}, got {SHARED!r}")


def _of_split(config: Any) -> Iterator[ConfigError]:
    if not METHODS[config.method].split:
        return
    if config.bottleneck is not None:
        try:
            Bottleneck.read(config.bottleneck)
        except ValueError as error:
            yield ConfigError("bottleneck", str(error).removeprefix("bottleneck: "))
    if config.half_checkpoint is not None and not config.freeze_clients:
        expected = "expected freeze_clients with it, as what clients' blocks resist is lost in training"
        yield ConfigError("half_checkpoint", f"{expected}, got {config.half_checkpoint}")
    if config.workers > 1:
        expected = f"expected 1 with {config.method}, whose clients and server step together in one process"
        yield ConfigError("workers", f"{expected}, got {config.workers}")


def _with_sums(config: Any, why: str) -> Iterator[ConfigError]:
    """Where the server sees sums alone, of at most MOST_CLIENTS terms of integers."""
    for name, expected in (("aggregation", "mean"), ("poison_rate", 0), ("wire_dtype", "float32")):
        if (got := getattr(config, name)) != expected:
            words = f"expected {expected} with {why}, whose changes go into a secure sum"
            yield ConfigError(name, f"{words}, got {got}")
    if config.cohort is not None and config.cohort > MOST_CLIENTS:
        words = f"expected at most {MOST_CLIENTS:,} with {why}, whom a secure sum holds"
        yield ConfigError("cohort", f"{words}, got {config.cohort:,}")


def _in_private(config: Any) -> Iterator[ConfigError]:
    """Where no server knows who asks for which rows, and each reads all of them for an answer."""
    if config.shares:
        words = (
            f"expected plain with {SHARED} negatives, where a cohort has one class set that the server makes"
        )
        yield ConfigError("requests", f"{words}, got {config.requests!r}")
    if config.denominator != "cohort":
        words = f"expected cohort with {PIR} requests, where nobody knows who holds a row"
        yield ConfigError("denominator", f"{words}, got {config.denominator!r}")
    if config.class_store is not None:
        words = f"expected none with {PIR} requests, whose servers read all rows for every client"
        yield ConfigError("class_store", f"{words}, got {config.class_store}")


def _with_noise(config: Any) -> Iterator[ConfigError]:
    """What would claim more privacy than there is."""
    if not config.noise_multiplier:
        return
    method = METHODS[config.method]
    if method.pooled or method.alone or method.split:
        why = f"expected 0 with {config.method}, whose clients send no changes to be averaged"
    elif method.tells:
        why = f"expected 0 with {config.method}, whose clients tell by the rows they ask for what they hold"
    elif config.noise_multiplier < LEAST_NOISE:
        why = f"expected 0, or at least {LEAST_NOISE:g}, as less gives no epsilon that can be computed"
    else:
        why = ""
    if why:
        yield ConfigError("noise_multiplier", f"{why}, got {config.noise_multiplier:g}")
    elif config.clip_norm is None:
        yield ConfigError("clip_norm", "expected a number with noise, which hides changes up to it, got none")
    if config.aggregation != "mean":
        yield ConfigError("aggregation", f"expected mean with noise, got {config.aggregation}")


def no_store(methods: Sequence[str], got: Path) -> ConfigError:
    return ConfigError("class_store", f"expected none with {storeless(methods)}, got {got}")


def storeless(methods: Sequence[str]) -> str:
    """Of methods without a class store: why there is none."""
    drawn = [name for name in methods if not METHODS[name].rowless]
    without = [name for name in methods if METHODS[name].rowless]
    reasons = (drawn, "whose class rows are drawn where they are needed"), (without, "without class rows")
    return ", and ".join(f"{', '.join(names)}, {why}" for names, why in reasons if names)
