"""What a run says of a round: one line of metrics.csv."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..ledger import Traffic, is_flow
from ..measures import MEASURES, Measured, Measures
from . import checkpoint

_BYTES = "bytes_"  # of a column of metrics.csv, before a flow


@dataclass(frozen=True)
class RoundMetrics(Measured):
    """One line of metrics.csv: a column for each measure of the run, None in rounds without an evaluation."""

    round: int  # rounds done, from 1
    loss: float  # mean over the cohort's images of the clients' training loss
    client_lr: float
    measures: Measures  # of the run: no column
    measured: Mapping[str, float | None]  # a column each
    # the round from which on the model has had numbers that are not finite, and no measures
    not_finite_since: int | None = field(default=None, kw_only=True)
    attempts: int  # cohorts drawn, as one in which too few answer is followed by another
    accepted: int  # answers that counted
    dropped: int  # clients that never answered
    late: int  # clients that took longer than the deadline
    rejected: int  # answers that were left out, as something was wrong with them
    discarded: int  # answers that nothing was wrong with, in cohorts of which too few answered
    mean_class_set: float  # mean |S_k| over the clients drawn
    traffic: Traffic  # a column bytes_FLOW for each of its flows
    bytes_so_far: int  # of this and all earlier rounds
    seconds: float  # since the run began, evaluations included

    @classmethod
    def header(cls, measures: Measures, flows: Sequence[str]) -> list[str]:
        """The columns of a run with these."""
        of = {each.name: [each.name] for each in fields(cls)}
        of |= {"measures": [], "measured": [*measures.names], "traffic": [_BYTES + flow for flow in flows]}
        return [column for columns in of.values() for column in columns]

    @property
    def line(self) -> list[object]:
        """Under `header`."""
        of = {each.name: [getattr(self, each.name)] for each in fields(self)}
        of |= {
            "measures": [],
            "measured": [*self.measured.values()],
            "traffic": [*self.traffic.bytes.values()],
        }
        return [value for values in of.values() for value in values]

    @classmethod
    def read(cls, line: Mapping[str, str], measures: Measures) -> "RoundMetrics":
        """Of a table's line. Raises ValueError for a column that this version does not know."""
        own = {each.name for each in fields(cls)} - {"measures", "measured", "traffic"}
        values, measured, moved = dict[str, Any](), dict[str, float | None](), dict[str, int]()
        for column, text in line.items():
            if column in own:
                values[column] = _number(text)
            elif column in MEASURES:
                measured[column] = _number(text)
            elif is_flow(flow := column.removeprefix(_BYTES)):
                moved[flow] = int(text)
            else:
                version = checkpoint.versions()["fedss-kernels"]
                raise ValueError(f"fedss-kernels {version} knows no column {column!r}")
        return cls(measures=measures, measured=measured, traffic=Traffic(moved), **values)


def _number(text: str) -> Any:
    if not text:
        return None
    return int(text) if text.lstrip("-").isdigit() else float(text)
