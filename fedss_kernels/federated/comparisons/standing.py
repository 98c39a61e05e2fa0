"""A comparison goes on with runs that stand; they have to be of the data and the methods of those to come."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..algorithms import METHODS
from ..clients.player import Player
from ..config import Config, ConfigError
from ..data.damage import some
from ..files import checkpoint
from ..files.checkpoint import CheckpointError
from ..loading import fitted, load_data, options_of_data
from ..plan import Plan
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
        player = Player(fitted(config, data.found), data)
        if config.init_checkpoint or config.half_checkpoint:  # whose files may be others
            different = found.differences(player.fingerprint)
        else:
            different = found.other_data(data) + found.other_method(player.method_numbers)
        if different:
            raise CheckpointError(
                f"the run in {folder_of(config)} is of other data, another method or another net than is "
                f"here now: not as it was: {', '.join(different)}"
            )
    for versions in sorted(others):
        log.warning("of the runs that stand some were made with %s: bits of the others may differ", versions)


def say_left_over(out: Path, plan: Plan) -> None:
    """Of a comparison that another one replaces: which of its runs' folders stay, as this has no such run."""
    try:
        before = Plan.read(out)
    except (OSError, CheckpointError, ConfigError):  # none, or one of another version
        return
    new = {*_folders(plan, out)}
    if left := [str(f) for f in _folders(before, out) if f.exists() and f not in new]:
        log.warning("runs of the comparison that was there stay, and count in no table: %s", some(left))


def _folders(plan: Plan, out: Path) -> list[Path]:
    trials = plan.trials(out / "rates") if plan.rates else []
    return [folder_of(config) for config in (*trials, *plan.runs(out, {}))]


def _options_of_data(config: Config) -> Iterator[Any]:
    """What `load_data` depends on."""
    yield from (getattr(config, name) for name in options_of_data())
    yield METHODS[config.method].alone
