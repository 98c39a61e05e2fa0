"""The commands that measure without comparing runs: `noise`, `confusion`, `privacy`, `parameters`."""

import argparse
import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..algorithms import METHODS
from ..disk import why
from ..fedavg_round import TooFewClients
from ..files.run_folder import as_trained, check_trained_on, make_folder, read_config, read_kept, read_model
from ..models import MODELS, family_of
from ..reports.measured import NotWritten
from ..reports.remarks import remarks
from ..run_loop import run
from ..workers import WorkerLost
from .command import Command
from .options import (
    Mistake,
    add_config_file,
    add_options,
    config_of,
    flag,
    mistakes,
    noted,
    one_of,
    read_counts,
    reader,
    refuse,
    refuse_lost,
)
from .output import print_markdown, read_data, show_tuned

if TYPE_CHECKING:
    from ..figures.confusion import Confusion


def write_measured(
    arguments: argparse.Namespace, out: Path, write: Callable[[], str], failed: Sequence[str] = ()
) -> int:
    """What was measured, as a table, a plot and a section of the report; the table is told in any case.

    Then a line for what could not be written, and each part that failed; returns the exit code.
    """
    lines = list(failed)
    try:
        text = write()
    except NotWritten as error:
        print_markdown(error.table)
        lines.insert(0, str(error))
    except Exception as error:
        lines.insert(0, f"not all that was measured could be written to {out}: {why(error)}")
    else:
        print_markdown(text)
        print(f"the table, the plot and the report: {out / 'report.html'}")
    for line in lines:
        print(f"fedss {arguments.command}: {line}", file=sys.stderr)
    return 1 if lines else 0


@contextlib.contextmanager
def kept(found: Sized, left_out: list[str], write: Callable[[], int]) -> Iterator[None]:
    """What was measured in here is written whatever ends it, a signal or an error; of the rest is a line."""
    try:
        yield
    except (Exception, KeyboardInterrupt):
        if found:
            left_out.append("stopped: what is not there was not measured")
            write()
        raise


def _add_noise_arguments(parser: argparse.ArgumentParser) -> None:
    count = reader(int, "an integer of at least 1", low=1)
    parser.add_argument(
        "--counts",
        type=read_counts,
        metavar="INTS",
        help="numbers of negatives, with commas between (default: seven, doubling, up to all the classes)",
    )
    parser.add_argument(
        "--batches", type=count, default=16, metavar="INT", help="batches, of a client each (default: 16)"
    )
    parser.add_argument(
        "--draws", type=count, default=4, metavar="INT", help="draws of negatives for each (default: 4)"
    )
    parser.add_argument(
        "--run",
        type=Path,
        metavar="FOLDER",
        help="measure the model of this finished run, on its data (default: a new one)",
    )
    add_config_file(parser)
    add_options(parser)


# Options by which the data or the net would be another than the run's.
_OF_A_RUN = (
    *("method", "similarity"),
    *("data", "data_seed", "task", "holdout", "image_size", "partition", "num_clients", "images_per_client"),
    *(
        "skip_damaged",
        "classes_per_client",
        "dirichlet_alpha",
        "glyph_classes",
        "glyph_writers",
        "model",
        "embedding_dim",
        "init_checkpoint",
    ),
)


def _noise(arguments: argparse.Namespace) -> int:
    from ..figures import noise

    with mistakes():
        if arguments.run:
            refuse(
                f"{flag(name)}: the model of --run is measured as it was trained, on its own data"
                for name in _OF_A_RUN
                if name in arguments
            )
        there = as_trained(read_config(arguments.run)[0]) if arguments.run else None
        config = config_of(arguments, there.to_dict() if there else {})
        if there:
            refuse(
                f"{arguments.config}: {name} is another than that of --run"
                for name in _OF_A_RUN
                if getattr(config, name) != getattr(there, name)
            )
            refuse_lost(arguments, config)
            if METHODS[config.method].personal:
                raise Mistake(f"--run: expected a run with one model for all, got one of {config.method}")
        if "num_negatives" in arguments:
            print("--num-negatives has no effect: --counts are taken", flush=True)
        if vars(arguments).get("method", "fedss") != "fedss":
            print("--method has no effect on what is measured: that is FedSS' gradient", flush=True)
        out = arguments.out if "out" in arguments else Path("runs") / f"noise-{config.data}"
        model = read_model(arguments.run) if arguments.run else None
        config, data = read_data(config, [config], given=arguments.given)
        if arguments.run:
            check_trained_on(arguments.run, data)
        counts = arguments.counts or noise.default_counts(data.num_classes)
        if max(counts) > data.num_classes:
            raise Mistake(
                f"--counts: expected at most {data.num_classes}, all the classes, got {max(counts)}"
            )
        make_folder(out)
    torch.set_num_threads(config.threads)
    lines, failed = list[noise.Line](), list[str]()

    def on_line(line: noise.Line) -> None:
        lines.append(line)
        print(f"fedss noise: {line.num_negatives} negatives", file=sys.stderr)

    def write() -> int:
        if not all(math.isfinite(line.noise) for line in lines):
            failed.append("the model's gradients are not finite, so their noise is not")
        return write_measured(arguments, out, lambda: noise.write(out, lines, data.num_classes), failed)

    number = {"batches": arguments.batches, "draws": arguments.draws}
    with kept(lines, failed, write):
        noise.measure(config, data, counts, model=model, on_line=on_line, **number)
    return write()


def _add_confusion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs")
    number = reader(int, "an integer of at least 0", low=0)
    parser.add_argument("--client", type=number, default=0, metavar="INT", help="default: 0")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/confusion"), metavar="PATH", help="default: runs/confusion"
    )


