"""`fedss bench`: its reports, and the machine they were measured on."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from . import aggregator, libraries, loss
from .machine import measure_machine
from .report import Plan, Report

REPORTS = {report.name: report for report in (loss.REPORT, aggregator.REPORT, libraries.REPORT)}


def select(subject: str, plan: Plan) -> list[Report]:
    """The reports of one subject or "all". Raises ValueError for a plan that is not theirs."""
    *most, last = REPORTS
    one_of_reports = f"{', '.join(most)} or {last}"
    if subject == "all" and not (plan.shapes is plan.contenders is None):
        raise ValueError(f"--shapes and --contenders: say which they are of, {one_of_reports}")
    reports = list(REPORTS.values()) if subject == "all" else [REPORTS[subject]]
    for report in reports:
        report.check(plan)
    return reports


def bench(reports: Sequence[Report], plan: Plan, out: Path) -> None:
    """Prints every report and writes its files and machine.json to `out`.

    Raises Mismatch, before anything is timed at a shape, where a result is wrong.
    """
    plan.progress("the machine's own limits")
    machine = measure_machine(plan.seconds)
    (out / "machine.json").write_text(json.dumps(dataclasses.asdict(machine), indent=2) + "\n")
    for report in reports:
        report.produce(plan, machine, out)
