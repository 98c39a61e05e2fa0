"""A round's clients as nodes of a network. All else of the round is the simulation's."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..algorithms.parts import Part
from ..clients.player import Player
from ..ledger import WIRE_DTYPES
from ..messages import Request, Silence, Update
from ..stopwatch import Stopwatch
from ..workers import Team
from .network import Network
from .wire import are_ids, message, number_of, update_of

_NONE = torch.empty(0, dtype=torch.int64)


class Nodes(Team):
    """Asks each node for what the simulator's player would say in its place."""

    repeats: ClassVar[bool] = False  # it would be a round's time again, and who answered may be gone

    def __init__(self, player: Player, watch: Stopwatch, network: Network):
        super().__init__(player, 1, watch)
        self.network = network

    def requests(
        self, round: int, attempt: int, clients: Sequence[int]
    ) -> tuple[dict[int, Request], dict[int, Silence]]:
        """Nobody is asked where all clients use the same rows, or each draws its own."""
        num_classes = self.player.data.num_classes
        self.network.wait_for(clients, self.player.config.min_clients)
        made_up = self.player.request_of(torch.tensor([0]), _NONE)
        if not made_up.sends_ids:
            unsaid = Request(_NONE, None, torch.empty(0), sends_ids=False)  # of nodes that draw their own
            common = made_up if len(made_up.class_ids) == num_classes else unsaid
            return dict.fromkeys(clients, common), {}
        asked = {k: message(self._words(round, attempt)) for k in clients}
        answers, silent = self.network.exchanged("query.rows", asked)
        found = {}
        for k, answer in answers.items():
            ids = number_of(answer, "ids")
            if ids is None or not len(ids) or not are_ids(ids, num_classes):
                silent[k] = Silence("rejected", "ids")
            else:
                found[k] = Request(ids, None, torch.empty(0))
        return found, silent

    def play(
        self,
        round: int,
        attempt: int,
        requests: Mapping[int, Request],
        phi: Tensor,  # (P,)
        given: Callable[[int, Request], Tensor],  # (client, request) -> its class rows
        take: Callable[[int, Update], None],  # (client, what it sends back)
    ) -> dict[int, Silence]:
        config = self.player.config
        dtype = WIRE_DTYPES[config.wire_dtype]
        words, net = self._words(round, attempt), phi.to(dtype)
        with self.watch("select"):
            sent = {
                k: message(words, {"net": net, "rows": given(k, request).to(dtype)})
                for k, request in requests.items()
            }
        with self.watch("local training"):
            answers, silent = self.network.exchanged("train", sent)
        travel = self.player.method.rows is Part.TRAINED
        for k, answer in answers.items():
            ids = requests[k].class_ids if travel else _NONE
            take(k, update_of(answer, k, ids, config.wire_dtype))
        return silent

    def _words(self, round: int, attempt: int) -> dict[str, int | str]:
        config = json.dumps(self.player.config.to_dict())
        return {**self.network.introduction, "config": config, "round": round, "attempt": attempt}
