"""Names that users give stand in plots as they are: "$" begins no formula, "_" hides no line."""

from dataclasses import replace

import pytest
import torch
from matplotlib import cbook
from matplotlib.figure import Figure
from test_personalisation import measured
from test_report import play

from fedss_kernels.federated.comparisons import personalisation
from fedss_kernels.federated.figures import by_depth, confusion, inversion
from fedss_kernels.federated.probes import Line
from fedss_kernels.federated.reports.page import png_of
from fedss_kernels.federated.reports.plots import LIGHT, accuracy_by_class_set, accuracy_by_round
from fedss_kernels.plotting import plotting

NAMES = ("FedSS, $10% and $20%", "$10 plan, $20_ plan", "_quiet", r"_a\$b$")


@pytest.fixture(scope="module")
def run():
    return play("fedss")


def accuracies(plot):
    def of(run, names) -> Figure:
        return plot([replace(run, config=replace(run.config, label=name)) for name in names], LIGHT)

    return of


def differences(run, names) -> Figure:
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(personalisation, "write_figures", lambda *given: figures.append(given[3]()) or "")
        personalisation.write(None, [measured(name, 0, 0.5, 0.6) for name in names])
    return figures[len(names) > 1]


def depths(run, names) -> Figure:
    lines = [Line("trained", depth, 4, {"probe": 0.5}) for depth in (1, 2)]
    return by_depth.plot([by_depth.Probed(name, "fedss", 0, lines) for name in names])


def confusions(run, names) -> Figure:
    shares = torch.eye(2, dtype=torch.float64)
    found = [confusion.Confusion(name, torch.arange(2), shares, 0.0, 0, ()) for name in names]
    return confusion._plot(found, 0)


def attacks(run, names) -> Figure:
    images = torch.zeros(2, 1, 4, 4)
    return inversion.plot(inversion.Found([], images, dict.fromkeys(names, images), ""))


PLOTS = {
    "by round": accuracies(accuracy_by_round),
    "by class set": accuracies(accuracy_by_class_set),
    "differences": differences,
    "by depth": depths,
    "confusion": confusions,
    "inversion": attacks,
}


@pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS)
def test_names_stand_in_plots_as_they_are(plot, run):
    with plotting():
        figure = plot(run, NAMES)
        png_of(figure)
    legends = [text for legend in figure.legends for text in legend.get_texts()]
    texts = [text for text in [*legends, *(axes.title for axes in figure.axes)] if text.get_text()]
    texts += [axes._left_title for axes in figure.axes if axes._left_title.get_text()]
    assert not any(cbook.is_math_text(text.get_text()) for text in texts)
    shown = [text.get_text().replace(r"\$", "$").replace("\u200b", "") for text in texts]
    there = NAMES[1:] if plot is differences else NAMES
    assert all(any(name in text for text in shown) for name in there), shown
