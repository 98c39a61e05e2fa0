"""`fedss probe`: what the features of a finished run's net are worth, block by block."""

import argparse
import sys
import time
from pathlib import Path

import torch

from ..files.run_folder import check_trained_on, make_folder, read_config, read_net
from ..probes import Probing
from .command import Command
from .measure import write_measured
from .options import mistakes, read_numbers, reader, refuse_lost
from .output import read_data

_COUNT = reader(int, "an integer of at least 1", low=1)
_POSITIVE = reader(float, "a number greater than 0", low=1e-300)
_USUAL = Probing()


def _add_probe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    _add_looked_at(parser.add_argument_group("what is looked at"))
    _add_fine_tuning(parser.add_argument_group("fine-tuning of the blocks and a linear layer"))
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="folder for table and plot (default: the run's)"
    )


def _add_looked_at(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--depths",
        type=read_numbers,
        default=[],
        metavar="INTS",
        help="after how many blocks of the net, with commas between; 0: its stem alone (default: the first, "
        "a quarter, half and all of them)",
    )
    group.add_argument(
        "--labels",
        type=reader(float, "a number greater than 0 and at most 1", low=1e-300, high=1.0),
        default=_USUAL.labels,
        metavar="NUMBER",
        help="share of the training images of each class whose labels are known (default: all)",
    )
    group.add_argument(
        "--neighbours",
        type=_COUNT,
        default=_USUAL.neighbours,
        metavar="INT",
        help=f"that vote for a class (default: {_USUAL.neighbours})",
    )
    group.add_argument(
        "--temperature",
        type=_POSITIVE,
        default=_USUAL.temperature,
        metavar="NUMBER",
        help=f"of their votes, e^(cosine / temperature) (default: {_USUAL.temperature})",
    )
    group.add_argument(
        "--seed",
        type=reader(int, "an integer of at least 0", low=0),
        default=_USUAL.seed,
        metavar="INT",
        help=f"of what is drawn: whose labels are known, the order of fine-tuning (default: {_USUAL.seed})",
    )


def _add_fine_tuning(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--fine-tune",
        type=reader(int, "an integer of at least 0", low=0),
        default=_USUAL.epochs,
        metavar="INT",
        help="epochs on the same images; the last one counts (default: there is none)",
    )
    group.add_argument(
        "--rate",
        type=_POSITIVE,
        default=_USUAL.rate,
        metavar="NUMBER",
        help=f"at first (default: {_USUAL.rate})",
    )
    group.add_argument(
        "--batch-size",
        type=_COUNT,
        default=_USUAL.batch_size,
        metavar="INT",
        help=f"images of a step (default: {_USUAL.batch_size})",
    )


def _probe(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from ..figures import probe
    from ..reports.progress import ReadingProgress

    folder, out = arguments.run, arguments.out or arguments.run
    with mistakes():
        config, _ = read_config(folder)
        probe.check(config, state := read_net(folder))
        refuse_lost(arguments, config, "start this there")
        make_folder(out)
        _, data = read_data(config, [])
        check_trained_on(folder, data)
    torch.set_num_threads(config.threads)
    probing = Probing(
        depths=tuple(sorted(set(arguments.depths))),
        neighbours=arguments.neighbours,
        temperature=arguments.temperature,
        labels=arguments.labels,
        epochs=arguments.fine_tune,
        rate=arguments.rate,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )
    begun, name = time.perf_counter(), f"fedss probe: {folder}"
    with mistakes(depth="--depths"), ReadingProgress(Console(stderr=True)) as progress:
        lines = probe.measure(config, data, state, probing, lambda *far: progress(f"{name}: measuring", *far))
    print(f"{name}: {len(lines)} measured in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    return write_measured(arguments, out, lambda: probe.write(out, lines, probing, config, data))


PROBE = Command(
    "measure the features of a run's net block by block: a linear probe, nearest neighbours, fine-tuning",
    ("matplotlib", "rich"),
    _add_probe_arguments,
    _probe,
)
