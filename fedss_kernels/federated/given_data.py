"""What the options of a Config count for where the data are handed over in Python, as run(config, data=...).

Nothing, of data of one's own: they are as they are. Data that have the name of the data set which the options
are of are taken for what these say, as `load` and `load_data` have read them.
"""

from dataclasses import replace
from typing import Any

from .config import Config
from .data import FederatedData
from .defaults import OWN
from .loading import options_of_data

# But "image_size", to which load_net resizes files, and places, which no result depends on.
_OTHERS = ("data", "data_dir", "cache_dir", "image_size")
OPTIONS = tuple(name for name in options_of_data() if name not in _OTHERS)


def as_given(config: Config, data: FederatedData) -> tuple[Config, list[str]]:
    """The configuration with options of the data as these are, and a line for each that said otherwise.

    Of data of one's own they are at their defaults.
    """
    usual, now = (vars(each) for each in (Config(data=config.data, method=config.method), config))
    name: str = config.data
    values: dict[str, Any] = {"task": data.task}
    if data.name != config.data:
        name, there = OWN, vars(Config(data=OWN, method=config.method))
        values |= {each: there[each] for each in OPTIONS if each != "task"}
    lines = [
        f"{each} {now[each]} has no effect: the data are handed over as they are"
        for each, value in values.items()
        if now[each] not in (value, usual[each])
    ]
    return replace(config, data=name, **values), lines
