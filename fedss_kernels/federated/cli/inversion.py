"""`fedss invert` and `harden`: what latents show of images, and a clients' half that shows less."""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..data import DATASETS, RESIZED, FederatedData
from ..data.of_clients import rows_held
from ..defaults import PRESETS
from ..disk import check_room, reason
from ..files.run_folder import as_trained, check_trained_on, make_folder, read_config, read_net
from ..loading import options_of_data
from ..randomness import NO_CLIENT, Purpose, generator
from .command import Command
from .measure import kept, places, write_measured
from .options import (
    Mistake,
    add_config_file,
    add_options,
    as_typed,
    config_of,
    mistakes,
    noted,
    one_of,
    reader,
    refuse,
    refuse_lost,
    say_idle,
)
from .output import read_data, say_what_is_logged

if TYPE_CHECKING:
    from ..figures.inversion import Found, Images
    from ..files.half_file import HalfFile

HALF = "half.safetensors"
SHARE = 0.01  # of the target's images, by default
PRESET = {"method": "mocosfl", "bottleneck": "C4S2", "batch_size": 128}  # by default, of a run's options


def _add_attack_arguments(parser: argparse._ActionsContainer) -> None:
    count = reader(int, "an integer of at least 1", low=1)
    share = reader(float, "a number greater than 0 and at most 1", low=1e-9, high=1)
    for name, kind, default, metavar, words in (
        ("share", share, 0.01, "NUMBER", "of the clients' images, that the attacker has"),
        ("images", count, 128, "INT", "of others, that the attack is tried on"),
        ("epochs", count, 50, "INT", "in which a decoder is trained"),
        ("width", count, 64, "INT", "channels of the decoders"),
    ):
        settings: dict[str, Any] = {"type": kind, "default": default, "metavar": metavar}
        parser.add_argument(f"--attack-{name}", help=f"{words} (default: {default})", **settings)


def _add_invert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished split runs")
    _add_attack_arguments(parser)
    seed = reader(int, "an integer of at least 0", low=0)
    parser.add_argument("--seed", type=seed, default=0, metavar="INT", help="of the attack (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/inversion"), metavar="PATH", help="default: runs/inversion"
    )


_ATTACK = "--attack-share and --attack-images"


def _invert(arguments: argparse.Namespace) -> int:
    from ..figures import inversion

    halves, drawn, wrong = {}, list[inversion.Images](), list[str]()
    for folder, name in zip(arguments.runs, places(arguments.runs), strict=True):
        own = {"images": _ATTACK, "latent": f"latents of {folder}", "--method": f"method of {folder}"}
        with noted(wrong, **own):
            config = as_trained(read_config(folder)[0])
            inversion.check(config)
            refuse_lost(arguments, config, again=False)
            state = read_net(folder)
            config, data = read_data(config, [])
            check_trained_on(folder, data)
            halves[name], prepared = inversion.clients_half(config, data, state)
            drawn.append(_drawn(arguments, data, arguments.seed, prepared))
            if not _same(drawn[-1], drawn[0]):
                first = arguments.runs[0]
                raise Mistake(f"{folder}: expected a run whose clients hold the same images as {first}'s")
            inversion.check_latents(halves[name], drawn[-1])
    refuse(wrong)
    with mistakes():
        make_folder(arguments.out)
    torch.set_num_threads(config.threads)
    _say_few(arguments, drawn[0])
    return _attack(arguments, arguments.out, halves, drawn[0], arguments.seed)


def _drawn(
    arguments: argparse.Namespace, data: FederatedData, seed: int, prepared: Callable[[Tensor], Tensor]
) -> "Images":
    from ..figures.inversion import Images

    share, count = arguments.attack_share, arguments.attack_images
    return Images.drawn(data.images, share, count, seed, prepared, rows_held(data))


def _say_few(arguments: argparse.Namespace, images: "Images") -> None:
    if images.remark:
        words = f"{images.remark}; --attack-share gives it more"
        print(f"fedss {arguments.command}: {words}", file=sys.stderr, flush=True)


