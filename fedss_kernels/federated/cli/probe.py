"""`fedss probe`: what the features of a finished run's net are worth, block by block."""

import argparse
import sys
import time
from pathlib import Path

import torch

from ..files.run_folder import check_trained_on, make_folder, read_config, read_net
from .command import Command
from .measure import write_measured
from .options import mistakes, read_numbers, reader, refuse_lost
from .output import read_data

_COUNT = reader(int, "an integer of at least 1", low=1)
_POSITIVE = reader(float, "a number greater than 0", low=1e-300)


def _add_probe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    looked_at = parser.add_argument_group("what is looked at")
    looked_at.add_argument(
        "--depths",
        type=read_numbers,
        default=[],
        metavar="INTS",
        help="after how many blocks of the net, with commas between; 0: its stem alone (default: the first, "
        "a quarter, half and all of them)",
    )
    looked_at.add_argument(
        "--labels",
        type=reader(float, "a number greater than 0 and at most 1", low=1e-300, high=1.0),
        default=1.0,
        metavar="NUMBER",
        help="share of the training images of each class whose labels are known (default: 1)",
    )
    looked_at.add_argument(
        "--neighbours", type=_COUNT, default=50, metavar="INT", help="that vote for a class (default: 50)"
    )
    looked_at.add_argument(
        "--temperature",
        type=_POSITIVE,
        default=0.1,
        metavar="NUMBER",
        help="of their votes, e^(cosine / temperature) (default: 0.1)",
    )
    looked_at.add_argument(
        "--seed",
        type=reader(int, "an integer of at least 0", low=0),
        default=0,
        metavar="INT",
        help="of what is drawn: whose labels are known, the order of fine-tuning (default: 0)",
    )
    tuning = parser.add_argument_group("fine-tuning of the blocks and a linear layer")
    tuning.add_argument(
        "--fine-tune",
        type=reader(int, "an integer of at least 0", low=0),
        default=0,
        metavar="INT",
        help="epochs on the same images; the last one counts (default: 0, there is none)",
    )
    tuning.add_argument(
        "--rate", type=_POSITIVE, default=0.03, metavar="NUMBER", help="at first (default: 0.03)"
    )
    tuning.add_argument(
        "--batch-size", type=_COUNT, default=32, metavar="INT", help="images of a step (default: 32)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="folder for table and plot (default: the run's)"
    )


def _probe(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from ..figures import probe
    from ..probes import Probing
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
    with mistakes(), ReadingProgress(Console(stderr=True)) as progress:
        lines = probe.measure(config, data, state, probing, lambda *far: progress(f"{name}: measuring", *far))
    print(f"{name}: {len(lines)} measured in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    return write_measured(arguments, out, lambda: probe.write(out, lines, probing, config, data))


PROBE = Command(
    "measure the features of a run's net block by block: a linear probe, nearest neighbours, fine-tuning",
    ("matplotlib", "rich"),
    _add_probe_arguments,
    _probe,
)
