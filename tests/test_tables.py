"""Tables on terminals of any width: fewer columns, never half numbers."""

import io

import pytest
import rich.console
from fedss_kernels.bench import results
from hypothesis import given
from hypothesis import strategies as st

from fedss_kernels.federated.cli import output
from fedss_kernels.federated.comparisons.table import LEAST
from fedss_kernels.federated.reports.tables import fitting, markdown, read_markdown

HEADER = ["method", "rate", "top-1 (%)", "MAP@10 (%)", "|S_k| (of C)", "MB moved", "saved"]
HEADER += ["MB for classes", "saved of these", "seconds"]
ROWS = [
    ["FedSS, 38 negatives", "0.05", "95.5 ± 0.3", "81.2 ± 10.5", "58.3 (10.8%)", "1,234,567.8", "45.3%"]
    + ["123,456.7", "89.1%", "12345"],
    ["FullSoftmax", "0.05", "95.6 ± 0.4", "81.3 ± 10.6", "540.3 (100.0%)", "11,234,567.8", "0.0%"]
    + ["223,456.7", "0.0%", "22345"],
]


@pytest.fixture
def printed(monkeypatch, capsys):
    """What a function prints on a terminal of so many columns; None: piped."""
    real = rich.console.Console

    def on(width, show) -> str:
        text = io.StringIO()

        def console(**options):
            size = {"width": options.get("width", width or 80)}
            return real(file=text, force_terminal=width is not None, color_system=None, **size)

        monkeypatch.setattr(rich.console, "Console", console)
        show()
        return text.getvalue() + capsys.readouterr().out

    return on


def check(text: str, width: int, header, rows) -> None:
    """No line is broken, and each column is shown in whole cells or named as left out."""
    body, _, words = text.partition("no room for: ")
    left_out = " ".join(words.split()).split(", ")
    assert "…" not in text and max(map(len, body.splitlines())) <= width
    for i in range(1, len(header)):
        shown = all(row[i] in body for row in rows)
        assert shown != (header[i].replace("\n", " ") in left_out), header[i]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_a_comparison_has_as_many_columns_as_there_is_room_for(width, printed):
    text = printed(width, lambda: output.print_table(HEADER, ROWS, LEAST))
    check(text, width, HEADER, ROWS)
    assert "95.5 ± 0.3" in text and ("no room" in text) == (width < 200)
    assert "MAP@10" in text.partition("no room")[0] or width == 40


@pytest.mark.parametrize("width", [40, 80, 200])
def test_so_do_the_tables_that_are_markdown_in_a_file(width, printed):
    text = printed(width, lambda: output.print_markdown(markdown(HEADER, ROWS)))
    if width < 200:
        check(text, width, HEADER, ROWS)
    else:
        assert text == markdown(HEADER, ROWS)


@pytest.mark.parametrize("name", ["FedSS [sticky]", "FedSS [/2]", "a :smile: b", r"\[x]"])
@pytest.mark.parametrize("width", [None, 40])
def test_names_are_as_they_were_given(name, width, printed):
    """None of what is markup to rich, or stands for an emoji there, is so in a name or a title."""
    for header in (["method", "top-1"], [name, "top-1"]):
        text = printed(width, lambda header=header: output.print_table(header, [[name, "1.0"]]))
        assert text.count(name) == header.count(name) + 1
    wide = [name, "1.0", "2" * 40]
    text = printed(width, lambda: output.print_markdown(markdown(["method", "a", "b"], [wide])))
    assert name in text
    table = results.Table(name, [name, "ms"], [results.Group(name, [[name, "1.0"]])], [name])
    text = printed(width, lambda: results.print_table(table, name))
    assert text.count(name) == 6


def test_columns_that_could_go_first_need_not_be_there(printed):
    """As in a comparison of methods without class rows."""
    text = printed(40, lambda: output.print_table(["method", "accuracy"], [["SimCLR", "1.0"]], LEAST))
    assert "SimCLR" in text and "no room" not in text


def test_what_is_piped_is_whole(printed):
    wide = [*HEADER, *[f"column{i}" * 5 for i in range(5)]]
    rows = [[*row, *"12345"] for row in ROWS]
    text = printed(None, lambda: output.print_table(wide, rows))
    assert "no room" not in text and all(cell in text for row in rows for cell in row)
    assert printed(None, lambda: output.print_markdown(markdown(wide, rows))).endswith(markdown(wide, rows))


@pytest.mark.parametrize("width", [40, 60, 80])
def test_benchmarks_too(width, printed):
    header = ["shape", "ours\nms", "eager ms", "speed\nup", "memory", "peak MB", "note of it"]
    rows = [["32x100x64x11318", "1.2345", "12.3456", "10.00x", "123,123", "4,567.8", "none"]]
    table = results.Table("Loss", header, [results.Group("forward, of float32", rows)], [])
    text = printed(width, lambda: results.print_table(table, "machine"))
    check(text, width, header, rows)


@given(st.lists(st.lists(st.text(st.sampled_from("a1| \\"), min_size=1), min_size=2, max_size=2), min_size=2))
def test_markdown_is_read_as_it_was_written(lines):
    lines = [[cell.strip().replace("\\", "") or "x" for cell in line] for line in lines]
    header, *rows = lines
    assert read_markdown(markdown(header, rows)) == (header, rows)


def test_the_first_two_columns_stay_unless_they_are_the_least():
    assert fitting([5, 5, 5, 5], 12) == [0, 1]
    assert fitting([5, 5, 5, 5], 1) == [0, 1]
    assert fitting([5, 5, 5, 5], 15, [1]) == [0, 2, 3]