def _confusion(arguments: argparse.Namespace) -> int:
    from ..figures import confusion

    found, wrong = [], list[str]()
    for folder in arguments.runs:
        with noted(wrong, client="--client"):
            config = as_trained(read_config(folder)[0])
            refuse_lost(arguments, config, again=False)
            model, own = read_model(folder), read_kept(folder)
            config, data = read_data(config, [])
            check_trained_on(folder, data)
            found.append(confusion.measure(config, data, model, arguments.client, own))
            if found[-1].held != found[0].held:
                raise Mistake(
                    f"client {arguments.client} of {folder} holds other images than that of "
                    f"{arguments.runs[0]}: expected runs on the same data"
                )
    refuse(wrong)
    with mistakes():
        make_folder(arguments.out)
    found = _told_apart(found, arguments.runs)
    for folder, each in zip(arguments.runs, found, strict=True):
        if each.not_finite:
            words = f"images whose embedding is not finite: {each.not_finite:,}; they are taken for nothing"
            print(f"fedss confusion: {folder}: {words}", file=sys.stderr)
        if not math.isfinite(each.cosine):
            words = "class rows that are not finite: nothing is taken for their classes"
            print(f"fedss confusion: {folder}: {words}", file=sys.stderr)
    return write_measured(
        arguments, arguments.out, lambda: confusion.write(arguments.out, found, arguments.client)
    )


def _told_apart(found: Sequence["Confusion"], folders: Sequence[Path]) -> list["Confusion"]:
    """Runs of one method by their folders too."""
    methods = [each.name for each in found]
    return [
        each if methods.count(each.name) == 1 else dataclasses.replace(each, name=f"{each.name} ({place})")
        for each, place in zip(found, places(folders), strict=True)
    ]


def places(folders: Sequence[Path]) -> list[str]:
    """Folders by name, or where that is the same by path."""
    names = [folder.resolve().name for folder in folders]
    return [
        name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)
    ]


def _add_privacy_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clients",
        type=reader(int, "an integer of at least 1", low=1),
        default=100,
        metavar="INT",
        help="clients whose requests are looked at (default: 100)",
    )
    parser.add_argument(
        "--train",
        action="store_true",
        help="train with each kind of negatives, in private, and with all rows, too: for what it costs",
    )
    add_config_file(parser)
    add_options(parser, without=("negatives", "requests"))


def _privacy(arguments: argparse.Namespace) -> int:
    from ..figures import privacy
    from ..reports.progress import RunProgress

    with mistakes():
        config = config_of(arguments)
        out = config.out or Path("runs") / f"privacy-{config.data}"
        config = dataclasses.replace(config, out=None)
        privacy.check(config)
        config, data = read_data(config, [config], lambda: make_folder(out), arguments.given)
    lines, failed = privacy.measure(config, data, clients=arguments.clients), list[str]()

    def write() -> int:
        return write_measured(arguments, out, lambda: privacy.write(out, lines), failed)

    if arguments.train:
        ways = privacy.ways(config)
        with kept(lines, failed, write), RunProgress(list(ways), config.rounds) as progress:
            for job, (name, way) in enumerate(ways.items()):
                progress.start(job)
                words = name if name in privacy.UNLIKE else f"{name} negatives"
                store = way.class_store and way.class_store / name.replace(" ", "-")
                try:
                    with mistakes():
                        result = run(
                            dataclasses.replace(way, class_store=store),
                            data=data,
                            on_round=functools.partial(progress.advance, job),
                            on_tuned=functools.partial(show_tuned, progress, job),
                        )
                except (Mistake, TooFewClients, WorkerLost) as error:  # the others are trained all the same
                    failed.append(f"training with {words} failed: {error}")
                    continue
                top1, map_at_10 = result.summary.top1, result.summary.map_at_10
                for place, line in enumerate(lines):
                    if line.negatives == name:
                        lines[place] = dataclasses.replace(line, top1=top1, map_at_10=map_at_10)
                if result.summary.not_finite_since is not None:
                    failed += [f"{words}: {line}" for line in remarks(result.summary)]
    return write()


def _add_parameters_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=one_of(*MODELS, chosen=family_of),
        default="mobilenet_v3_large",
        metavar="NAME",
        help=f"one of {', '.join(MODELS)} (default: mobilenet_v3_large, the paper's)",
    )
    parser.add_argument(
        "--dims",
        type=read_counts,
        default=[64, 1280],
        metavar="INTS",
        help="embedding sizes (default: 64,1280)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/parameters"), metavar="PATH", help="default: runs/parameters"
    )


def _parameters(arguments: argparse.Namespace) -> int:
    from ..figures import parameters

    with mistakes():
        lines = parameters.measure(arguments.model, arguments.dims)
        make_folder(arguments.out)
    return write_measured(
        arguments, arguments.out, lambda: parameters.write(arguments.out, arguments.model, lines)
    )


NOISE = Command(
    "measure how far FedSS' gradient is from FullSoftmax'",
    ("matplotlib", "rich"),
    _add_noise_arguments,
    _noise,
)


CONFUSION = Command(
    "show what runs take a client's images for, among its own classes",
    ("matplotlib", "rich"),
    _add_confusion_arguments,
    _confusion,
)


PRIVACY = Command(
    "measure what a server learns from a client's requests",
    ("matplotlib", "rich"),
    _add_privacy_arguments,
    _privacy,
)


PARAMETERS = Command(
    "say what share of a model its class matrix is, and what FedSS saves",
    ("matplotlib",),
    _add_parameters_arguments,
    _parameters,
    extra="sim,vision",
    plugins=False,
)
