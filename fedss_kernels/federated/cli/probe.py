"""`fedss probe`: what the features of finished runs' nets are worth, block by block."""

import argparse
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..config import Config
from ..data import FederatedData
from ..files.run_folder import as_trained, check_trained_on, make_folder, read_config, read_net
from ..probes import Line, Probing
from .command import Command
from .measure import kept, write_measured
from .options import Mistake, mistakes, noted, read_numbers, reader, refuse, refuse_lost, say_idle
from .output import read_data
from .several_runs import by_label, finished_runs, say_differences, titles

_COUNT = reader(int, "an integer of at least 1", low=1)
_POSITIVE = reader(float, "a number greater than 0", low=1e-300)
_USUAL = Probing()
# what the net at random depends on, and the seed: it is measured once where runs have it in common
OF_THE_NET = ("model", "embedding_dim", "bottleneck", "cut", "crop_size")


def _add_probe_arguments(parser: argparse.ArgumentParser) -> None:
    words = (
        "folder of a finished run; of several, or a comparison's, on the same data, means over seeds are told"
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=words)
    _add_looked_at(parser.add_argument_group("what is looked at"))
    _add_fine_tuning(parser.add_argument_group("fine-tuning of the blocks and a linear layer"))
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="folder for table and plot (default: the first RUN)"
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
    from ..figures import by_depth, probe

    out, wrong, lost = arguments.out or arguments.runs[0], list[str](), list[str]()
    nets = _nets(arguments, wrong, lost)
    configs = {folder: config for folder, (config, _) in nets.items()}
    called, twice = titles(configs, by_label(configs))
    refuse([*wrong, *twice])
    if not nets:
        refuse(lost)
    first = next(iter(configs.values()))
    with mistakes():
        make_folder(out)
        _, data = read_data(as_trained(first), [])
        for folder in nets:
            check_trained_on(folder, data)
    _say_idle(arguments, data.task)
    say_differences("probe", configs)
    torch.set_num_threads(first.threads)
    probing = _probing(arguments)
    if len(nets) + len(lost) == 1:
        ((folder, net),) = nets.items()
        lines = _measured(folder, *net, data, probing)
        return write_measured(arguments, out, lambda: probe.write(out, lines, probing, net[0], data))
    probed, drawn = list[by_depth.Probed](), set[tuple[object, ...]]()

    def write() -> int:
        return write_measured(arguments, out, lambda: by_depth.write(out, probed), lost)

    with kept(probed, lost, write):
        for folder, (config, state) in nets.items():
            net_at_random = (*(getattr(config, name) for name in OF_THE_NET), config.seed)
            with noted(failed := list[str]()):
                lines = _measured(folder, config, state, data, probing, at_random=net_at_random not in drawn)
                at_random = _at_random(config, configs.values())
                probed += by_depth.Probed.of(config, called[folder], lines, at_random)
                drawn.add(net_at_random)
            lost += [_left_out(folder, words) for words in failed]
    if not probed:
        refuse(lost)
    return write()


def _nets(
    arguments: argparse.Namespace, wrong: list[str], lost: list[str]
) -> dict[Path, tuple[Config, dict[str, Tensor]]]:
    """Of each run; a line on a net that is not finite goes to `lost`, on what else is wrong to `wrong`."""
    from ..figures import probe

    found = dict[Path, tuple[Config, dict[str, Tensor]]]()
    for folder in finished_runs("probe", arguments.runs, wrong):
        with noted(wrong):
            config, _ = read_config(folder)
            state = read_net(folder)
            probe.check(config)
            refuse_lost(arguments, as_trained(config), again=False)
            if folder in found:
                raise Mistake(f"{folder}: expected it once")
            with noted(failed := list[str]()):
                probe.check_finite(state)
                found[folder] = config, state
            lost += [_left_out(folder, words) for words in failed]
    return found


def _at_random(config: Config, others: Iterable[Config]) -> str:
    """What its net at random is called, with the options in which those of others differ."""
    from ..figures.probe import RANDOM

    varied = [name for name in OF_THE_NET if len({getattr(each, name) for each in others}) > 1]
    return ", ".join([RANDOM, *(f"{name} {getattr(config, name)}" for name in varied)])


def _left_out(folder: Path, words: str) -> str:
    return f"{folder} is left out: {words}"


def _say_idle(arguments: argparse.Namespace, task: str) -> None:
    """Of options that nothing is measured by."""
    tuned = {"rate": _USUAL.rate, "batch_size": _USUAL.batch_size}
    if task == "retrieval":
        voted = {name: getattr(_USUAL, name) for name in ("labels", "neighbours", "temperature", "seed")}
        say_idle(
            arguments, voted | {"fine_tune": _USUAL.epochs} | tuned, "nothing is trained for a retrieval"
        )
    elif not arguments.fine_tune:
        say_idle(arguments, tuned, "there is no --fine-tune")
        if arguments.labels == 1:
            say_idle(arguments, {"seed": _USUAL.seed}, "all labels are known, and there is no --fine-tune")


def _probing(arguments: argparse.Namespace) -> Probing:
    return Probing(
        depths=tuple(sorted(set(arguments.depths))),
        neighbours=arguments.neighbours,
        temperature=arguments.temperature,
        labels=arguments.labels,
        epochs=arguments.fine_tune,
        rate=arguments.rate,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )


def _measured(
    folder: Path,
    config: Config,
    state: Mapping[str, Tensor],
    data: FederatedData,
    probing: Probing,
    *,
    at_random: bool = True,
) -> list[Line]:
    from rich.console import Console

    from ..figures import probe
    from ..reports.progress import ReadingProgress

    begun, name = time.perf_counter(), f"fedss probe: {folder}"
    with mistakes(depth="--depths"), ReadingProgress(Console(stderr=True)) as progress:

        def say(*far: int) -> None:
            progress(f"{name}: measuring", *far)

        lines = probe.measure(config, data, state, probing, say, at_random=at_random)
    print(f"{name}: {len(lines)} measured in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    if words := probe.lost(lines):
        print(f"{name}: {words}", file=sys.stderr)
    return lines


PROBE = Command(
    "measure the features of a run's net block by block: a linear probe, nearest neighbours, fine-tuning",
    ("matplotlib", "rich"),
    _add_probe_arguments,
    _probe,
)