def _same(images: "Images", others: "Images") -> bool:
    pairs = (images.own, others.own), (images.others, others.others)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def _attack(
    arguments: argparse.Namespace,
    out: Path,
    halves: Mapping[str, nn.Module],
    images: "Images",
    seed: int,
    note: Callable[["Found"], list[str]] = lambda found: [],  # keeps it elsewhere too; returns what failed
) -> int:
    """Measures, and writes what was found whatever ends it; returns the exit code."""
    from ..figures import inversion

    so_far, failed = list[inversion.Found](), list[str]()

    def say(found: inversion.Found) -> None:
        so_far[:] = [found]
        line = found.lines[-1]
        words = f"{line.half}, {line.attacker}: MSE {line.mse:.4f}, SSIM {line.ssim:.3f}"
        print(f"fedss {arguments.command}: {words}", file=sys.stderr, flush=True)

    def write() -> int:
        (found,) = so_far
        lines = [*_not_finite(found), *note(found), *failed]
        return write_measured(arguments, out, lambda: inversion.write(out, found), lines)

    how = {"epochs": arguments.attack_epochs, "width": arguments.attack_width}
    with kept(so_far, failed, write):
        inversion.measure(halves, images, seed=seed, on_line=say, **how)
    return write()


def _not_finite(found: "Found") -> list[str]:
    """A line for each half of whose latents attackers make numbers that are not finite."""
    halves = dict.fromkeys(line.half for line in found.lines if not math.isfinite(line.mse + line.ssim))
    return [f"{half}: what is made of its latents is not finite" for half in halves]


def _add_harden_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("whom it is trained against")
    number = reader(float, "a number of at least 0", low=0)
    group.add_argument(
        "--strength",
        type=number,
        default=2.0,
        metavar="NUMBER",
        help="what an SSIM over the allowed is multiplied by in the loss (default: 2.0)",
    )
    group.add_argument(
        "--allowed",
        type=reader(float, "an SSIM, from -1 to 1", low=-1, high=1),
        default=0.6,
        metavar="NUMBER",
        help="SSIM of the attacker's images up to which nothing is done (default: 0.6)",
    )
    group = parser.add_argument_group("images like the clients', which are not those of --data")
    group.add_argument(
        "--target",
        type=one_of(*DATASETS),
        metavar="NAME",
        help="the clients' data set, which the attack at the end is tried on (default: none, that of --data)",
    )
    group.add_argument("--target-dir", type=Path, metavar="PATH", help="the folder of its files")
    group.add_argument(
        "--target-share",
        type=reader(float, "a number of at least 0 and less than 1", low=0, high=0.999999),
        default=SHARE,
        metavar="NUMBER",
        help=f"of its images, that the server trains with, too (default: {SHARE})",
    )
    _add_attack_arguments(parser.add_argument_group("the attack at the end"))
    add_config_file(parser)
    add_options(parser, without=_NOT_OF_IT)


_NOT_OF_IT = (
    *("method", "half_checkpoint", "freeze_clients", "private_queues", "in_turn", "sync_period"),
    *("client_gradient", "momentum_copies", "velocities", "workers", "class_store", "eval_every"),
    *("checkpoint_every", "cohort", "min_clients", "dropout_rate"),
)


