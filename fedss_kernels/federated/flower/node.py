"""The app of a node: the simulator's client, on data that it alone has."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from ..clients.player import Player, training_device
from ..config import Config
from ..data import FederatedData
from ..ledger import WIRE_DTYPES
from .wire import message, number_of, update_message, word_of

Data = Callable[[Mapping[str, Any]], tuple[Any, Any]]
PARTITION = "partition-id"
# Of the server's machine; the net as it begins is what the server sends.
_PLACES = ("data_dir", "cache_dir", "out", "class_store", "init_checkpoint", "half_checkpoint")


def app(data: Data, model: Callable[[], nn.Module] | None) -> ClientApp:
    """It keeps nothing from one message to the next: a node that was started again goes on."""
    found = ClientApp()

    def handled(asked: Message, context: Context, answer: Callable[["_Node"], RecordDict]) -> Message:
        try:
            content = answer(_Node(asked.content, context.node_config, data, model))
        except ValueError as error:  # what the node's people should put right
            content = message({"refused": " ".join(str(error).split())})
        return Message(content, reply_to=asked)

    @found.query("roll")
    def roll(asked: Message, context: Context) -> Message:
        return handled(asked, context, _Node.roll)

    @found.query("rows")
    def rows(asked: Message, context: Context) -> Message:
        return handled(asked, context, _Node.rows)

    @found.train()
    def train(asked: Message, context: Context) -> Message:
        return handled(asked, context, _Node.train)

    return found


class _Node:
    """For one message. Raises ValueError where the node's data or configuration do not fit the run."""

    def __init__(
        self,
        asked: RecordDict,
        node: Mapping[str, Any],
        data: Data,
        model: Callable[[], nn.Module] | None,
    ):
        self.asked, self.model = asked, model
        self.nodes, self.classes = self._word("nodes"), self._word("classes")
        self.client = node.get(PARTITION, -1)
        if not isinstance(self.client, int) or not 0 <= self.client < self.nodes:
            raise ValueError(
                f"{PARTITION}: expected a number in [0, {self.nodes}), a node's own, got "
                f"{node.get(PARTITION)!r}: start it with --node-config '{PARTITION}=0'"
            )
        self.device = str(node.get("device", "cpu"))
        self.data = self._data(*data(node))

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
        request = player.request(round, attempt, self.client)
        net, rows = self._numbers(player.config, "net"), self._numbers(player.config, "rows")
        with torch.random.fork_rng(devices=[]):
            update = player.update(round, attempt, self.client, request, net, rows)
        player.extractor.check_buffers()
        return update_message(update, player.config.wire_dtype)

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
        config = Config.from_dict(values | dict.fromkeys(_PLACES) | {"device": self.device})
        torch.set_num_threads(config.threads)
        return Player(config, self.data, self.model() if self.model else None, training_device(config))
