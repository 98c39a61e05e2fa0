"""What is measured of a run's model: on everybody's test images, and on each client's own."""

import statistics
from dataclasses import replace

import torch
from torch import Tensor

from .algorithms import METHODS
from .any_round import OnTuned
from .config import Config, ConfigError
from .data import FederatedData
from .fine_tuning import Tuning, check_measurable, personalise
from .fine_tuning import measures as personal_measures
from .measures import BY_TASK, OF_A_STEP, OF_FEATURES, Measures
from .metrics import retrieval, top1
from .privacy_budget import EPSILON
from .probes.features import depth_of
from .probes.of_a_run import at_the_end, before_training, while_training
from .server.kept_by_clients import Homes
from .server.row_table import RowTable
from .workers import Team

_PERSONAL = {  # a measure of a run -> what fine_tuning calls it
    "initial_top1": "initial",
    "restricted_top1": "restricted",
    "nearest_mean_top1": "nearest_mean",
    "personal_top1": "personalised",
}


def measures_of(config: Config, data: FederatedData) -> Measures:
    """Those of a run, and which is the one it is judged by."""
    measures = _of_accuracy(config, data)
    if not config.noise_multiplier:
        return measures
    name = (EPSILON.name,)
    return replace(
        measures, names=measures.names + name, shown=measures.shown + name, told=measures.told + name
    )


def _of_accuracy(config: Config, data: FederatedData) -> Measures:
    measures = BY_TASK[data.task]
    if METHODS[config.method].contrastive:
        usual, more = OF_FEATURES[data.task], OF_A_STEP if counts_steps(config) else ()
        return replace(usual, names=(*usual.names, *more), shown=(*usual.shown, *more))
    if METHODS[config.method].personal:
        measures = Measures(("own_top1", "not_finite"), "own_top1", ("own_top1",), ("own_top1",))
    if not config.personalise_epochs:
        return measures
    shown = ("initial_top1", "restricted_top1", "personal_top1")
    names = (*measures.names, *_PERSONAL, "personal_not_finite")
    return Measures(names, "personal_top1", shown, shown)


def counts_steps(config: Config) -> bool:
    """Whether what a step takes is that of the net that is measured, without a copy or the server's half."""
    method = METHODS[config.method]
    return method.contrastive and not (method.queued or method.split)


def check_measured(config: Config, data: FederatedData) -> None:
    """Raises ConfigError where what the run is judged by cannot be measured on these data."""
    personal = METHODS[config.method].personal
    if not (personal or config.personalise_epochs):
        return
    option = "method" if personal else "personalise_epochs"
    try:
        check_measurable(data)
    except ValueError as error:
        raise ConfigError(option, str(error).removeprefix("personalise: ")) from None
    if personal and not any(map(len, data.test_clients)) and not config.personalise_epochs:
        raise ConfigError(
            "personalise_epochs",
            f"expected at least 1 with {config.method} and a holdout, as those who are held out have no "
            "model of their own before they fine-tune one, got 0",
        )


class Evaluation:
    """Of the model that a run has at the moment."""

    def __init__(self, config: Config, team: Team):
        self.config, self.team, self.data = config, team, team.player.data

    def shared(
        self, phi: Tensor, weight: RowTable, round: int, *, finite: bool, last: bool
    ) -> dict[str, float | None]:
        """Of one model, that of a round, on all test images.

        In a classification task a retrieval, the dearer and the second thing, is measured in the last round
        only; top-1 of a retrieval task, whose test classes have no rows, never. Of a model that is not finite
        nothing is.
        """
        embeddings, labels = self.team.embed(phi, round), self.data.test_labels
        with self.team.watch("evaluation"):
            found = _not_finite(embeddings)
            if not finite:
                return found
            if self.data.task == "classification":
                found["top1"] = top1(embeddings, weight, labels, similarity=self.config.similarity)
                if not last:
                    return found
            return found | retrieval(embeddings, labels).measured

    def of_features(
        self, phi: Tensor, first: Tensor, round: int, *, finite: bool, last: bool
    ) -> dict[str, float | None]:
        """Of a net without class rows, as far as its blocks are there in a round; `first`: its first phi."""
        if not finite:
            return {}
        player, found = self.team.player, dict[str, float | None]()
        extractor, net = player.extractor, player.extractor.module
        absent = len(extractor.block_sizes) - sum(player.schedule.whole(round).present)
        depth, prepared = depth_of(net) - absent, extractor.as_input
        with self.team.watch("evaluation"):
            extractor.flat.copy_(phi)
            found |= while_training(net, self.data, depth, self.config.seed, prepared)
            if last:
                found |= at_the_end(net, self.data, prepared)
                extractor.flat.copy_(first)
                found |= before_training(net, self.data, prepared)
        return found

    def own(self, phi: Tensor, homes: Homes, round: int, *, finite: bool) -> dict[str, float | None]:
        """Of each client's own model on its own test images: their mean, all clients alike."""
        tested = [(k, rows) for k, rows in enumerate(self.data.test_clients) if len(rows)]
        if not (finite and tested):
            return {}
        at_home = METHODS[self.config.method].alone
        shared = None if at_home else self.team.embed(phi, round)
        embedded, scores = list[Tensor](), list[float]()
        with self.team.watch("evaluation"):
            for k, rows in tested:
                own_phi, weight = homes.model(k)
                embedded.append(self._embedded(own_phi, rows) if shared is None else shared[rows])
                labels = self.data.test_labels[rows]
                scores.append(top1(embedded[-1], weight, labels, similarity=self.config.similarity))
            return _not_finite(torch.cat(embedded)) | {"own_top1": statistics.fmean(scores)}

    def _embedded(self, phi: Tensor | None, rows: Tensor) -> Tensor:
        """Test images by a client's own net."""
        assert phi is not None
        extractor = self.team.player.extractor
        extractor.flat.copy_(phi)
        return extractor.embed(self.data.test_images[rows])

    def personal(
        self, phi: Tensor, weight: RowTable, homes: Homes | None, on_tuned: OnTuned
    ) -> dict[str, float | None]:
        """Of each client's own test images, before and after it fine-tunes the model."""
        config, extractor = self.config, self.team.player.extractor
        tuning = Tuning(config.personalise_part, (config.personalise_epochs,), config.personalise_rate)
        extractor.flat.copy_(phi)
        model, own = (extractor.module, weight[:]), homes.model if homes else None
        with self.team.watch("evaluation"):
            people = personalise(config, self.data, model, tuning, own=own, on_tuned=on_tuned)
        found = personal_measures(people)
        lost = {"personal_not_finite": sum(person.not_finite for person in people)}
        return {**{name: found[there] for name, there in _PERSONAL.items()}, **lost}


def _not_finite(embeddings: Tensor) -> dict[str, float | None]:
    return {"not_finite": int((~embeddings.isfinite().all(dim=1)).sum())}
