"""The linear probe: how well one linear layer tells classes apart by features that stay as they are."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..metrics import BLOCK
from .rows import blocks, check_rows, finite, share

L2 = 1e-5
ITERATIONS = 100


def linear_probe(
    train: Tensor,  # (N, F)
    train_labels: Tensor,  # (N,) int64
    test: Tensor,  # (T, F)
    test_labels: Tensor,  # (T,) int64
    *,
    l2: float = L2,
    iterations: int = ITERATIONS,
    block: int = BLOCK,  # numbers in one block of logits
) -> float:
    """The share of test rows whose class a multinomial logistic regression on the training rows names.

        minimise over W, b  mean_i CE(W x_i + b, y_i) + l2 / 2 |W|^2      by L-BFGS from W = b = 0

    x are the features less their training mean, divided by their training standard deviation; one that is the
    same in all of training counts for nothing. The test rows choose nothing. Equal arguments give equal bits
    on one machine. A test row that is not finite, or of a class that the training lacks, is a miss; a
    training row that is not finite is left out. Raises ValueError for shapes that do not go together.
    """
    check_rows(train, train_labels, test, test_labels)
    kept, there = finite(train), finite(test)
    train, train_labels = train[kept], train_labels[kept]
    if not len(train):
        return 0.0
    standard = Standard(train)
    classes, targets = train_labels.unique(return_inverse=True)
    weight, bias = _fitted(standard(train), targets, len(classes), l2, iterations, block)
    logits = torch.addmm(bias, standard(torch.where(there[:, None], test, 0.0)), weight)
    return share(classes[logits.argmax(dim=1)], test_labels, there & finite(logits))


class Standard(nn.Module):
    """x -> (x - mean) * scale; scale is 1 / standard deviation, and 0 where that is but rounding."""

    mean: Tensor  # (F,)
    scale: Tensor  # (F,)

    def __init__(self, rows: Tensor, block: int = BLOCK):  # (N, F) of the training
        super().__init__()
        mean = rows.mean(dim=0, dtype=torch.float64)
        squares = torch.zeros_like(mean)
        for some in blocks(len(rows), rows.shape[1], block):
            squares += (rows[some] - mean).square().sum(dim=0)
        sd = (squares / len(rows)).sqrt()
        alive = sd > torch.finfo(torch.float32).eps * rows.abs().amax(dim=0)
        self.register_buffer("mean", mean.to(rows.dtype))
        self.register_buffer("scale", torch.where(alive, 1 / sd, 0.0).to(rows.dtype))

    def forward(self, rows: Tensor) -> Tensor:  # (N, F)
        return (rows - self.mean) * self.scale


def _fitted(
    x: Tensor,  # (N, F)
    targets: Tensor,  # (N,) in [0, C)
    num_classes: int,
    l2: float,
    iterations: int,
    block: int,
) -> tuple[Tensor, Tensor]:  # (F, C), (C,)
    weight = x.new_zeros(x.shape[1], num_classes, requires_grad=True)
    bias = x.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def loss() -> float:
        optimizer.zero_grad()
        total = 0.0
        for rows in blocks(len(x), num_classes, block):
            logits = torch.addmm(bias, x[rows], weight)
            part = cross_entropy(logits, targets[rows], reduction="sum") / len(x)
            part.backward()
            total += part.item()
        penalty = l2 / 2 * weight.square().sum()
        penalty.backward()
        return total + penalty.item()

    optimizer.step(loss)
    return weight.detach(), bias.detach()
