"""What a run is of, besides its settings."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..data import FederatedData
from ..ledger import FLOWS, WORK
from ..measures import BY_TASK, OF_A_STEP, Measures


@dataclass(frozen=True)
class Facts:
    """What a run is of, besides its settings."""

    data: str
    task: str
    num_classes: int  # C
    num_clients: int
    num_train_images: int
    num_test_images: int
    num_parameters: int  # of the extractor
    measures: Measures
    flows: tuple[str, ...]  # what moves in it
    notes: list[str] = field(default_factory=list)  # of the data: what was left out
    num_own_test_images: int | None = None  # those that are a client's, or newcomer's, own; None: unknown

    @classmethod
    def of(
        cls, data: FederatedData, num_parameters: int, measures: Measures, flows: Sequence[str]
    ) -> "Facts":
        images = sum(len(held) for held in data.clients)
        sizes = data.num_classes, len(data.clients), images, len(data.test_images)
        own = sum(len(tested) for _, tested in data.newcomers) or sum(map(len, data.test_clients))
        notes = list(data.notes)
        return cls(data.name, data.task, *sizes, num_parameters, measures, tuple(flows), notes, own)

    @property
    def columns(self) -> tuple[str, ...]:
        """Of its ledger, from the first flow on: with what clients compute where that is measured."""
        return self.flows + WORK * (set(OF_A_STEP) <= set(self.measures.names))

    @property
    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, text: str | bytes) -> "Facts":
        """Of `text`; an earlier version's had neither measures nor flows, as they were always the same."""
        values = json.loads(text)
        listed = values.pop("measures", None)
        measures = Measures.read(listed) if listed else BY_TASK[values["task"]]
        flows = tuple(values.pop("flows", FLOWS["travel"]))
        return cls(measures=measures, flows=flows, **values)
