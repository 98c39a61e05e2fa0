"""What a clients' half that was trained against an attacker hides, and what it costs: TAResSFL on CIFAR-10.

Half of the classes, those of even number, are the source on which the server trains a half before; images of
the others are the clients', of which it has 250. Three halves: as it is, with a bottleneck, and with that and
the penalty on what an attacker in training makes of the latents (Li et al., ICCV 2023). Each is attacked by
three decoders, with 450 images of the clients', on 500 others. Then it is frozen, the server's half goes on
to learn from the clients, and a linear probe says what the features are worth.

The attack's lines are read from hardened.csv where they are, and not measured again.
"""

import argparse
import csv
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

import torch

from ..federated import Config, run
from ..federated.data import FederatedData
from ..federated.disk import write_whole
from ..federated.figures import inversion
from ..federated.loading import load_data
from ..federated.reports.mean_sd import mean_sd
from ..federated.reports.tables import markdown, write_csv
from ..federated.split_learning.hardened import harden
from ..federated.split_learning.resistance import Resistance
from ..plotting import plotting

CLIENTS = 100
KNOWN = 250  # images of the clients' that the server trains with
ATTACK = {"share": 0.018, "count": 500}  # 450 images of 25,000 that the attacker has
PASSES, WIDTH = 40, 24  # of an attacker over them; its channels
ALLOWED = 0.6  # SSIM of the attacker in training
EPOCHS, STEPS = 12, 600


@dataclass(frozen=True)
class Case:
    bottleneck: str | None
    strength: float  # of the penalty
    steps: int = STEPS


CASES = {
    "no bottleneck": Case(None, 0.0, 100),
    "bottleneck alone": Case("C4S1", 0.0),
    "trained against an attacker": Case("C4S1", 2.0),
}


@dataclass(frozen=True)
class Line:
    """Of one half and seed: what one attacker came to, or ("probe") what its features are worth."""

    half: str
    seed: int
    attacker: str
    mse: float | None = None
    ssim: float | None = None
    psnr: float | None = None  # decibels
    probe: float | None = None
    knn: float | None = None


PROBE = "probe"


def parts(data: FederatedData) -> tuple[FederatedData, FederatedData]:
    """(the source, the clients')"""
    return _every_other(data, 0), _every_other(data, 1)


def _every_other(data: FederatedData, odd: int) -> FederatedData:
    keep, tested = ((labels % 2 == odd).nonzero()[:, 0] for labels in (data.labels, data.test_labels))
    return replace(
        data,
        images=data.images[keep],
        labels=data.labels[keep],
        clients=tuple(torch.arange(len(keep)).chunk(CLIENTS)),
        client_names=tuple(map(str, range(CLIENTS))),
        test_images=data.test_images[tested],
        test_labels=data.test_labels[tested],
        test_clients=(),
    )


