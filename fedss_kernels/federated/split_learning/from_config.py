"""The halves of a run's net, made from its configuration."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clients.player import Player
from ..config import Config, ConfigError
from ..files.half_file import half_of
from ..ledger import over_the_wire
from ..randomness import NO_CLIENT, Purpose, generator
from .client_halves import ClientHalves, unchanged
from .half import Half, cut
from .joint import Joint
from .key_queue import KeyQueue
from .rules import Rules
from .server_half import ServerHalf


def rules_of(config: Config) -> Rules:
    return Rules(
        temperature=config.temperature,
        ema=config.ema,
        momentum=config.server_momentum,
        client_momentum=config.client_momentum,
        weight_decay=config.weight_decay,
        symmetric=config.symmetric,
        client_gradient=config.client_gradient,
        momentum_copies=config.momentum_copies,
        velocities=config.velocities,
        frozen=config.freeze_clients,
        in_turn=config.in_turn,
    )


def joint_of(config: Config, player: Player) -> Joint:
    """Clients in main memory, the server where the player's net is. Raises ConfigError where no cut fits."""
    rules, extractor = rules_of(config), player.extractor
    images = extractor.as_input(player.data.images[:2])
    with torch.no_grad():
        features = extractor.module.eval()(images)
    try:
        first, rest = cut(extractor.module, config.cut)
    except ValueError as error:
        option, _, words = str(error).partition(": ")  # of the cut or the model
        raise ConfigError(option, words) from None
    with torch.no_grad():
        again = rest(first(images))
    if again.shape != features.shape or not torch.allclose(
        again, features, rtol=1e-4, atol=1e-5, equal_nan=True
    ):
        words = "expected a net that is its blocks one after another and its pool, which gives something else"
        raise ConfigError("model", words)
    with_head = nn.Sequential(rest, _head(features.shape[1], config))
    travels = unchanged
    if config.wire_dtype != "float32":
        travels = partial(over_the_wire, dtype=config.wire_dtype)
    clients = ClientHalves(Half(first.to("cpu").train()), rules, travels)
    server = ServerHalf(Half(with_head.train()), _queues(config, player, extractor.device), rules)
    return Joint(clients, server, config.trust_updates, config.max_norm_ratio)


def _head(features: int, config: Config) -> nn.Module:
    """Two layers, as the paper's."""
    rng = generator(config.seed, 0, 0, NO_CLIENT, Purpose.HEAD)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(rng.integers(2**63)))
        first, last = nn.Linear(features, config.key_dim), nn.Linear(config.key_dim, config.key_dim)
    head = nn.Sequential(first, nn.ReLU(), last)
    if half := half_of(config):
        head.load_state_dict(half.head)
    return head


def _queues(config: Config, player: Player, device: torch.device) -> list[KeyQueue]:
    """One, or one for each client, of unit vectors at random."""
    number = len(player.data.clients) if config.private_queues else 1
    if config.queue_size < number:
        expected = f"expected at least {number:,} with private_queues, a key for each client"
        raise ConfigError("queue_size", f"{expected}, got {config.queue_size:,}")
    return [KeyQueue(_noise(config, k, config.queue_size // number).to(device)) for k in range(number)]


def _noise(config: Config, queue: int, keys: int) -> Tensor:  # (M, d)
    rng = generator(config.seed, 0, 0, queue, Purpose.QUEUE)
    return F.normalize(torch.from_numpy(rng.standard_normal((keys, config.key_dim), dtype="float32")), dim=1)
