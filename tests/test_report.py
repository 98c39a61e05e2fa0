"""The report: whole in one file, with the figures in it, and plots that say what they show."""

import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from later import later
from layered_net import layered_net
from matplotlib.figure import Figure
from rich.console import Console
from tiny_federation import tiny_config, tiny_data, tiny_model

from fedss_kernels.federated import Stopped, cli, run
from fedss_kernels.federated.algorithms import METHODS
from fedss_kernels.federated.algorithms.parts import Part
from fedss_kernels.federated.comparisons.table import cells, header, tabulate
from fedss_kernels.federated.data.holdout import held_out
from fedss_kernels.federated.files.round_metrics import RoundMetrics
from fedss_kernels.federated.measures import percent
from fedss_kernels.federated.reports import progress, report
from fedss_kernels.federated.reports.measured import write_figures
from fedss_kernels.federated.reports.parts_in_words import place
from fedss_kernels.federated.reports.plots import (
    DARK,
    LIGHT,
    accuracy_by_bytes,
    accuracy_by_class_set,
    accuracy_by_round,
    plots_with_captions,
)
from fedss_kernels.federated.reports.report import attempt, write_comparison_report, write_run_report
from fedss_kernels.federated.reports.reported_run import Run, course
from fedss_kernels.federated.reports.styles import style, styles
from fedss_kernels.federated.reports.what_was_run import what_was_run