def config_of(case: Case, seed: int) -> Config:
    """Of the training before: about `case.steps` steps, of 50 images of the source and 50 of the clients'."""
    return Config(
        data="own",
        method="mocosfl",
        model="conv4_ws",
        embedding_dim=128,
        cut=2,
        bottleneck=case.bottleneck,
        smallest_box=0.2,
        queue_size=2000,
        key_dim=128,
        rounds=EPOCHS if case.steps >= EPOCHS else 1,
        round_steps=max(1, case.steps // EPOCHS),
        batch_size=50,
        cohort=1,
        client_lr=0.06,
        seed=seed,
    )


def measure(name: str, seed: int, source: FederatedData, clients: FederatedData, out: Path) -> list[Line]:
    """Trains the half, attacks it, trains on with it frozen. Its file stays in `out`."""
    case = CASES[name]
    config, drawn = config_of(case, seed), torch.Generator().manual_seed(seed + 1)
    known = clients.images[torch.randperm(len(clients.images), generator=drawn)[:KNOWN]]
    half = harden(config, source, known, Resistance(case.strength, ALLOWED), width=WIDTH)
    path = out / f"{name.replace(' ', '-')}-seed{seed}.safetensors"
    half.write(path)
    first, prepared = inversion.clients_half(config, clients, half.net)
    images = inversion.Images.drawn(clients.images, **ATTACK, seed=seed, prepared=prepared)
    found = inversion.measure({name: first}, images, seed=seed, epochs=PASSES, width=WIDTH)
    lines = [Line(e.half, seed, e.attacker, e.mse, e.ssim, e.psnr) for e in found.lines]
    if seed == 0:
        torch.save((found.images, dict(found.pictures)), path.with_suffix(".pt"))
    if case.bottleneck:
        lines.append(_frozen(config, name, clients, path))
    return lines


def _frozen(config: Config, name: str, clients: FederatedData, half: Path) -> Line:
    """The server's half trains on, 600 steps of an image of each client."""
    further = replace(
        config,
        **{
            "rounds": EPOCHS,
            "round_steps": STEPS // EPOCHS,
            "batch_size": 1,
            "cohort": CLIENTS,
            "client_lr": 0.02,
        },
        half_checkpoint=half,
        freeze_clients=True,
        eval_every=EPOCHS,
    )
    measured = run(further, data=clients).summary.measured
    return Line(name, config.seed, PROBE, probe=measured["probe"], knn=measured["knn"])


def table(lines: Sequence[Line]) -> str:
    header = ["the clients' half", "attacker", "MSE", "SSIM", "PSNR", "probe (%)", "kNN (%)"]
    rows, first = list[list[str]](), next(iter(inversion.ATTACKERS))  # in whose row the probe stands
    for half, attacker in dict.fromkeys((e.half, e.attacker) for e in lines if e.attacker != PROBE):
        own = _of(lines, half, attacker)
        row = [half, attacker, _mean(own, "mse", "{:.4f}"), _mean(own, "ssim", "{:.3f}")]
        row.append(_mean(own, "psnr", "{:.1f}"))
        probed = _of(lines, half, PROBE) if attacker == first else []
        row += [_mean(probed, name, "{:.1f}", 100) for name in ("probe", "knn")]
        rows.append(row)
    return markdown(header, rows)


def _of(lines: Sequence[Line], half: str, attacker: str) -> list[Line]:
    """One for each seed: what needs no latents is the same with every half."""
    return list({e.seed: e for e in lines if (e.half, e.attacker) == (half, attacker)}.values())


def _mean(lines: Sequence[Line], name: str, form: str, factor: float = 1) -> str:
    if not lines:
        return "–"
    mean, sd = mean_sd([factor * getattr(e, name) for e in lines])
    return form.format(mean) + ("" if sd is None else f" ± {form.format(sd)}")


def write(out: Path, lines: Sequence[Line]) -> None:
    write_csv(out / "hardened.csv", [[field.name for field in fields(Line)], *map(astuple, lines)])


def read(path: Path) -> list[Line]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    numbers = [field.name for field in fields(Line)][3:]
    return [
        Line(
            row["half"],
            int(row["seed"]),
            row["attacker"],
            **{name: float(row[name]) if row[name] else None for name in numbers},
        )
        for row in rows
    ]


def save_picture(out: Path) -> None:
    """Images of the first seed, and under them what each attacker made of what was sent of them."""
    images, pictures = torch.empty(0), dict[str, torch.Tensor]()
    for name in CASES:
        images, own = torch.load(out / f"{name.replace(' ', '-')}-seed0.pt")
        pictures |= own
    with plotting():
        inversion.plot(inversion.Found([], images, pictures)).savefig(out / "hardened.png", dpi=150)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fedss_kernels.bench.hardened", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="the folder that holds CIFAR-10's files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-hardened"), metavar="DIR")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    data = load_data(Config(data="cifar10", data_dir=given.data_dir, partition="iid"))
    source, clients = parts(data)
    lines = read(given.out / "hardened.csv")
    for seed in given.seeds:
        for name in CASES:
            if any((e.half, e.seed) == (name, seed) for e in lines):
                continue
            lines += measure(name, seed, source, clients, given.out)
            write(given.out, lines)
            print(f"{name}, seed {seed}: measured", flush=True)
    text = table(lines)
    write_whole(given.out / "hardened.md", text)
    if 0 in given.seeds:
        save_picture(given.out)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
