"""Memory of a federated round in which every client has every class, beside what no round can do without.

Sixteen clients of 20 images each train a linear net and all of C class rows of 64 numbers. The least is W,
its velocity and three times a client's rows: as they came, as they are trained, and their gradient. What is
measured is the peak of resident memory, in a process of its own, over what it had before the class rows; of
each round by itself, as the first draws them. Memory is given back as by the command `fedss`.
"""

import argparse
import multiprocessing
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from ..federated import Config
from ..federated.clients.player import Player
from ..federated.data import FederatedData
from ..federated.fedavg_round import Simulation
from ..federated.given_back import give_back
from .peak_memory import CLEAR, resident_peak
from .results import decimal, mebibytes

CLIENTS, IMAGES, PIXELS, DIM = 16, 20, 28, 64


def simulation(classes: int) -> Simulation:
    rng = torch.Generator().manual_seed(0)
    count = CLIENTS * IMAGES
    data = FederatedData(
        name="own",
        images=torch.randint(0, 256, (count, 1, PIXELS, PIXELS), generator=rng, dtype=torch.uint8),
        labels=torch.arange(count) % classes,
        clients=tuple(torch.arange(count).split(IMAGES)),
        client_names=tuple(f"client {k}" for k in range(CLIENTS)),
        test_images=torch.zeros(2, 1, PIXELS, PIXELS, dtype=torch.uint8),
        test_labels=torch.arange(2),
        num_classes=classes,
        class_names=tuple(f"class {j}" for j in range(classes)),
        task="classification",
    )
    config = Config(method="full_softmax", cohort=CLIENTS, batch_size=10, embedding_dim=DIM, warmup_rounds=0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS**2, DIM))
    config = replace(config, data="own", model="own")
    return Simulation(config, Player(config, data, net))


def measure(classes: int, rounds: int) -> list[int]:
    """Bytes at the peak of each round."""
    torch.set_num_threads(1)
    give_back()
    warm = simulation(1000)
    for round in range(2):
        warm.play(round)
    run, peaks = simulation(classes), []
    CLEAR.write_text("5")
    before = resident_peak()
    for round in range(rounds):
        CLEAR.write_text("5")
        run.play(round)
        peaks.append(resident_peak() - before)
    return peaks


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fedss_kernels.bench.round_memory", description=__doc__)
    parser.add_argument("--classes", type=int, nargs="*", default=[100_000], metavar="C")
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args(arguments)
    print(
        "| C | round | peak MiB | / W, its velocity and three clients' rows |\n| ---: | ---: | ---: | ---: |"
    )
    for classes in given.classes:
        least = 5 * classes * DIM * 4
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks = pool.apply(measure, (classes, given.rounds))
        for round, peak in enumerate(peaks, 1):
            print(f"| {classes:,} | {round} | {mebibytes(peak)} | {decimal(peak / least)} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
