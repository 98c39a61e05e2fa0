"""The data that a configuration names, and whether the two fit."""

from typing import Any

from .config import OWN, Config, ConfigError
from .data import RESIZED, FederatedData, Partition, load
from .data.holdout import held_out
from .data.images import OnProgress
from .player import check_model


def load_data(config: Config, on_progress: OnProgress | None = None) -> FederatedData:
    """The data set that `config` names. Raises ConfigError, or ValueError and OSError about its files.

    Image files are decoded when they are first read, which may take hours: on_progress(what, done, total) is
    called from the first on, with total 0 where nobody knows it.
    """
    if config.data == OWN:
        raise ConfigError("data", f"{OWN!r} data is handed over in Python, as run(config, data=...)")
    if config.data_dir is not None and not config.data_dir.is_dir():
        raise ConfigError("data_dir", f"no such folder: {config.data_dir}")
    options: dict[str, Any] = {"skip_damaged": config.skip_damaged, "on_progress": on_progress}
    if config.data == "glyphs":  # drawn, not read
        options = {"num_classes": config.glyph_classes, "writers": config.glyph_writers}
    if config.data in RESIZED:
        options["image_size"] = config.image_size
    elif config.image_size:
        raise ConfigError(
            "image_size",
            f"expected 0 for {config.data}, whose images keep their size, got {config.image_size}",
        )
    data = load(
        config.data,
        data_dir=config.data_dir,
        seed=config.data_seed,
        task=config.task,
        cache_dir=config.cache_dir,
        how=Partition(
            config.partition,
            num_clients=config.num_clients,
            images_per_client=config.images_per_client,
            classes_per_client=config.classes_per_client,
            alpha=config.dirichlet_alpha,
        ),
        **options,
    )
    return held_out(data, config.holdout, config.data_seed) if config.holdout else data


def check_data(config: Config, data: FederatedData) -> None:
    """Raises ConfigError if the run and the data do not fit."""
    if config.cohort > len(data.clients):
        raise ConfigError(
            "cohort", f"expected at most {len(data.clients)}, the clients there are, got {config.cohort}"
        )
    if len(data.test_images) < 2:
        raise ConfigError("data", f"expected at least 2 test images, got {len(data.test_images)}")
    if config.model != OWN:
        check_model(config, data)
