"""The simulation's rounds, played by the nodes of a network."""

import json
from collections.abc import Mapping

from ..clients.player import Player
from ..disk import write_whole
from ..fedavg_round import Simulation
from ..files.run_folder import RunFolder
from ..messages import Request, Silence
from ..server.tally import Tally
from ..workers import Team
from .network import Network
from .summing import SummingNodes
from .team import Nodes

ROLL = "roll.json"  # in the run's folder: of each client how many images it has


def federation(network: Network) -> type[Simulation]:
    """Those of this one."""

    class Federation(Simulation):
        def _team_of(self, player: Player, workers: int) -> Team:
            nodes = SummingNodes if player.config.shares else Nodes
            return nodes(player, self.watch, network)

        def _play(
            self, round: int, attempt: int, requests: Mapping[int, Request], tally: Tally
        ) -> dict[int, Silence]:
            if not isinstance(self.team, SummingNodes):
                return super()._play(round, attempt, requests, tally)
            if not requests:
                return {}
            rows = self._giving()(*next(iter(requests.items())))
            return self.team.sum(round, attempt, requests, self.server.extractor, rows, tally)

        def checkpoint(self, folder: RunFolder, rounds: int) -> None:
            write_whole(folder.path / ROLL, json.dumps(network.images))
            super().checkpoint(folder, rounds)

    return Federation
