"""A Flower network without processes: its nodes are in this one, and their answers can be spoilt."""

from collections.abc import Callable, Iterable
from itertools import count

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

Spoil = Callable[[str, Message], "Message | Error | None"]


class LocalGrid:
    """What a server's app uses of flwr.serverapp.Grid."""

    def __init__(self, app: ClientApp, node_configs: dict[int, dict]):
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 0  # as Flower sets them
        self.app, self.nodes = app, dict(node_configs)  # Flower's id -> the node's configuration
        self.spoil: dict[int, Spoil] = {}  # Flower's id -> what becomes of its answers
        self.sent: list[tuple[int, str]] = []
        self._replies: dict[str, tuple[int, Message]] = {}
        self.states: dict[int, RecordDict] = {}  # Flower's id -> what is kept for the node
        self._numbers = count()

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Those that were taken alone, as in Flower's simulation engine."""
        return [name for message in messages if (name := self._push(message))]

    def _push(self, message: Message) -> str | None:
        node = message.metadata.dst_node_id
        if node not in self.nodes:
            return None
        name = f"message {next(self._numbers)}"
        message.metadata.__dict__["_message_id"] = name
        self.sent.append((node, message.metadata.message_type))
        context = Context(0, node, self.nodes[node], self.states.setdefault(node, RecordDict()), {})
        reply = self.app(message, context)
        if node in self.spoil:
            reply = self.spoil[node](message.metadata.message_type, reply)
        if isinstance(reply, Error):
            reply = Message(reply, reply_to=message)
        if reply is not None:
            self._replies[name] = node, reply
        return name

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        there = [name for name in reversed(list(message_ids)) if name in self._replies]  # in no order of ours
        return [self._replies.pop(name)[1] for name in there]