def _harden(arguments: argparse.Namespace) -> int:
    from ..figures import inversion
    from ..split_learning import hardened

    with mistakes(images=_ATTACK, latent="latents"):
        config = config_of(arguments, PRESET)
        inversion.check(config)
        out = config.out or Path("runs") / f"harden-{config.data}"
        if (out / HALF).exists() and not config.overwrite:
            raise Mistake(f"{out / HALF} is there: choose another folder, or replace it with --overwrite")
        config = dataclasses.replace(
            config,
            out=None,
            half_checkpoint=None,
            freeze_clients=False,
            cohort=1,  # all in one place
        )
        if not arguments.target:
            say_idle(arguments, {"target_dir": None, "target_share": SHARE}, "--target is not given")
        config, source = read_data(config, [config], lambda: make_folder(out), arguments.given)
        target = _target(arguments, config, source) if arguments.target else None
        known = source.images[:0] if target is None else _known(arguments, config, target)
        clients = source if target is None else target
        half, prepared = inversion.clients_half(config, clients)
        images = _drawn(arguments, clients, config.seed, prepared)
        inversion.check_latents(half, images)

    torch.set_num_threads(config.threads)
    _say_few(arguments, images)
    say_what_is_logged(arguments.command, hardened)
    try:
        made = _trained(arguments, config, source, known, out)
        made.write(out / HALF)  # before the attack, which takes its time
    except hardened.Diverged as error:
        print(f"fedss harden: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"fedss harden: {reason(error)}; nothing of this training is saved", file=sys.stderr)
        return 1
    half, _ = inversion.clients_half(config, clients, made.net)

    def note(found: inversion.Found) -> list[str]:
        print(f"the halves, for a run's --half-checkpoint: {out / HALF}")
        attack = [dataclasses.asdict(line) for line in found.lines]
        try:
            dataclasses.replace(made, made={**made.made, "attack": attack}).write(out / HALF)
        except OSError as error:
            return [f"{out / HALF} is there, without what the attack found: {reason(error)}"]
        return []

    return _attack(arguments, out, {out.resolve().name: half}, images, config.seed, note)


def _trained(
    arguments: argparse.Namespace, config: Config, source: FederatedData, known: Tensor, out: Path
) -> "HalfFile":
    """Raises OSError before the training where the folder has no room for the halves, and Diverged."""
    from ..split_learning.hardened import harden
    from ..split_learning.resistance import Resistance

    def say(epoch: int, loss: float, seen: float) -> None:
        words = f"epoch {epoch + 1} of {config.rounds}: loss {loss:.2f}, the attacker's SSIM {seen:.3f}"
        print(f"fedss harden: {words}", file=sys.stderr, flush=True)

    def reserve(drawn: "HalfFile") -> None:
        check_room(out, len(drawn.content))

    resistance = Resistance(arguments.strength, arguments.allowed)
    how = {"width": arguments.attack_width, "on_begin": reserve, "on_epoch": say}
    try:
        return harden(config, source, known, resistance, **how)
    except ValueError as error:  # of a target of other images
        raise Mistake(as_typed(error)) from None


def _target(arguments: argparse.Namespace, config: Config, source: FederatedData) -> FederatedData:
    """The clients' data set, of images as large as the source's; options not given are its defaults."""
    unsaid = ({*options_of_data()} & {*PRESETS[arguments.target]}) - {*arguments.given}
    options: dict[str, Any] = dict.fromkeys(unsaid)
    options["image_size"] = source.images.shape[-1] if arguments.target in RESIZED else 0
    options |= {"data": arguments.target, "data_dir": arguments.target_dir}
    try:
        return read_data(dataclasses.replace(config, **options), [])[1]
    except (ValueError, OSError) as error:  # the same options may fit the source
        words = as_typed(error, **{"--data-dir": "--target-dir"})
        raise Mistake(f"of --target {arguments.target}: {words}") from None


def _known(arguments: argparse.Namespace, config: Config, target: FederatedData) -> Tensor:
    rng = generator(config.seed, 1, 0, NO_CLIENT, Purpose.HARDEN)
    held = rows_held(target)
    count = round(arguments.target_share * len(held))
    return target.images[held[torch.from_numpy(rng.permutation(len(held))[:count])]]


INVERT = Command(
    "measure what an attacker makes of what clients of split runs send",
    ("matplotlib", "rich"),
    _add_invert_arguments,
    _invert,
)


HARDEN = Command(
    "train halves of a net of which the clients' resists inversion, for --half-checkpoint",
    ("matplotlib", "rich", "safetensors"),
    _add_harden_arguments,
    _harden,
)
