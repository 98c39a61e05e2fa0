"""Broken and hostile clients, to see what the server's checks are good for."""

from dataclasses import replace

import numpy as np
import torch

from ..messages import Update

FACTOR = 1e6


def poisoned(update: Update, num_classes: int, rng: np.random.Generator) -> Update:
    """NaN for a number, the rows of the next classes, or all of it a million times as large."""
    kind = rng.integers(3)
    if kind == 0:
        rows = update.rows.clone()
        rows.view(-1)[rng.integers(max(rows.numel(), 1))] = torch.nan
        return replace(update, rows=rows)
    if kind == 1:
        return replace(update, class_ids=(update.class_ids + 1) % num_classes)
    return replace(update, rows=update.rows * FACTOR, extractor=update.extractor * FACTOR)
