"""A comparison goes on with runs that stand; they have to be of the data and the methods of those to come."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from ..algorithms import METHODS
from ..clients.player import Player
from ..config import Config
from ..files import checkpoint
from ..files.checkpoint import CheckpointError
from ..files.method_numbers import method_numbers
from ..loading import load_data, options_of_data
from .jobs import folder_of

log = logging.getLogger(__name__)


def check_standing(configs: Sequence[Config]) -> None:
    """Raises CheckpointError where one that is done or begun is of other data, another method or net by now.

    Where it kept no checkpoint, as with checkpoint_every 0, it is not known. Says where they were made with
    other versions.
    """
    of, data, others = None, None, set[str]()
    for config in configs:
        try:
            found, versions = checkpoint.read_fingerprint(folder_of(config))
        except CheckpointError:
            continue
        others |= {versions} - {""}
        if data is None or of != [*_options_of_data(config)]:  # the same for most
            of, data = [*_options_of_data(config)], load_data(config)
        if config.init_checkpoint or config.half_checkpoint:  # whose files may be others
            different = found.differences(Player(config, data).fingerprint)
        else:
            method = METHODS[config.method].configured(config.settings)
            numbers = method_numbers(method, config, data.num_classes)
            different = found.other_data(data) + found.other_method(numbers)
        if different:
            raise CheckpointError(
                f"the run in {folder_of(config)} is of other data, another method or another net than is "
                f"here now: not as it was: {', '.join(different)}"
            )
    for versions in sorted(others):
        log.warning("of the runs that stand some were made with %s: bits of the others may differ", versions)


def _options_of_data(config: Config) -> Iterator[Any]:
    """What `load_data` depends on."""
    yield from (getattr(config, name) for name in options_of_data())
    yield METHODS[config.method].alone
