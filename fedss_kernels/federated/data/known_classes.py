"""What a classification is left with where a class has lost its training images, or its test images."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np

from .damage import printable, some

log = logging.getLogger(__name__)


def of_known(labels: np.ndarray, test_labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Labels as places among the classes that are in `labels`, and what of the test is of these.

    Returns (the classes, places of `labels`, rows of the test that are of these classes, places of those).
    """
    classes, places = np.unique(labels, return_inverse=True)
    rows = np.flatnonzero(np.isin(test_labels, classes))
    return classes, places.astype(np.int64), rows, np.searchsorted(classes, test_labels[rows])


def say_unknown(name: str, classes: Iterable[str]) -> tuple[str, ...]:
    """Which classes of the test of data set `name` have no training image now: its note, if any."""
    if not (gone := some(map(printable, sorted(classes)))):
        return ()
    note = f"classes without a training image now, left out of the test too: {gone}"
    log.warning("%s: %s", name, note)
    return (note,)


def untested(classes: int) -> tuple[str, ...]:
    """How many classes have no test image: a note, if any."""
    return (f"classes without a test image: {classes:,}",) if classes else ()
