"""The app of a node: the simulator's client, on data that it alone has."""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from .. import secure_sums
from ..clients.common_classes import CommonClasses
from ..clients.player import Player, training_device
from ..config import Config
from ..data import FederatedData
from ..files.checkpoint import PLACES
from ..ledger import WIRE_DTYPES
from ..messages import Update
from ..server.inspection import Inspection
from .keys import CHANGES, CLASSES
from .masks import KEY_BYTES, Integers, marks, stream
from .member import Membership
from .wire import are_ids, message, number_of, update_message, word_of

Data = Callable[[Mapping[str, Any]], tuple[Any, Any]]
PARTITION = "partition-id"
log = logging.getLogger(__name__)
_OF_THE_SERVER = ("out", *PLACES)  # its machine's; the net as it begins is what the server sends


def app(data: Data, model: Callable[[], nn.Module] | None) -> ClientApp:
    """It keeps nothing from one message to the next but the keys of an attempt's secure sums.

    So a node that was started again goes on, with them in the next attempt.
    """
    found = ClientApp()

    def handled(asked: Message, context: Context, answer: Callable[["_Node"], RecordDict]) -> Message:
        try:
            content = answer(_Node(asked.content, context, data, model))
        except ValueError as error:  # what the node's people should put right
            content = _refused(str(error))
        except Exception as error:  # of their functions: anything
            log.exception("this node refuses what the server asks for")
            content = _refused(f"{type(error).__name__}: {error}")
        return Message(content, reply_to=asked)

    queries = _Node.roll, _Node.rows, _Node.keys, _Node.shares, _Node.union, _Node.open
    for answer in queries:
        found.query(answer.__name__)(partial(handled, answer=answer))
    found.train()(partial(handled, answer=_Node.train))
    return found


def _refused(words: str) -> RecordDict:
    return message({"refused": " ".join(words.split())})