VOID = {"meta", "img", "source", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """Collects a page's text and links, and checks that every element is closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attributes):
        self.links += [
            value for name, value in attributes if name in ("src", "srcset", "href", "action", "data")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def play(method: str, seed: int = 0, **options) -> Run:
    config = tiny_config(method=method, seed=seed, rounds=4, **options)
    model = layered_net() if METHODS[method].by_round else tiny_model()
    result = run(config, data=tiny_data(options.get("task", "classification")), model=model)
    return Run(result.config, result.history, result.summary)


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return [play(method, seed) for method in ("fedss", "full_softmax", "pos_only") for seed in (0, 1)]


def assert_self_contained(html: str, page: Page, links: int = 4) -> None:
    assert len(page.links) == links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "http" not in html and "@import" not in html and "url(" not in html and "<script" not in html


def test_the_report_of_a_run_is_whole_and_has_its_figures(tmp_path, runs):
    write_run_report(tmp_path, runs[0])
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page, summary = Page(html), runs[0].summary
    assert_self_contained(html, page)
    assert f"{100 * summary.top1:.1f}%" in page.text
    assert f"{summary.mean_class_set:.0f} of 7" in page.text
    # In a round a client's rows and ids: |S_k| * (2 * 4 * 4 + 8) bytes, against 7 * 2 * 4 * 4 of FullSoftmax.
    assert f"{100 * (1 - summary.mean_class_set * 40 / 224):.1f}%" in page.text
    for word in ("FedSS", "FullSoftmax", "Glossary", "negatives", "MAP@10", "client_lr", "0.2", "7 classes"):
        assert word in page.text, word
    for name in ("accuracy_by_round.png", "accuracy_by_bytes.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.exhaustive
def test_a_cohort_of_all_clients_is_not_drawn(tmp_path):
    for cohort, words in ((3, "3 clients, drawn at random, download"), (5, "rounds all clients download")):
        write_run_report(tmp_path, play("fedss", cohort=cohort))
        text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
        assert words in text and ("drawn at random, download" in text) == (cohort == 3)


def test_the_report_of_a_comparison_has_the_table_and_what_failed(tmp_path, runs):
    head, table = header(tabulate(runs)), cells(tabulate(runs))
    write_comparison_report(tmp_path, runs, head, table, ["NegOnly, seed 0 failed: <out of memory>"])
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert_self_contained(html, page)
    for cell in (*head, *(cell for row in table for cell in row)):
        assert cell in page.text, cell
    assert "failed: <out of memory>" in page.text and "<out of memory>" not in html  # escaped
    assert "run 2 times" in page.text


def test_what_was_run_is_of_all_the_runs(runs):
    """Methods that have rounds and cohorts of their own, one with a seed that failed."""
    first = next(run for run in runs if run.summary.method == "fedss")
    said = dict(rounds=first.summary.rounds, cohort=first.summary.cohort)
    other = replace(
        first,
        config=replace(first.config, method="full_softmax"),
        summary=replace(first.summary, method="full_softmax", rounds=1_500, cohort=4),
    )
    text = what_was_run([first, replace(first, summary=replace(first.summary, seed=9)), other])
    assert f"In each of {said['rounds']} to 1,500 rounds {said['cohort']} to 4 clients, drawn" in text
    assert "Every method was run 1 to 2 times, with different random numbers" in text
    all_of_them = replace(other, summary=replace(other.summary, cohort=other.summary.num_clients))
    assert "clients, drawn at random, or all of them, download" in what_was_run([first, all_of_them])
    assert "times" not in what_was_run([first, other])


def test_a_retrieval_reports_map(tmp_path):
    write_run_report(tmp_path, retrieved := play("fedss", task="retrieval"))
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert f"{100 * retrieved.summary.map_at_10:.1f}%" in text
    assert "classes that no client holds" in text


@pytest.mark.parametrize("theme", [LIGHT, DARK])
@pytest.mark.parametrize(
    "plot, labels",
    [
        (accuracy_by_round, ["rounds of training"]),
        (
            accuracy_by_bytes,
            ["everything moved so far (MB)", "class rows and ids moved so far (MB, log scale)"],
        ),
    ],
)
def test_plots_say_what_they_show_and_nothing_overlaps(plot, labels, theme, runs):
    figure = plot(runs, theme)
    assert [axes.get_xlabel() for axes in figure.axes] == labels
    assert figure.axes[0].get_ylabel() == "top-1 on the test images (%)"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["FedSS", "FullSoftmax", "PosOnly"]
    assert len({line.get_color() for line in figure.axes[0].lines}) == 3
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes] + [legend.get_window_extent()]
    for i, a in enumerate(boxes):
        assert not any(a.overlaps(b) for b in boxes[:i])


def test_a_curve_is_the_mean_over_seeds_by_what_was_moved(runs):
    figure = accuracy_by_bytes(runs[:2], LIGHT)
    total, classes = (axes.lines[0].get_xydata() for axes in figure.axes)
    evaluated = [[m for m in r.history if m.top1 is not None] for r in runs[:2]]
    assert len(total) == 2  # rounds 2 and 4
    for i, (a, b) in enumerate(zip(*evaluated, strict=True)):
        assert total[i] == pytest.approx(
            [(a.bytes_so_far + b.bytes_so_far) / 2 / 1e6, 50 * (a.top1 + b.top1)]
        )
    # All but phi, which is 148 numbers of 4 bytes, down and up, for 3 clients a round.
    assert total[:, 0] - classes[:, 0] == pytest.approx([2 * 3 * 148 * 8 / 1e6, 4 * 3 * 148 * 8 / 1e6])


def test_by_what_the_classes_cost_are_those_methods_whose_classes_cost_something(runs):
    """The others are at 0, which a logarithm has not; where all are, they are there."""
    frozen = [play(method) for method in ("fedbabu", "fedbabu_ss")]
    left, right = accuracy_by_bytes([*runs, *frozen], LIGHT).axes
    assert (len(left.lines), len(right.lines), right.get_xscale()) == (5, 3, "log")
    left, right = accuracy_by_bytes(frozen, LIGHT).axes
    assert (len(left.lines), len(right.lines), right.get_xscale()) == (2, 2, "linear")


def with_values(run: Run, **values: tuple[float, float]) -> Run:
    """Measured in rounds 2 and 4."""
    history = list(run.history)
    for done, i in ((2, 0), (4, 1)):
        measured = history[done - 1].measured | {name: pair[i] for name, pair in values.items()}
        history[done - 1] = replace(history[done - 1], measured=measured)
    return Run(run.config, history, replace(run.summary, measured=history[-1].measured))


@pytest.mark.parametrize(
    ("values", "bottom"),
    [((0.97, 0.99), 97 - 0.06 * 0.05 * 99), ((0.4, 0.99), 0), ((0.0, 0.0), 0), ((0.99, 0.99), None)],
)
def test_the_axis_holds_all_marks_and_begins_near_the_values_where_all_are_high(values, bottom, runs):
    for plot in (accuracy_by_round, accuracy_by_bytes):
        axes = plot([with_values(runs[0], top1=values)], LIGHT).axes[0]
        least, most = axes.get_ylim()
        assert bottom is None or least == pytest.approx(bottom)
        assert most - 100 * max(values) >= 0.04 * (most - least)  # so is half a mark's height
        assert 100 * min(values) - least >= 0.04 * (most - least) or least == 0
        assert not any(line.get_clip_on() for line in axes.lines)


def test_the_plot_of_one_run_has_what_else_is_told_of_it(runs):
    run = play("fedss", task="retrieval")
    for plot in (accuracy_by_round, accuracy_by_bytes):
        figure = plot([run], LIGHT)
        lines = figure.axes[0].lines
        assert [line.get_label() for line in lines] == ["FedSS, MAP@10", "FedSS, recall@1"]
        shown = [m for m in run.history if m.recall_at_1 is not None]
        assert lines[1].get_ydata().tolist() == pytest.approx([100 * m.recall_at_1 for m in shown])
        assert lines[0].get_linestyle() != lines[1].get_linestyle()
        assert figure.axes[0].get_ylabel() == "MAP@10 and recall@1 on the test images (%)"
    (axes,) = accuracy_by_round([run, play("pos_only", task="retrieval")], LIGHT).axes
    assert [line.get_label() for line in axes.lines] == ["FedSS", "PosOnly"]
    assert axes.get_ylabel() == "MAP@10 on the test images (%)"
    left, _ = accuracy_by_bytes([run, play("centralized", task="retrieval")], LIGHT).axes
    assert [line.get_label() for line in left.lines] == ["FedSS"]


def test_where_nothing_moves_there_is_no_plot_of_it(tmp_path):
    write_run_report(tmp_path, play("fedss"))
    assert (tmp_path / "accuracy_by_bytes.png").exists()
    write_run_report(tmp_path, play("centralized"))
    assert not (tmp_path / "accuracy_by_bytes.png").exists()
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "so there is no plot by what was moved" in page.text and len(page.links) == 2


def test_a_run_in_one_place_speaks_of_no_phones_and_saves_nothing(tmp_path):
    run = play("centralized", batch_size=2)
    there = run.summary.num_train_images
    write_run_report(tmp_path, run)
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "such as phones" not in text and "against FullSoftmax" not in text and "100.0%" not in text
    assert f"as many images as those of 3 clients together. That is 6 of {there}." in text
    assert "without chance" not in text
    write_run_report(tmp_path, play("centralized", batch_size=20))
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert f"That is all {there} of them, so that a step goes down the whole loss, without chance" in text


def test_where_no_method_has_class_rows_there_is_one_panel():
    (axes,) = accuracy_by_bytes([play("simclr")], LIGHT).axes
    assert axes.get_xlabel() == "everything moved so far (MB)" and axes.lines


@pytest.mark.exhaustive
def test_several_numbers_of_negatives_have_a_plot_of_their_own_and_one_line_in_the_others(tmp_path):
    runs = [play("fedss", seed, num_negatives=m) for m in (1, 2, 4) for seed in (0, 1)]
    runs += [play("full_softmax", seed) for seed in (0, 1)]
    figure = accuracy_by_class_set(runs, LIGHT)
    (axes,) = figure.axes
    line, point = axes.containers
    sizes = [sum(run.summary.mean_class_set for run in runs[i : i + 2]) / 2 for i in (0, 2, 4)]
    assert line.lines[0].get_xdata().tolist() == pytest.approx(sizes)
    values = [50 * sum(run.summary.top1 for run in runs[i : i + 2]) for i in (0, 2, 4)]
    assert line.lines[0].get_ydata().tolist() == pytest.approx(values)
    assert point.lines[0].get_xdata().tolist() == [7]
    (by_round,) = accuracy_by_round(runs, LIGHT).axes
    labels = [text.get_text() for text in by_round.get_figure().legends[0].get_texts()]
    assert labels == ["FedSS, 2 negatives", "FullSoftmax"]
    head, table = header(tabulate(runs)), cells(tabulate(runs))
    write_comparison_report(tmp_path, runs, head, table, [])
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len(page.links) == 6 and "FedSS, 4 negatives" in page.text
    assert (tmp_path / "accuracy_by_class_set.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.exhaustive
def test_what_else_is_measured_stands_in_the_report_once(tmp_path, runs):
    """After a run's own page, which may be written anew; and in a page of its own where there is no run."""

    def measured(folder, name, cell):
        words = f"The {name}", "Of <one>."
        text = write_figures(folder, name, [["a"]], Figure, *words, ["x", "y|z"], [["a", cell]])
        assert text == f"| x | y\\|z |\n| --- | ---: |\n| a | {cell} |\n"
        assert (folder / f"{name}.md").read_text() == text

    def page(folder, links):
        html = (folder / "report.html").read_text(encoding="utf-8")
        assert_self_contained(html, found := Page(html), links)
        return found.text

    of_run, alone = tmp_path / "run", tmp_path / "alone"
    of_run.mkdir(), alone.mkdir()
    write_run_report(of_run, runs[0])
    measured(of_run, "noise", "0.25")
    measured(of_run, "cost", "7.5")
    measured(of_run, "noise", "0.75")
    for anew in (False, True):
        if anew:
            write_run_report(of_run, runs[0])
        text = page(of_run, 6)
        assert text.count("The noise") == text.count("The cost") == 1 and "Glossary" in text
        assert "0.75" in text and "0.25" not in text and "Of <one>." in text
        assert (of_run / "report.html").read_text(encoding="utf-8").count(
            "<!-- what else was measured -->"
        ) == 1
    measured(alone, "noise", "0.5")
    text = page(alone, 1)
    assert "The noise Of <one>." in text and "What was measured" in text
    for other in ("<main>mine</main>", "mine"):  # nothing in a page without sections is lost
        (alone / "report.html").write_text(other)
        measured(alone, "noise", "0.5")
        assert "mine The noise" in page(alone, 1)


# ---- whatever is set, and whatever is in the folder --------------------------------------------------------


@pytest.mark.exhaustive
def test_no_backend_and_no_style_of_the_users_has_a_say(tmp_path, runs):
    """In a process that inherits a notebook's backend, which is not installed, and a matplotlibrc."""
    write_run_report(tmp_path, runs[0])
    plain = (tmp_path / "accuracy_by_round.png").read_bytes()
    (tmp_path / "run.pickle").write_bytes(pickle.dumps(runs[0]))
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nsavefig.dpi: 10\naxes.facecolor: red\n")
    code = (
        "import pickle, sys\n"
        "from pathlib import Path\n"
        "from fedss_kernels.federated.reports.report import write_run_report\n"
        "from fedss_kernels.federated.data.glyphs import shared_code_points\n"
        "assert len(shared_code_points()) > 100\n"
        "write_run_report(Path.cwd(), pickle.loads(Path('run.pickle').read_bytes()))\n"
        "import matplotlib\n"
        "assert matplotlib.rcParams['savefig.dpi'] == 10, 'the user has them back'\n"
    )
    backend = "module://no_such_package.backend_inline"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": backend, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "accuracy_by_round.png").read_bytes() == plain


def stopped_run(out, rounds_done: int) -> None:
    seen: list[RoundMetrics] = []
    with pytest.raises(Stopped):
        run(
            tiny_config(rounds=8, out=out),
            data=tiny_data(),
            model=tiny_model(),
            on_round=seen.append,
            stop=lambda: len(seen) == rounds_done,
        )


@pytest.mark.parametrize("rounds_done, accuracy", [(1, False), *later((5, True))])
def test_a_stopped_run_is_reported_as_far_as_it_came(rounds_done, accuracy, tmp_path, capsys):
    """After one round nothing was measured yet."""
    stopped_run(tmp_path, rounds_done)
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr() == (f"the report: {tmp_path / 'report.html'}\n", "")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert_self_contained(html, page := Page(html))
    assert f"Not finished: {rounds_done} of 8 rounds are done." in page.text
    assert f"In each of {rounds_done} rounds" in page.text
    assert ("– top-1" in page.text) is not accuracy
    assert (
        run(
            tiny_config(rounds=8, out=tmp_path), data=tiny_data(), model=tiny_model(), resume=True
        ).summary.rounds
        == 8
    )
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "Not finished" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_run_that_was_killed_before_its_first_checkpoint_is_reported_too(tmp_path):
    def kill(metrics):
        if metrics.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_config(rounds=8, out=tmp_path), data=tiny_data(), model=tiny_model(), on_round=kill)
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "Not finished: 2 of 8" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_report_of_a_finished_run_is_made_again_from_its_record(tmp_path):
    result = run(tiny_config(rounds=4, out=tmp_path), data=tiny_data(), model=tiny_model())
    write_run_report(tmp_path, Run(result.config, result.history, result.summary))
    first = {path: path.read_bytes() for path in tmp_path.iterdir() if path.suffix in (".html", ".png")}
    assert len(first) == 3
    for path in [*first, tmp_path / "metrics.csv", tmp_path / "summary.json"]:
        path.write_text("edited")
    assert cli.main(["report", str(tmp_path)]) == 0
    assert {path: path.read_bytes() for path in first} == first


