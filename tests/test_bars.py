"""Bars on terminals of any width: what is there of a figure is all of it."""

import io

import pytest
from rich.console import Console

from fedss_kernels.federated.reports.progress import ReadingProgress, RunProgress

NAMES = ["FedSS, 4 negatives, seed 0", "FullSoftmax, seed 0"]
TIMES = "0:00:00 0:00:00"


def lines(kind, *arguments, width: int, **fields: object) -> list[str]:
    """What is drawn of the tasks, the last of which has no figures yet."""
    drawn = io.StringIO()
    console = Console(file=drawn, width=width, force_terminal=True, color_system=None)
    bars = kind(*arguments, console).bars
    if kind is ReadingProgress:
        bars.add_task("image_folder: decoding images", total=120_053)
    bars.start_task(0)
    bars.update(0, **fields)
    console.print(bars.get_renderable())
    return drawn.getvalue().splitlines()


@pytest.mark.parametrize(
    "width, name, figures",
    [
        (120, f"{NAMES[0]} {'━' * 40}", f"100/100 loss 0.285 top-1 71.7% {TIMES}"),
        (80, f"{NAMES[0]} {'━' * 6}", f"100/100 loss 0.285 top-1 71.7% {TIMES}"),
        (78, f"{NAMES[0]} {'━' * 4}", f"100/100 loss 0.285 top-1 71.7% {TIMES}"),
        (77, NAMES[0], f"100/100 loss 0.285 top-1 71.7% {TIMES}"),
        (70, NAMES[0], "100/100 loss 0.285 top-1 71.7% 0:00:00"),
        (60, NAMES[0], "100/100 loss 0.285 top-1 71.7%"),
        (46, NAMES[0], "100/100 top-1 71.7%"),
        (40, "FedSS, 4 negatives,…", "100/100 top-1 71.7%"),
        (21, "…", "100/100 top-1 71.7%"),
        (20, "FedSS, 4 ne…", "100/100"),
    ],
)
def test_the_bar_goes_first_then_times_and_loss_and_names_are_shortened(width, name, figures):
    fields = {"completed": 100, "loss": "0.285", "accuracy": "top-1 71.7%"}
    first, second = lines(RunProgress, NAMES, 100, width=width, **fields)
    assert first.rstrip() == f"{name} {figures}"
    assert len(first) == len(second) <= width and second.split("/100")[0].endswith(" 0")


@pytest.mark.parametrize("width", [120, 80, 60, 40])
@pytest.mark.parametrize("words", ["personalised top-1 71.7%", "fine-tuning clients: 12 of 12"])
def test_the_round_and_what_is_measured_are_there_on_any_terminal(words, width):
    line = lines(RunProgress, NAMES[:1], 100, width=width, completed=100, loss="0.285", accuracy=words)[0]
    assert len(line) <= width and line.replace(" loss 0.285", "").count(f"100/100 {words}") == 1


@pytest.mark.parametrize(
    "width, line",
    [
        (60, "image_folder: decoding images   5000/120053 0:00:00 -:--:--"),
        (50, "image_folder: decoding images   5000/120053"),
        (40, "image_folder: decoding im…   5000/120053"),
    ],
)
def test_the_images_read_are_counted_on_any_terminal(width, line):
    assert lines(ReadingProgress, width=width, completed=5000) == [line.ljust(len(line))]


def test_names_are_as_they_are():
    """Also those of folders in brackets, which would be rich's markup."""
    name = "fedss personalise: runs/[a], rate 0.1"
    assert lines(RunProgress, [name], 9, width=80)[0].startswith(f"{name} ")
