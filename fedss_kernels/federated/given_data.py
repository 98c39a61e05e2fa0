"""What the options of a Config count for where the data are handed over in Python, as run(config, data=...).

Nothing: the data are as they are. But data that `load_data` has read are what its options said.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .config import Config
from .data import FederatedData
from .defaults import OWN
from .loading import fitted, options_of_data, read_by

# But "image_size", to which load_net resizes files, and places, which no result depends on.
_OTHERS = ("data", "data_dir", "cache_dir", "image_size")
OPTIONS = tuple(name for name in options_of_data() if name not in _OTHERS)


def as_given(config: Config, data: FederatedData) -> tuple[Config, list[str]]:
    """The configuration with options of the data as these are, and a line for each that said otherwise.

    Of data that nobody has read here they are at their defaults.
    """
    name = config.data if config.data == data.name else OWN
    usual = vars(Config(data=config.data, method=config.method))
    there: Mapping[str, Any] = vars(Config(data=name, method=config.method))
    now: Mapping[str, Any] = vars(config)
    if name != OWN and (read := read_by(data)):
        now, there = vars(fitted(config, data.found)), read
    values = {each: there[each] for each in OPTIONS} | {"task": data.task}
    lines = [
        f"{each} {now[each]} has no effect: the data are handed over as they are"
        for each, value in values.items()
        if now[each] not in (value, usual[each])
    ]
    return replace(config, data=name, **values), lines