@pytest.mark.exhaustive
@pytest.mark.parametrize("room, lost", [(1000, "accuracy_by_round.png"), (100_000, "report.html")])
def test_a_report_without_room_is_a_line_and_the_one_before_stays(
    room, lost, tmp_path, capsys, room_for_files_of
):
    run(tiny_config(rounds=4, out=tmp_path), data=tiny_data(), model=tiny_model())
    assert cli.main(["report", str(tmp_path)]) == 0
    names = "accuracy_by_round.png", "accuracy_by_bytes.png", "report.html"
    first = [(tmp_path / name).read_bytes() for name in names]
    capsys.readouterr()
    with room_for_files_of(room):
        assert cli.main(["report", str(tmp_path)]) == 1
    line = f"fedss report: File too large: {tmp_path / lost}-unfinished\n"
    assert capsys.readouterr() == ("", line)
    assert [(tmp_path / name).read_bytes() for name in names] == first


def test_what_there_is_no_report_of_is_one_line(tmp_path, capsys):
    def line(folder):
        assert cli.main(["report", str(folder)]) == 2
        return capsys.readouterr().err

    assert line(tmp_path).endswith(
        f"no run, comparison or measurement in {tmp_path}: no config.json, no comparison.json\n"
    )
    tiny_config().save(tmp_path / "config.json")
    assert line(tmp_path) == f"fedss report: no run in {tmp_path}: metrics.csv: No such file or directory\n"
    (tmp_path / "record").mkdir()
    (tmp_path / "record/metrics.csv").write_text("round,loss\r\n")
    assert line(tmp_path) == f"fedss report: no round of the run in {tmp_path} is done\n"
    (tmp_path / "record/metrics.csv").write_text("round,later\r\n1,2\r\n")
    assert "metrics.csv in" in (found := line(tmp_path)) and "is not as a run wrote it" in found
    (tmp_path / "comparison.json").write_text('{"config": {"later": 1}, "methods": []}')
    assert line(tmp_path).endswith("comparison.json has no seeds, counts, rates\n")


