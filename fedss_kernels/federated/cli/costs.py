"""`fedss costs`: what a step of layer-wise learning costs a client, stage by stage."""

import argparse
from pathlib import Path

import torch

from ..files.run_folder import make_folder
from ..models import MODELS, build_model, family_of
from .command import Command
from .measure import write_measured
from .options import mistakes, one_of, reader

_COUNT = reader(int, "an integer of at least 1", low=1)


def _add_costs_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=one_of(*MODELS, chosen=family_of),
        default="isotropic",
        metavar="NAME",
        help="one of several blocks, as isotropic and vit, with settings of its own as vit:depth=6,patch=8 "
        "(default: isotropic)",
    )
    parser.add_argument(
        "--embedding-dim", type=_COUNT, default=192, metavar="INT", help="its embedding's size (default: 192)"
    )
    parser.add_argument(
        "--images",
        type=_COUNT,
        default=50,
        metavar="INT",
        help="in a step; two views of an image are two (default: 50)",
    )
    parser.add_argument(
        "--side", type=_COUNT, default=32, metavar="INT", help="pixels of an image's side (default: 32)"
    )
    parser.add_argument(
        "--depth-budget",
        type=reader(int, "an integer of at least 2", low=2),
        metavar="INT",
        help="blocks that a client holds at most, as of layerwise, beside none (default: none alone)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/costs"), metavar="PATH", help="default: runs/costs"
    )


def _costs(arguments: argparse.Namespace) -> int:
    from ..figures import costs

    with mistakes():
        net = build_model(arguments.model, arguments.embedding_dim, seed=0)
        images = torch.rand(arguments.images, 3, arguments.side, arguments.side)
        cases, whole = costs.of_model(net, images, arguments.depth_budget)
        blocks = costs.of_blocks(net, images, arguments.depth_budget)
        make_folder(arguments.out)
    out, model = arguments.out, arguments.model
    return write_measured(
        arguments, out, lambda: costs.write(out, model, arguments.images, cases, whole, blocks)
    )


COSTS = Command(
    "measure what a step costs a client who learns block by block: memory, multiply-adds, traffic",
    ("matplotlib",),
    _add_costs_arguments,
    _costs,
    plugins=False,
)
