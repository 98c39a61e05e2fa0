"""Several finished runs that a command looks at side by side: which they are, and what each is called."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..algorithms import METHODS
from ..config import Config
from ..files.checkpoint import MAY_DIFFER
from ..plan import FILE, Plan
from .options import Mistake, noted

# Of one method and setting are runs that differ in these alone; one that began with another net is not.
_OF_NO_METHOD = {*MAY_DIFFER, "seed", "threads", "device", "eval_every", "label"}
_OF_NO_METHOD -= {"init_checkpoint", "half_checkpoint"}
# What a fair comparison has in common, but for the rate, which may be found for each.
_OF_THE_TRAINING = (
    *("rounds", "cohort", "batch_size", "local_epochs"),
    *("model", "embedding_dim", "init_checkpoint"),
)


def finished_runs(command: str, folders: Sequence[Path], wrong: list[str]) -> list[Path]:
    """Those of comparisons one by one; a comparison of which none is finished is wrong."""
    found = list[Path]()
    for folder in folders:
        if not (folder / FILE).exists():
            found.append(folder)
            continue
        with noted(wrong):
            runs = [config.out for config in Plan.read(folder).runs(folder, {}) if config.out]
            done = [run for run in runs if (run / "summary.json").exists()]
            if not done:
                raise Mistake(f"no run of the comparison in {folder} is finished")
            for run in runs:
                if run not in done:
                    print(f"fedss {command}: {run} is left out: it is not finished", file=sys.stderr)
            found += done
    return found


def titles(configs: Mapping[Path, Config], called: Mapping[Path, str]) -> tuple[dict[Path, str], list[str]]:
    """(titles, a line for each run that differs in nothing from another).

    A title is what a run is called, with the options in which others that are called so have other values.
    """
    settings = {
        folder: {n: v for n, v in config.to_dict().items() if n not in _OF_NO_METHOD}
        for folder, config in configs.items()
    }
    found, seen, twice = dict[Path, str](), dict[tuple[str, int], Path](), list[str]()
    for folder, mine in settings.items():
        same = [settings[other] for other in settings if called[other] == called[folder]]
        varied = [name for name in mine if any(each.get(name) != mine[name] for each in same)]
        title = ", ".join([called[folder], *(f"{name} {mine[name]}" for name in varied)])
        other = seen.setdefault((title, configs[folder].seed), folder)
        if other != folder:
            twice.append(f"{folder} and {other} are of one method, settings and seed: expected each once")
        found[folder] = title
    return found, twice


def say_differences(command: str, configs: Mapping[Path, Config]) -> None:
    """A line on the options in which runs of different methods differ besides these."""
    if len({config.method for config in configs.values()}) < 2:
        return
    words = [
        f"{name} {' and '.join(sorted(map(str, values)))}"
        for name in _OF_THE_TRAINING
        if len(values := {getattr(config, name) for config in configs.values()}) > 1
    ]
    if words:
        print(
            f"fedss {command}: the runs differ in more than their methods: {', '.join(words)}",
            file=sys.stderr,
        )


def by_method(configs: Mapping[Path, Config]) -> dict[Path, str]:
    return {folder: METHODS[config.method].label for folder, config in configs.items()}


def by_label(configs: Mapping[Path, Config]) -> dict[Path, str]:
    """As in their comparison, or by method."""
    return {folder: config.label or METHODS[config.method].label for folder, config in configs.items()}