def test_measurements_without_a_run_are_put_together_again(tmp_path):
    write_figures(tmp_path, "noise", [["a"]], Figure, "The noise", "Of one.", ["x"], [["a"]])
    first = (tmp_path / "report.html").read_text(encoding="utf-8")
    (tmp_path / "report.html").unlink()
    assert cli.main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == first


@pytest.mark.exhaustive
def test_a_report_that_cannot_be_made_is_a_line(tmp_path, runs, monkeypatch):
    assert attempt(tmp_path, write_run_report, tmp_path, runs[0]) == []

    def broken(*arguments):
        raise RuntimeError("no\nfonts")

    monkeypatch.setattr("fedss_kernels.federated.reports.plots._png", broken)
    assert attempt(tmp_path, write_run_report, tmp_path, runs[0]) == [
        f"the results are in {tmp_path}, but their report could not be made (RuntimeError: no fonts); to try "
        f"again: fedss report {tmp_path}"
    ]


def page_of(folder: Path) -> str:
    return Page((folder / "report.html").read_text(encoding="utf-8")).text


@pytest.fixture
def no_plots(monkeypatch):
    """Which take most of a report's time."""
    monkeypatch.setattr(report, "save_plots", lambda folder, runs: ["", ""])


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.split])
def test_a_report_says_what_moves_in_its_method_and_what_does_not(method, tmp_path, no_plots):
    """In the introduction, in what was saved, in the table of methods: the same."""
    write_run_report(tmp_path, made := play(method))
    text, moved, rowless = page_of(tmp_path), made.summary.traffic, METHODS[method].rows is Part.ABSENT
    says = {
        "download the net and some class rows": moved.of("rows") > 0,
        "class rows that each draws from a seed": moved.of("seed") > 0,
        "class rows of their own": method in ("fedper", "fedrep"),
        "train models of their own": method == "local_only",
        "all the images are in one place: in each": method == "centralized",
        "each client's own model is tested on its share of 21 images": METHODS[method].personal,
        "the result is tested on 21 images that no client holds": not METHODS[method].personal,
        "0 MB what moves: nothing": moved.total == 0,
        "Nothing moves, so there is no plot by what was moved.": moved.total == 0,
        "none of the class rows moves": moved.total > 0 and moved.classification == 0 and not rowless,
        "train both on their own images without a label": rowless,
        "class matrix W": not rowless,
        "and one row of 4 numbers for each of 7 classes": not rowless,
        "At 0 on the right, as no class row moves": moved.total > moved.classification == 0 and not rowless,
        "saved of everything moved": moved.total > 0,
        "The server keeps it.": moved.of("rows") > 0,
        "Each client has its own.": METHODS[method].personal,
    }
    assert {words: words in text for words in says} == says
    card = f"{made.summary.mean_class_set:.0f} of 7 {place(METHODS[method]).held}"
    assert (card in text) == (not rowless)
    assert not re.search(r"\b(nan|inf)\b", text)


