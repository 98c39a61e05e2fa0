"""The table of a comparison: a line for each case, means over its seeds."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..algorithms import METHODS
from ..disk import write_whole
from ..ledger import KINDS
from ..measures import MEASURES, Measure, Measures, percent
from ..plan import Case
from ..reports.mean_sd import mean_sd
from ..reports.reported_run import MEGABYTE, Run, by_case
from ..reports.tables import markdown, write_csv


@dataclass(frozen=True)
class Line:
    """A case's line in the table, means over its seeds. Bytes are of a whole run, but where they say."""

    method: str
    label: str
    num_negatives: int | None  # where there are several
    client_lr: float
    seeds: int
    measures: Measures  # no column
    measured: Mapping[str, tuple[float | None, float | None]]  # mean and sd, a column each
    class_set: float  # mean |S_k|
    class_set_share: float  # of C
    bytes_per_client_round: float
    bytes_by_kind: Mapping[str, float]  # a column each
    bytes_total: float
    saving: float  # of all bytes, against full_softmax in as many rounds
    class_saving: float  # of what grows with the number of classes alone
    seconds: float

    @property
    def bytes_for_classes(self) -> float:
        return sum(count for kind, count in self.bytes_by_kind.items() if KINDS[kind].by_class)

    def columns(self, measured: Sequence[str], kinds: Sequence[str]) -> dict[str, object]:
        """Of table.csv, where the table has these measures and kinds."""
        found = dict[str, object]()
        for field in dataclasses.fields(self):
            if field.name == "measured":
                for name in measured:
                    found[name], found[f"{name}_sd"] = self.measured.get(name, (None, None))
            elif field.name == "bytes_by_kind":
                found |= {f"bytes_{kind}": self.bytes_by_kind.get(kind, 0.0) for kind in kinds}
            elif field.name != "measures":
                found[field.name] = getattr(self, field.name)
        return found


LEAST = ("seconds", "saved of these", "MB for classes", "rate", "|S_k| (of C)")  # what can be done without


OF_CLASSES = ("|S_k| (of C)", "MB for classes", "saved of these")


def header(table: Sequence[Line]) -> list[str]:
    """Of the columns of `cells`."""
    return [*_cells(table[0], _shown(table), _with_rows(table))]


def _shown(table: Sequence[Line]) -> list[str]:
    """The measures in the table: those of the methods, each once."""
    return list(dict.fromkeys(name for line in table for name in line.measures.shown))


def tabulate(runs: Sequence[Run]) -> list[Line]:
    """One line for each case, in the order of their first run."""
    groups = by_case(runs)
    return [_line(case, group) for case, group in groups.items()]


def _line(case: Case, runs: Sequence[Run]) -> Line:
    summaries = [run.summary for run in runs]
    measures, mean = summaries[0].measures, statistics.fmean
    return Line(
        method=case.method,
        label=case.label,
        num_negatives=case.num_negatives,
        client_lr=runs[0].config.client_lr,
        seeds=len(runs),
        measures=measures,
        measured={
            name: _mean_sd([s.measured.get(name) for s in summaries])
            for name in measures.names
            if MEASURES[name].compared
        },
        class_set=mean(s.mean_class_set for s in summaries),
        class_set_share=mean(s.mean_class_set / s.num_classes for s in summaries),
        bytes_per_client_round=mean(run.summary.traffic.total / run.updates for run in runs),
        bytes_by_kind={
            kind.name: mean(s.traffic.of(kind.name) for s in summaries) for kind in summaries[0].traffic.kinds
        },
        bytes_total=mean(s.traffic.total for s in summaries),
        saving=mean(run.saving for run in runs),
        class_saving=mean(run.class_saving for run in runs),
        seconds=mean(s.seconds for s in summaries),
    )


def _mean_sd(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """None for what was not measured, and for the sd of one value."""
    numbers = [value for value in values if value is not None]
    return mean_sd(numbers) if numbers else (None, None)


def cells(table: Sequence[Line]) -> list[list[str]]:
    """The lines as text, under `header`."""
    shown, with_rows = _shown(table), _with_rows(table)
    return [[*_cells(line, shown, with_rows).values()] for line in table]


def _with_rows(table: Sequence[Line]) -> bool:
    """Whether any of the methods has class rows: else nothing is said of what they cost."""
    return not all(METHODS[line.method].rowless for line in table)


def _cells(line: Line, shown: Sequence[str], with_rows: bool) -> dict[str, str]:
    """By column."""
    found = {
        "method": line.label,
        "rate": f"{line.client_lr:g}",
        **{MEASURES[n].column: _with_sd(MEASURES[n], *line.measured.get(n, (None, None))) for n in shown},
        "|S_k| (of C)": f"{line.class_set:.1f} ({percent(line.class_set_share)})",
        "MB moved": f"{line.bytes_total / MEGABYTE:,.1f}",
        "saved": percent(line.saving),
        "MB for classes": f"{line.bytes_for_classes / MEGABYTE:,.1f}",
        "saved of these": percent(line.class_saving),
        "seconds": f"{line.seconds:.0f}",
    }
    if METHODS[line.method].rowless:
        found |= dict.fromkeys(OF_CLASSES, "–")
    return found if with_rows else {name: cell for name, cell in found.items() if name not in OF_CLASSES}


def _with_sd(measure: Measure, mean: float | None, sd: float | None) -> str:
    if mean is None:
        return "–"
    return measure.figure(mean) if sd is None else f"{measure.figure(mean)} ± {measure.figure(sd)}"


def write_tables(out: Path, table: Sequence[Line]) -> None:
    """table.csv, with shares in [0, 1] and bytes as they are, and table.md, with the text of `cells`."""
    measured = dict.fromkeys(name for line in table for name in line.measured)
    kinds = [kind for kind in KINDS if any(kind in line.bytes_by_kind for line in table)]
    lines = [line.columns([*measured], kinds) for line in table]
    write_csv(out / "table.csv", [[*lines[0]], *([*line.values()] for line in lines)])
    write_whole(out / "table.md", markdown(header(table), cells(table)))
