"""Broken and hostile clients, to see what the server's checks are good for."""

from dataclasses import replace

import numpy as np
import torch

from ..messages import Update

FACTOR = 1e6


def poisoned(update: Update, num_classes: int, rng: np.random.Generator) -> Update:
    """NaN for a number, the rows of the next classes, or all of it a million times as large.

    Where no rows are sent the number is one of the net's, and the rows are one that nobody asked for. Where
    nothing is sent there is nothing to spoil.
    """
    if not (update.rows.numel() or update.extractor.numel()):
        return update
    kind, sends_rows = rng.integers(3), bool(len(update.rows))
    if kind == 0:
        name = "rows" if sends_rows else "extractor"
        numbers = getattr(update, name).clone()
        numbers.view(-1)[rng.integers(numbers.numel())] = torch.nan
        return replace(update, **{name: numbers})
    if kind == 1 and not sends_rows:
        row = update.rows.new_ones(1, update.rows.shape[1])
        return replace(update, class_ids=torch.zeros(1, dtype=torch.int64), rows=row)
    if kind == 1:
        return replace(update, class_ids=(update.class_ids + 1) % num_classes)
    return replace(update, rows=update.rows * FACTOR, extractor=update.extractor * FACTOR)