def test_what_is_saved_is_by_as_many_clients_as_there_would_be(tmp_path, no_plots):
    """phi has 148 numbers, and there are 7 rows of 4: a client of FullSoftmax moves 1408 bytes in a round."""
    for method in ("centralized", "local_only"):
        write_run_report(tmp_path, made := play(method))
        assert made.updates == 4 * 3 and (made.saving, made.class_saving) == (1, 1)
        assert bool(re.search(r"all 0\.0 1\.4 100\.0% 0\.0", page_of(tmp_path))) == (method != "centralized")


def test_few_bytes_are_not_shown_as_none(tmp_path, no_plots):
    write_run_report(tmp_path, play("fedbabu"))
    assert "the seed of the class rows, down 0.008 0.0 – 0.0" in page_of(tmp_path)


def test_a_linear_head_and_numbers_of_two_bytes_are_told_as_they_are(tmp_path, no_plots):
    write_run_report(tmp_path, play("full_softmax", similarity="dot", wire_dtype="bfloat16"))
    text = page_of(tmp_path)
    assert "one row of 4 numbers, and a bias," in text and "product of row and embedding" in text
    assert "cosine" not in text.split("Settings")[0] and "points most nearly" not in text
    assert "Numbers travel as 2 bytes" in text


def test_settings_are_those_that_a_method_of_the_page_reads(tmp_path, no_plots):
    write_run_report(tmp_path, play("fedrep", flip=True))
    text = page_of(tmp_path).split("Settings")[1]
    assert "head_epochs 1 " in text and "flip yes " in text and "trust_updates no " in text
    assert "num_negatives" not in text and "spreadout" not in text
    write_run_report(tmp_path, play("fedaws"))
    text = page_of(tmp_path).split("Settings")[1]
    assert "spreadout_rows 1024 " in text and "head_epochs" not in text


