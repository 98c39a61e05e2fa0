"""One report for the aggregator: the scatter-add and the momentum step, against copy bandwidth."""

from collections.abc import Iterator, Sequence

from .bench_row_momentum import ROW_MOMENTUM
from .bench_scatter_add import SCATTER_ADD
from .machine import Machine
from .plot import Panel
from .report import Plan, Report
from .results import Figures, Group, Row, Table, decimal, mebibytes, milliseconds, numbers, quotient, share
from .row_operation import RowOperation, Shape

OPERATIONS = {operation.name: operation for operation in (SCATTER_ADD, ROW_MOMENTUM)}

HEADER = ("M, D, C", "contender", "ms", "/ ours", "of copy\nbandwidth", "peak\nMiB")
NOTES = (
    "/ ours: the time divided by that of ours which does the same.",
    "of copy bandwidth: the bytes that must move, 4·M·D "
    + " and ".join(f"{operation.passes} times for {name}" for name, operation in OPERATIONS.items())
    + ", over the time, against a large copy; what fits a cache can be faster than a copy that does not.",
    "peak MiB: what a call adds to its inputs, in a process of its own.",
)


def measure(plan: Plan) -> Iterator[Row]:
    for operation in OPERATIONS.values():
        shapes = operation.shapes[-1:] if plan.quick else operation.shapes
        if plan.shapes:
            given = [Shape(*shape) for shape in plan.shapes]
            shapes = [shape for shape in given if operation.repeats or shape.M <= shape.C]
        names = [name for name in operation.contenders if plan.wants(name)]
        for number, shape in enumerate(shapes, 1):
            plan.progress(f"{operation.name} {number}/{len(shapes)}: {numbers(shape)}")
            yield from operation.measure(shape, names, plan.seconds)


def table(rows: Sequence[Row], machine: Machine) -> Table:
    figures = Figures(rows)
    groups = []
    for name, operation in OPERATIONS.items():
        lines = [_line(figures, operation, row, machine) for row in rows if row.operation == name]
        groups.append(Group(name, lines))
    return Table(REPORT.title, HEADER, groups, [*NOTES, *figures.remarks()])


def _line(figures: Figures, operation: RowOperation, row: Row, machine: Machine) -> list[str]:
    assert row.timing is not None
    contender, seconds = operation.contenders[row.contender], row.timing.median_s
    own = figures.seconds(row.shape, operation.name, row.dtype, contender.ours)
    return [
        numbers(row.shape),
        contender.label,
        milliseconds(seconds),
        decimal(quotient(seconds, own)),
        share(operation.bytes_per_second(row.shape, seconds), machine.copy_bytes),
        mebibytes(row.peak_bytes),
    ]


def panels(rows: Sequence[Row]) -> list[Panel]:
    found = []
    for name, operation in OPERATIONS.items():
        for ours in dict.fromkeys(contender.ours for contender in operation.contenders.values()):
            others = {key: c.label for key, c in operation.contenders.items() if c.ours == ours != key}
            of = [row for row in rows if row.operation == name]
            found.append(Panel(operation.contenders[ours].label, of, ours, others))
    return found


REPORT = Report(
    name="aggregator",
    title="Aggregator, float32",
    axes=Shape._fields,
    contenders=[name for operation in OPERATIONS.values() for name in operation.contenders],
    measure=measure,
    table=table,
    panels=panels,
)
