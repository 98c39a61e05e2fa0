"""`fedss report`: makes a report of what is in a folder."""

import argparse
import sys
from pathlib import Path

from ..files import checkpoint
from ..plan import FILE
from .command import Command
from .options import Mistake, as_typed


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="of a run, finished or stopped, or of a comparison"
    )


def _report(arguments: argparse.Namespace) -> int:
    from ..comparisons.compare import report_again
    from ..files.run_folder import read_run
    from ..reports.page import write_sections
    from ..reports.report import write_run_report
    from ..reports.reported_run import Run

    folder, left_out = arguments.folder, list[str]()
    try:
        if (folder / FILE).exists():
            left_out = report_again(folder)
        elif (folder / "config.json").exists() or checkpoint.exists(folder):
            write_run_report(folder, Run(*read_run(folder)))
        elif any(folder.glob("section-*.html")):
            write_sections(folder)
        else:
            raise Mistake(f"no run, comparison or measurement in {folder}: no config.json, no {FILE}")
    except ValueError as error:  # of what is there; an OSError is of what is written
        raise Mistake(as_typed(error)) from None
    for line in left_out:
        print(f"fedss report: {line}", file=sys.stderr)
    print(f"the report: {folder / 'report.html'}")
    return 0


REPORT = Command(
    "make the report of a run, finished or stopped, or of a comparison again",
    ("matplotlib",),
    _add_report_arguments,
    _report,
)
