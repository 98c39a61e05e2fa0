"""Time of a round on the server over the number of classes, with clients that do not train.

Sixty-four clients ask for 170 class rows of 64 numbers each and send them back a little changed. What is
timed: class sets, `Server.select`, `aggregate` and `step`, in a process of its own for each number of
classes. In memory every row is stepped before, so that no page is new; in files, which may be larger than
memory, none is, and rounds bring in new pages as they go.
"""

import argparse
import csv
import multiprocessing
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path

import torch

from ..class_sets import draw_class_set
from ..federated.messages import Update
from ..federated.randomness import Purpose, generator, initial_rows
from ..federated.server.class_store import ClassStore
from ..federated.server.row_table import SGD
from ..federated.server.server import Server
from ..plotting import plotting
from .machine import measure_machine
from .results import decimal, mebibytes, milliseconds

CLIENTS, POSITIVES, NEGATIVES, DIM = 64, 20, 150, 64
FILLED_AT_A_TIME = 2**16
STAGES = ("draw", "select", "aggregate", "step")


@dataclass(frozen=True)
class Line:
    """Of one number of classes: medians over rounds, in seconds."""

    classes: int
    store: str  # "memory" or "files"
    round: float
    draw: float  # class sets
    select: float
    aggregate: float
    step: float
    first_round: float
    rounds: int
    peak_bytes: int  # of the process
    file_bytes: int  # on disk


def measure(classes: int, rounds: int, folder: Path | None) -> Line:
    torch.set_num_threads(1)
    server = Server(
        torch.zeros(1),
        classes,
        DIM,
        initial_rows=partial(initial_rows, 0, dim=DIM, scale=0.01),
        optimizer=SGD(lr=1.0, momentum=0.9),
        store=ClassStore.new(folder, classes, DIM) if folder else None,
    )
    if folder is None:
        for first in range(0, classes, FILLED_AT_A_TIME):
            ids = torch.arange(first, min(first + FILLED_AT_A_TIME, classes))
            server.weight.step(ids, torch.full((len(ids), DIM), 1e-3))
    times = [_round(server, classes, round) for round in range(rounds + 1)]
    stages = [statistics.median(stage) for stage in zip(*times[1:], strict=True)]
    return Line(
        classes,
        "memory" if folder is None else "files",
        statistics.median(sum(stages) for stages in times[1:]),
        *stages,
        sum(times[0]),
        rounds,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        0 if folder is None else sum(path.stat().st_blocks * 512 for path in folder.iterdir()),
    )


def _round(server: Server, classes: int, round: int) -> list[float]:
    """Seconds of each stage."""
    spent, updates = dict.fromkeys(STAGES, 0.0), []
    clock = time.perf_counter
    for client in range(CLIENTS):
        start = clock()
        rng = generator(0, round, 0, client, Purpose.NEGATIVES)
        every = classes // POSITIVES
        positives = torch.arange(POSITIVES) * every + client % every
        class_ids = draw_class_set(classes, positives, NEGATIVES, rng).class_ids
        drawn = clock()
        phi, rows = server.select(class_ids)
        selected = clock()
        spent["draw"] += drawn - start
        spent["select"] += selected - drawn
        updates.append(Update(client, class_ids, rows * 0.01, torch.zeros_like(phi), 100, loss=0.0))
    start = clock()
    gradient = server.aggregate(updates)
    aggregated = clock()
    server.step(gradient)
    spent["aggregate"], spent["step"] = aggregated - start, clock() - aggregated
    return list(spent.values())


def measured_apart(classes: int, rounds: int, folder: Path | None) -> Line:
    """`measure`, in a process that did nothing before it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (classes, rounds, folder))


def markdown(lines: Sequence[Line], machine: object) -> str:
    least = min(lines, key=lambda line: line.classes)
    header = [
        "C",
        "store",
        "round ms",
        f"/ C = {least.classes:,}",
        *STAGES,
        "first ms",
        "peak MiB",
        "disk MiB",
    ]
    rows = [
        [
            *(f"{line.classes:,}", line.store, milliseconds(line.round), decimal(line.round / least.round)),
            *(milliseconds(getattr(line, stage)) for stage in STAGES),
            *(milliseconds(line.first_round), mebibytes(line.peak_bytes), mebibytes(line.file_bytes)),
        ]
        for line in lines
    ]
    table = [header, ["---:"] * len(header), *rows]
    shape = f"{CLIENTS} clients x {POSITIVES + NEGATIVES} rows of {DIM}, medians of {lines[0].rounds} rounds"
    return (
        "\n".join([f"{shape} ({machine}):", "", *("| " + " | ".join(cells) + " |" for cells in table)]) + "\n"
    )


@plotting()
def save_plot(path: Path, lines: Sequence[Line]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for store, mark in (("memory", "o"), ("files", "s")):
        points = [(line.classes, line.round * 1e3) for line in lines if line.store == store]
        if points:
            axes.plot(*zip(*points, strict=True), marker=mark, label=f"W in {store}")
    axes.set(xscale="log", xlabel="classes C", ylabel="server's time of a round, ms")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fedss_kernels.bench.server", description=__doc__)
    parser.add_argument("--classes", type=int, nargs="*", default=[10**4, 10**5, 10**6, 10**7], metavar="C")
    parser.add_argument("--in-files", type=int, nargs="*", default=[10**7, 10**8], metavar="C")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument(
        "--store", type=Path, help="where the files go for the while; default: a temporary folder"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench-server"), metavar="DIR")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for classes, in_files in [*((c, False) for c in given.classes), *((c, True) for c in given.in_files)]:
        print(f"bench.server: {classes:,} classes in {'files' if in_files else 'memory'}", file=sys.stderr)
        folder = Path(tempfile.mkdtemp(dir=given.store)) if in_files else None
        try:
            lines.append(measured_apart(classes, given.rounds, folder))
        finally:
            if folder is not None:
                shutil.rmtree(folder)
    text = markdown(lines, measure_machine(0.1))
    (given.out / "server.md").write_text(text, encoding="utf-8")
    with (given.out / "server.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([[field.name for field in fields(Line)], *map(astuple, lines)])
    save_plot(given.out / "server.png", lines)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