@pytest.fixture(scope="module")
def personalised() -> list[Run]:
    methods = ("full_softmax", "fedbabu", "fedper", "local_only", "centralized")
    return [play(method, personalise_epochs=2) for method in methods]


def test_what_is_measured_at_the_end_is_a_mark_there_and_lines_are_of_what_was_measured_before(personalised):
    (axes,) = accuracy_by_round(personalised, LIGHT).axes
    lines = {line.get_label(): line.get_xydata() for line in axes.lines if len(line.get_xydata()) > 1}
    own = [f"{METHODS[name].label} (own top-1)" for name in ("fedper", "local_only")]
    assert [*lines] == ["FullSoftmax", "FedBABU", *own, "Centralized"]
    assert all(points[:, 0].tolist() == [2, 4] for points in lines.values())
    assert lines["FedBABU"][-1, 1] == pytest.approx(100 * personalised[1].summary.top1)
    marks = [line for line in axes.lines if len(line.get_xydata()) == 1]
    assert [line.get_xydata().tolist() for line in marks] == [
        [[4, pytest.approx(100 * run.summary.personal_top1)]] for run in personalised
    ]
    assert axes.get_ylabel() == "top-1 on the test images (%)"
    (legend,) = axes.get_figure().legends
    assert legend.get_texts()[-1].get_text() == "hollow: personalised top-1, at the end"


