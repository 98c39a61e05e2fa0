"""The nodes of a federation, as the server reaches them: by their own numbers, whatever Flower calls them."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from ..messages import Silence
from .wire import message, word_of

PAUSE = 1.0  # seconds between two looks for answers
GRACE = 60.0  # seconds that Flower keeps a message longer than it is waited for
TOLD = 3  # reasons, of many
log = logging.getLogger(__name__)


class Incomplete(RuntimeError):
    """A federation that cannot begin: nodes are missing, or cannot take part."""


@dataclass
class Network:
    """A node is its partition-id: Flower's own ids are random, and others when a node is started again."""

    grid: Grid
    introduction: Mapping[str, Any]  # what every message says
    timeout: float  # seconds that answers are waited for
    nodes: int
    images: dict[int, int] = field(default_factory=dict)  # of each client that has been there, how many
    refused: list[str] = field(default_factory=list)  # by nodes that cannot take part, in their words
    silent: Counter[str] = field(default_factory=Counter)  # why clients were so in this round, in words
    _failing: dict[int, str] = field(default_factory=dict)  # Flower's id -> why nobody knows who it is
    _asked: set[int] = field(default_factory=set)  # Flower's ids of those who have said who they are
    _node: dict[int, int] = field(default_factory=dict)  # client -> Flower's id

    def there(self) -> dict[int, int]:
        """client -> Flower's id, of all who are there now; those whom nobody knows are asked who they are."""
        now = set(self.grid.get_node_ids())
        new = {node: message(dict(self.introduction)) for node in sorted(now - self._asked)}
        for node, answer in self._exchanged("query.roll", new).items():
            if isinstance(answer, RecordDict):
                self._asked.add(node)
                self._failing.pop(node, None)
                self._enter(node, answer)
            elif self._failing.get(node) != answer:
                self._failing[node] = answer
                log.warning("a node does not say who it is: %s", answer)
        return {client: node for client, node in self._node.items() if node in now}

    def _enter(self, node: int, answer: RecordDict) -> None:
        client, images = word_of(answer, "client"), word_of(answer, "images")
        known = type(client) is int and 0 <= client < self.nodes and type(images) is int and images >= 1
        if not known:
            said = f"it says that it is client {client!r} with {images!r} images"
            self.refused.append(str(word_of(answer, "refused") or said))
            log.warning("a node cannot take part: %s", self.refused[-1])
            return
        if client in self._node:
            log.warning("client %d: another node has its number, and its place from now on", client)
        self._node[client] = node
        self.images.setdefault(client, images)

    def wait_for(self, clients: Collection[int], count: int) -> None:
        """Until so many of them are there, or `timeout` seconds are over."""
        self._until(lambda: len(self.there().keys() & set(clients)) >= count)

    def wait_for_all(self) -> None:
        """Raises Incomplete where one does not come in time, or says that it cannot take part."""
        self._until(lambda: len(self.there()) == self.nodes or bool(self.refused))
        there = self.there()
        missing = ", ".join(str(k) for k in range(self.nodes) if k not in there)
        if missing:
            failing = dict.fromkeys(self._failing.values())
            why = self.refused or [f"missing after {self.timeout:g} s: {missing}", *failing]
            raise Incomplete(f"of {self.nodes} nodes {len(there)} are there: {'; '.join(why)}")

    def _until(self, done: Callable[[], bool]) -> None:
        end = time.monotonic() + self.timeout
        while not done() and time.monotonic() < end:
            time.sleep(PAUSE)

    def exchanged(
        self, kind: str, contents: Mapping[int, RecordDict]
    ) -> tuple[dict[int, RecordDict], dict[int, Silence]]:
        """(what these clients answer, in their order; who does not)"""
        there = self.there()
        sent = {there[k]: content for k, content in contents.items() if k in there}
        came = self._exchanged(kind, sent)
        answers, silent = dict[int, RecordDict](), dict[int, Silence]()
        for k in contents:
            answer = came.get(there[k]) if k in there else "it is not there"
            if isinstance(answer, RecordDict) and (refused := word_of(answer, "refused")):
                answer = f"it refused: {refused}"
            if isinstance(answer, RecordDict):
                answers[k] = answer
                continue
            silent[k] = Silence("late" if answer is None else "dropped")
            why = answer or f"nothing in {self.timeout:g} s"
            self.silent[why] += 1
            log.warning("client %d does not answer: %s", k, why)
        return answers, silent

    def said(self) -> list[str]:
        """Why nodes had no part in a round: the commonest reasons, and those of who never have."""
        silent = [f"{why} ({count:,})" for why, count in self.silent.most_common(TOLD)]
        return [*silent, *(f"a node cannot take part: {why}" for why in dict.fromkeys(self.refused))]

    def _exchanged(self, kind: str, contents: Mapping[int, RecordDict]) -> dict[int, RecordDict | str]:
        """By Flower's id: what came back, or in words why nothing will; those who are late are not in it."""
        if not contents:
            return {}
        sent = [Message(content, node, kind, ttl=self.timeout + GRACE) for node, content in contents.items()]
        taken = set(self.grid.push_messages(sent))  # an engine may leave out the others, or have None there
        waiting = {
            m.metadata.message_id: m.metadata.dst_node_id for m in sent if m.metadata.message_id in taken
        }
        gone = contents.keys() - waiting.values()
        found: dict[int, RecordDict | str] = dict.fromkeys(gone, "it is gone")
        end = time.monotonic() + self.timeout
        while waiting and time.monotonic() < end:
            found |= _taken(self.grid.pull_messages(list(waiting)), waiting)
            if waiting:
                time.sleep(PAUSE)
        return found


def _taken(replies: Iterable[Message], waiting: dict[str, int]) -> dict[int, RecordDict | str]:
    """What came from those who are waited for, who then are no more."""
    found: dict[int, RecordDict | str] = {}
    for reply in replies:
        node = waiting.pop(reply.metadata.reply_to_message_id, None)
        if node is not None:
            reason = f"{reply.error.reason}" if reply.has_error() else ""
            found[node] = " ".join(reason.split()) or "an error" if reply.has_error() else reply.content
    return found
