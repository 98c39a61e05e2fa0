"""`fedss personalise`: what runs' models are worth to their clients, fine-tuned and as they are."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..algorithms import METHODS
from ..config import Config
from ..data import FederatedData
from ..files.checkpoint import MAY_DIFFER
from ..files.run_folder import check_trained_on, make_folder, read_config, read_kept, read_model
from ..plan import FILE, Plan
from .command import Command
from .measure import write_measured
from .options import (
    GROUPS,
    Mistake,
    mistakes,
    one_of,
    read_numbers,
    read_rates,
    reader,
    refuse_lost,
)
from .output import read_data

if TYPE_CHECKING:
    from ..figures.personalisation import Measured
    from ..fine_tuning import Tuning

# Of one method and setting are runs that differ in these alone.
_OF_NO_METHOD = {*MAY_DIFFER, "seed", "threads", "device", "eval_every"}


def _add_personalise_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs, or of comparisons"
    )
    parser.add_argument(
        "--part",
        type=one_of("head", "body", "full"),
        default="head",
        metavar="NAME",
        help="what a client fine-tunes: head, the class rows, on plain images; body, the net; full, both "
        "(default: head)",
    )
    parser.add_argument(
        "--epochs",
        type=read_numbers,
        metavar="INTS",
        help="numbers of epochs after which to look, with commas between (default: 0,1,2,3,5,10)",
    )
    parser.add_argument(
        "--rate",
        type=read_rates,
        metavar="NUMBERS",
        help="learning rates of the fine-tuning, with commas between; each is shown (default: 0.01)",
    )
    parser.add_argument(
        "--rows",
        type=one_of("all", "own"),
        default="all",
        metavar="NAME",
        help="classes that its loss is over: all, or the client's own; scores are over all (default: all)",
    )
    parser.add_argument(
        "--clients",
        type=reader(int, "an integer of at least 1", low=1),
        metavar="INT",
        help="the first so many alone (default: all)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/personalise"), metavar="PATH", help="default: runs/personalise"
    )


def _personalise(arguments: argparse.Namespace) -> int:
    from ..figures import personalisation
    from ..fine_tuning import EPOCHS, RATE, Tuning, check_measurable

    with mistakes():
        configs = {folder: read_config(folder)[0] for folder in _runs(arguments.runs)}
        first = next(iter(configs.values()))
        _check_same_data(configs)
        titles = _titles(configs)
        refuse_lost(arguments, first, "start this there")
        _, data = read_data(first, [])
        check_measurable(data)
        for folder in configs:  # before the first takes its time
            read_model(folder)
            check_trained_on(folder, data)
        epochs = tuple(EPOCHS if arguments.epochs is None else arguments.epochs)
        tunings = [Tuning(arguments.part, epochs, rate, arguments.rows) for rate in arguments.rate or [RATE]]
        make_folder(arguments.out)
    found = []
    for folder, config in configs.items():
        for tuning in tunings:
            found.append(_measured(arguments, folder, config, data, tuning, titles[folder]))
    failed = [
        f"{each.run}, rate {each.tuning.rate:g}: fine-tuning left numbers that are not finite for {lost:,} "
        f"of {len(each.people):,} clients, for whom nothing is right then: is --rate too high?"
        for each in found
        if (lost := sum(person.not_finite for person in each.people))
    ]
    return write_measured(
        arguments, arguments.out, lambda: personalisation.write(arguments.out, found), failed
    )


def _measured(
    arguments: argparse.Namespace,
    folder: Path,
    config: Config,
    data: FederatedData,
    tuning: "Tuning",
    title: str,
) -> "Measured":
    from ..figures.personalisation import Measured
    from ..fine_tuning import personalise

    torch.set_num_threads(config.threads)
    begun = time.perf_counter()
    with mistakes():
        people = personalise(
            config, data, read_model(folder), tuning, clients=arguments.clients, own=read_kept(folder)
        )
    spent = f"{len(people):,} clients in {time.perf_counter() - begun:.0f} s"
    print(f"fedss personalise: {folder}, rate {tuning.rate:g}: {spent}", file=sys.stderr)
    return Measured(str(folder), title, config.seed, tuning, people, config.method)


def _runs(folders: Sequence[Path]) -> list[Path]:
    """Those of comparisons one by one. Raises Mistake for a comparison of which none is finished."""
    found = []
    for folder in folders:
        if not (folder / FILE).exists():
            found.append(folder)
            continue
        runs = [config.out for config in Plan.read(folder).runs(folder, {}) if config.out]
        done = [run for run in runs if (run / "summary.json").exists()]
        if not done:
            raise Mistake(f"no run of the comparison in {folder} is finished")
        for run in runs:
            if run not in done:
                print(f"fedss personalise: {run} is left out: it is not finished", file=sys.stderr)
        found += done
    return found


def _check_same_data(configs: dict[Path, Config]) -> None:
    """Raises Mistake for a run on other data, or on the same among other clients, than the first."""
    fields = [field.name for field in dataclasses.fields(Config)]
    begin, end = (fields.index(GROUPS[title]) for title in ("the data", "the method"))
    (first, expected), *others = configs.items()
    for folder, config in others:
        for name in fields[begin:end]:
            value, there = getattr(config, name), getattr(expected, name)
            if name != "cache_dir" and value != there:
                raise Mistake(
                    f"{folder} is on other data than {first}: {name} {value} and {there}: expected runs on "
                    "the same data, with one data_seed and partition"
                )


def _titles(configs: dict[Path, Config]) -> dict[Path, str]:
    """Of each run its method, with the options in which others of the method have other values.

    Raises Mistake for two runs that differ in nothing.
    """
    settings = {
        folder: {n: v for n, v in config.to_dict().items() if n not in _OF_NO_METHOD}
        for folder, config in configs.items()
    }
    titles, seen = dict[Path, str](), dict[tuple[str, int], Path]()
    for folder, mine in settings.items():
        same = [each for each in settings.values() if each["method"] == mine["method"]]
        varied = [name for name in mine if any(each.get(name) != mine[name] for each in same)]
        title = ", ".join([METHODS[mine["method"]].label, *(f"{name} {mine[name]}" for name in varied)])
        other = seen.setdefault((title, configs[folder].seed), folder)
        if other != folder:
            raise Mistake(f"{folder} and {other} are of one method, settings and seed: expected each once")
        titles[folder] = title
    return titles


PERSONALISE = Command(
    "measure what runs' models are worth to each client, before and after it fine-tunes them",
    ("matplotlib", "rich"),
    _add_personalise_arguments,
    _personalise,
)
