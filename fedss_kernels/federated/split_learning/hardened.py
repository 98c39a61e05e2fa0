"""Both halves of a net as a server prepares them, before any client has its own: TAResSFL's pre-training."""

import logging
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ..clients.player import Player, training_device, views_of
from ..clients.views import Views
from ..config import Config
from ..data import FederatedData
from ..data.of_clients import rows_held
from ..files.half_file import HalfFile
from ..learning_rate import learning_rate
from ..randomness import NO_CLIENT, Purpose, generator
from .batches import next_images
from .from_config import joint_of
from .inversion import ResidualDecoder
from .joint import Joint
from .resistance import Hardening, Resistance
from .split_round import ALIKE

log = logging.getLogger(__name__)
HEAD = "1."  # in the names of the server's half


class Diverged(RuntimeError):
    """Numbers that are not finite."""


def harden(
    config: Config,  # of a run with clients that train; its rounds are passes through the source
    source: FederatedData,
    target: Tensor,  # (N, channels, H, W) uint8: images like the clients' that the server has; N may be 0
    resistance: Resistance,
    *,
    model: nn.Module | None = None,
    width: int = 64,  # of the attacker
    on_begin: Callable[[HalfFile], None] = lambda half: None,  # with the halves as they are drawn
    on_epoch: Callable[[int, float, float], None] = lambda epoch, loss, seen: None,
) -> HalfFile:
    """A batch has `batch_size` images of the source, and as many of the target where there are any.

    on_epoch(epoch, mean loss, mean SSIM of the attacker's images) is called after each. Raises ValueError for
    a target of other images, Diverged.
    """
    if len(target) and target.shape[1:] != source.images.shape[1:]:
        shapes = tuple(source.images.shape[1:]), tuple(target.shape[1:])
        raise ValueError(f"target: expected images as the source's, {shapes[0]}, got {shapes[1]}")
    player = Player(config, source, model, training_device(config))
    joint, views = joint_of(config, player), views_of(config, source)
    held = rows_held(source)
    steps = config.round_steps or max(1, len(held) // config.batch_size)
    attacker = _attacker(config, joint, views, source.images[held[:1]], width)
    drawn_from = (source.images, held), (target, torch.arange(len(target)))
    hardening = Hardening(joint, attacker, resistance, config.rounds * steps)
    on_begin(HalfFile(*_states(player, joint), config.to_dict(), {}))
    for epoch in range(config.rounds):
        rng = generator(config.seed, epoch, 0, NO_CLIENT, Purpose.AUGMENTATION)
        torch.manual_seed(_seed(config, epoch, Purpose.MODEL))
        found, lr = np.zeros(2), learning_rate(config, epoch)
        for step in range(epoch * steps, (epoch + 1) * steps):
            pixels = _batch(config, drawn_from, step)
            found += hardening.step(views(pixels, rng), views(pixels, rng), lr)
        loss, seen = (found / steps).tolist()
        on_epoch(epoch, loss, seen)
        if not math.isfinite(loss + seen):
            raise Diverged(f"epoch {epoch + 1}: numbers are not finite: is --client-lr too high?")
    if loss >= ALIKE * (guessing := joint.server.rules.guessing(config.queue_size)):
        log.warning(
            "the loss is %.2f, and would be %.2f if all keys were alike: it has collapsed", loss, guessing
        )
    hardening.end()
    made = {"strength": resistance.strength, "allowed": resistance.allowed, "target_images": len(target)}
    return HalfFile(*_states(player, joint), config.to_dict(), made | {"loss": loss, "attacker_ssim": seen})


def _batch(
    config: Config,
    drawn_from: tuple[tuple[Tensor, Tensor], ...],  # images and rows of them: the source's, the target's
    step: int,
) -> Tensor:
    taken, count, parts = step * config.batch_size, config.batch_size, []
    for who, (images, rows) in enumerate(drawn_from):
        if len(rows):
            parts.append(images[next_images(rows, taken, count, config.seed, who)])
    return torch.cat(parts)


def _attacker(config: Config, joint: Joint, views: Views, image: Tensor, width: int) -> nn.Module:
    half = joint.clients.half
    with torch.no_grad():
        seen = views(image, generator(0, 0, 0, NO_CLIENT, Purpose.AUGMENTATION))
        latent = half(half.initial, seen)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_seed(config, 0, Purpose.HARDEN))
        return ResidualDecoder(latent.shape[1:], seen.shape[1:], width)


def _seed(config: Config, epoch: int, purpose: Purpose) -> int:
    return int(generator(config.seed, epoch, 0, NO_CLIENT, purpose).integers(2**63))


def _states(player: Player, joint: Joint) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the net's, the head's)"""
    extractor, half, clients = player.extractor, joint.server.half, joint.clients.weights
    of_server = len(extractor.flat) - len(clients)  # what follows is the head
    extractor.flat.copy_(torch.cat([clients.to(extractor.device), joint.server.weights[:of_server]]))
    net = {name: value.detach().cpu().clone() for name, value in extractor.module.state_dict().items()}
    parts = zip(half.names, half.shapes, joint.server.weights.cpu().split(half.sizes), strict=True)
    head = {name: part.view(shape).clone() for name, shape, part in parts if name.startswith(HEAD)}
    return net, {name.removeprefix(HEAD): value for name, value in head.items()}