def test_the_bar_has_what_was_measured_last_while_what_counts_is_not(personalised, capsys):
    with progress.RunProgress(["one"], 4, Console(force_terminal=False)) as bar:
        for name, run in (("top-1", personalised[1]), ("own top-1", personalised[2])):
            bar.advance(0, run.history[1])
            assert bar.accuracy == [f"{name} {percent(run.history[1].measured[course(run).name])}"]
            bar.advance(0, run.history[2])  # nothing is measured
            assert bar.accuracy[0].startswith(f"{name} ")
            bar.advance(0, run.history[3])
            assert bar.accuracy == [f"personalised top-1 {percent(run.summary.personal_top1)}"]


def test_a_comparison_of_methods_that_share_different_things_says_so(tmp_path, personalised, no_plots):
    head, table = header(tabulate(personalised)), cells(tabulate(personalised))
    write_comparison_report(tmp_path, personalised, head, table, [])
    text = page_of(tmp_path)
    for words in (
        "The methods differ in what of the model clients share",
        "at the end each client trains the class rows for 2 epochs more on its own images",
        "The hollow marks are personalised top-1 on clients' own test images",
        "Not in it, as nothing moves: local training; Centralized.",
        "Not on the right, as no class row moves: FedBABU; FedPer.",
        "of Centralized, with all the images in one place",
        "FedBABU averaged random, the same for all, never trained the net, and a seed for the class rows",
        "local training each client's own each client's own nothing",
    ):
        assert words in text, words
    assert "download" not in text.split("What came out")[0] and "The server keeps it" not in text


