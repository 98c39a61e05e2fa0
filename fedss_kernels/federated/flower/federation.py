"""The simulation's rounds, played by the nodes of a network."""

import json
from collections.abc import Mapping, Sequence

from ..any_round import Played
from ..clients.player import Player
from ..disk import write_whole
from ..fedavg_round import HOPELESS_ATTEMPTS, Simulation
from ..files.run_folder import RunFolder
from ..ledger import Entry
from ..messages import Request, Silence
from ..server.inspection import reasons
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

        def play(self, round: int) -> Played:
            network.silent.clear()
            return super().play(round)

        def _hopeless(self, left_out: int, entries: Sequence[Entry]) -> bool:
            """Where nobody answers, or a client has not for a few times, an attempt may take a timeout."""
            silent = bool(network.silent) and _are_silent(entries)
            return silent or super()._hopeless(left_out, entries)

        def _reasons(self, entries: Sequence[Entry]) -> str:
            late = "timeout" if self.config.deadline is None else "timeout or --deadline"
            return "; ".join([reasons(entries, late), *network.said()])

        def checkpoint(self, folder: RunFolder, rounds: int) -> None:
            write_whole(folder.path / ROLL, json.dumps(network.images))
            super().checkpoint(folder, rounds)

    return Federation


def _are_silent(entries: Sequence[Entry]) -> bool:
    """Whether all clients have been in all attempts, or one in the last few that it was drawn for."""
    of_client = dict[int, list[bool]]()
    for entry in entries:
        of_client.setdefault(entry.client, []).append(entry.outcome in ("late", "dropped"))
    last = (times[-HOPELESS_ATTEMPTS:] for times in of_client.values())
    one = any(len(times) == HOPELESS_ATTEMPTS and all(times) for times in last)
    return one or all(all(times) for times in of_client.values())
