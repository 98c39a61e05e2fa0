"""A round's clients as nodes whose classes and changes the server sees in secure sums alone."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from flwr.app import RecordDict
from torch import Tensor

from .. import secure_sums
from ..clients.common_classes import CommonClasses
from ..clients.player import Player
from ..messages import Request, Silence, Update
from ..server.inspection import REASONS, Inspection
from ..server.mean import PseudoGradient
from ..server.tally import Tally
from ..stopwatch import Stopwatch
from .keys import CHANGES, CLASSES
from .masks import Integers
from .network import Network
from .sums import SHARES, Numbers, SumLost, Sums, Words, Wrong
from .team import Nodes
from .wire import message, word_of

log = logging.getLogger(__name__)


class SummingNodes(Nodes):
    """By one sum it has the classes of a cohort, and by another its changes."""

    def __init__(self, player: Player, watch: Stopwatch, network: Network):
        super().__init__(player, watch, network)
        self._liars: set[int] = set()  # by whom a sum was lost: they are not asked again

    def requests(
        self, round: int, attempt: int, clients: Sequence[int]
    ) -> tuple[dict[int, Request], dict[int, Silence]]:
        """Of those whose classes are in the class set; of nobody where the sum is lost."""
        config = self.player.config
        self.network.wait_for(clients, config.min_clients)

        def ask(
            kind: str, contents: Mapping[int, tuple[Words, Numbers]]
        ) -> tuple[dict[int, RecordDict], dict[int, Silence]]:
            said = self._words(round, attempt)
            made = {k: message({**said, **words}, numbers) for k, (words, numbers) in contents.items()}
            return self.network.exchanged(kind, made)

        self._sums = sums = Sums(ask, config.min_clients)
        sums.silent |= {k: Silence("rejected", SHARES) for k in clients if k in self._liars}
        try:
            sums.set_up([k for k in clients if k not in self._liars])
            joining = {k: (sums.joining(k), Numbers()) for k in sums.members}
            holding, total = sums.of(CLASSES, "query.union", joining, self.player.data.num_classes)
            common = self._common(total, len(holding), round, attempt)
        except SumLost as lost:
            return {}, self._without(clients, lost)
        self.player.common.told(round, attempt, common)
        return {k: self.player.request(round, attempt, k) for k in holding}, sums.silent

    def _common(self, total: Integers, clients: int, round: int, attempt: int) -> CommonClasses:
        held = torch.from_numpy(total.nonzero()[0])
        holders = torch.ones_like(held)
        if self.player.config.min_holders > 1:
            holders = torch.from_numpy(total)[held]
        if not len(held) or holders.max() > clients:
            raise SumLost("some client's classes are none")
        return CommonClasses(held, holders, self.player.common.others(held, round, attempt), absent=0)

    def sum(
        self,
        round: int,
        attempt: int,
        requests: Mapping[int, Request],
        phi: Tensor,  # (P,)
        rows: Tensor,  # (S, D), of the class set that they have in common
        tally: Tally,
    ) -> dict[int, Silence]:
        """Has them trained, and gives the tally the sum of what they change; who of them is not in it."""
        player, sums = self.player, self._sums
        config, common = player.config, player.common.of(round, attempt)
        few = common.few(config.min_holders)
        words = {"most": player.most_images}
        numbers = {"net": phi, "rows": rows, "held": common.held, "few": few, "negatives": common.negatives}
        assert tally.inspection is not None  # where the server sees sums it looks
        answers = _Answers(tally.inspection, next(iter(requests.values())).class_ids)
        kept = ~torch.isin(answers.class_ids, few)
        size = int(kept.sum()) * config.row_dim + tally.inspection.num_parameters
        try:
            with self.watch("local training"):
                contents = dict.fromkeys(requests, (words, numbers))
                active, total = sums.of(CHANGES, "train", contents, size, answers.look)
            if total.min() < 0 or total.max() > len(active) * secure_sums.LEVELS:
                raise SumLost("some client's changes are no numbers that can be added")
        except SumLost as lost:
            return self._without(requests, lost)
        finally:
            absent = config.cohort - len(requests.keys() - sums.silent.keys())
            player.common.told(round, attempt, replace(common, absent=absent))
        counted = {k: answers.found[k] for k in active}
        tally.take_sum(counted, self._mean(torch.from_numpy(total), counted, answers.class_ids, kept))
        return {k: sums.silent[k] for k in requests if k not in counted}

    def _mean(
        self, total: Tensor, answers: Mapping[int, Update], class_ids: Tensor, kept: Tensor
    ) -> PseudoGradient:
        weight = sum(update.num_examples for update in answers.values()) / self.player.most_images
        mean, dim = secure_sums.mean(total, len(answers), weight), self.player.config.row_dim
        of_rows, extractor = mean.tensor_split([int(kept.sum()) * dim])
        rows = torch.zeros(len(class_ids), dim)
        rows[kept] = of_rows.view(-1, dim)
        return PseudoGradient(class_ids, rows, extractor)

    def _without(self, clients: Collection[int], lost: SumLost) -> dict[int, Silence]:
        """Why each of them has no part in an attempt whose sum is lost."""
        log.warning("a secure sum was lost: %s", lost)
        self._liars |= self._sums.liars
        blamed = dict.fromkeys(self._sums.liars, Silence("rejected", SHARES))
        said = dict.fromkeys(clients, Silence("discarded")) | self._sums.silent | blamed
        return {k: said[k] for k in clients}


class _Answers:
    """What clients say in the clear beside their part in the sum of changes."""

    def __init__(self, inspection: Inspection, class_ids: Tensor):
        self.inspection, self.class_ids = inspection, class_ids
        self.found: dict[int, Update] = {}
        self._rows = torch.zeros(len(class_ids), inspection.embedding_dim)
        self._net = torch.zeros(inspection.num_parameters)

    def look(self, client: int, answer: RecordDict) -> None:
        """Raises Wrong for what is to be left out, by the client's own word or by what it says."""
        images, loss = word_of(answer, "images"), word_of(answer, "loss")
        update = Update(client, self.class_ids, self._rows, self._net, images, loss)
        fault = self.inspection.look(update, self.class_ids).fault
        if (said := word_of(answer, "fault")) is not None:
            fault = said if isinstance(said, str) and said in REASONS else SHARES
        if fault:
            raise Wrong(fault, REASONS[fault])
        self.found[client] = update