def test_a_method_looks_the_same_in_every_plot_and_no_two_do_in_one():
    looks = [style(method) for method in METHODS]
    assert looks == styles([*METHODS]) and len({tuple(look.values()) for look in looks}) == len(METHODS)
    alone, twice, other, again = styles(["fedbabu", "fedss", "made up", "fedss"])
    assert alone == style("fedbabu") and twice == style("fedss")
    assert again["color"] == twice["color"] and again["marker"] != twice["marker"]
    assert twice["linestyle"] == "-" and again["linestyle"] == "--"
    assert other not in (alone, twice, again)
    assert len({tuple(look.values()) for look in styles(["fedss"] * 36)}) == 36
    assert len(styles(["fedss"] * 40)) == 40


def test_below_the_plot_stands_what_guessing_is_worth(runs):
    first, _ = plots_with_captions(runs, ["rounds", "bytes"])
    assert "Who guesses is right for 14% of them, one in 7." in first


def test_a_method_from_outside_has_a_colour_that_no_other_line_has_while_there_are_some():
    ours, theirs = ["fedss", "full_softmax", "pos_only"], ["decoys", "fedprox", "x"]
    for methods in (
        ours + theirs,
        theirs + ours,
        ["decoys", "full_softmax", "fedprox", "fedss", "x", "neg_only"],
    ):
        looks = styles(methods)
        assert len({look["color"] for look in looks}) == 6
        assert all(look == style(name) for name, look in zip(methods, looks, strict=True) if name in METHODS)
    first, other, again = styles(["decoys", "fedss", "decoys"])
    assert again["color"] == first["color"] and again["marker"] != first["marker"] and other == style("fedss")


def test_methods_that_are_not_judged_alike_are_told_apart(tmp_path, runs, personalised, no_plots):
    mixed = [runs[0], play("fedper"), play("local_only")]
    apart = (
        "not all judged by one measure",
        "Of FedPer; local training it is the own top-1 on clients' own test images.",
        "tested on 21 images that no client holds, or where each client has a model of its own, that on its",
    )
    for some, there in ((mixed, True), (runs, False), (mixed[1:], False)):
        write_comparison_report(tmp_path, some, header(tabulate(some)), cells(tabulate(some)), [])
        assert [words in page_of(tmp_path) for words in apart] == [there] * 3
    write_comparison_report(tmp_path, personalised, ["method"], [], [])
    assert [words in page_of(tmp_path) for words in apart[:2]] == [False, True]


@pytest.mark.parametrize(
    "method, epochs, words",
    [
        ("fedss", 0, "images of clients who do not train, of the same classes."),
        (
            "fedper",
            1,
            "each client who is held out trains the class rows for an epoch more on its own images",
        ),
        ("local_only", 0, "each client's own model is tested on others of its own images."),
        ("local_only", 1, "at the end each client trains the class rows for an epoch more on its own images"),
    ],
)
def test_who_is_tested_where_clients_are_held_out(method, epochs, words, tmp_path, no_plots):
    config = tiny_config(method=method, rounds=2, cohort=1, holdout=0.2, personalise_epochs=epochs)
    data = held_out(tiny_data(), 0.2, 0, alone=METHODS[method].alone)
    found = run(replace(config, holdout=0.0), data=data, model=tiny_model())
    write_run_report(tmp_path, Run(config, found.history, found.summary))
    assert words in page_of(tmp_path)


def test_names_of_one_method_are_lines_of_their_own_over_class_sets(runs):
    few = replace(runs[0], config=replace(runs[0].config, label="FedSS, few"))
    (axes,) = accuracy_by_class_set([runs[0], few], LIGHT).axes
    labels = [line.get_label() for line in axes.containers]
    assert len(labels) == 2 and "FedSS, few" in labels
