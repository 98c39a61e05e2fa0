"""The rows that a measure takes: checked, and those that are not finite left out."""

from collections.abc import Iterator

from torch import Tensor


def check_rows(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> None:
    """Raises ValueError unless these are (N, F), (N,), (T, F) and (T,), N and T at least 1."""
    if train.dim() != 2 or not train.numel():
        raise ValueError(f"training features: expected (N, F) of at least one row, got {tuple(train.shape)}")
    if test.dim() != 2 or test.shape[1] != train.shape[1] or not len(test):
        raise ValueError(f"test features: expected (T, {train.shape[1]}), got {tuple(test.shape)}")
    for name, rows, labels in (("training", train, train_labels), ("test", test, test_labels)):
        if labels.shape != rows.shape[:1]:
            raise ValueError(
                f"{name} labels: expected ({len(rows)},), one for each row, got {tuple(labels.shape)}"
            )


def finite(rows: Tensor) -> Tensor:  # (N, F) -> (N,) bool
    return rows.isfinite().all(dim=1)


def blocks(rows: int, numbers: int, block: int) -> Iterator[slice]:
    """Consecutive rows, so many at a time that with `numbers` for each they are `block`, one at least."""
    size = max(1, block // max(1, numbers))
    return (slice(first, first + size) for first in range(0, rows, size))


def share(found: Tensor, labels: Tensor, there: Tensor) -> float:
    """Of all rows those whose class is found; where a row is not `there` nothing is."""
    return ((found == labels) & there).double().mean().item()
