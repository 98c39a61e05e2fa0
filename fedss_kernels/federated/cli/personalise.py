"""`fedss personalise`: what runs' models are worth to their clients, fine-tuned and as they are."""

import argparse
import functools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..config import Config
from ..data import FederatedData
from ..files import checkpoint
from ..files.run_folder import as_trained, check_trained_on, make_folder, read_config, read_kept, read_model
from ..loading import options_of_data
from .command import Command
from .measure import kept, write_measured
from .options import (
    mistakes,
    noted,
    one_of,
    read_numbers,
    read_rates,
    reader,
    refuse,
    refuse_lost,
)
from .output import read_data
from .several_runs import by_method, finished_runs, say_differences, titles

if TYPE_CHECKING:
    from ..comparisons.paired_differences import Measured
    from ..fine_tuning import Tuning


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
    from ..comparisons import personalisation
    from ..comparisons.paired_differences import Measured, unpaired
    from ..fine_tuning import EPOCHS, RATE, Tuning

    epochs, tunings = tuple(EPOCHS if arguments.epochs is None else arguments.epochs), list[Tuning]()
    wrong = list[str]()
    for rate in arguments.rate or [RATE]:
        with noted(wrong):
            tunings.append(Tuning(arguments.part, epochs, rate, arguments.rows))
    configs, called = _read(arguments, wrong)
    if arguments.out.exists():  # else it would be made
        with noted(wrong):
            make_folder(arguments.out)
    refuse(wrong)
    say_differences("personalise", configs)
    data = _data_of(configs)
    with mistakes():
        make_folder(arguments.out)
    found, left_out = list[Measured](), list[str]()

    def write() -> int:
        return write_measured(
            arguments, arguments.out, lambda: personalisation.write(arguments.out, found), left_out
        )

    with kept(found, left_out, write):
        for folder, config in configs.items():
            for tuning in tunings:
                with noted(failed := list[str]()):
                    found.append(_measured(arguments, folder, config, data, tuning, called[folder]))
                    left_out += _not_finite(found[-1])
                left_out += [f"{folder} is left out, rate {tuning.rate:g}: {words}" for words in failed]
    if not found:
        refuse(left_out)
    for pair in unpaired(found):
        words = f"{' and '.join(pair)} have no seed in common: there is no difference of the two"
        print(f"fedss personalise: {words}", file=sys.stderr)
    return write()


def _not_finite(found: "Measured") -> list[str]:
    """A line where fine-tuning left numbers that are not finite."""
    lost = sum(person.not_finite for person in found.people)
    words = (
        f"{found.run}, rate {found.tuning.rate:g}: fine-tuning left numbers that are not finite for {lost:,} "
        f"of {len(found.people):,} clients, for whom nothing is right then: is --rate too high?"
    )
    return [words] if lost else []


def _read(arguments: argparse.Namespace, wrong: list[str]) -> tuple[dict[Path, Config], dict[Path, str]]:
    """(the configurations of the runs, their titles); what is wrong with any of them goes to `wrong`."""
    configs = dict[Path, Config]()
    for folder in finished_runs("personalise", arguments.runs, wrong):
        with noted(wrong):
            configs[folder] = read_config(folder)[0]
            read_model(folder)  # before the data are read, and the first takes its time
    called, twice = titles(configs, by_method(configs))
    wrong += [*_on_other_data(configs), *twice]
    for config in configs.values():
        with noted(wrong):
            refuse_lost(arguments, as_trained(config), again=False)
    return configs, called


def _data_of(configs: dict[Path, Config]) -> FederatedData:
    """What these runs are measured on. Raises Mistake where they cannot be, or are of other data."""
    from ..fine_tuning import check_measurable

    wrong = list[str]()
    with mistakes():
        _, data = read_data(as_trained(next(iter(configs.values()))), [])
    with noted(wrong):
        check_measurable(data)
    wrong = [line.removeprefix("personalise: ") for line in wrong]  # the command says its name itself
    for folder in configs:
        with noted(wrong):
            check_trained_on(folder, data)
    refuse(wrong)
    return data


def _measured(
    arguments: argparse.Namespace,
    folder: Path,
    config: Config,
    data: FederatedData,
    tuning: "Tuning",
    title: str,
) -> "Measured":
    from rich.console import Console

    from ..comparisons.paired_differences import Measured
    from ..fine_tuning import personalise
    from ..reports.progress import ReadingProgress

    torch.set_num_threads(config.threads)
    begun, name = time.perf_counter(), f"fedss personalise: {folder}, rate {tuning.rate:g}"
    with mistakes(model="its model"), ReadingProgress(Console(stderr=True)) as progress:
        what = f"{name}: fine-tuning clients"
        progress.said[what] = time.monotonic()  # as of rounds the first line comes after a while
        people = personalise(
            as_trained(config),
            data,
            read_model(folder),
            tuning,
            clients=arguments.clients,
            own=read_kept(folder),
            on_tuned=functools.partial(progress, what),
        )
    print(f"{name}: {len(people):,} clients in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    return Measured(str(folder), title, config.seed, tuning, people, config.method)


def _on_other_data(configs: dict[Path, Config]) -> Iterator[str]:
    """A line for each run on other data, or on the same among other clients, than the first."""
    names = [name for name in options_of_data() if name != "cache_dir"]
    first, expected = next(iter(configs.items()), (None, None))
    for folder, config in configs.items():
        # whether those in another folder are others a checkpoint knows
        told = [name for name in names if name != "data_dir" or not checkpoint.exists(folder)]
        pairs = [(name, getattr(config, name), getattr(expected, name)) for name in told]
        words = ", ".join(f"{name} {value} and {there}" for name, value, there in pairs if value != there)
        if words:
            yield (
                f"{folder} is on other data than {first}: {words}: expected runs on the same data, with one "
                "data_seed and partition"
            )


PERSONALISE = Command(
    "measure what runs' models are worth to each client, before and after it fine-tunes them",
    ("matplotlib", "rich"),
    _add_personalise_arguments,
    _personalise,
)
