"""One step of a client's optimiser."""

from torch import Tensor


def sgd_step(numbers: Tensor, gradient: Tensor, lr: float, momentum: float, velocity: Tensor | None) -> None:
    """v <- momentum * v + g, theta <- theta - lr * v, in place; without a velocity v = g."""
    if velocity is not None:
        gradient = velocity.mul_(momentum).add_(gradient)
    numbers.add_(gradient, alpha=-lr)
