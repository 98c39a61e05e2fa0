"""What was run, on which data, and tested how: a paragraph for readers who know nothing of the code."""

from collections.abc import Iterable, Sequence
from html import escape

from ..algorithms import METHODS
from ..algorithms.parts import Part
from .parts_in_words import PERSONALISED, in_a_round
from .reported_run import Run, by_case, method_names


def what_was_run(runs: Sequence[Run]) -> str:
    s, names = runs[0].summary, method_names(runs)
    times = _from_to(len(same) for same in by_case(runs).values())
    rows = _rows(names, runs[0])
    repeated = f" Every method was run {times} times, with different random numbers." if times != "1" else ""
    rounds, size = (_from_to(getattr(run.summary, name) for run in runs) for name in ("rounds", "cohort"))
    round = in_a_round(names).format(rounds=rounds, cohort=_cohort(runs, size), size=size)
    who = f"{s.num_clients:,} clients, such as phones, each hold a few images of a few classes. "
    if all(METHODS[name].pooled for name in names):
        who, round = "", f"{round} {_of_a_step(runs[0])}"
    notes = f"<p>Of the data: {escape('; '.join(s.notes))}.</p>" if s.notes else ""
    return (
        f"<p>{who}A model is a net that maps an image to {s.embedding_dim} numbers, its <em>embedding</em>"
        f"{rows}. {round} There are {s.num_train_images:,} training images; "
        f"{_tested(runs)}.{_rows_cost(names)}{repeated}</p>{notes}"
    )


def _from_to(numbers: Iterable[int]) -> str:
    """One number, where all are it, or the least and the largest."""
    found = sorted(set(numbers))
    return " to ".join(f"{number:,}" for number in (found if len(found) < 2 else (found[0], found[-1])))


def _cohort(runs: Sequence[Run], size: str) -> str:
    everyone = [run.summary.cohort >= run.summary.num_clients for run in runs]
    if all(everyone):
        return "all clients"
    return f"{size} clients, drawn at random{', or all of them' if any(everyone) else ''},"


def _of_a_step(run: Run) -> str:
    """How many of all images a step in one place takes."""
    taken, there = run.config.cohort * run.config.batch_size, run.summary.num_train_images
    if taken < there:
        return f"That is {taken:,} of {there:,}."
    return f"That is all {there:,} of them, so that a step goes down the whole loss, without chance."


def _rows(names: Sequence[str], run: Run) -> str:
    """What a model has beside the net, where one of the methods has it."""
    if all(METHODS[name].rowless for name in names):
        return ""
    bias = ", and a bias," if run.config.similarity == "dot" else ""
    s = run.summary
    return f", and one row of {s.embedding_dim} numbers{bias} for each of {s.num_classes:,} classes"


def _tested(runs: Sequence[Run]) -> str:
    """On what, and after what."""
    s, config = runs[0].summary, runs[0].config
    images = f"{s.num_test_images:,} images " + (
        "of classes that no client holds" if s.task == "retrieval" else "that no client holds"
    )
    if config.holdout:
        images = f"{s.num_test_images:,} images of clients who do not train, of the same classes"
    who, share = "each client", f"its share of {images}"
    if config.holdout:  # of whose clients the test images are
        alone = all(METHODS[name].alone for name in method_names(runs))
        who = who if alone else "each client who is held out"
        share = "others of its own images"
    if config.personalise_epochs:
        epochs = "an epoch" if config.personalise_epochs == 1 else f"{config.personalise_epochs:,} epochs"
        return (
            f"at the end {who} trains {PERSONALISED[config.personalise_part]} for {epochs} more on its own "
            f"images, and what it then has is tested on {share}"
        )
    own = {METHODS[name].personal for name in method_names(runs)}
    if own == {True}:
        return f"each client's own model is tested on {share}"
    beside = (
        ", or where each client has a model of its own, that on its share of these" if True in own else ""
    )
    return f"the result is tested on {images}{beside}"


def _rows_cost(names: Sequence[str]) -> str:
    """Why methods differ, where it is in which rows travel."""
    if any(METHODS[name].pooled or METHODS[name].rows is not Part.TRAINED for name in names):
        return ""
    return (
        " The more classes, the more the rows cost to move: the methods differ in which rows a client gets."
    )
