"""What a federated round costs beyond the training in it, and what more workers gain.

The training alone is a plain loop of PyTorch: the same model, the same fused loss and the same batches, made
before, with torch.optim.SGD. It and the simulator's round take turns, in one process. Then whole runs are
timed with one worker, with two and so on.
"""

import argparse
import copy
import csv
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from ..federated import Config, run
from ..federated.clients.player import Player
from ..federated.cohort import draw_cohort
from ..federated.data import FederatedData
from ..federated.fedavg_round import Simulation
from ..federated.learning_rate import learning_rate
from ..federated.loading import load_data
from ..federated.messages import Request
from ..federated.randomness import Purpose, generator
from ..sampled_softmax import sampled_softmax_loss
from .machine import measure_machine
from .results import decimal, milliseconds

WARM_UP = 5  # rounds


@dataclass(frozen=True)
class Line:
    """Medians over rounds, in seconds."""

    what: str  # "training alone", "in one process", "2 workers" ...
    round: float
    ratio: float  # to the line that it is held against
    rounds: int


class Training:
    """The local steps of a round's clients and nothing else."""

    def __init__(self, simulation: Simulation):
        self.simulation = simulation
        self.model = copy.deepcopy(simulation.player.extractor.module).train()
        for p in self.model.parameters():
            p.data, p.grad = p.data.clone(), None

    def prepare(self, round: int) -> None:
        """Loads phi and makes the batches of the round, which is not timed."""
        simulation, config = self.simulation, self.simulation.config
        flat = simulation.server.extractor
        parameters = list(self.model.parameters())
        for p, values in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.data.copy_(values.view(p.shape))
        cohort = draw_cohort(config.seed, round, 0, len(simulation.data.clients), config.cohort)
        self.lr = learning_rate(config, round)
        self.clients = [self._client(round, k) for k in cohort]

    def _client(self, round: int, k: int) -> tuple[Request, Tensor, list[tuple[Tensor, Tensor]]]:
        """(what it asks for, its class rows, its batches)"""
        simulation = self.simulation
        request = simulation.player.request(round, 0, k)
        data, config = simulation.data, simulation.config
        held = data.clients[k]
        rng = generator(config.seed, round, 0, k, Purpose.BATCHES)
        order = held[torch.from_numpy(rng.permutation(len(held)))]
        target = torch.searchsorted(request.class_ids, data.labels[order])
        size = config.batch_size
        images = simulation.player.extractor.as_input(data.images[order])
        batches = zip(images.split(size), target.split(size), strict=True)
        _, rows = simulation.server.select(request.class_ids)
        return request, rows.clone().requires_grad_(), list(batches)

    def run(self) -> None:
        for request, rows, batches in self.clients:
            optimizer = torch.optim.SGD([*self.model.parameters(), rows], lr=self.lr)
            for images, target in batches:
                optimizer.zero_grad()
                loss = sampled_softmax_loss(
                    self.model(images),
                    rows,
                    target,
                    request.denominator,
                    request.log_expected_count,
                    scale=self.simulation.config.scale,
                )
                loss.backward()
                optimizer.step()
                loss.item()


def overhead(config: Config, data: FederatedData, rounds: int) -> list[Line]:
    """A round beside its training alone, in turns."""
    torch.set_num_threads(config.threads)
    simulation = Simulation(config, Player(config, data))
    training, times = Training(simulation), []
    for round in range(WARM_UP + rounds):
        training.prepare(round)
        start = time.perf_counter()
        training.run()
        between = time.perf_counter()
        simulation.play(round)
        times.append((between - start, time.perf_counter() - between))
    alone, whole = zip(*times[WARM_UP:], strict=True)
    ratio = statistics.median(b / a for a, b in times[WARM_UP:])
    return [
        Line("training alone", statistics.median(alone), 1.0, rounds),
        Line("in one process", statistics.median(whole), ratio, rounds),
    ]


def with_workers(config: Config, data: FederatedData, workers: Sequence[int], rounds: int) -> list[Line]:
    """Whole runs, without their start and evaluations; bits are compared."""
    lines, first = [], None
    for count in workers:
        stamps: list[float] = []
        result = run(
            replace(config, workers=count, rounds=WARM_UP + rounds, eval_every=10**6),
            data=data,
            on_round=lambda metrics, stamps=stamps: stamps.append(time.perf_counter()),
        )
        assert result.weight is not None
        first = first if first is not None else result.weight
        if not torch.equal(first, result.weight):
            raise AssertionError(f"{count} workers give other bits than {workers[0]}")
        timed = stamps[WARM_UP - 1 : -1]  # the last round ends with an evaluation
        seconds = (timed[-1] - timed[0]) / (len(timed) - 1)
        lines.append(Line(f"{count} worker{'s' * (count > 1)}", seconds, 0.0, len(timed) - 1))
    return [replace(line, ratio=lines[0].round / line.round) for line in lines]


def markdown(config: Config, lines: Sequence[Line], machine: object) -> str:
    header = ["", "round ms", "ratio", "of what"]
    of_what = {"training alone": "", "in one process": "time to training alone"}
    rows = [
        [
            line.what,
            milliseconds(line.round),
            decimal(line.ratio),
            of_what.get(line.what, "speed to 1 worker"),
        ]
        for line in lines
    ]
    table = [header, ["---", "---:", "---:", "---"], *rows]
    what = f"{config.data}, {config.method}, {config.cohort} clients a round"
    drawn = "\n".join("| " + " | ".join(cells) + " |" for cells in table)
    return f"{what} ({machine}):\n\n{drawn}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fedss_kernels.bench.rounds", description=__doc__)
    parser.add_argument("--config", type=Path, metavar="FILE", help="a run's config.json; default: glyphs")
    parser.add_argument("--data-dir", type=Path, help="the folder that holds the data set's files")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], metavar="N")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-rounds"), metavar="DIR")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    config = Config.load(given.config) if given.config else Config()
    alone = {"max_shift": 0, "flip": False, "client_momentum": 0.0}  # what the training alone does not do
    config = replace(config, data_dir=given.data_dir or config.data_dir, out=None, **alone)
    data = load_data(config)
    print("bench.rounds: beside the training alone", file=sys.stderr)
    lines = overhead(config, data, given.rounds)
    print(f"bench.rounds: with {given.workers} workers", file=sys.stderr)
    lines += with_workers(config, data, given.workers, given.rounds)
    text = markdown(config, lines, measure_machine(0.1))
    (given.out / "rounds.md").write_text(text, encoding="utf-8")
    with (given.out / "rounds.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([[field.name for field in fields(Line)], *map(astuple, lines)])
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