class _Node:
    """For one message. Raises ValueError where the node's data or configuration do not fit the run."""

    def __init__(
        self,
        asked: RecordDict,
        context: Context,
        data: Data,
        model: Callable[[], nn.Module] | None,
    ):
        self.asked, self.context, self.model = asked, context, model
        node = context.node_config
        self.nodes, self.classes = self._word("nodes"), self._word("classes")
        self.client: Any = node.get(PARTITION, -1)
        if not isinstance(self.client, int) or not 0 <= self.client < self.nodes:
            raise ValueError(
                f"{PARTITION}: expected a number in [0, {self.nodes}), a node's own, got "
                f"{node.get(PARTITION)!r}: start it with --node-config '{PARTITION}=0'"
            )
        self.device = str(node.get("device", "cpu"))
        self._read = data

    @cached_property
    def data(self) -> FederatedData:
        return self._data(*self._read(self.context.node_config))

    def roll(self) -> RecordDict:
        """Who it is, and how many images it has."""
        shape = json.loads(self._word("shape"))
        if list(self.data.images.shape[1:]) != shape:
            expected = f"images: expected (n, {', '.join(map(str, shape))}), as the server's test images"
            raise ValueError(f"{expected}, got {tuple(self.data.images.shape)}")
        return message({"client": self.client, "images": len(self.data.images)})

    def rows(self) -> RecordDict:
        """Which class rows it asks for."""
        request = self._player().request(self._word("round"), self._word("attempt"), self.client)
        return message({}, {"ids": request.class_ids})

    def train(self) -> RecordDict:
        """Its update, from the net and the rows that came."""
        player, round, attempt = self._player(), self._word("round"), self._word("attempt")
        if player.config.shares:
            player.most_images = self._word("most")
            player.common.told(round, attempt, self._common(player))
        request = player.request(round, attempt, self.client)
        net, rows = self._numbers(player.config, "net"), self._numbers(player.config, "rows")
        if net.shape != player.extractor.flat.shape:
            expected = f"expected the server's net, of {net.numel():,} numbers"
            raise ValueError(f"model: {expected}, got one of {player.extractor.flat.numel():,}")
        with torch.random.fork_rng(devices=[]):
            update = player.update(round, attempt, self.client, request, net, rows)
        player.extractor.check_buffers()
        if player.config.shares:
            return self._summed(player, update)
        return update_message(update, player.config.wire_dtype)

    def keys(self) -> RecordDict:
        """Its public keys in the secure sums of an attempt at a round."""
        return message({"keys": self._membership.keys()})

    def shares(self) -> RecordDict:
        """Its shares for the others."""
        words = (self._word(name) for name in ("clients", "keys", "threshold"))
        return message({"shares": self._membership.shares(*words)})

    def union(self) -> RecordDict:
        """Its classes, behind masks; or whose shares are not what they should be."""
        if unsound := self._membership.join(self._word("from"), self._word("shares")):
            return message({"unsound": unsound})
        player = self._player()
        held = player.client.positives(self.client).numpy()
        # Numbers of chance tell that somebody holds a class, and ones how many do, where that is asked for.
        counted = player.config.min_holders > 1
        numbers = np.ones(len(held), np.int64) if counted else stream(os.urandom(KEY_BYTES), len(held))
        return self._masked(CLASSES, marks(held, self.classes, numbers))

    def open(self) -> RecordDict:
        """Its shares of what others hide in a sum."""
        words = (self._word(name) for name in ("sum", "active", "dropped"))
        return message({"shares": self._membership.open(*words)})

    def _masked(self, number: int, integers: Integers, **words: Any) -> RecordDict:
        hidden = self._membership.masked(number, integers).astype(np.uint32).view(np.int32)
        return message(words, {"masked": torch.from_numpy(hidden)})

    def _summed(self, player: Player, update: Update) -> RecordDict:
        """Its update behind masks; where it is to be left out, why: of that nobody else can judge."""
        config, most = player.config, player.most_images
        size = len(update.extractor)
        looks = Inspection(size, config.row_dim, most, config.max_norm, math.inf, secure_sums.RANGE)
        if fault := looks.look(update, update.class_ids).fault:
            return message({"fault": fault})
        common = player.common.of(self._word("round"), self._word("attempt"))
        kept = ~torch.isin(update.class_ids, common.few(config.min_holders))
        numbers = torch.cat([update.rows[kept].flatten(), update.extractor])
        integers = secure_sums.integers(numbers, update.num_examples / most).numpy()
        return self._masked(CHANGES, integers, images=update.num_examples, loss=update.loss)

    @property
    def _membership(self) -> Membership:
        round, attempt = self._word("round"), self._word("attempt")
        return Membership(self.context.state, self.client, round, attempt)

    def _common(self, player: Player) -> CommonClasses:
        """What the server says of the classes of all."""
        held, few, negatives = (self._ids(name) for name in ("held", "few", "negatives"))
        mine = player.client.positives(self.client)
        if not torch.isin(mine, held).all() or torch.isin(negatives, held).any():
            raise ValueError("held, negatives: expected this node's classes among the first alone")
        enough = player.config.min_holders
        return CommonClasses(held, enough - torch.isin(held, few).long(), negatives, absent=0)

    def _ids(self, name: str) -> Tensor:
        found = number_of(self.asked, name)
        if found is None or not are_ids(found, self.classes):
            raise ValueError(f"{name}: expected ids of classes, ascending")
        return found

    def _word(self, name: str) -> Any:
        found = word_of(self.asked, name)
        if found is None:
            raise ValueError(
                f"{name}: the server's message is without it: is its fedss-kernels another version?"
            )
        return found

    def _numbers(self, config: Config, name: str) -> Tensor:
        found = number_of(self.asked, name)
        if found is None or found.dtype != WIRE_DTYPES[config.wire_dtype]:
            raise ValueError(f"{name}: the server's message is without it")
        return found.to(torch.float32)

    def _data(self, images: Any, labels: Any) -> FederatedData:
        """Its own images, as those of its number among clients of whom nothing is known."""
        of_others = (torch.zeros(1, dtype=torch.int64),) * self.nodes
        made = FederatedData(
            name="own",
            images=images,
            labels=labels,
            clients=of_others,
            client_names=("",) * self.nodes,
            test_images=images,
            test_labels=labels,
            num_classes=self.classes,
            class_names=("",) * self.classes,
            task="classification",
        )
        held = list(of_others)
        held[self.client] = torch.arange(len(made.images))
        return replace(made, clients=tuple(held))

    def _player(self) -> Player:
        values = json.loads(self._word("config"))
        config = Config.from_dict(values | dict.fromkeys(_OF_THE_SERVER) | {"device": self.device})
        torch.set_num_threads(config.threads)
        return Player(config, self.data, self.model() if self.model else None, training_device(config))
